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

from scale_sft.kernels.choice import PLAIN, GradientPath
from scale_sft.spiel.delta import DeltaStore
from scale_sft.spiel.entries import Entries
from scale_sft.spiel.sampling import dense_products

ROOT = Path(__file__).parents[2]
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


def test_without_a_gpu_there_is_only_the_plain_path_and_triton_is_not_imported() -> None:
    code = (
        "import sys, torch; from scale_sft.kernels.choice import GradientPath; path = GradientPath('cpu');"
        "assert list(path.paths) == ['plain']; path.measure(8, 70000, 4, [9], torch.float32);"
        "assert 'triton' not in sys.modules"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


# --- the kernels --------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.slow
def test_all_kernels_are_exact_in_tritons_interpreter() -> None:
    """The tests of tests/gpu, in a process of their own: Triton looks for the switch when it is imported."""
    done = run_python("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def compile_for(capability: int, kernel, constants: dict, options: dict, **types: str) -> tuple[str, int, int, int]:
    """(PTX, bytes of shared memory, registers, bytes of spilled ones) of a kernel for a GPU that need not be there.

    Pointers, strides and sizes are taken to be divisible by 16, as those of models are.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    even = [n for n, type_ in types.items() if type_[0] == "*" or n.endswith("stride") or n in ("rows", "width")]
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in even},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return compiled.asm["ptx"], compiled.metadata.shared, registers, spilled


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """`compile_for`, leaving nothing in the user's cache."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if not triton.__version__.startswith("3.7."):
        pytest.skip(f"asks Triton 3.7 to compile for a GPU that is not there; this is {triton.__version__}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return compile_for


ENTRIES_OF_A_WEIGHT = {"row_starts": "*i32", "columns": "*u16"}
A100, H100 = 80, 90
A100_SHARED_BYTES = 163 << 10


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [A100, H100])
def test_the_product_runs_on_tensor_cores_and_picks_entries_through_shared_memory(compiler, capability: int) -> None:
    from scale_sft.kernels.tiles import TILES, tile_kernel

    types = dict.fromkeys(("left", "right"), "*bf16") | dict.fromkeys(("out", "out_2"), "*fp32") | ENTRIES_OF_A_WEIGHT
    types |= {"row_starts_2": "*i32", "columns_2": "*u16"}
    types |= dict.fromkeys(("tokens", "rows", "width", "left_stride", "right_stride", "bisections"), "i32")
    for tile in TILES:
        constants = {"SECOND": True, "PRECISION": "ieee", "PICKS": 16, "GROUP": 8}
        constants |= {"BLOCK_R": tile.block_r, "BLOCK_C": tile.block_c, "BLOCK_T": tile.block_t}
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        ptx, shared_bytes, _, spilled_bytes = compiler(capability, tile_kernel, constants, options, **types)
        assert ("wgmma.mma_async" if capability == H100 else "mma.sync") in ptx
        assert "cp.async" in ptx  # the next tokens are loaded meanwhile
        assert shared_bytes <= A100_SHARED_BYTES and spilled_bytes <= 64
        assert ptx.count("shfl.sync") < 200  # not picked by exchanges between threads


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [A100, H100])
def test_dot_products_and_updates_spill_nothing_and_updates_round_as_ieee_754_asks(compiler, capability: int) -> None:
    from scale_sft.kernels.picked import pick_kernel
    from scale_sft.kernels.sampled import ENTRIES, TOKENS, dot_kernel
    from scale_sft.kernels.updates import BLOCK, ROW_BLOCK, adamw_kernel, sm3_kernel

    constants = {"ENTRIES": ENTRIES, "TOKENS": TOKENS}
    types = {"left": "*bf16", "right": "*bf16", "sums": "*fp32", "token_stride": "i32", **ENTRIES_OF_A_WEIGHT}
    *_, spilled_bytes = compiler(capability, dot_kernel, constants, {}, **types)
    assert spilled_bytes == 0

    types = {"gradient": "*bf16", "out": "*fp32", "width": "i32", **ENTRIES_OF_A_WEIGHT}
    *_, spilled_bytes = compiler(capability, pick_kernel, {"BLOCK": 128}, {}, **types)
    assert spilled_bytes == 0

    common = dict.fromkeys(("deltas", "gradients", "scale"), "*fp32") | dict.fromkeys(("weight", "base"), "*bf16")
    common |= {"width": "i32", "part_start": "i64", "part_size": "i32", "first": "i32"} | ENTRIES_OF_A_WEIGHT
    common |= dict.fromkeys(("decay", "eps"), "fp32")
    adamw = dict.fromkeys(("exp_avg", "exp_avg_sq", "step_sizes", "denominators"), "*fp32") | {"cohort": "*u8"}
    adamw |= {"entries": "i32", "rows": "i32"} | dict.fromkeys(("weight1", "beta2", "weight2"), "fp32")
    sm3 = dict.fromkeys(("row_accumulator", "old_columns", "column_accumulator"), "*fp32") | {"step_size": "fp32"}
    for kernel, types, block in ((adamw_kernel, adamw, BLOCK), (sm3_kernel, sm3, ROW_BLOCK)):
        constants = {"SCALED": True, "WRITES": True, "BLOCK": block}
        ptx, _, _, spilled_bytes = compiler(
            capability, kernel, constants, {"enable_fp_fusion": False}, **common, **types
        )
        assert spilled_bytes == 0
        assert "div.rn.f32" in ptx and "sqrt.rn.f32" in ptx and "fma.rn.f32" not in ptx
        assert re.search(r"cvt\.rn\.bf16", ptx)  # the effective value, to the nearest
