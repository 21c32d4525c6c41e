"""Option deterministic: torch's settings inside a run and after it, and no operation that they refuse on a GPU."""

import os
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scale_sft import train
from scale_sft.config.loading import load
from scale_sft.distributed import candidates
from scale_sft.errors import UserError
from scale_sft.model.determinism import deterministic, refuse_unrepeatable
from scale_sft.model.first_choice import choose_entries
from tests.faults.comparing import losses
from tests.methods import ESTIMATED
from tests.thread_ranks import on_threads

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def settings() -> dict:
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "cudnn": torch.backends.cudnn.deterministic,
        "benchmark": torch.backends.cudnn.benchmark,
        "cudnn attention": torch.backends.cuda.cudnn_sdp_enabled(),
        "inductor": torch._inductor.config.deterministic,
        "workspace": os.environ.get(WORKSPACE),
    }


INSIDE = {
    "algorithms": True,
    "warn only": False,
    "fill": False,
    "cudnn": True,
    "benchmark": False,
    "cudnn attention": False,
    "inductor": True,
    "workspace": ":4096:8",
}


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_computes_under_the_settings_and_leaves_them_as_they_were(run_options, monkeypatch, fails) -> None:
    seen = []

    def run_on(*_):
        seen.append(settings())
        if fails:
            raise UserError("stopped")

    monkeypatch.setattr(train, "run_on", run_on)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = settings()
    try:
        train.run_training(load(None, run_options | {"deterministic": True}))
    except UserError:
        assert fails
    train_again = run_options | {"deterministic": False}
    try:
        train.run_training(load(None, train_again))
    except UserError:
        assert fails
    assert seen == [INSIDE, before] and settings() == before


@pytest.mark.parametrize("found", [None, ":0:0", ":16:8", ":4096:8"])
def test_a_gpu_that_was_used_without_the_setting_of_cublas_is_refused(monkeypatch, found) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.delenv(WORKSPACE, raising=False)
    if found:
        monkeypatch.setenv(WORKSPACE, found)
    before = settings()
    if found in (":16:8", ":4096:8"):
        with deterministic(True):
            assert settings() == INSIDE | {"workspace": found}
    else:
        refused = pytest.raises(UserError, match=f"deterministic: .*{WORKSPACE}={found}.*Fix: {WORKSPACE}=:4096:8")
        with refused, deterministic(True):
            pytest.fail("started")
    assert settings() == before


@pytest.mark.parametrize("option", [{"attention": "flash_attention_2"}, {"compile": "blocks"}])
def test_options_that_do_not_repeat_on_a_gpu_are_refused_there(option) -> None:
    (name,) = option
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    asked = {"density": 0.1, "deterministic": True}
    with pytest.raises(UserError, match=f"deterministic: got true with {name} .*Fix: --{name} "):
        refuse_unrepeatable(load(None, asked | option), gpu)
    refuse_unrepeatable(load(None, asked | option), cpu)
    refuse_unrepeatable(load(None, asked), gpu)
    refuse_unrepeatable(load(None, asked | option | {"deterministic": False}), gpu)


def test_on_a_cpu_a_run_has_the_same_bits_with_it_and_without(train_run, tmp_path) -> None:
    runs = [
        train_run(output_dir=str(tmp_path / str(wanted)), deterministic=wanted, log_every_steps=1)
        for wanted in (True, False)
    ]
    weights = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1] and losses(runs[0]) == losses(runs[1])


# --- operations -----------------------------------------------------------------------------------------------------


def floating(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


REFUSED = {
    # From torch.use_deterministic_algorithms: what raises on CUDA, by operator; and when, where not always.
    "histc": None,
    "put_": None,
    "put": None,
    "kthvalue": None,
    "median": lambda args, kwargs: len(args) > 1 or "dim" in kwargs,
    "nanmedian": lambda args, kwargs: len(args) > 1 or "dim" in kwargs,
    "bincount": lambda args, kwargs: (args[1] if len(args) > 1 else kwargs.get("weights")) is not None,
    "cumsum": lambda args, kwargs: floating(args[0]),
    "cumsum_": lambda args, kwargs: floating(args[0]),
    "cumprod": lambda args, kwargs: floating(args[0]),
    "scatter_reduce": lambda args, kwargs: args[4] == "prod",
    "scatter_reduce_": lambda args, kwargs: args[4] == "prod",
    "index_reduce": None,
    "index_reduce_": None,
    "resize_": lambda args, kwargs: args[0].is_quantized,
    "nll_loss2d_forward": None,
    "nll_loss2d_backward": None,
    "ctc_loss_backward": None,
    "_ctc_loss_backward": None,
    "_embedding_bag_dense_backward": None,
    "avg_pool3d_backward": None,
    "_adaptive_avg_pool2d_backward": None,
    "_adaptive_avg_pool3d_backward": None,
    "adaptive_max_pool2d_backward": None,
    "fractional_max_pool2d_backward": None,
    "fractional_max_pool3d_backward": None,
    "max_unpool2d": None,
    "max_unpool3d": None,
    "upsample_linear1d_backward": None,
    "upsample_bilinear2d_backward": None,
    "upsample_bicubic2d_backward": None,
    "upsample_trilinear3d_backward": None,
    "reflection_pad1d_backward": None,
    "reflection_pad2d_backward": None,
    "reflection_pad3d_backward": None,
    "grid_sampler_2d_backward": None,
    "grid_sampler_3d_backward": None,
    "_cudnn_attention_backward": None,
    "_scaled_dot_product_cudnn_attention_backward": None,
}


class Scan(TorchDispatchMode):
    """Collects the names of all operations, and of those that CUDA would refuse."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()
        self.refused: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        self.names.add(name)
        if name in REFUSED and (REFUSED[name] is None or REFUSED[name](args, kwargs)):
            self.refused.add(name)
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    "call", [lambda x: x.histc(4), lambda x: x.cumsum(0), lambda x: x.median(0), lambda x: x.long().bincount(x)]
)
def test_the_scan_sees_what_cuda_refuses(call) -> None:
    with Scan() as scan:
        call(torch.rand(8))
    assert len(scan.refused) == 1


def test_what_it_allows_it_does_not_count() -> None:
    with Scan() as scan:
        whole = torch.arange(8)
        whole.cumsum(0), whole.bincount(), whole.float().median()
        torch.zeros(8).scatter_reduce_(0, whole, torch.rand(8), "amax")
    assert not scan.refused and {"cumsum", "bincount", "median", "scatter_reduce_"} <= scan.names


CYCLES = {
    "ag": {"method": "ag"},
    "ma": {"method": "ma", "base": "gpt2"},
    "static": ESTIMATED | {"base": "gpt2"},
    "chosen": {"score": "snr", "draw": "sample", "selection_batches": 2, "budget": "global"},
}


@pytest.mark.parametrize("name", CYCLES)
def test_no_operation_of_a_whole_cycle_is_one_that_cuda_refuses(session, tiny_model, pairs_file, name) -> None:
    """Losses, candidates, updates, reallocations, digests and a held-out loss, by the operations that run on a GPU."""
    run = session(
        **{"kernels": "off", "max_grad_norm": 1.0, "gradient_checkpointing": True, "deterministic": True},
        **{"eval_data": str(pairs_file), "max_eval_examples": 4},
        **CYCLES[name] | {"base": str(tiny_model(CYCLES[name].get("base", "llama")))},
    )
    optimizer, reallocations = run.optimizer, 0
    batches = (partial(train.forward_backward, run, run.inputs.order.batch(number)) for number in (1, 2))
    with deterministic(True), Scan() as scan:
        if name == "chosen":
            choose_entries(run.sparse, batches)
        run.tuning.together = True  # as on a GPU
        for step in range(1, 7):
            optimizer.begin()
            train.forward_backward(run, run.inputs.order.batch(step))
            optimizer.reduce()
            optimizer.clip()
            optimizer.update()
            if optimizer.reallocates and optimizer.reallocate():
                reallocations += 1
            optimizer.end()
        run.tuning.digests()
        run.evaluate()
    assert reallocations == (1 if name == "static" else 3)
    assert {"sort", "scatter_"} <= scan.names and not scan.refused


def test_nor_does_the_choice_of_candidates_over_ranks_use_one() -> None:
    gradients = [torch.randn(5000, generator=torch.Generator().manual_seed(rank)) for rank in range(3)]
    scans = [Scan() for _ in gradients]

    def choose(ranks):
        with scans[ranks.rank]:
            return candidates.select_candidates(ranks, gradients[ranks.rank], 100)

    with deterministic(True):
        found = on_threads(3, choose)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert all("bincount" in scan.names and not scan.refused for scan in scans)


@pytest.mark.parametrize("wanted", [True, False])
def test_on_a_gpu_digits_are_counted_by_an_operation_that_is_allowed_there(wanted, monkeypatch) -> None:
    """A GPU is not needed to see which one is called; on a CPU `histc` does not count integers."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    counts = []
    works = nullcontext() if wanted else pytest.raises(RuntimeError, match="hist")
    with deterministic(wanted), Scan() as scan, works:
        counts.append(candidates._histogram(torch.arange(100, dtype=torch.int32), torch.zeros(1).int(), 3, 4))
    assert scan.refused == (set() if wanted else {"histc"})
    assert not wanted or counts[0].tolist() == [16, 16, 16, 16, 16, 16, 4, 0]
