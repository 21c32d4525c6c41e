"""Columns and fields that change the prompt or the loss: used as in the tools that introduced them, or named."""

from __future__ import annotations

import json

import pytest

from scale_sft.errors import UserError


def call(name: str, **arguments) -> dict:
    return {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


turn = lambda role, content, **more: {"role": role, "content": content, **more}
ASK, ANSWER = turn("user", "a"), turn("assistant", "b")
CHAT = [ASK, ANSWER]
LONG = [ASK, ANSWER, turn("user", "c"), turn("assistant", "d")]
TOOL = [{"type": "function", "function": {"name": "f"}}]
WRITTEN = '<s>tools:[{"type": "function", "function": {"name": "f"}}]</s>'


@pytest.mark.parametrize(
    ("row", "whole"),
    [
        ({"messages": CHAT, "tools": TOOL}, WRITTEN + "<s>user:a</s><s>assistant:b</s>"),
        ({"messages": CHAT, "tools": json.dumps(TOOL)}, WRITTEN + "<s>user:a</s><s>assistant:b</s>"),
        ({"messages": CHAT, "tools": []}, "<s>user:a</s><s>assistant:b</s>"),
        ({"messages": CHAT, "system": "S"}, "<s>system:S</s><s>user:a</s><s>assistant:b</s>"),
        ({"messages": CHAT, "system": ""}, "<s>user:a</s><s>assistant:b</s>"),
        ({"messages": [turn("system", "S"), *CHAT], "system": "S"}, "<s>system:S</s><s>user:a</s><s>assistant:b</s>"),
        ({"messages": CHAT, "chat_template_kwargs": {"loud": True}}, "!<s>user:a</s><s>assistant:b</s>"),
        ({"prompt": [ASK], "completion": [ANSWER], "tools": TOOL}, WRITTEN + "<s>user:a</s><s>assistant:b</s>"),
        ({"prompt": [ASK], "completion": "b", "system": "S"}, "<s>system:S</s><s>user:a</s><s>assistant:b</s>"),
        ({"instruction": "a", "output": "b", "system": "S"}, "<s>system:S</s><s>user:a</s><s>assistant:b</s>"),
        (
            {"instruction": "c", "output": "d", "history": [["a", "b"]]},
            "<s>user:a</s><s>assistant:b</s><s>user:c</s><s>assistant:d</s>",
        ),
        ({"messages": json.dumps(CHAT)}, "<s>user:a</s><s>assistant:b</s>"),
    ],
)
def test_columns_of_the_prompt_reach_the_template_row_by_row(row, whole, put, read, with_tools, texts):
    plain = {key: None if key in ("tools", "system", "chat_template_kwargs", "history") else row[key] for key in row}
    examples = read(put("rows.jsonl", [plain, row, plain]), with_tools)
    before, mine, after = texts(examples, with_tools)
    assert mine == whole and before == after
    assert examples.notes == ()


@pytest.mark.parametrize(
    ("turns", "learned"),
    [
        (LONG, "b</s>d</s>"),
        ([ASK, {**ANSWER, "weight": 0}, *LONG[2:]], "d</s>"),
        ([ASK, {**ANSWER, "weight": 1}, LONG[2], {**LONG[3], "weight": 0.0}], "b</s>"),
        ([ASK, {**ANSWER, "train": False}, *LONG[2:]], "d</s>"),
        ([{**ASK, "weight": 1}, {**ANSWER, "training": True}, LONG[2], {**LONG[3], "training": False}], "b</s>"),
        ([ASK, call("f", x=1), turn("tool", "t"), turn("assistant", "d")], '{"function": {"name": "f", "arguments": '
         '{"x": 1}}}</s>d</s>'),
        ([ASK, call("f")], '{"function": {"name": "f", "arguments": {}}}</s>'),
        ([ASK, {**call("f"), "content": ""}, turn("tool", "t")], '{"function": {"name": "f", "arguments": {}}}</s>'),
    ],
)  # fmt: skip
def test_weights_choose_turns_and_a_tool_call_is_an_answer(turns, learned, put, read, with_tools, texts, counted):
    path = put("rows.jsonl", [{"messages": turns}])
    examples = read(path, with_tools)
    assert counted(examples, with_tools) == learned
    assert "weight" not in texts(examples, with_tools)[0] and "train" not in texts(examples, with_tools)[0]
    unlearned = read(path, with_tools, loss_on="all")
    muted = any(turn.get("weight", 1) == 0 or False in (turn.get("train"), turn.get("training")) for turn in turns)
    assert (counted(unlearned, with_tools) == texts(unlearned, with_tools)[0]) is not muted


def test_weights_choose_among_generation_marks(put, read, with_tools, counted):
    with_tools.chat_template = (
        "{% for turn in messages %}{% if turn.role == 'assistant' %}{% generation %}{{ turn.content }}</s>"
        "{% endgeneration %}{% else %}{{ turn.content }}{% endif %}{% endfor %}"
    )
    turns = [ASK, {**ANSWER, "weight": 0}, *LONG[2:]]
    path = put("rows.jsonl", [{"messages": turns}])
    assert counted(read(path, with_tools), with_tools) == "d</s>"
    assert counted(read(path, with_tools, loss_on="all"), with_tools) == "acd</s>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": CHAT, "tools": "f"}, "field 'tools' is 'f', expected a list of functions"),
        ({"messages": CHAT, "system": 5}, "field 'system' is int, expected text"),
        ({"messages": [turn("system", "S"), *CHAT], "system": "T"}, "are two system prompts; remove one"),
        (
            {"messages": CHAT, "chat_template_kwargs": "loud"},
            "field 'chat_template_kwargs' is 'loud', expected an object",
        ),
        ({"messages": CHAT, "chat_template_kwargs": {"tokenize": True}}, "'tokenize' is not the template's to choose"),
        ({"messages": [ASK, {**ANSWER, "weight": 0.5}]}, r"the weight of turn 2 \(assistant\) is 0.5, expected 0 or 1"),
        ({"messages": [ASK, {**ANSWER, "weight": "0"}]}, "is '0', expected 0 or 1"),
        ({"messages": [ASK, {**ANSWER, "train": 0}]}, r"train of turn 2 \(assistant\) is 0, expected true or false"),
        ({"messages": [{**ASK, "train": True}, ANSWER]}, "only turns of the assistant are learned"),
        ({"messages": [ASK, {**ANSWER, "train_detail": []}]}, "has train_detail; parts of a turn cannot be chosen"),
        ({"messages": [ASK, {**ANSWER, "weight": 0}]}, "its assistant turns have weight 0 or train false"),
        ({"messages": [ASK, {"role": "assistant", "tool_calls": []}]}, r"content of turn 2 \(assistant\) is NoneType"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "field 'history' holds 'c', expected pairs"),
        ({"messages": CHAT, "images": ["a.png"]}, "got 'images', expected text alone"),
        ({"prompt": "a", "completion": "b", "image": "a.png"}, "got 'image', expected text alone"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}, ANSWER]},
            "turn 1 .user. has a part of type 'image', expected text alone",
        ),
    ],
)
def test_what_has_no_clear_meaning_is_refused_with_its_line(row, message, put, read, with_tools):
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1: .*" + message):
        read(put("rows.jsonl", [row]), with_tools)


@pytest.mark.parametrize(
    ("row", "note"),
    [
        ({"prompt": "a", "completion": "b", "system": "S"}, "not used with format prompt_completion: 'system'"),
        ({"prompt": "a", "completion": "b", "history": []}, "not used with format prompt_completion: 'history'"),
        ({"messages": CHAT, "functions": "f", "images": []}, "not used with format messages: 'functions', 'images'"),
        ({"messages": CHAT, "tools": TOOL}, "the chat template does not use 'tools'"),
        ({"messages": CHAT, "chat_template_kwargs": {"deep": 1}}, "the chat template does not use 'deep'"),
        ({"messages": [ASK, {**ANSWER, "reasoning_content": "r"}]}, "does not write 'reasoning_content' of turns"),
    ],
)
def test_what_is_not_used_is_named_once_by_whichever_process_meets_it(row, note, put, read):
    path = put("rows.jsonl", [row] * 8)
    examples = read(path, preprocess_workers=2)
    assert len(examples.notes) == 1 and note in examples.notes[0]
    assert read(path, preprocess_workers=2).notes == examples.notes, "the cache keeps them"


def test_a_tool_call_that_the_template_does_not_write_is_refused(put, read):
    with pytest.raises(UserError, match="turn 2 has tool_calls, which the chat template does not write"):
        read(put("rows.jsonl", [{"messages": [ASK, call("f")]}]))


def test_a_column_of_the_prompt_needs_a_template(put, read, with_tools):
    with_tools.chat_template = None
    with pytest.raises(UserError, match="line 1: field 'history' needs a chat template"):
        read(put("rows.jsonl", [{"instruction": "a", "output": "b", "history": [["c", "d"]]}]), with_tools)
