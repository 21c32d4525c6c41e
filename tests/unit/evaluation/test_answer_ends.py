"""The token that the data teach as the end stops generation; answers are compared with all their tokens."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer, GenerationConfig

from scale_sft.adapters.format import Adapter
from scale_sft.adapters.merge import merge
from scale_sft.config.options import DataConfig, ModelConfig
from scale_sft.data.cache import load_examples
from scale_sft.data.examples import Examples
from scale_sft.data.turn_ends import taught_end, with_end, write_taught_end
from scale_sft.evaluation.answers import exact_match, greedy_answers
from scale_sft.model.loading import load_base, load_model_config

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
EOT, YES, NO = 259, 260, 261


@pytest.fixture
def turns(tokenizer):
    """A tokenizer whose template ends turns with an added token, and that has two answers as special tokens."""
    made = copy.deepcopy(tokenizer)
    for text in ("<|eot|>", "<|yes|>", "<|no|>"):
        made.add_tokens([AddedToken(text, special=True, normalized=False)])
    made.chat_template = TEMPLATE
    assert made.convert_tokens_to_ids(["<|eot|>", "<|yes|>", "<|no|>"]) == [EOT, YES, NO]
    assert EOT not in made.all_special_ids, "as with Llama 3, only the list of added tokens knows it"
    return made


class Scripted:
    """Stands in for a model: answers every prompt with the same ids, up to the first that stops it."""

    def __init__(self, ids: list[int]):
        self.ids, self.training, self.seen = ids, False, []
        self.config = GenerationConfig()  # without max_position_embeddings
        self.generation_config = GenerationConfig(
            eos_token_id=257, repetition_penalty=9.0, num_beams=4, no_repeat_ngram_size=1, forced_eos_token_id=1
        )

    def eval(self):
        return self

    def train(self, mode):
        return self

    def generate(self, *, input_ids, attention_mask, generation_config, synced_gpus):
        self.seen.append((generation_config, self.generation_config))
        stops = [place for place, token in enumerate(self.ids) if token in generation_config.eos_token_id]
        answer = self.ids[: stops[0] + 1] if stops else self.ids
        answer = answer + [generation_config.pad_token_id] * (generation_config.max_new_tokens - len(answer))
        return torch.cat([input_ids, torch.tensor([answer] * len(input_ids))], dim=1)


def answers_of(model, tokenizer, references, cluster):
    examples = Examples.from_lists(
        [[65, 66, *reference] for reference in references],
        [[-100, -100, *reference] for reference in references],
        "test",
    )
    return greedy_answers(model, tokenizer, examples, cluster, count=9, batch_size=2, max_new_tokens=6)


@pytest.mark.parametrize(
    ("generated", "references", "right"),
    [
        ([NO, 257], [[YES, 257]] * 2, 0),  # answers that are special tokens are compared, not dropped
        ([YES, 257], [[YES, 257], [NO, 257]], 0.5),
        ([YES], [[YES], [NO], [YES]], 2 / 3),  # ... also where no end follows them
        ([257], [[YES], [YES], [NO]], 0),  # an empty answer is not the token that most answers are
        ([52, EOT, 66], [[52, EOT]], 1),  # the taught end stops generation
        ([52, 257], [[52, EOT]], 1),  # ... and so does the base's; neither is part of the answer
        ([YES, 52, EOT], [[NO, 52, EOT]], 0),
        ([52, EOT, EOT], [[52, EOT], [52, 257], [53, EOT]], 2 / 3),
    ],
)
def test_answers_are_compared_by_all_tokens_but_their_end(turns, cluster, generated, references, right):
    assert exact_match(answers_of(Scripted(generated), turns, references, cluster)) == pytest.approx(right)


def test_greedy_takes_nothing_but_token_ids_from_the_base(turns, cluster):
    model = Scripted([52, EOT])
    before = model.generation_config
    answers_of(model, turns, [[52, EOT]], cluster)
    for settings in model.seen[0]:  # the call's, and the model's own, from which transformers fills the gaps
        found = {name: value for name, value in settings.to_diff_dict().items() if value is not None}
        found.pop("transformers_version", None)
        assert found == {
            "do_sample": False, "num_beams": 1, "use_cache": True, "max_new_tokens": 6, "pad_token_id": 258,
            "eos_token_id": [257, EOT],
        }  # fmt: skip
    assert model.generation_config is before


def test_greedy_answers_are_the_argmax_of_the_base_whatever_its_generation_settings(
    tiny_model, pairs_file, tokenizer, tmp_path, cluster
):
    config = ModelConfig(base=str(tiny_model("llama")))
    model = load_base(config, load_model_config(config), torch.device("cpu"))
    data = DataConfig(max_length=64, cache_dir=str(tmp_path / "cache"))
    examples = load_examples(str(pairs_file), "eval", tokenizer, data, None)
    answer = lambda: greedy_answers(model, tokenizer, examples, cluster, count=3, batch_size=3, max_new_tokens=8)
    plain = answer()
    model.generation_config.update(repetition_penalty=5.0, num_beams=3, no_repeat_ngram_size=1, do_sample=True)
    assert answer() == plain
    ids = torch.tensor([examples.tokens(0)[0].tolist()[: len("0 + 0 = ") + 1]])
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
            if ids[0, -1] == 257:
                break
    assert plain[0].generated == tokenizer.decode([i for i in ids[0, 9:].tolist() if i != 257]).strip()


def test_the_taught_end_is_the_added_token_that_ends_most_turns(turns):
    ids = lambda *rows: Examples.from_lists(rows, [[-100, *row[1:]] for row in rows], "test")
    assert taught_end(ids([1, 52, EOT], [1, 53, EOT], [1, 54, 55]), turns) == EOT  # the last was cut
    assert taught_end(ids([1, 52, 257], [1, 53, 257]), turns) == 257
    assert taught_end(ids([1, 52, 53], [1, 54, 53]), turns) is None  # text ends them
    assert taught_end(ids([1, YES], [1, NO]), turns) is None


def test_a_conversation_ends_at_an_added_token_that_the_map_of_special_tokens_lacks(turns, messages_file, tmp_path):
    data = DataConfig(max_length=200, cache_dir=str(tmp_path / "cache"))
    examples = load_examples(str(messages_file), "train", turns, data, None)
    ids, labels = examples.tokens(0)
    assert ids[labels != -100].tolist()[-1] == EOT, "the line break between turns is not generated"
    assert taught_end(examples, turns) == EOT


@pytest.fixture
def chat_base(tiny_model, turns, tmp_path):
    """A base whose tokenizer has the added tokens, with rows for them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    model.resize_token_embeddings(264, mean_resizing=False)
    model.save_pretrained(tmp_path / "base")
    turns.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_the_end_that_the_data_teach_stands_in_the_merged_generation_config(
    train_run, chat_base, messages_file, tmp_path
):
    assert EOT not in AutoTokenizer.from_pretrained(chat_base).all_special_ids
    run = train_run(base=str(chat_base), train_data=str(messages_file), max_length=128)
    assert Adapter.load(run / "adapter").info["end_token_id"] == EOT
    merge(run / "adapter", tmp_path / "merged")
    merged = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert merged.eos_token_id == [257, EOT] and merged.pad_token_id == 258


@pytest.mark.parametrize("written", [True, False])
def test_other_settings_of_a_merged_model_stay(tmp_path, written):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2, "bos_token_id": 1, "vocab_size": 9}))
    path = tmp_path / "generation_config.json"
    if written:
        path.write_text(json.dumps({"eos_token_id": [2, 5], "temperature": 0.6}))
    write_taught_end(tmp_path, {"end_token_id": 7})
    kept = {"eos_token_id": [2, 5, 7], "temperature": 0.6} if written else {"eos_token_id": [2, 7], "bos_token_id": 1}
    assert json.loads(path.read_text()) == kept
    before = path.read_bytes()
    for info in ({}, {"end_token_id": 2}):  # an adapter of an earlier version; an end that is known
        write_taught_end(tmp_path, info)
        assert path.read_bytes() == before
    assert (with_end(None, 3), with_end(3, 3), with_end(None, None)) == ([3], 3, None)
