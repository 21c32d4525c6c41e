"""A base with new tokens: rows for them, the same ones each time; the tokenizer and the template go along."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from scale_sft.adapters.format import Adapter
from scale_sft.cli.main import main
from scale_sft.data.new_tokens import RECORD_FILE, add_tokens
from scale_sft.errors import UserError
from scale_sft.files import ASSETS
from scale_sft.reporting.metrics_file import read_metrics

TOKENS = ["<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize(("architecture", "multiple", "rows"), [("llama", None, 261), ("qwen2", 8, 264)])
def test_new_rows_are_the_mean_of_the_old_and_nothing_else_changes(
    tiny_model, tmp_path, architecture, multiple, rows
) -> None:
    base = tiny_model(architecture, "bfloat16")
    added = add_tokens(str(base), TOKENS, tmp_path / "base", pad_to_multiple_of=multiple)
    first = len(AutoTokenizer.from_pretrained(base))  # qwen2's tokenizer brings a token of its own
    assert (added.ids, added.rows_before, added.rows) == ({TOKENS[0]: first, TOKENS[1]: first + 1}, 259, rows)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "base" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, old in before.items():
        new = after[name]
        if new.shape != old.shape:
            assert new.shape == (rows, old.shape[1]) and ("embed" in name or "lm_head" in name)
            assert torch.equal(new[259:], old.float().mean(0).bfloat16().expand(rows - 259, -1))
            new = new[:259]
        assert torch.equal(new, old) and new.dtype is old.dtype
    again = add_tokens(str(base), TOKENS, tmp_path / "again", pad_to_multiple_of=multiple)
    assert again == added
    for file in (tmp_path / "base").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert model.config.vocab_size == rows
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (architecture == "qwen2")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert tokenizer.encode("".join(TOKENS), add_special_tokens=False) == [*added.ids.values()]


def test_rows_that_the_base_has_to_spare_are_used_first(tiny_model, tmp_path) -> None:
    spare = add_tokens(str(tiny_model("llama")), TOKENS[:1], tmp_path / "spare", pad_to_multiple_of=64)
    more = add_tokens(str(tmp_path / "spare"), TOKENS[1:], tmp_path / "more")
    assert spare.rows == more.rows_before == more.rows == 320 and more.ids == {TOKENS[1]: 260}
    record = json.loads((tmp_path / "more" / RECORD_FILE).read_text())
    assert record["base"] == str(tmp_path / "spare") and record["tokens"] == TOKENS[1:]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["<new>", "<new>"], "tokens: got '<new>' twice"),
        (["a"], r"tokens: got 'a', which the tokenizer has \("),
        ([""], "tokens: got an empty token"),
        ([], "tokens: got none"),
    ],
)
def test_tokens_that_cannot_be_added_are_refused_and_nothing_is_written(tiny_model, tmp_path, tokens, message) -> None:
    with pytest.raises(UserError, match=message):
        add_tokens(str(tiny_model("llama")), tokens, tmp_path / "base")
    assert not (tmp_path / "base").exists()


@pytest.mark.timeout(600)
def test_a_chat_format_of_new_tokens_trains_merges_and_answers(train_run, tmp_path) -> None:
    """The recipe `new_tokens`, on few steps: the command, a run, the merged model."""
    base, run = tmp_path / "base", tmp_path / "run"
    arguments = ["models", "add-tokens", "demo", "--tokens", ",".join(TOKENS), "--pad-to-multiple-of", "64"]
    result = CliRunner().invoke(main, [*arguments, "--chat-template", "chatml", "--output", str(base)])
    assert result.exit_code == 0 and "<|im_end|> = 101; 100 rows of the embeddings before, 128 now" in result.output
    train_run(
        base=str(base), train_data="demo_chat", train_embeddings="both", method="ag", dtype="float32", steps=12, max_length=96,
        global_batch_size=8, update_interval_steps=6, save_merged=True, output_dir=str(run),
    )  # fmt: skip
    name = "model.embed_tokens.weight"
    adapter = Adapter.load(run / "adapter")
    assert adapter.shapes[name] == (128, 128)
    rows = adapter.indices[name][adapter.deltas[name] != 0] // 128
    assert {100, 101} <= set(rows.tolist())
    command = f"scale-sft models add-tokens demo --tokens '{','.join(TOKENS)}' --pad-to-multiple-of 64"
    assert command in (run / "merged" / "README.md").read_text().replace("\\|", "|")
    losses = [record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["event"] == "step"]
    assert losses[-1] < losses[0] / 2
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert merged.config.vocab_size == 128 and 101 in merged.generation_config.eos_token_id  # the end that was taught
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    assert tokenizer.chat_template == (ASSETS / "templates" / "chatml.jinja").read_text()
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert tokenizer.encode(asked, add_special_tokens=False)[0] == 100
