"""Adapters without training: random entries and deltas on a tiny model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from scale_sft.adapters.format import Adapter
from scale_sft.model.experts import weight_named
from scale_sft.model.fingerprints import combine_fingerprints, fingerprint
from scale_sft.model.resident import WeightPart
from scale_sft.model.targets import find_targets
from scale_sft.spiel.budgets import budget
from scale_sft.spiel.seeding import random_indices


def load(base: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()


def make_adapter(
    base: Path, folder: Path, *, dtype: str = "float32", targets=None, seed: int = 0, scale: float = 0.1, **size
) -> Path:
    """A saved adapter of `base` whose deltas are about as large as the weights; `size`: density, rank_equivalent ..."""
    model = load(base, getattr(torch, dtype))
    found = find_targets(model, targets)
    shapes = {target.name: target.shape for target in found}
    prints = {target.name: fingerprint(WeightPart.whole(weight_named(model, target.name))) for target in found}
    generator = torch.Generator().manual_seed(seed)
    indices = {
        name: random_indices(shapes[name], count, seed, name).int()
        for name, count in budget(shapes, **(size or {"density": 0.05})).items()
    }
    deltas = {name: scale * torch.randn(found.shape, generator=generator) for name, found in indices.items()}
    info = {
        "base": str(base), "revision": None, "dtype": dtype, "method": "ag",
        "base_hash": combine_fingerprints(prints, shapes),
        "base_fingerprints": {name: f"{a:016x}{b:016x}" for name, (a, b) in prints.items()},
    }  # fmt: skip
    Adapter(indices, deltas, shapes, info).save(folder)
    return folder
