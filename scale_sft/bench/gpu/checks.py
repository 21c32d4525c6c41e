"""The device itself, the tests of the kernels, the bits of attention, and the loss over a large vocabulary."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from scale_sft.bench.peak import peak_of, seconds_of
from scale_sft.bench.workload import Base, Batches
from scale_sft.kernels import backends
from scale_sft.model.loss import token_loss_sum

from .lab import Lab, Skipped

MIB = 1 << 20
KERNEL_TESTS = Path(__file__).resolve().parents[3] / "tests" / "gpu"
_RIGHT = ["test_recorded_entries.py", "test_fused_updates.py", "test_fused_step.py", "test_candidates_on_gpu.py"]
_PROCESSES = 8  # most of the time is Triton's compiler
_TRIALS = 4


def device(lab: Lab) -> None:
    """Report the device, and how fast it multiplies and copies."""
    size = 512 if lab.sizes.tiny else 8192
    a, b = (torch.randn(size, size, device=lab.device, dtype=torch.bfloat16) for _ in range(2))
    product, copied = _best(lambda: a @ b, lab), _best(lambda: a.copy_(b), lab)
    figures: dict[str, Any] = {
        "cores": os.cpu_count(),
        "products_tflops": round(2 * size**3 / product / 1e12, 2),
        "copy_gb_per_s": round(2 * a.nbytes / copied / 1e9, 1),
        "without_kernels_because": backends.why_plain(lab.device, "auto"),
    }
    if lab.on_gpu:
        found = torch.cuda.get_device_properties(lab.device)
        figures |= {"capability": f"{found.major}.{found.minor}", "memory_gib": round(found.total_memory / 2**30, 1)}
        figures |= {"cuda": torch.version.cuda, "hip": torch.version.hip}
    lab.say("device", figures)


def kernels(lab: Lab) -> None:
    """Run the tests of the kernels, without whole runs and races; in Triton's interpreter on a CPU."""
    if not KERNEL_TESTS.is_dir():
        raise Skipped("the tests come with a clone, not with the package")
    for needed in ("pytest", "triton"):
        if find_spec(needed) is None:
            raise Skipped(f"{needed} is not installed")
    if lab.sizes.tiny:
        lab.say("right", {"passed": _pytest(lab, _RIGHT[:1])})
        return
    lab.say("right", {"passed": _pytest(lab, _RIGHT, *(["-n", str(_PROCESSES)] if find_spec("xdist") else []))})
    lab.say("fast", {"passed": _pytest(lab, ["test_speed.py"])})


def _pytest(lab: Lab, files: Sequence[str], *options: str) -> str:
    """Run files of `KERNEL_TESTS`; returns pytest's last line.

    Raises:
        RuntimeError: a test failed, with the end of what pytest printed.
    """
    root = KERNEL_TESTS.parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=line", *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)])}
    environment |= {} if lab.on_gpu else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [*command, *(str(KERNEL_TESTS / name) for name in files if (KERNEL_TESTS / name).is_file())],
        cwd=root,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["pytest printed nothing"]
    if done.returncode:
        raise RuntimeError("\n".join(lines[-12:]))
    return lines[-1]


def attention(lab: Lab) -> None:
    """Report whether the backward pass of torch's attention repeats its bits, for each gradient."""
    for what, found in attention_bits(lab).items():
        lab.say(what, found)


def attention_bits(lab: Lab) -> dict[str, dict[str, bool]]:
    """Find which gradients of attention are the same in several trials, without a mask and with one."""
    length = 64 if lab.sizes.tiny else lab.sizes.length
    factors = [
        torch.randn(2, 32, length, 128, device=lab.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    ]
    mask = torch.ones(length, length, dtype=torch.bool, device=lab.device).tril().expand(2, 1, length, length)
    ways: dict[str, dict[str, Any]] = {"causal": {"is_causal": True}, "masked": {"attn_mask": mask}}
    return {what: _same_bits(factors, how) for what, how in ways.items()}


def _same_bits(factors: list[Tensor], how: dict[str, Any]) -> dict[str, bool]:
    given = torch.randn_like(factors[0])
    query, key, value = factors
    work = lambda: torch.autograd.grad(scaled_dot_product_attention(query, key, value, **how), factors, given)
    first, *others = [work() for _ in range(_TRIALS)]
    return {
        name: all(torch.equal(first[place], other[place]) for other in others)
        for place, name in enumerate(("dq", "dk", "dv"))
    }


def vocabulary(lab: Lab) -> None:
    """Report the loss over a large vocabulary: what it adds to a model's forward and backward pass."""
    sizes = lab.sizes
    micro_batch = max(1, sizes.vocabulary_tokens // sizes.length)
    folder = lab.base_folder(num_hidden_layers=1, vocab_size=sizes.vocabulary)
    case = lab.case(base=str(folder), micro_batch=micro_batch)
    base = Base(case, lab.device)
    model: Any = base.load()
    model.enable_input_require_grads()
    batches = Batches(case, sizes.vocabulary, lab.device)
    batch = batches.take(0)
    inputs = {name: value for name, value in batch.items() if name != "labels"}

    def with_loss() -> None:
        token_loss_sum(model, batch, batches.target_tokens).backward()

    def without() -> None:
        model.model(**inputs, use_cache=False).last_hidden_state.sum().backward()

    figures: dict[str, Any] = {"vocabulary": sizes.vocabulary, "tokens": micro_batch * sizes.length}
    for what, work in (("", with_loss), ("_without_loss", without)):
        work()
        figures |= {f"ms{what}": round(1e3 * _best(work, lab), 3)}
        figures |= {f"peak_mib{what}": round(peak_of(work, lab.device).added / MIB, 1)}
    lab.say("loss", figures)


def _best(work: Any, lab: Lab) -> float:
    work()
    return min(seconds_of(work, lab.device) for _ in range(lab.few(5)))
