"""Prompts are shared only where attention reaches over the whole row."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from scale_sft.objective import layouts


@pytest.mark.parametrize(
    ("settings", "shared"),
    [
        ({}, True),
        ({"sliding_window": None}, True),
        ({"sliding_window": 64}, True),
        ({"sliding_window": 63}, False),
        ({"sliding_window": 8, "use_sliding_window": False}, True),
        ({"attention_chunk_size": 8}, False),
        ({"window_size": 8}, False),  # GPT-Neo, whose layers cut by place in the row, whatever the mask
    ],
    ids=str,
)
def test_a_row_longer_than_a_window_keeps_sides_apart(monkeypatch, settings, shared):
    monkeypatch.setattr(layouts, "shares", lambda *_: True)
    model = nn.Linear(1, 1)
    model.config = SimpleNamespace(**settings)
    layout, note = layouts.layout_of(model, row_tokens=64, attention="sdpa", pairs=True, device=torch.device("cpu"))
    assert (layout.shared, note is None) == (shared, shared)
