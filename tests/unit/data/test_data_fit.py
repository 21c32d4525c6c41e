"""Tokenizers and models that do not fit, and terminals that cannot show the text."""

from __future__ import annotations

import copy
import io

import pytest
from rich.console import Console
from transformers import AutoConfig

from scale_sft.config.options import ModelConfig
from scale_sft.data.fit import refuse_misfit
from scale_sft.data.preview import show_examples
from scale_sft.errors import UserError
from scale_sft.model.loading import load_tokenizer


def test_a_token_beyond_the_embedding_is_refused_before_weights_load(
    train_run, tiny_model, tokenizer, put, tmp_path, monkeypatch
):
    monkeypatch.setattr("scale_sft.training.assemble.load_base", None)
    made = copy.deepcopy(tokenizer)
    made.add_tokens(["<|new|>"])
    base = tmp_path / "base"
    import shutil

    shutil.copytree(tiny_model("llama"), base)
    made.save_pretrained(base)
    rows = put("rows.jsonl", [{"prompt": "a", "completion": "b<|new|>"}] * 8)
    with pytest.raises(UserError, match=r"uses the token '<\|new\|>' \(259\), but the model's embedding has 259 rows"):
        train_run(base=str(base), train_data=str(rows), base_placement="replicate")


def test_padding_beyond_the_embedding_is_refused_and_a_token_that_no_example_uses_is_not(
    tiny_model, tokenizer, put, read
):
    config = AutoConfig.from_pretrained(tiny_model("llama"))
    made = copy.deepcopy(tokenizer)
    made.add_tokens(["<|new|>"])
    examples = read(put("rows.jsonl", [{"prompt": "a", "completion": "b"}]), made)
    assert examples.largest_token() == 257
    refuse_misfit(made, config, examples, None)
    made.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(UserError, match=r"the padding uses the token '\[PAD\]' \(260\)"):
        refuse_misfit(made, config, examples)


def test_a_tokenizer_with_neither_end_nor_padding_is_refused(tiny_model, tokenizer, tmp_path):
    made = copy.deepcopy(tokenizer)
    made.pad_token = made.eos_token = None
    made.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match="has neither an end nor a padding token, expected one of them. Fix: set eos_token"
    ):
        load_tokenizer(ModelConfig(base=str(tmp_path)))


@pytest.mark.parametrize(("encoding", "expected"), [("ascii", r"<s>\xe9<<\U0001f600</s>>>"), ("utf-8", "<s>é«😀</s>»")])
def test_examples_are_shown_on_any_terminal(encoding, expected, put, read, tokenizer):
    examples = read(put("rows.jsonl", [{"prompt": "é", "completion": "😀", "system": "S"}]))
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    show_examples(examples, tokenizer, title="train_data", first=0, count=1, console=Console(file=file, width=100))
    file.flush()
    shown = raw.getvalue().decode(encoding)
    assert expected in shown and "note: data: " in shown
    assert ("#####" if encoding == "ascii" else "█████") in shown
