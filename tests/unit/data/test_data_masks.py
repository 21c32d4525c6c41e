"""Which tokens of an example count, token by token, on templates in the style of seven families of models."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest

from scale_sft.config.options import DataConfig
from scale_sft.data.cache import load_examples
from scale_sft.data.chat import SHIPPED_TEMPLATES, render, use_template
from scale_sft.data.turns import Chat
from scale_sft.errors import UserError
from scale_sft.model.loss import IGNORED

TEMPLATES = Path(__file__).parents[2] / "templates"
SPECIAL = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|im_start|>", "<|im_end|>", "<end_of_turn>"]
ONE = [("user", "Hi?"), ("assistant", "Yes.")]
TWO = [*ONE, ("user", " And é now?"), ("assistant", "No\nmore")]
SYSTEM = [("system", "Be brief.")]


def expected(family: str, turns: list[tuple[str, str]]) -> list[tuple[str, bool]]:
    """What the model should see: pieces of text, and whether they count."""
    system = next((text for role, text in turns if role == "system"), None)
    rest = [turn for turn in turns if turn[0] != "system"]
    if family == "llama2":
        before = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
        return [
            (f" {text} </s>", True)
            if role == "assistant"
            else (f"<s>[INST] {before if n == 0 else ''}{text} [/INST]", False)
            for n, (role, text) in enumerate(rest)
        ]
    if family == "mistral":
        before = f"{system}\n\n" if system else ""
        return [("<s>", False)] + [
            (f" {text}</s>", True)
            if role == "assistant"
            else (f"[INST] {before if n == 0 else ''}{text}[/INST]", False)
            for n, (role, text) in enumerate(rest)
        ]
    head, end, tail, first = {
        "llama3": ("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", "", "<s>"),
        "chatml": (
            "<|im_start|>{}\n",
            "<|im_end|>",
            "\n",
            "" if system else "<|im_start|>system\nBe helpful.<|im_end|>\n",
        ),
        "gemma": ("<start_of_turn>{}\n", "<end_of_turn>", "\n", "<s>"),
        "zephyr": ("<|{}|>\n", "</s>", "\n", ""),
        "tulu": ("<|{}|>\n", "</s>", "\n", "<s>"),
    }[family]
    pieces = [(first, False)]
    for n, (role, text) in enumerate(turns):
        name = "model" if (family, role) == ("gemma", "assistant") else role
        text = text.strip() if family == "llama3" else text
        last = family == "tulu" and n + 1 == len(turns)
        ending = "" if family == "tulu" and role != "assistant" else end
        pieces += [(head.format(name), False), (text + ending, role == "assistant"), ("" if last else tail, False)]
    return pieces


def with_template(tokenizer, family: str, marks: bool):
    path = TEMPLATES / f"{family}.jinja"
    text = (path if path.exists() else SHIPPED_TEMPLATES / path.name).read_text(encoding="utf-8")
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    made.chat_template = text if marks else re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)
    return made


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def conversation(turns) -> dict:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def seen_and_counted(examples, n: int = 0) -> tuple[list[int], list[bool]]:
    ids, labels = examples.tokens(n)
    return ids.tolist(), (labels != IGNORED).tolist()


@pytest.mark.parametrize("marks", [True, False], ids=["marks", "prefixes"])
@pytest.mark.parametrize("family", ["llama2", "llama3", "chatml", "mistral", "gemma", "zephyr", "tulu"])
def test_exactly_the_assistants_words_and_end_tokens_count(family, marks, tokenizer, tmp_path):
    chats = [ONE, TWO] + ([] if family == "gemma" else [SYSTEM + ONE, SYSTEM + TWO])
    made = with_template(tokenizer, family, marks)
    source = write(tmp_path / "chats.jsonl", *map(conversation, chats))
    examples = load_examples(source, "train", made, DataConfig(max_length=500, cache_dir=str(tmp_path / "c")), None)
    for n, turns in enumerate(chats):
        pieces = [
            (made(text, add_special_tokens=False)["input_ids"], counts) for text, counts in expected(family, turns)
        ]
        ids = [token for piece, _ in pieces for token in piece]
        counted = [counts for piece, counts in pieces for _ in piece]
        assert seen_and_counted(examples, n) == (ids, counted), (family, turns)
        assert examples.target_tokens([n]) == sum(counted[1:])


@pytest.mark.parametrize("family", ["llama2", "llama3", "chatml", "mistral", "gemma", "zephyr", "tulu"])
def test_generation_marks_and_prefixes_find_the_same_spans(family, tokenizer):
    made = with_template(tokenizer, family, marks=True)
    chats = [Chat(conversation(turns)["messages"]) for turns in (ONE, TWO)]
    assert render(chats, made, str, marks=True) == render(chats, made, str, marks=False)


def test_a_refusal_of_the_template_names_file_and_line(tokenizer, tmp_path):
    source = write(tmp_path / "chats.jsonl", conversation(ONE), conversation(SYSTEM + ONE))
    with pytest.raises(UserError, match=r"chats\.jsonl, line 2: the chat template refuses it: no system turn"):
        load_examples(source, "train", with_template(tokenizer, "gemma", False), config(tmp_path), None)


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_it_has_marks(tokenizer, tmp_path):
    made = copy.deepcopy(tokenizer)
    body = "{{ turn['content'] if loop.last else '...' }}</s>"
    made.chat_template = "{% for turn in messages %}" + body + "{% endfor %}"
    source = write(tmp_path / "chats.jsonl", conversation(TWO))
    with pytest.raises(UserError, match="line 1: the chat template writes turn 2 differently"):
        load_examples(source, "train", made, config(tmp_path), None)
    marked = "{% if turn['role'] == 'assistant' %}{% generation %}" + body + "{% endgeneration %}{% else %}" + body
    made.chat_template = "{% for turn in messages %}" + marked + "{% endif %}{% endfor %}"
    ids, counted = seen_and_counted(load_examples(source, "train", made, config(tmp_path), None))
    assert made.decode([token for token, counts in zip(ids, counted, strict=False) if counts]) == "...</s>No\nmore</s>"


def config(tmp_path: Path, **options) -> DataConfig:
    return DataConfig(**{"max_length": 500, "cache_dir": str(tmp_path / "cache"), **options})


@pytest.mark.parametrize(
    ("loss_on", "counted"),
    [("completion", "4</s>"), ("assistant", "2</s>4</s>"), ("all", None)],
)
def test_loss_on_says_which_turns_of_a_prompt_of_messages_count(loss_on, counted, tokenizer, tmp_path):
    turns = conversation([("user", "1+1"), ("assistant", "2"), ("user", "2+2")])["messages"]
    for name, completion in {"text": "4", "turns": [{"role": "assistant", "content": "4"}]}.items():
        source = write(tmp_path / f"{name}.jsonl", {"prompt": turns, "completion": completion})
        ids, counts = seen_and_counted(
            load_examples(source, "train", tokenizer, config(tmp_path, loss_on=loss_on), None)
        )
        chosen = tokenizer.decode([token for token, counts_ in zip(ids, counts, strict=False) if counts_])
        assert chosen == (counted or tokenizer.decode(ids))


@pytest.mark.parametrize(
    ("row", "whole", "counted"),
    [
        ({"prompt": "1+1=", "completion": "2"}, "<s>1+1=2</s>", "2</s>"),
        ({"question": "1+1=", "answer": "2"}, "<s>1+1=2</s>", "2</s>"),
        ({"instruction": "add", "input": "1 1", "output": "2"}, "<s>user:add\n\n1 1</s><s>assistant:2</s>", "2</s>"),
        ({"instruction": "add", "input": None, "output": "2"}, "<s>user:add</s><s>assistant:2</s>", "2</s>"),
    ],
    ids=["prompt_completion", "renamed", "alpaca", "alpaca without input"],
)
def test_formats_are_recognised_from_their_columns(row, whole, counted, tokenizer, tmp_path):
    source = write(tmp_path / "rows.jsonl", row)
    source += "?prompt=question&completion=answer" if "question" in row else ""
    ids, counts = seen_and_counted(load_examples(source, "train", tokenizer, config(tmp_path), None))
    assert tokenizer.decode(ids) == whole
    assert tokenizer.decode([token for token, counts_ in zip(ids, counts, strict=False) if counts_]) == counted


def test_alpaca_rows_are_text_where_there_is_no_chat_template(tokenizer, tmp_path):
    made = copy.deepcopy(tokenizer)
    made.chat_template = None
    source = write(tmp_path / "rows.jsonl", {"instruction": "add", "input": "1 1", "output": "2"})
    ids, _ = seen_and_counted(load_examples(source, "train", made, config(tmp_path), None))
    assert made.decode(ids) == "<s>### Instruction:\nadd\n\n### Input:\n1 1\n\n### Response:\n2</s>"


def test_plain_text_counts_whole_and_only_with_loss_on_all(tokenizer, tmp_path):
    source = write(tmp_path / "rows.jsonl", {"text": "once"})
    examples = load_examples(source, "train", tokenizer, config(tmp_path, loss_on="all"), None)
    assert seen_and_counted(examples)[1] == [True] * 6 and examples.target_tokens([0]) == 5
    with pytest.raises(UserError, match="set loss_on all"):
        load_examples(source, "train", tokenizer, config(tmp_path), None)


def test_what_max_length_leaves_no_target_of_is_dropped_and_counted(tokenizer, tmp_path):
    rows = [("a", "bcd"), ("a" * 9, "b"), ("aa", "b" * 20), ("a" * 30, "b")]
    source = write(tmp_path / "rows.jsonl", *({"prompt": p, "completion": c} for p, c in rows))
    examples = load_examples(source, "train", tokenizer, config(tmp_path, max_length=8), None)
    assert (len(examples), examples.truncated, examples.dropped) == (2, 1, 2)
    assert examples.lengths.tolist() == [6, 8]
    assert examples.target_tokens([0]) == 4 and examples.target_tokens([0, 1]) == 9


def test_a_set_that_leaves_no_target_token_is_an_error(tokenizer, tmp_path):
    source = write(tmp_path / "rows.jsonl", {"prompt": "a" * 30, "completion": "b"})
    with pytest.raises(UserError, match=r"each of its 1 examples fills max_length \(8\); raise max_length"):
        load_examples(source, "train", tokenizer, config(tmp_path, max_length=8), None)


def test_a_base_without_a_template_gets_one_by_name_or_file(tokenizer, tmp_path):
    made = copy.deepcopy(tokenizer)
    made.chat_template = None
    source = write(tmp_path / "chats.jsonl", conversation(ONE))
    with pytest.raises(UserError, match="no chat template; choose one with chat_template: chatml, tulu"):
        load_examples(source, "train", made, config(tmp_path), None)
    ids, _ = seen_and_counted(load_examples(source, "train", use_template(made, "tulu"), config(tmp_path), None))
    assert made.decode(ids) == "<s><|user|>\nHi?\n<|assistant|>\nYes.</s>"
    (tmp_path / "own.jinja").write_text("{% for turn in messages %}{{ turn['content'] }}{% endfor %}")
    assert use_template(made, str(tmp_path / "own.jinja")).chat_template.startswith("{% for turn")
    with pytest.raises(UserError, match="chat_template: 'tullu' is neither a file nor one of: chatml, tulu"):
        use_template(made, "tullu")


def test_a_tokenizer_that_does_not_tell_where_its_tokens_stand_gives_the_same_masks(tokenizer, tmp_path):
    class Slow:
        backend_tokenizer = None

        def __call__(self, *arguments, **options):
            return tokenizer(*arguments, **options)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    source = write(tmp_path / "chats.jsonl", conversation(TWO), conversation(SYSTEM + ONE))
    fast = load_examples(source, "train", tokenizer, config(tmp_path), None)
    slow = load_examples(source, "train", Slow(), config(tmp_path, cache_dir=str(tmp_path / "slow")), None)
    assert fast.digest() == slow.digest()
