"""A trained model that changes as fast as a test wants: steps of a real optimizer, or deltas set by hand."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import scale_sft
from scale_sft.model.resident import bits_of

SCHEDULE = {"method": "ag", "density": 0.05, "total_steps": 200, "update_interval_steps": 2, "estimation_steps": 1}
IDS = torch.tensor([[7, 3, 200, 45]])


def load(base: Path, dtype: torch.dtype = torch.bfloat16):
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()


class Trainer:
    """A model, its deltas and its optimizer."""

    def __init__(self, base: Path, dtype: torch.dtype = torch.bfloat16, lr: float = 1e-2, **options):
        self.model = load(base, dtype)
        self.sparse = scale_sft.attach(self.model, **{**SCHEDULE, **options})
        self.optimizer = self.sparse.optimizer(lr=lr)
        self.steps = 0

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.steps += 1
            ids = torch.randint(0, 256, (2, 8), generator=torch.Generator().manual_seed(self.steps))
            self.model(input_ids=ids, labels=ids).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def set_deltas(self, value: float) -> None:
        self.sparse.tuning.store.flat.fill_(value)
        self.sparse.carrier.write()


def same_weights(left, right) -> bool:
    """Compare all parameters of two models of one kind, bit for bit."""
    found = dict(left.named_parameters())
    names = [name for name, _ in right.named_parameters() if name in found]
    return len(names) > 5 and all(
        torch.equal(bits_of(found[n].data), bits_of(right.get_parameter(n).data)) for n in names
    )
