"""Kernels without a GPU: the rule that chooses them, all of them in Triton's interpreter, and what they compile to."""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from scale_sft.kernels import backends
from scale_sft.kernels.gpu import usable
from scale_sft.spiel.deltas import DeltaStore
from scale_sft.spiel.indices import Entries
from scale_sft.spiel.optimizers import SM3

ROOT = Path(__file__).parents[3]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Python in a process of its own, with `environment` added; it finds the project first."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)


# --- the rule -----------------------------------------------------------------------------------------------------

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("kernels", ["off", "cpu", "auto"])
@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("reason", [None, "no driver"])
def test_triton_is_used_exactly_where_it_is_asked_for_and_runs(kernels, device, reason, monkeypatch) -> None:
    tried = []
    monkeypatch.setattr(usable, "why_not", lambda device: tried.append(device) or reason)
    asked = device is GPU and kernels == "auto"
    assert backends.triton_used(device, kernels) is (asked and reason is None)
    if device is GPU:
        assert backends.why_plain(device, kernels) == ("slower than Triton: no driver" if asked and reason else None)
    assert bool(tried) is asked


def test_kernels_are_tried_once_and_whatever_goes_wrong_is_a_reason_for_plain_torch(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    tried = []

    def trial(outcome):
        def run(device):
            tried.append(device)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(usable, "_right", run)
        usable._why_not.cache_clear()
        return [usable.why_not(torch.device("cuda", 0)) for _ in range(2)]

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert trial(True) == [None] * 2 and trial(False) == ["a kernel gave other numbers than torch"] * 2
    assert trial(RuntimeError("no compiler\nat all")) == ["RuntimeError: no compiler"] * 2
    assert len(tried) == 3  # one for each outcome
    assert "Fix: torch.cuda.set_device(1)" in usable.why_not(torch.device("cuda", 1)) and len(tried) == 3
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert trial(True) == ["Triton is not installed"] * 2
    usable._why_not.cache_clear()


def test_without_a_gpu_triton_is_not_even_imported() -> None:
    code = (
        "import sys, torch; from scale_sft.kernels import backends; cpu = torch.device('cpu');"
        "backends.products_of(cpu, 'auto'), backends.why_plain(cpu, 'auto'); assert 'triton' not in sys.modules"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


# --- the kernels --------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.interpreter
@pytest.mark.timeout(600)
def test_all_kernels_are_exact_in_tritons_interpreter() -> None:
    """The tests of tests/gpu, in a process of their own: Triton looks for the switch when it is imported."""
    command = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"]
    done = run_python(*command, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


class Compiling:
    """Takes a kernel's place: compiles what would be launched, for a GPU that need not be there."""

    def __init__(self, kernel, compiled: list):
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid: tuple):
        return lambda *arguments, **options: self.compiled.append(self.kernel.warmup(*arguments, grid=grid, **options))


class NoGpu:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.get_current_target = lambda: GPUTarget("cuda", capability, 32)
        self.get_current_device = lambda: capability  # compiled kernels are kept by device
        self.get_current_stream = lambda device: 0


A100, H100 = 80, 90
DRIVERS_POSED_AS = ((3, 6), (3, 7))


@pytest.fixture(params=[A100, H100])
def compiling(request, tmp_path, monkeypatch):
    """(capability, kernels compiled so far): kernels are compiled for it and not launched; no cache of the user's."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if tuple(map(int, triton.__version__.split(".")[:2])) not in DRIVERS_POSED_AS:
        pytest.skip(f"poses as a driver of Triton 3.6 and 3.7; this is {triton.__version__}")
    from scale_sft.kernels.gpu import picked, updates

    compiled = []
    for module in (picked, updates):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Compiling(getattr(module, name), compiled))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", NoGpu(request.param))
    return request.param, compiled


def spilled_bytes(kernel) -> int:
    """Bytes per thread that did not fit into registers."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [tool, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage).group(1))


def some_product(tokens: int, rows: int, width: int, count: int, dtype: torch.dtype = torch.bfloat16):
    """(left, right, two times `count` entries that are wanted), of which only shapes and dtypes matter."""
    entries = Entries(torch.arange(count), (rows, width))
    return (
        torch.zeros(tokens, rows).to(dtype),
        torch.zeros(tokens, width).to(dtype),
        [(entries, torch.zeros(count))] * 2,
    )


@needs_triton
@pytest.mark.slow
def test_kernels_spill_nothing_and_updates_round_as_ieee_754_asks(compiling) -> None:
    from scale_sft.kernels.gpu.picked import picked_entries
    from scale_sft.kernels.gpu.updates import Written, adamw_write, sm3_write

    _, compiled = compiling
    picked_entries(*some_product(256, 256, 512, 2048))
    entries, state = Entries(torch.arange(2048), (256, 512)), torch.zeros(4, 2048)
    common = {"decay": 1.0, "eps": 1e-8, "entries": entries}
    common["written"] = Written(torch.zeros(256, 512, dtype=torch.bfloat16), torch.zeros(2048, dtype=torch.bfloat16))
    adamw_write(*state, torch.zeros(2048, dtype=torch.uint8), *torch.zeros(2, 3), betas=(0.9, 0.99), **common)
    sm3_write(*state[:2], torch.zeros(256), torch.zeros(512), learning_rate=0.1, **common)
    assert not any(map(spilled_bytes, compiled))
    for kernel in compiled[-2:]:
        ptx = kernel.asm["ptx"]
        assert "div.rn.f32" in ptx and "sqrt.rn.f32" in ptx and "fma.rn.f32" not in ptx
        assert re.search(r"cvt\.rn\.bf16", ptx)  # the effective value, to the nearest


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("compiling", [H100], indirect=True)
@pytest.mark.parametrize(
    ("tokens", "rows", "width", "count", "dtype"),
    [(100, 1, 128, 50, torch.bfloat16), (1, 64, 1, 30, torch.float16), (33, 17, 70000, 1, torch.float32)],
)
def test_sizes_of_one_and_wide_weights_compile_too(compiling, tokens, rows, width, count, dtype) -> None:
    """A size of 1 is a constant to Triton, of another type than other sizes."""
    from scale_sft.kernels.gpu.picked import picked_entries
    from scale_sft.kernels.gpu.updates import Written, adamw_write, sm3_write

    picked_entries(*some_product(tokens, rows, width, count, dtype))
    entries, state = Entries(torch.arange(count), (rows, width)), torch.zeros(4, count)
    one = Written(torch.zeros(1), torch.zeros(1), start=0, first=0)
    for written in (None, one):
        common = {"decay": 1.0, "eps": 1e-8, "entries": entries, "written": written}
        adamw_write(*state, torch.zeros(count, dtype=torch.int16), *torch.zeros(2, 1), betas=(0.9, 0.99), **common)
        sm3_write(*state[:2], torch.zeros(rows), torch.zeros(width), learning_rate=0.1, **common)


LARGEST_START_SECONDS = 5
SHAPES_OF_7B = [(4096, 4096), (11008, 4096), (4096, 11008)]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("compiling", [H100], indirect=True)
def test_a_start_compiles_one_kernel_to_pick_whatever_the_shapes_and_takes_seconds(compiling) -> None:
    from scale_sft.kernels.gpu.picked import picked_entries

    _, compiled = compiling
    began = time.perf_counter()
    for rows, width in SHAPES_OF_7B:
        for count in (1000, rows * width // 50):  # alone, and with candidates
            picked_entries(*some_product(2, rows, width, count))
    assert len({kernel.hash for kernel in compiled}) == 1
    assert time.perf_counter() - began < LARGEST_START_SECONDS


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("compiling", [H100], indirect=True)
def test_weights_at_any_place_of_the_flat_buffers_share_their_kernels(compiling) -> None:
    """Triton makes a kernel of each combination of pointers to multiples of 16 bytes and others."""
    from scale_sft.kernels.gpu.picked import picked_entries
    from scale_sft.kernels.gpu.updates import Written, adamw_write, sm3_write

    _, compiled = compiling
    shapes = {str(number): (32, 48) for number in range(9)}
    counts = {name: [13, 16, 7, 24, 32][number % 5] for number, name in enumerate(shapes)}
    store = DeltaStore(shapes, counts)
    sm3, moments = SM3(store), torch.zeros(2, store.active)
    kernels: dict[str, set] = {"pick": set(), "adamw": set(), "sm3": set()}
    for delta in store:
        part, base = store.entries_of(delta.name), torch.zeros(delta.active)
        own = {"entries": delta.entries, "written": Written(torch.zeros(32, 48), base), "decay": 1.0, "eps": 1e-8}
        gradients, state = store.flat[part], sm3.state_of(delta.name)
        picked_entries(torch.zeros(2, 32), torch.zeros(2, 48), [(delta.entries, gradients)])
        kernels["pick"].add(compiled.pop().hash)
        tables, (mean, square) = torch.zeros(2, 1), moments[:, part]
        adamw_write(delta.deltas, gradients, mean, square, delta.cohort, *tables, betas=(0.9, 0.99), **own)
        kernels["adamw"].add(compiled.pop().hash)
        sm3_write(delta.deltas, gradients, state["row"], state["col"], learning_rate=0.1, **own)
        kernels["sm3"].add(compiled.pop().hash)
    assert {name: len(found) for name, found in kernels.items()} == {"pick": 1, "adamw": 2, "sm3": 1}


# --- in a run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernels", "reason", "fused", "said"),
    [
        ("auto", None, True, "entries of weight gradients picked in one pass; deltas updated and written in one pass"),
        ("auto", None, False, "entries of weight gradients picked in one pass; deltas updated, then written"),
        ("auto", "no driver", False, "using plain torch, which is slower than Triton: no driver"),
        ("cpu", None, False, None),
        ("off", None, False, None),
    ],
)
def test_a_run_on_a_gpu_says_which_kernels_it_uses(kernels, reason, fused, said, session, monkeypatch) -> None:
    one = session(kernels=kernels)
    monkeypatch.setattr(one.cluster, "device", GPU)
    monkeypatch.setattr(one.sparse, "fused", fused)
    monkeypatch.setattr(usable, "why_not", lambda device: reason)
    assert one.describe_kernels() == ([f"kernels: {said}"] if said else [])


def test_without_a_gpu_a_run_that_asks_for_its_kernels_is_that_with_those_of_a_cpu(train_run, tmp_path) -> None:
    runs = [train_run(kernels=choice, output_dir=str(tmp_path / choice)) for choice in ("cpu", "auto")]
    one, other = ((run / "adapter" / "adapter_model.safetensors").read_bytes() for run in runs)
    assert one == other
