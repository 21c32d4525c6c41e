"""What a whole step of ours costs on a GPU, compared with dense training, with LoRA, and on a base in 4 bits.

In Triton's interpreter (see test_recorded_entries.py) the same comparisons run on a tiny model and assert no time.
"""

import json
import statistics
from pathlib import Path

import pytest
import torch
from kernel_tools import DEVICE, INTERPRETED, marks
from rich.console import Console

import scale_sft
from scale_sft.bench.contestants import CONTESTANTS
from scale_sft.bench.step import race as step
from scale_sft.bench.workload import Base, Batches, Case

pytestmark = [*marks, pytest.mark.timeout(600)]
LAYERS = 4  # of a model of 7 billion parameters
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
TINY |= {"vocab_size": 300, "num_hidden_layers": 1}
ROUNDS, WARM_UP_STEPS = (2, 1) if INTERPRETED else (25, 3)
LARGEST_SHARE_OF_FULL = 1.03
LARGEST_TAX_OF_FOUR_BITS = 1.10


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """The folder of a Llama as wide as one of 7 billion parameters, with fewer layers and without weights."""
    config = json.loads((Path(scale_sft.__file__).parent / "assets" / "shapes" / "7b" / "config.json").read_text())
    config |= TINY if INTERPRETED else {"num_hidden_layers": LAYERS}
    folder = tmp_path_factory.mktemp("base")
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def case(base: str, *, gradient_checkpointing: bool, quantization: str = "none") -> Case:
    """4,096 tokens a step, as many parameters as LoRA of rank 16 has."""
    sizes = {"length": 8, "micro_batch": 2, "rank": 2} if INTERPRETED else {"length": 1024, "micro_batch": 4}
    shared = {"base": base, "dtype": "bfloat16", "kernels": "auto", **sizes}
    return Case(**shared, gradient_checkpointing=gradient_checkpointing, quantization=quantization)


@pytest.mark.parametrize("method", ["ag", "ma"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_step_takes_what_dense_gradients_take_and_less_than_lora_of_as_many_parameters(
    base, tmp_path, method: str, gradient_checkpointing: bool
) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    ours = f"ours-{method}"
    effort = step.Effort(rounds=ROUNDS, warm_up_steps=WARM_UP_STEPS, breakdown=False, together=True)
    cases = [case(base, gradient_checkpointing=gradient_checkpointing)]
    rows = step.run(cases, [ours, "peft-lora", "full"], effort, tmp_path, Console(quiet=True))
    results = {row["settings"]["contestant"]: row["result"] for row in rows}
    assert results[ours]["trainable"] == results["peft-lora"]["trainable"]
    relative = {peer: results[ours]["relative"][peer]["median"] for peer in ("full", "peft-lora")}
    print(relative)
    assert INTERPRETED or relative["full"] <= LARGEST_SHARE_OF_FULL
    assert INTERPRETED or relative["peft-lora"] < 1


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_base_in_four_bits_costs_a_tenth_of_a_step_at_most(base, gradient_checkpointing: bool) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    device, ready = torch.device(DEVICE), {}
    for quantization in ("none", "nf4"):
        one = case(base, gradient_checkpointing=gradient_checkpointing, quantization=quantization)
        start = Base(one, device)
        batches = Batches(one, start.model_config.vocab_size, device)
        ours = CONTESTANTS["ours-ag"](start)
        assert INTERPRETED or ours.fused
        ours.warm_up(batches)
        for number in range(WARM_UP_STEPS):
            ours.step(batches, number)
        ready[quantization] = ours
    ratios = []
    for number in range(ROUNDS):  # two steps of one round are compared, each first in every other round
        order = sorted(ready, reverse=number % 2 == 1)
        seconds = {name: step.timed_step(ready[name], batches, number, device).wall for name in order}
        ratios.append(seconds["nf4"] / seconds["none"])
    print(statistics.median(ratios), ratios)
    assert INTERPRETED or statistics.median(ratios) <= LARGEST_TAX_OF_FOUR_BITS
