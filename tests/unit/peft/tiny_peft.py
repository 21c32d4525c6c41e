"""A tiny model, its batches, and the adapter that tests give it."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from scale_sft.peft import SpielConfig

SCHEDULE = {"method": "ag", "update_interval_steps": 4, "estimation_steps": 2}


def tiny(dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**(config | sizes))).to(dtype)


def batches(count: int, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 64, (4, 12), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def wrapped(model: torch.nn.Module, **options) -> PeftModel:
    return get_peft_model(model, SpielConfig(**({"density": 0.05, "total_steps": 12, **SCHEDULE} | options)))


def train(model: PeftModel, steps: int, optimizer: torch.optim.Optimizer | None = None, **options):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
    for batch in batches(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def session_of(model: torch.nn.Module):
    return model.base_model.sessions["default"]


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The base layers' weights as they are now, by name in the base."""
    return {layer.weight_name: layer.weight.detach().clone() for layer in model.base_model.spiel_layers()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
