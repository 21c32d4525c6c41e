"""Deltas that vanish in a merged model are counted."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import scale_sft
from scale_sft.model.visibility import visible_fraction
from scale_sft.spiel.selection.spread import FRACTIONS, profiles


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_delta_is_visible_if_it_moves_its_weight_by_half_a_step_of_bfloat16(tiny_model, dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama", dtype), dtype=getattr(torch, dtype))
    sparse = scale_sft.attach(model, density=0.1)
    store = sparse.tuning.store
    assert visible_fraction(sparse) == 0
    for delta in store:
        base = sparse.carrier.base_values(delta.name).float()
        step = torch.ldexp(torch.ones_like(base), torch.frexp(base).exponent - 8)  # 7 bits after the first
        odd = torch.arange(delta.active, device=base.device) % 2
        delta.deltas.copy_(torch.where(odd == 1, 2 * step, 1e-4 * step))
    sparse.carrier.write()
    expected = sum(delta.active // 2 for delta in store) / store.active
    assert visible_fraction(sparse) == pytest.approx(expected, abs=0.005)


def test_profiles_tell_crowded_rows_from_spread_columns() -> None:
    indices = torch.arange(200, 300)  # one row of a hundred columns
    rows, columns = profiles(indices, (100, 100))
    assert rows == [1.0] * len(FRACTIONS)
    assert columns == pytest.approx(list(FRACTIONS))
    assert profiles(indices[:0], (100, 100))[0] == [0.0] * len(FRACTIONS)
