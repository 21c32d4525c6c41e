"""Whole runs that train the embeddings: they resume bit for bit, choose by any rule, and merge, in 4 bits too."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from scale_sft import train
from scale_sft.adapters.format import Adapter
from scale_sft.model.packed_weights import PlainWeight
from scale_sft.model.transient import TransientDeltas
from scale_sft.reporting.metrics_file import read_metrics
from scale_sft.spiel.deltas import DeltaStore

OWN = "model.embed_tokens.weight"


def test_a_run_on_a_tied_base_resumes_bit_for_bit(train_run, tiny_model, tmp_path, monkeypatch) -> None:
    options = {
        "base": str(tiny_model("qwen2")), "train_embeddings": "both", "density": 0.2, "method": "ag", "steps": 6,
        "update_interval_steps": 3, "estimation_steps": 2, "save_every_steps": 1,
    }  # fmt: skip
    whole = train_run(**options, output_dir=str(tmp_path / "whole"))
    forward_backward = train.forward_backward

    def crashing(session, batch):
        if session.step == 4:  # in an estimation phase
            raise InterruptedError
        return forward_backward(session, batch)

    with monkeypatch.context() as patch:
        patch.setattr(train, "forward_backward", crashing)
        with pytest.raises(InterruptedError):
            train_run(**options, output_dir=str(tmp_path / "cut"))
    resumed = train_run(**options, output_dir=str(tmp_path / "cut"))
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (whole, resumed))
    assert first.keys() == second.keys() and f"{OWN}.deltas" in first and "lm_head.weight.deltas" not in first
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    losses = [record["loss"] for record in read_metrics(whole / "metrics.jsonl") if record["event"] == "step"]
    assert losses[-1] < losses[0]


def test_quotas_and_a_global_budget_hold_for_embeddings(train_run) -> None:
    run = train_run(
        train_embeddings="both", method="static", selection_batches=2, density=0.05, budget="global", row_quota=2.0,
        score="snr", draw="sample",
    )  # fmt: skip
    adapter = Adapter.load(run / "adapter")
    for name in (OWN, "lm_head.weight"):
        rows, columns = adapter.shapes[name]
        in_row = torch.bincount(adapter.indices[name].long() // columns, minlength=rows)
        assert in_row.max() <= -(-2 * int(in_row.sum()) // rows)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_in_four_bits_the_ends_train_and_the_merged_model_has_them(train_run, tiny_model, architecture) -> None:
    run = train_run(
        base=str(tiny_model(architecture)), train_embeddings="both", quantization="nf4", save_merged=True
    )  # fmt: skip
    adapter = Adapter.load(run / "adapter")
    assert (OWN in adapter.shapes) and ("lm_head.weight" in adapter.shapes) == (architecture == "llama")
    assert adapter.deltas[OWN].any()
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    tied = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert tied == (architecture == "qwen2")
    base = AutoModelForCausalLM.from_pretrained(tiny_model(architecture)).get_input_embeddings().weight
    moved = (merged.get_input_embeddings().weight.float() != base.bfloat16().float()).flatten().nonzero().flatten()
    assert moved.numel() and set(moved.tolist()) <= set(adapter.indices[OWN].tolist())


def test_rows_are_looked_up_with_their_deltas_without_a_copy_of_the_rest() -> None:
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(30, 4)
    store = DeltaStore({"w": (30, 4)}, {"w": 50}, seed=0)
    deltas = TransientDeltas(store, {"w": PlainWeight(embedding, transposed=False)})
    store["w"].deltas.normal_()
    ids = torch.tensor([[3, 3, 29], [0, 7, 3]])
    assert torch.equal(deltas.effective_rows("w", ids), deltas.effective_weight("w")[ids])
    with deltas.without():
        assert torch.equal(deltas.effective_rows("w", ids), embedding.weight[ids])
