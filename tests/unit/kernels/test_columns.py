"""Dot products of sampled columns, in C, give the entries that the whole product would give."""

import subprocess
import sys

import pytest
import torch

from scale_sft.bench.peak import peak_of
from scale_sft.kernels.cpu import compile as native
from scale_sft.kernels.cpu import sampled_columns as columns
from scale_sft.kernels.cpu.sampled_columns import SampledColumns
from scale_sft.spiel.deltas import DeltaStore
from scale_sft.spiel.indices import Entries
from scale_sft.spiel.recorder import GradientRecorder, pick
from scale_sft.spiel.schedules import Phase

ANY_SHARE = 10**6


@pytest.fixture
def sampled(c_kernels, monkeypatch) -> SampledColumns:
    """On any processor, and however many entries are asked for."""
    monkeypatch.setattr(columns, "has_matrix_units", lambda: False)
    monkeypatch.setattr(columns, "LARGEST_SHARE", ANY_SHARE)
    return SampledColumns()


@pytest.fixture(params=[1, 2, 3])
def threads(request, set_threads):
    set_threads(request.param)


def factors(
    tokens: int, rows: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return tuple(torch.randn(tokens, n, generator=generator).to(dtype) for n in (rows, width))


def some(rows: int, width: int, count: int, seed: int = 0) -> Entries:
    chosen = torch.randperm(rows * width, generator=torch.Generator().manual_seed(seed))[:count]
    return Entries(chosen.sort().values, (rows, width))


def exact(left: torch.Tensor, right: torch.Tensor, entries: Entries) -> torch.Tensor:
    return (left.double().t() @ right.double()).view(-1)[entries.flat().long()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "rows", "width", "count"),
    [(1, 3, 5, 1), (37, 9, 40, 11), (300, 64, 48, 3072), (513, 33, 100, 700), (5, 400, 2, 7), (3, 2, 70_000, 900)],
)
def test_entries_are_those_of_the_exact_product(tokens, rows, width, count, dtype, sampled, threads):
    left, right = factors(tokens, rows, width, dtype)
    entries = some(rows, width, count)
    out = torch.ones(count)
    assert sampled(left, right, [(entries, out)])
    torch.testing.assert_close(out.double() - 1, exact(left, right, entries), rtol=2e-5, atol=5e-5)


def test_all_that_is_wanted_is_added_to_what_is_there_in_its_own_dtype(sampled):
    left, right = factors(64, 32, 16)
    active, candidates = some(32, 16, 30), some(32, 16, 50, seed=1)
    out = torch.full((30,), 2.0), torch.full((50,), 3.0, dtype=torch.bfloat16)
    sampled(left, right, [(active, out[0]), (candidates, out[1])])
    torch.testing.assert_close(out[0], (2 + exact(left, right, active)).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[1], (3 + exact(left, right, candidates)).bfloat16())


def test_factors_may_lie_in_memory_as_they_like(sampled):
    left, right = factors(48, 20, 24)
    entries = some(20, 24, 60)
    apart = torch.stack((left, left), dim=2)[..., 0]
    strided, plain = torch.zeros(60), torch.zeros(60)
    sampled(apart, right.t().contiguous().t(), [(entries, strided)])
    sampled(left, right, [(entries, plain)])
    assert torch.equal(strided, plain)
    ones = torch.ones(1, 1).expand(48, 20)  # what autograd gives for the gradient of a sum
    sampled(ones, right, [(entries, plain.zero_())])
    torch.testing.assert_close(plain, right.sum(0)[entries.flat().long() % 24])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_is_the_same_bit_for_bit_for_any_number_of_threads(dtype, sampled, set_threads):
    left, right = factors(512, 256, 256, dtype)
    entries, results = some(256, 256, 3000), []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(torch.zeros(3000))
        sampled(left, right, [(entries, results[-1])])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_nothing_of_the_size_of_the_weight_is_made(sampled):
    left, right = factors(64, 4096, 4096)
    entries, out = some(4096, 4096, 2000), torch.zeros(2000)
    sampled(*factors(64, 64, 64), [(some(64, 64, 9), torch.zeros(9))])  # what the first call loads does not count
    peak = peak_of(lambda: sampled(left, right, [(entries, out)]), torch.device("cpu"))
    assert peak.added < 4096 * 4096  # bytes; the product has four times as many


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_entries_are_sampled_and_many_are_left_to_the_whole_product(dtype, sampled, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(columns, "has_matrix_units", lambda: False)
    left, right = factors(512, 512, 512, dtype)
    few, many = 512 * 512 // 10, 512 * 512 // 4
    assert sampled.pays(left, right, few) and not sampled.pays(left, right, many)
    out = torch.zeros(many)
    assert not sampled(left, right, [(some(512, 512, many), out)]) and not out.any()
    assert not sampled.pays(left[:8], right[:8], few)  # as much work as for 256 tokens
    assert not sampled.pays(left.to("meta"), right.to("meta"), 1)
    assert not any(sampled.pays(left.to(other), right.to(other), 1) for other in (torch.float64, torch.float16))
    monkeypatch.setattr(columns, "has_matrix_units", lambda: True)
    assert sampled.pays(left, right, few) is (dtype is torch.float32)


def test_factors_and_entries_that_do_not_belong_together_are_refused(sampled):
    left, right = factors(8, 4, 6)
    for wrong in (factors(8, 5, 6), (left, right[:7]), (left, right.bfloat16())):
        with pytest.raises(ValueError, match="expected|the factors give"):
            sampled(*wrong, [(some(4, 6, 3), torch.zeros(3))])
    with pytest.raises(ValueError, match="gradients of 3 entries"):
        sampled(left, right, [(some(4, 6, 3), torch.zeros(4))])


def test_the_recorder_forms_the_whole_product_only_where_all_of_it_is_looked_at(sampled, monkeypatch):
    store = DeltaStore({"w": (256, 512)}, {"w": 900}, seed=0)
    recorder = GradientRecorder(store, {"w": 700}, estimation_steps=1, products=sampled)
    left, right = factors(512, 256, 512)
    whole = []
    form = GradientRecorder._product
    monkeypatch.setattr(GradientRecorder, "_product", lambda *args: whole.append(1) or form(*args))

    def record(phase: Phase, *, watch: bool = False) -> bool:
        recorder.begin_step(phase, watch=watch)
        whole.clear()
        recorder.record_product("w", left, right)
        recorder.end_step()
        torch.testing.assert_close(
            recorder.gradients.double(), exact(left, right, store["w"].entries), rtol=1e-4, atol=1e-4
        )
        return bool(whole)

    assert record(Phase.OFF, watch=True)  # looks for dead gradients
    assert not record(Phase.OFF)
    assert record(Phase.PROPOSE)
    proposed = recorder.candidates["w"].mean.clone()
    dense = torch.zeros(700)
    pick(left.t() @ right, [(recorder.candidates["w"].entries, dense)])
    torch.testing.assert_close(proposed, dense)
    assert not record(Phase.ESTIMATE)
    torch.testing.assert_close(recorder.candidates["w"].mean, 2 * dense, rtol=1e-4, atol=1e-4)


# --- the compiler ---------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Compile anew with another compiler, a shell script or a name, and in a folder to look at."""
    monkeypatch.setattr(native.tempfile, "tempdir", str(tmp_path))
    yield lambda name: monkeypatch.setenv("CC", str(name))
    native._made.cache_clear()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "no C compiler '.*' .set CC to one"),
        ("echo 'error: unknown argument: -march=native' >&2; exit 1", "failed: error: unknown argument"),
        ('while [ $# -gt 0 ]; do [ "$1" = -o ] && echo nothing > "$2"; shift; done', "OSError"),
    ],
)
def test_without_a_compiler_that_works_a_run_is_plain_torch_and_says_why(
    script, said, compiler, tmp_path, train_run, capsys
):
    made = tmp_path / "compiler"
    if script:
        made.write_text(f"#!/bin/sh\n{script}\n")
        made.chmod(0o755)
    compiler(made)
    native._made.cache_clear()
    with pytest.raises(native.NoCompiler, match=said):
        native.library()
    runs = [train_run(kernels=choice, output_dir=str(tmp_path / choice)) for choice in ("off", "cpu")]
    assert "using plain torch, which is slower than C" in capsys.readouterr().out
    one, other = ((run / "adapter" / "adapter_model.safetensors").read_bytes() for run in runs)
    assert one == other
    assert not list(tmp_path.glob("scale-sft-*"))


@pytest.mark.parametrize(
    ("cc", "folder", "said"),
    [
        ('gcc "', None, "No closing quotation"),
        ("{tmp}/mute", None, "failed: no reason given"),
        ("{tmp}/foreign", None, "failed: erreur"),
        ("cc", "{tmp}/missing", "FileNotFoundError"),
    ],
)
def test_whatever_goes_wrong_with_a_compiler_is_a_reason_and_no_crash(
    cc, folder, said, compiler, tmp_path, monkeypatch
):
    for name, line in (("mute", "exit 1"), ("foreign", r"printf 'erreur \351' >&2; exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    compiler(cc.format(tmp=tmp_path))
    if folder:
        monkeypatch.setattr(native.tempfile, "tempdir", folder.format(tmp=tmp_path))
    native._made.cache_clear()
    assert said in native.why_not()
    with pytest.raises(native.NoCompiler, match=said):
        native.library()


def test_a_blank_cc_means_the_usual_compiler(sampled, compiler):
    compiler(" ")
    native._made.cache_clear()
    assert native.why_not() is None


def test_deltas_are_updated_in_c_only_where_all_ranks_can(sampled, session, monkeypatch):
    """The same sums end in other bits in torch, and deltas would drift apart."""
    assert session().sparse.fused
    others = lambda self, value: [value, False] if isinstance(value, bool) else [value]
    monkeypatch.setattr("scale_sft.distributed.cluster.Cluster.gather_objects", others)
    assert not session().sparse.fused


def test_one_openmp_runtime_serves_torch_and_the_kernels(sampled):
    """Two would have two sets of threads on the same cores."""
    code = (
        "import torch; from scale_sft.kernels.cpu.compile import library; library();"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line}))"
    )
    if sys.platform != "linux":
        pytest.skip("looks into /proc")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert int(said) == 1, said
