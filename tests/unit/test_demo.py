"""The model and the data that ship with the package, and the two commands that made them."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from scale_sft.files import ASSETS
from tools.demo import make_data, pretrain
from tools.demo.tasks import DEMO_INSTRUCTION, PRETRAINING_TASKS, demo_rows, pretraining_documents

DEMO = ASSETS / "demo"
BASE = DEMO / "base"


def read_rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DEMO / name).read_text(encoding="utf-8").splitlines()]


def answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int = 40
) -> list[str]:
    """Greedy answers to the prompts, as one left-padded batch."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BASE, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, local_files_only=True)


def test_shipped_files_are_small() -> None:
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= 2.2e6
    assert (DEMO / "train.jsonl").stat().st_size + (DEMO / "eval.jsonl").stat().st_size <= 300e3


def test_base_is_a_bf16_llama_with_grouped_queries(tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE, local_files_only=True)
    assert isinstance(model, LlamaForCausalLM) and model.dtype == torch.bfloat16
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.vocab_size == len(tokenizer)


def test_tokenizing_in_parts_equals_tokenizing_the_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    row = read_rows("eval.jsonl")[0]
    prompt, completion = (tokenizer.encode(row[key], add_special_tokens=False) for key in ("prompt", "completion"))
    assert tokenizer(row["prompt"] + row["completion"])["input_ids"] == [tokenizer.bos_token_id, *prompt, *completion]
    assert tokenizer.decode(prompt + completion) == row["prompt"] + row["completion"]
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 4


def test_chat_template_marks_the_answer_and_its_end(tokenizer: PreTrainedTokenizerBase) -> None:
    row = read_rows("eval.jsonl")[0]
    question = {"role": "user", "content": row["prompt"].removesuffix("\n")}
    answer = {"role": "assistant", "content": row["completion"]}
    encoded = tokenizer.apply_chat_template(
        [question, answer], return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    marked = [i for i, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert marked == [*tokenizer.encode(row["completion"], add_special_tokens=False), tokenizer.eos_token_id]
    assert encoded["input_ids"] == [*tokenizer(row["prompt"])["input_ids"], *marked]
    opened = tokenizer.apply_chat_template([question], add_generation_prompt=True, tokenize=False)
    assert opened == tokenizer.bos_token + row["prompt"]


def test_make_data_reproduces_the_shipped_bytes(tmp_path: Path) -> None:
    result = CliRunner().invoke(make_data.main, ["--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes()


def test_train_and_eval_prompts_do_not_overlap() -> None:
    train, evaluation = ([row["prompt"] for row in read_rows(name)] for name in ("train.jsonl", "eval.jsonl"))
    assert len(train) == len(set(train)) and len(evaluation) == len(set(evaluation))
    assert not set(train) & set(evaluation)


def test_pretraining_never_shows_the_demo_task() -> None:
    instructions = [text for task in PRETRAINING_TASKS for text in task.instructions]
    assert len(instructions) == len(set(instructions)) and DEMO_INSTRUCTION not in instructions
    words = ["count", "the", "open", "orders"]
    assert "countTheOpenOrders" not in {task.answer(words) for task in PRETRAINING_TASKS}


def test_text_depends_on_the_seed_only() -> None:
    assert demo_rows("a", 20) == demo_rows("a", 20) != demo_rows("b", 20)
    first, second, other = (pretraining_documents(seed) for seed in ("a", "a", "b"))
    some = [next(first) for _ in range(20)]
    assert some == [next(second) for _ in range(20)] != [next(other) for _ in range(20)]


def test_base_cannot_do_the_demo_task(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = read_rows("eval.jsonl")[:32]
    given = answers(model, tokenizer, [row["prompt"] for row in rows])
    assert sum(a == row["completion"] for a, row in zip(given, rows, strict=True)) < 0.1 * len(rows)


def test_base_can_do_what_it_was_pretrained_on(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    documents = pretraining_documents("not the seed of pretraining")
    pairs = [pair for pair in (next(documents) for _ in range(40)) if pair[0]][:32]
    given = answers(model, tokenizer, [prompt for prompt, _ in pairs])
    assert sum(a == completion for a, (_, completion) in zip(given, pairs, strict=True)) > 0.8 * len(pairs)


def test_pretrain_writes_a_loadable_folder(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    result = CliRunner().invoke(
        pretrain.main, ["--output", str(tmp_path), "--steps", "2", "--batch-size", "2", "--threads", str(threads)]
    )
    assert result.exit_code == 0, result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert model(**tokenizer("Copy: red apple\n", return_tensors="pt")).logits.isfinite().all()
    assert (tmp_path / "tokenizer.json").read_bytes() == (BASE / "tokenizer.json").read_bytes()
