"""Kernels without a GPU: the choice among paths, all kernels in Triton's interpreter, and what they compile to."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from scale_sft.kernels.autotune import PLAIN, GradientPath
from scale_sft.spiel.deltas import DeltaStore
from scale_sft.spiel.indices import Entries
from scale_sft.spiel.recorder import dense_products

ROOT = Path(__file__).parents[3]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Python in a process of its own, with `environment` added; it finds the project first."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)


# --- the choice ---------------------------------------------------------------------------------------------------


class Clock:
    """A timer that runs the work and says what each path is made to cost."""

    def __init__(self, **seconds: float):
        self.seconds, self.used = seconds, []

    def path(self, name: str, compute=dense_products):
        def run(*arguments) -> None:
            self.used.append(name)
            compute(*arguments)

        return run

    def __call__(self, work) -> float:
        work()
        return self.seconds[self.used[-1]]


def chooser(compute=dense_products, **seconds: float) -> tuple[GradientPath, Clock]:
    clock = Clock(**seconds)
    paths = {name: clock.path(name, dense_products if name == PLAIN else compute) for name in seconds}
    return GradientPath("cpu", paths, clock), clock


def a_call(path: GradientPath, tokens: int = 32, count: int = 12) -> torch.Tensor:
    out = torch.zeros(count)
    path.products(torch.ones(tokens, 8), torch.ones(tokens, 16), [(Entries(torch.arange(count), (8, 16)), out)])
    return out


def test_the_fastest_path_is_chosen_and_used() -> None:
    path, clock = chooser(plain=1.0, fast=0.5, faster=0.4)
    assert path.measure(8, 16, 32, [12], torch.float32).chosen == "faster"
    clock.used.clear()
    assert a_call(path).tolist() == [32.0] * 12
    assert clock.used == ["faster"]


@pytest.mark.parametrize("seconds", [2.0, 1.01, 1.0, 0.99])
def test_a_path_that_is_not_clearly_faster_is_left_alone(seconds: float) -> None:
    path, _ = chooser(plain=1.0, other=seconds)
    assert path.measure(8, 16, 32, [12], torch.float32).chosen == PLAIN


def test_a_path_that_fails_or_is_wrong_is_refused_with_the_reason() -> None:
    def wrong(left, right, wanted) -> None:
        dense_products(left, right * 1.1, wanted)

    def broken(left, right, wanted) -> None:
        raise RuntimeError("no compiler")

    for compute, reason in ((wrong, "differs from the dense product by 0.1"), (broken, "RuntimeError: no compiler")):
        path, _ = chooser(compute, plain=1.0, other=0.1)
        measurement = path.measure(8, 16, 32, [12], torch.float32)
        assert measurement.chosen == PLAIN and measurement.refused["other"].startswith(reason)


def test_what_was_not_measured_takes_the_nearest_number_of_tokens_or_the_plain_path() -> None:
    path, clock = chooser(plain=1.0, fast=0.5)
    path.measure(8, 16, 32, [12], torch.float32)
    for tokens, count, expected in ((1000, 12, "fast"), (3, 12, "fast"), (32, 6, "fast"), (32, 1, PLAIN)):
        clock.used.clear()
        a_call(path, tokens, count)
        assert clock.used == [expected]


def test_alike_cases_are_measured_once_and_choices_can_be_kept() -> None:
    path, clock = chooser(plain=1.0, fast=0.5)
    path.measure(8, 16, 32, [12], torch.float32)
    clock.used.clear()
    path.measure(8, 16, 30, [6, 6], torch.float32)
    assert not clock.used
    kept = json.loads(json.dumps(path.state()))
    other, _ = chooser(plain=1.0, fast=2.0)
    other.load_state(kept)
    assert other.measure(8, 16, 32, [12], torch.float32).chosen == "fast"
    without, _ = chooser(plain=1.0)
    without.load_state(kept)
    assert without.measure(8, 16, 32, [12], torch.float32).chosen == PLAIN


def test_all_that_a_run_will_ask_for_is_measured() -> None:
    path, _ = chooser(plain=1.0, fast=0.5)
    store = DeltaStore({"a": (8, 16), "b": (16, 8), "c": (8, 16)}, {"a": 3, "b": 3, "c": 3})
    path.measure_store(store, {}, 32, torch.float32)
    assert len(path.measured) == 2
    path.measure_store(store, dict.fromkeys("abc", 20), 32, torch.float32)
    assert len(path.measured) == 4


def test_nothing_is_drawn_for_what_is_measured_already_and_the_same_for_the_same_seed(monkeypatch) -> None:
    """A model has hundreds of weights and few shapes: factors of all of them would take minutes."""
    drawn, randn = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **options: drawn.append(randn(*a, **options)) or drawn[-1])
    store = DeltaStore(dict.fromkeys("abcd", (8, 16)), dict.fromkeys("abcd", 3))
    for _ in range(2):
        path, _ = chooser(plain=1.0, fast=0.5)
        path.measure_store(store, dict.fromkeys("abcd", 20), 32, torch.bfloat16)
    assert [(*factor.shape, factor.dtype) for factor in drawn[:2]] == [(32, n, torch.bfloat16) for n in (8, 16)]
    assert len(drawn) == 8  # two cases in each of two rounds, two factors
    assert all(map(torch.equal, drawn[:4], drawn[4:]))


def test_without_a_gpu_there_is_only_the_plain_path_and_triton_is_not_imported() -> None:
    code = (
        "import sys, torch; from scale_sft.kernels.autotune import GradientPath; path = GradientPath('cpu');"
        "assert list(path.paths) == ['plain']; path.measure(8, 70000, 4, [9], torch.float32);"
        "assert 'triton' not in sys.modules"
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
A100_SHARED_BYTES = 163 << 10


@pytest.fixture(params=[A100, H100])
def compiling(request, tmp_path, monkeypatch):
    """(capability, kernels compiled so far): kernels are compiled for it and not launched; no cache of the user's."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if not triton.__version__.startswith("3.7."):
        pytest.skip(f"poses as a driver of Triton 3.7; this is {triton.__version__}")
    from scale_sft.kernels.gpu import picked, sampled, updates
    from scale_sft.kernels.gpu import tiled as tiles

    compiled = []
    for module in (picked, sampled, tiles, updates):
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
def test_the_product_runs_on_tensor_cores_and_picks_entries_through_shared_memory(compiling) -> None:
    from scale_sft.kernels.gpu.tiled import TILES, product_entries

    capability, compiled = compiling
    for tile in TILES:
        product_entries(*some_product(256, 256, 512, 2048), tile)
    for kernel in compiled:
        ptx = kernel.asm["ptx"]
        assert ("wgmma.mma_async" if capability == H100 else "mma.sync") in ptx
        assert "cp.async" in ptx  # the next tokens are loaded meanwhile
        assert kernel.metadata.shared <= A100_SHARED_BYTES and spilled_bytes(kernel) <= 64
        assert ptx.count("shfl.sync") < 200  # not picked by exchanges between threads


@needs_triton
@pytest.mark.slow
def test_dot_products_and_updates_spill_nothing_and_updates_round_as_ieee_754_asks(compiling) -> None:
    from scale_sft.kernels.gpu.picked import picked_entries
    from scale_sft.kernels.gpu.sampled import sampled_dots
    from scale_sft.kernels.gpu.updates import Written, adamw_write, sm3_write

    _, compiled = compiling
    for path in (picked_entries, sampled_dots):
        path(*some_product(256, 256, 512, 2048))
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
    from scale_sft.kernels.gpu.sampled import sampled_dots
    from scale_sft.kernels.gpu.tiled import product_entries
    from scale_sft.kernels.gpu.updates import Written, adamw_write, sm3_write

    for path in (picked_entries, sampled_dots, product_entries):
        path(*some_product(tokens, rows, width, count, dtype))
    entries, state = Entries(torch.arange(count), (rows, width)), torch.zeros(4, count)
    one = Written(torch.zeros(1), torch.zeros(1), start=0, first=0)
    for written in (None, one):
        common = {"decay": 1.0, "eps": 1e-8, "entries": entries, "written": written}
        adamw_write(*state, torch.zeros(count, dtype=torch.int16), *torch.zeros(2, 1), betas=(0.9, 0.99), **common)
        sm3_write(*state[:2], torch.zeros(rows), torch.zeros(width), learning_rate=0.1, **common)


# --- in a run -------------------------------------------------------------------------------------------------------


def test_without_a_gpu_a_run_that_asks_for_its_kernels_is_that_with_those_of_a_cpu(train_run, tmp_path) -> None:
    runs = [train_run(kernels=choice, output_dir=str(tmp_path / choice)) for choice in ("cpu", "auto")]
    one, other = ((run / "adapter" / "adapter_model.safetensors").read_bytes() for run in runs)
    assert one == other


def test_the_paths_that_were_chosen_are_kept_by_a_checkpoint(train_run, tmp_path, monkeypatch) -> None:
    """Measured anew they might be others, and sums end in other bits."""
    from scale_sft.kernels import autotune as choice

    clock = Clock(plain=1.0, fast=0.5)
    monkeypatch.setattr(choice, "paths_of", lambda device: {name: clock.path(name) for name in clock.seconds})
    monkeypatch.setattr(choice, "_EventTimer", lambda device: clock)
    monkeypatch.setattr("scale_sft.model.sparse_model.fuses", lambda *_: False)
    options = {"kernels": "auto", "save_every_steps": 2, "output_dir": str(tmp_path / "run"), "keep_last": 9}
    run = train_run(**options)
    kept = json.loads((run / "checkpoints" / "step_000002" / "state.json").read_text())["gradient_paths"]
    assert set(kept.values()) == {"fast"}
    clock.seconds["fast"] = 2.0  # slower now; the run goes on with it all the same
    clock.used.clear()
    again = {**options, "output_dir": str(tmp_path / "again"), "resume": str(run / "checkpoints" / "step_000004")}
    train_run(**again)
    assert "fast" in clock.used
