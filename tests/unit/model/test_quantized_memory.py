"""Peak memory of a training step on a quantised base beside bfloat16, by the allocator's own record.

pytest -m slow -s tests/unit/model/test_quantized_memory.py     # prints the figures
"""

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from scale_sft.config.loading import load
from scale_sft.distributed.cluster import Cluster
from scale_sft.train import forward_backward
from scale_sft.training import assemble
from scale_sft.training.inputs import read_inputs

pytestmark = [pytest.mark.slow, pytest.mark.quantized, pytest.mark.timeout(600)]
MIB = 1 << 20


def step_bytes(session) -> int:
    """Peak of what one step allocates beyond what lies there before it, in bytes: forward, backward, update."""
    batch = session.inputs.order.batch(2)
    session.tuning.begin_step(2)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        forward_backward(session, batch)
        session.tuning.update(1e-3)
    now = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def measure(name: str, options: dict, tmp_path: Path, capsys) -> dict[str, tuple[int, int, int, int]]:
    """By quantisation: bytes of the base, of the delta state, of a step beyond both, and of the largest layer."""
    figures = {}
    for kind in ("none", "nf4", "int8"):
        config = load(None, options | {"quantization": kind, "output_dir": str(tmp_path / kind), "dtype": "bfloat16"})
        inputs = read_inputs(config)
        cluster = Cluster.start(sharded=False, dtype=inputs.dtype)
        try:
            session = assemble.assemble(inputs, cluster)
            session.tuning.begin_step(1)
            forward_backward(session, inputs.order.batch(1))  # the first pass fills caches of the libraries
            session.tuning.recorder.end_step()  # what lives for a step is gone before the next is measured
            base = sum(parameter.nbytes for parameter in session.model.parameters())
            if kind != "none":
                base += sum(packed.state_bytes for packed in session.resident.packed.values())
            state = sum(session.tuning.state_bytes().values()) + session.resident.bytes
            largest = max(target.numel for target in session.targets) * inputs.dtype.itemsize
            figures[kind] = (base, state, step_bytes(session), largest)
        finally:
            cluster.close()
    with capsys.disabled():
        print(f"\n{name}: MiB of base, delta state, step beyond both, together; largest layer {largest / MIB:.1f}")
        for kind, (base, state, step, _) in figures.items():
            label = "bfloat16" if kind == "none" else kind
            print(f"  {label:9}", *(f"{size / MIB:8.1f}" for size in (base, state, step, base + state + step)))
    return figures


def assert_one_layer_more(figures) -> None:
    """A step on a packed base costs at most one dequantised layer, and its unpacked scales, more than in bfloat16."""
    _, _, plain, largest = figures["none"]
    for kind in ("nf4", "int8"):
        base, state, step, _ = figures[kind]
        assert step <= plain + 1.1 * largest, kind
        assert base < figures["none"][0] and state < figures["none"][1]


def test_a_step_on_llama_7m_needs_one_layer_more_at_most(shared, run_options, tmp_path, capsys):
    options = run_options | {"base": str(shared("models/llama-7m")), "max_length": 64}
    assert_one_layer_more(measure("llama-7m", options, tmp_path, capsys))


def test_a_step_on_a_model_of_160_mb_needs_one_layer_more_at_most(tokenizer, run_options, tmp_path, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "model"
    config = LlamaConfig(
        vocab_size=259, hidden_size=1280, intermediate_size=3456, num_hidden_layers=4, num_attention_heads=10,
        max_position_embeddings=128, pad_token_id=258,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert 150e6 < size < 170e6
    del model
    options = run_options | {"base": str(folder), "global_batch_size": 2, "method": "ma", "density": 0.01}
    assert_one_layer_more(measure(f"random model of {size / 1e6:.0f} MB", options, tmp_path, capsys))
