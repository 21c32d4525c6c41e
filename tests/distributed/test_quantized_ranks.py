"""A quantised base on 2 ranks, replicated and sharded: the run of one process on the base dequantised beforehand."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from .test_same_on_any_ranks import assert_same_run, reallocations_of

pytestmark = [pytest.mark.distributed, pytest.mark.quantized, pytest.mark.timeout(900)]

KINDS = ("nf4", "fp4", "int8")
# Evaluates after every step, by loss and by generation: native layers would repack their weights then.
OPTIONS = {"steps": 11, "max_train_examples": 60, "eval_data": "demo", "max_eval_examples": 4, "eval_every_steps": 1}
ANSWERS = {"exact_match_examples": 2, "max_new_tokens": 2}


def dequantize(kind, folder):
    """The demo base with dequantised linear layers."""
    from scale_sft.config.options import ModelConfig
    from scale_sft.model.loading import base_location, load_base, load_model_config
    from scale_sft.model.packed_weights import packed_weights
    from scale_sft.model.quantization import resolve_quantization

    config = ModelConfig(base="demo", dtype="float32", quantization=kind)
    model_config = load_model_config(config)
    model = load_base(config, model_config, torch.device("cpu"), resolve_quantization(config, model_config))
    shutil.copytree(base_location("demo"), folder)
    for file in folder.glob("*.safetensors"):
        tensors = {name: value.float() for name, value in load_file(file).items()}
        for name, packed in packed_weights(model, torch.float32, torch.device("cpu")).items():
            if name in tensors:
                tensors[name] = packed.dequantize(packed.module.weight.data)
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def on_dequantized_bases(launch_runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    runs = [{**OPTIONS, "base": str(dequantize(kind, folder / kind))} for kind in KINDS]
    names = [*KINDS, "packed"]
    packed = {**OPTIONS, "steps": 1, "quantization": KINDS[0]}
    return dict(zip(names, launch_runs(1, False, [*runs, packed]), strict=True))


def hash_of(run):
    return json.loads((run / "adapter" / "adapter_config.json").read_text())["base_hash"]


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
def test_two_ranks_on_a_packed_base_do_what_one_does_on_its_values(launch_runs, on_dequantized_bases, sharded):
    runs = launch_runs(2, sharded, [{**OPTIONS, **ANSWERS, "quantization": kind} for kind in KINDS])
    for kind, run in zip(KINDS, runs, strict=True):  # a run that ends has proved that its packed bytes are as they were
        assert_same_run(on_dequantized_bases[kind], run)
        assert len(reallocations_of(run)) == 3
    assert hash_of(runs[0]) == hash_of(on_dequantized_bases["packed"]), "the same base, wherever it lies"
    assert len({hash_of(run) for run in runs}) == len(KINDS)
