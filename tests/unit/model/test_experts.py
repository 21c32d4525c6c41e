"""Experts fused into one parameter: names, and views of their slices."""

import pytest
import torch

from scale_sft.model.experts import fused_weights, named_weights, parse_slice, weight_named
from tests.unit.model.mixtures import KINDS, mixture


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_is_a_view_of_its_parameter_under_a_name_that_parses_back(kind):
    model = mixture(kind)
    fused = list(fused_weights(model))
    assert fused
    weights = named_weights(model)
    for one in fused:
        for number, name in enumerate(one.slice_names()):
            assert parse_slice(name) == (one.name, number)
            found = weight_named(model, name)
            assert found.is_contiguous() and tuple(found.shape) == one.slice_shape
            assert found.data_ptr() == one.weight[number].data_ptr() == weights[name].data_ptr()
            assert torch.equal(found, one.weight[number])


def test_the_name_of_a_whole_parameter_is_no_slice():
    assert parse_slice("model.layers.0.mlp.up_proj.weight") is None
