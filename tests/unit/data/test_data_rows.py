"""A row is the same alone, among others, in every file format, and with streaming."""

from __future__ import annotations

import json

import pytest

from scale_sft.errors import UserError


def call(name: str, **arguments) -> dict:
    return {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


CALLS = [{"messages": [{"role": "user", "content": "go"}, call("f", city="Rome")]},
         {"messages": [{"role": "user", "content": "go"}, call("g", a=1, b=[1.5])]},
         {"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "no"}]}]  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "array", "parquet of structures", "parquet of JSON", "saved"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_tool_call_has_its_own_arguments_only(kind, streaming, put, read, with_tools, tmp_path, counted):
    import datasets

    path = put("rows.jsonl", CALLS)
    if kind == "array":
        path = put("rows.json", json.dumps(CALLS))
    elif kind == "parquet of structures":
        path = tmp_path / "a.parquet"
        datasets.Dataset.from_list(CALLS).to_parquet(path)
    elif kind == "parquet of JSON":
        path = tmp_path / "b.parquet"
        datasets.load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train").to_parquet(path)
    elif kind == "saved":
        path = tmp_path / "saved"
        datasets.Dataset.from_list(CALLS).save_to_disk(path)
    examples = read(path, with_tools, limit=3, streaming=streaming)
    assert counted(examples, with_tools) == '{"function": {"name": "f", "arguments": {"city": "Rome"}}}</s>'
    assert counted(examples, with_tools, 1) == '{"function": {"name": "g", "arguments": {"a": 1, "b": [1.5]}}}</s>'
    assert counted(examples, with_tools, 2) == "no</s>"


def test_text_and_turns_as_prompts_stand_next_to_each_other(put, read, tokenizer, texts):
    turns = [{"role": "user", "content": "a"}]
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": turns, "completion": "b"},
        {"prompt": "c", "completion": "d"},
    ]
    assert texts(read(put("rows.jsonl", rows)), tokenizer) == [
        "<s>ab</s>",
        "<s>user:a</s><s>assistant:b</s>",
        "<s>cd</s>",
    ]


def test_streaming_takes_what_the_plain_way_takes(put, read):
    rows = [{"prompt": f"{n}", "completion": "b", "kind": "xy"[n % 2]} for n in range(30)]
    path = put("rows.jsonl", rows)
    for query in ("", "?keep=kind:y", "?weight=2", "?split=train[50%:]", "?split=train[20:]&keep=kind:y"):
        digests = {read(f"{path}{query}", limit=5, streaming=streaming).digest() for streaming in (False, True)}
        assert len(digests) == 1, query


def test_a_weight_that_leaves_no_example_is_refused(put, read):
    path = put("rows.jsonl", [{"prompt": "a", "completion": "b"}] * 9)
    with pytest.raises(
        UserError, match=r"weight 0.001 of its 9 examples leaves none; raise the weight to 0.056 or more"
    ):
        read([str(path), f"{path}?weight=0.001"])
