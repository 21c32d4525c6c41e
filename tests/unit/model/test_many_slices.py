"""Thousands of small weights: what is done once for each of them must not show."""

import time

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import scale_sft
from scale_sft.model.coverage import coverage
from scale_sft.model.targets import choose_targets

LIMIT_SECONDS = 6.0
"""Of this process, on a slow core; it takes a third of that."""


def seconds(work, *arguments, **options):
    began = time.process_time()
    return work(*arguments, **options), time.process_time() - began


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", ["ag", "ma"])
def test_a_model_with_as_many_slices_as_qwen3_30b_is_attached_and_reallocated_in_seconds(method):
    """12,288 slices: 48 layers of 128 experts."""
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=8, intermediate_size=8, moe_intermediate_size=8, num_hidden_layers=48,
        num_attention_heads=1, num_key_value_heads=1, head_dim=8, num_experts=128, num_experts_per_tok=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    model = model.to_empty(device="cpu").float()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2) if weight.dim() > 1 else torch.nn.init.ones_(weight)
    for buffer in model.buffers():
        torch.nn.init.ones_(buffer)
    took = {}
    choice, _ = seconds(choose_targets, model, None)  # probes the class, once
    choice, took["choice"] = seconds(choose_targets, model, None)
    _, took["coverage"] = seconds(coverage, model, choice)
    assert sum(target.fused is not None for target in choice.targets) == 12_288
    options = {"density": 0.1, "total_steps": 9, "update_interval_steps": 3, "estimation_steps": 1}
    sparse, took["start"] = seconds(scale_sft.attach, model, method=method, **options)
    optimizer = sparse.optimizer(lr=1e-3)
    ids = torch.arange(512).remainder(61).view(4, 128)
    for number in range(1, 5):
        model(input_ids=ids, labels=ids).loss.backward()
        _, took[f"step {number}"] = seconds(optimizer.step)
    assert len(optimizer.turnovers) == 2
    print({what: round(value, 2) for what, value in took.items()})
    assert max(took.values()) < LIMIT_SECONDS, took
