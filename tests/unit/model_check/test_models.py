"""A representative dozen of model types, tiny and random: trained, gradients as autograd's, merged bit for bit.

`scale-sft models check` checks them all, in more ways, and writes docs/models.md.
"""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from scale_sft.adapters.apply import apply_adapter
from scale_sft.adapters.format import Adapter
from scale_sft.adapters.merge import merge
from scale_sft.model_check.checks import Checker
from scale_sft.model_check.findings import COLUMNS, Findings
from scale_sft.model_check.page import page
from scale_sft.model_check.tiny import tiny_config, types

DOZEN = {
    "falcon": "a subclass of nn.Linear",
    "gemma2": "soft caps, a norm on both sides",
    "bloom": "no sdpa, biases from position",
    "mamba": "a weight that is used past its forward",
    "mixtral": "experts and a router",
    "gpt_oss": "experts with biases, eager attention",
    "phimoe": "a router that samples",
    "nemotron_h": "other names on disk",
    "hrm_text": "four weights fused into one tensor on disk",
    "qwen3_vl": "vision and language",
    "llava": "vision and language, other names on disk",
    "mllama": "blocks that only images reach",
}


@pytest.mark.parametrize("model_type", DOZEN)
def test_a_type_trains_as_autograd_says_and_merges_bit_for_bit(model_type: str, tmp_path) -> None:
    checker = Checker(model_type, tmp_path, partial(tiny_config, model_type))
    assert checker.run(("gradient", "merge")).failures == [], checker.found.cells
    allowed = {"phimoe": "with allow_randomness"}
    assert checker.found.cells["trains"] == allowed.get(model_type, "yes"), checker.found.remark
    assert checker.found.cells["merge"] == "identical"


def test_the_page_has_a_row_for_each_type_and_names_what_failed() -> None:
    good = Findings("llama", dict.fromkeys(COLUMNS, "yes"))
    bad = Findings("odd", {"trains": "FAILED: ValueError: a | b"}, "why")
    text = page([bad, good])
    assert "2 types were tried: 1 train, 1 of them without a failure in any column." in text
    assert text.index("| llama | yes") < text.index("| odd | FAILED: ValueError: a / b")
    assert bad.failures == ["trains"] and not good.failures
    assert len(types()) == len(set(types())) > 90 and {*DOZEN} <= {*types()}


def test_a_weight_that_a_model_keeps_in_another_dtype_keeps_it_in_adapter_and_merge(tmp_path) -> None:
    checker = Checker("hunyuan_v1_moe", tmp_path, partial(tiny_config, "hunyuan_v1_moe"))
    checker.make()
    AutoModelForCausalLM.from_pretrained(checker.base, dtype=torch.bfloat16).save_pretrained(checker.base)
    checker._run(target_modules=["q_proj", "wg"])  # routers are frozen unless they are named
    adapter = Adapter.load(tmp_path / "run" / "adapter")
    gates = {f"model.layers.{n}.mlp.gate.wg.weight": "float32" for n in (0, 1)}
    assert adapter.info["dtype"] == "bfloat16" and adapter.info["dtypes"] == gates
    merged = merge(adapter, tmp_path / "merged")
    in_place, from_disk = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (checker.base, merged))
    apply_adapter(in_place, adapter)
    expected = in_place.state_dict()
    for name, weight in from_disk.state_dict().items():
        assert weight.dtype is expected[name].dtype and torch.equal(weight, expected[name]), name
