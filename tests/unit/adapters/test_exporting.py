"""Exports give the trained model's logits in stock peft and transformers, bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapter_factory import make_adapter
from click.testing import CliRunner
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from scale_sft.adapters.export import export
from scale_sft.adapters.peft import exact_addends
from scale_sft.adapters.verify import verify
from scale_sft.cli.main import main
from scale_sft.errors import UserError


def command(*arguments) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "opt", "qwen2"])
@pytest.mark.parametrize("to", ["shira", "supertuning", "merged"])
def test_exported_logits_equal_the_trained_models(tiny_model, tmp_path, architecture, dtype, to) -> None:
    adapter = make_adapter(tiny_model(architecture, dtype), tmp_path / "adapter", dtype=dtype)
    output = command("export", adapter, "--to", to, "--output", tmp_path / "out", "--verify")
    assert "bit for bit" in output


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_logits_of_transposed_weights_equal_the_trained_models(tiny_model, tmp_path, dtype) -> None:
    adapter = make_adapter(tiny_model("gpt2", dtype), tmp_path / "adapter", dtype=dtype)
    assert "bit for bit" in command("export", adapter, "--to", "merged", "--output", tmp_path / "out", "--verify")


@pytest.mark.parametrize("to", ["shira", "supertuning"])
def test_some_layers_of_a_model_export_alone(tiny_model, tmp_path, to) -> None:
    chosen = r"model\.layers\.1\..*(q|k|down)_proj"
    adapter = make_adapter(tiny_model("llama"), tmp_path / "adapter", targets=chosen, rank_equivalent=3)
    written = export(adapter, to, tmp_path / "out")
    assert (written.padding == 0) == (to == "shira"), "rank_equivalent needs no padding in SHiRA"
    assert verify(adapter, to, tmp_path / "out").identical


def test_a_wrong_value_is_found_by_verify(tiny_model, tmp_path) -> None:
    from safetensors.torch import save_file

    adapter = make_adapter(tiny_model("llama"), tmp_path / "adapter")
    export(adapter, "shira", tmp_path / "out")
    path = tmp_path / "out" / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(name for name in tensors if name.endswith("shira_weight"))
    tensors[first][tensors[first].abs().argmax()] *= 1.01
    save_file(tensors, path)
    assert not verify(adapter, "shira", tmp_path / "out").identical


def test_peft_formats_refuse_transposed_weights(tiny_model, tmp_path) -> None:
    adapter = make_adapter(tiny_model("gpt2"), tmp_path / "adapter")
    with pytest.raises(UserError, match="Conv1D.*--to merged"):
        export(adapter, "shira", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_onto_another_base_is_refused(tiny_model, tmp_path) -> None:
    adapter = make_adapter(tiny_model("llama"), tmp_path / "adapter")
    for to in ("shira", "supertuning", "merged"):
        with pytest.raises(UserError, match="not the base"):
            export(adapter, to, tmp_path / "out", base=str(_changed(tiny_model("llama"), tmp_path)))
        assert not (tmp_path / "out").exists()


def _changed(base: Path, tmp_path: Path) -> Path:
    import shutil

    from safetensors.torch import save_file

    other = tmp_path / "other"
    if not other.exists():
        shutil.copytree(base, other)
        tensors = load_file(other / "model.safetensors")
        tensors["model.layers.1.mlp.down_proj.weight"][0, 0] += 1
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    return other


def test_addends_reach_the_effective_value_in_the_dtype_of_the_base() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(20000, generator=generator).bfloat16()
    deltas = torch.randn(20000, generator=generator)
    addends, twice = exact_addends(base, deltas)
    wanted = (base.float() + deltas).bfloat16()
    assert torch.equal(addends.bfloat16().float(), addends), "an addend survives the cast to bf16"
    once = base + addends.bfloat16()
    assert torch.equal(once[~twice], wanted[~twice])
    assert not once[twice].any(), "the first of two additions leaves zero"
    assert 0 < twice.float().mean() < 0.2


def test_the_card_names_base_method_and_licence(tiny_model, tmp_path) -> None:
    adapter = make_adapter(tiny_model("llama"), tmp_path / "adapter")
    export(adapter, "shira", tmp_path / "out", licence="apache-2.0")
    card = (tmp_path / "out" / "README.md").read_text()
    head = ModelCard(card).data
    assert (head.license, head.library_name, head.pipeline_tag) == ("apache-2.0", "peft", "text-generation")
    assert json.loads((adapter / "adapter_config.json").read_text())["base_hash"][:16] in card
    assert 'PeftModel.from_pretrained(model, "out")' in card and "| method | ag |" in card


@pytest.mark.parametrize("to", ["shira", "supertuning", "merged"])
def test_a_card_names_the_folder_that_was_asked_for(tiny_model, tmp_path, monkeypatch, to) -> None:
    adapter = make_adapter(tiny_model("llama"), tmp_path / "adapter")
    (tmp_path / "my_model").mkdir()
    monkeypatch.chdir(tmp_path / "my_model")
    command("export", adapter, "--to", to, "--output", ".")
    card = (tmp_path / "my_model" / "README.md").read_text()
    assert '"my_model"' in card and "partial" not in card


def test_a_merged_model_has_a_card_with_the_licence_of_its_base(tiny_model, tmp_path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model("llama"), base)
    (base / "README.md").write_text("---\nlicense: llama2\n---\n# The base\n")
    adapter = make_adapter(base, tmp_path / "adapter")
    command("merge", adapter, "--output", tmp_path / "merged")
    card = ModelCard((tmp_path / "merged" / "README.md").read_text())
    assert (card.data.license, card.data.library_name) == ("llama2", "transformers")
    assert 'AutoModelForCausalLM.from_pretrained("merged", dtype="float32")' in card.text


@pytest.mark.parametrize("spelling", ["--licence", "--license"])
@pytest.mark.parametrize("arguments", [["merge"], ["export", "--to", "merged"]], ids=["merge", "export"])
def test_a_licence_that_is_given_is_on_the_card_in_either_spelling(tiny_model, tmp_path, arguments, spelling) -> None:
    adapter = make_adapter(tiny_model("llama"), tmp_path / "adapter")
    command(*arguments, adapter, "--output", tmp_path / "out", spelling, "mit")
    assert ModelCard((tmp_path / "out" / "README.md").read_text()).data.license == "mit"


@pytest.mark.parametrize("head", ["no front matter", "---\nlicense: [\n---\n", "---\n- a list\n---\n", "\udcff"])
def test_a_damaged_card_of_the_base_states_no_licence(tiny_model, tmp_path, head) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model("llama"), base)
    (base / "README.md").write_text(head, errors="surrogateescape")
    adapter = make_adapter(base, tmp_path / "adapter")
    command("export", adapter, "--to", "shira", "--output", tmp_path / "out")
    assert ModelCard((tmp_path / "out" / "README.md").read_text()).data.license == "unknown"


@pytest.mark.parametrize("to", ["shira", "supertuning"])
def test_verify_asks_for_peft_before_anything_is_written(tiny_model, tmp_path, monkeypatch, to) -> None:
    monkeypatch.setattr("scale_sft.adapters.verify.find_spec", lambda name: None)
    adapter = make_adapter(tiny_model("llama"), tmp_path / "adapter")
    arguments = ["export", str(adapter), "--to", to, "--output", str(tmp_path / "out"), "--verify"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and "needs peft" in result.output and not (tmp_path / "out").exists()


def test_an_export_is_uploaded_whole(tiny_model, tmp_path, monkeypatch) -> None:
    import huggingface_hub

    calls = []

    class Hub:
        def create_repo(self, repository, private, exist_ok):
            calls.append(("create", repository, private))
            return f"https://hub/{repository}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    adapter = make_adapter(tiny_model("llama"), tmp_path / "adapter")
    output = command(
        "export", adapter, "--to", "shira", "--output", tmp_path / "out", "--push-to-hub", "me/x", "--private"
    )
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert calls == [("create", "me/x", True), ("upload", "me/x", files)]
    assert "uploaded: https://hub/me/x" in output


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gate_too_small_for_shira_is_written_whole(tmp_path, dtype: str) -> None:
    pytest.importorskip("peft", "0.17")
    config = Qwen2MoeConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_experts=4,
        num_key_value_heads=2, moe_intermediate_size=16, shared_expert_intermediate_size=32, num_experts_per_tok=2,
    )  # fmt: skip
    Qwen2MoeForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(tmp_path / "base")
    layers = ("q_proj", "shared_expert_gate", "shared_expert.down_proj")
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", dtype=dtype, targets=layers)
    written = export(adapter, "shira", tmp_path / "out")
    assert written.whole == 2
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == [f"model.layers.{n}.mlp.shared_expert_gate" for n in (0, 1)]
    assert verify(adapter, "shira", tmp_path / "out").identical
