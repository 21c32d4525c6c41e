"""Prompts are answered in batches only where padding on their left is proved to change nothing."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, RwkvConfig

from scale_sft.errors import UserError
from scale_sft.evaluation.padding import ignores_left_padding

SETTINGS = GenerationConfig(do_sample=False, use_cache=True, max_new_tokens=3, pad_token_id=258, bos_token_id=256)
RWKV = RwkvConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2, context_length=64, use_cache=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_masks_its_padding_answers_in_batches(tiny_model, architecture: str, dtype: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(architecture, dtype), dtype=dtype).eval()
    assert ignores_left_padding(model, SETTINGS, torch.device("cpu"), synced=False)


def test_a_model_that_reads_padding_as_text_answers_one_prompt_at_a_time() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(RWKV).eval()
    assert not ignores_left_padding(model, SETTINGS, torch.device("cpu"), synced=False)


def test_a_model_that_cannot_generate_is_one_error(tiny_model) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    model.prepare_inputs_for_generation = None
    with pytest.raises(UserError, match="exact_match_examples: got a base that cannot generate text"):
        ignores_left_padding(model, SETTINGS, torch.device("cpu"), synced=False)
