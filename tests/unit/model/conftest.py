"""What the tests of models share."""

import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture
def load(tiny_model):
    """(dtype="float32", architecture="llama") -> a freshly loaded model."""

    def load_one(dtype: str = "float32", architecture: str = "llama"):
        return AutoModelForCausalLM.from_pretrained(tiny_model(architecture, dtype), dtype=getattr(torch, dtype))

    return load_one
