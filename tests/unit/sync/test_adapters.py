"""Patches in the hands of vLLM, SGLang and TRL: what we hand over, held against their own sources where they are installed."""

import ast
import importlib.util
import inspect
import queue
import sys
import types
from dataclasses import make_dataclass
from pathlib import Path

import pytest
import torch
from servers import FusedServer
from torch import nn
from trainers import Trainer, load, same_weights

from scale_sft import sync
from scale_sft.sync import sglang, trl, vllm
from scale_sft.sync.patches import SyncError

PROTOCOL = ("init_weight_transfer", "pause", "send_weights", "resume", "destroy")


@pytest.fixture
def trainer(tiny_model):
    return Trainer(tiny_model("llama", "bfloat16"))


@pytest.fixture
def base(tiny_model):
    return load(tiny_model("llama", "bfloat16"))


def source_of(module: str) -> Path:
    """Find the file of an installed module without importing it, or skip the test."""
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed: nothing to hold ours against")
    return Path(spec.submodule_search_locations[0]).joinpath(*rest).with_suffix(".py")


def classes(path: Path) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)}


def fields(kind: ast.ClassDef) -> list[str]:
    return [
        node.target.id
        for node in kind.body
        if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation)
    ]


def methods(kind: ast.ClassDef) -> dict[str, list[str]]:
    found = [node for node in kind.body if isinstance(node, ast.FunctionDef)]
    return {node.name: [argument.arg for argument in node.args.args + node.args.kwonlyargs][1:] for node in found}


# --- vLLM -------------------------------------------------------------------------------------------------------------


def test_what_we_call_in_vllm_is_there() -> None:
    engine = classes(source_of("vllm.distributed.weight_transfer.sparse_nccl_engine"))
    assert fields(engine["SparseWeightPatch"]) == ["name", "indices", "values", "full_shape"]
    assert fields(engine["SparseNCCLTrainerInitInfo"]) == ["master_address", "master_port", "world_size"]
    assert methods(engine["SparseNCCLTrainerWeightTransferEngine"])["send_weights"] == ["patches"]
    folder = "vllm.distributed.weight_transfer"
    factory = classes(source_of(f"{folder}.factory"))["WeightTransferTrainerFactory"]
    assert methods(factory)["trainer_init"] == ["init_info", "client", "source"]
    client = classes(source_of(f"{folder}.clients"))["HTTPVLLMWeightSyncClient"]
    assert methods(client)["__init__"] == ["base_url", "timeout"]
    routes = source_of("vllm.entrypoints.rl.online.api_router").read_text()
    assert all(
        f'@router.{verb}("/{path}")' in routes
        for verb, path in (("post", "pause"), ("post", "resume"), ("get", "get_world_size"))
    )


def test_vllms_own_loader_writes_our_patches_as_ours_does(trainer, base) -> None:
    path = source_of("vllm.model_executor.model_loader.checkpoint_weight_patch")
    spec = importlib.util.spec_from_file_location("their_checkpoint_weight_patch", path)
    theirs = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = theirs  # a NamedTuple looks its module up
    spec.loader.exec_module(theirs)
    for server in (FusedServer(base), FusedServer(base, 0, 2), FusedServer(base, 1, 2)):
        trainer.step()
        patches = sync.full(trainer.sparse)
        make = lambda p: theirs.CheckpointWeightPatch(p.name, p.shape, p.values.dtype, p.values, p.indices)
        theirs.load_checkpoint_weight_patches(server, [make(patch) for patch in patches])
        expected = FusedServer(trainer.model, server.rank, server.size)
        assert all(torch.equal(server.held[key], expected.held[key]) for key in server.held)


@pytest.fixture
def pretend_vllm(monkeypatch):
    """(field names) -> a stand-in for vLLM whose `SparseWeightPatch` has them."""

    def install(*names: str) -> None:
        parts = ["vllm", "distributed", "weight_transfer", "sparse_nccl_engine"]
        for depth in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), types.ModuleType(".".join(parts[:depth])))
        sys.modules[".".join(parts)].SparseWeightPatch = make_dataclass("SparseWeightPatch", names)

    return install


def test_patches_become_vllms(trainer, pretend_vllm) -> None:
    pretend_vllm("name", "indices", "values", "full_shape")
    trainer.step()
    patches = sync.changed(trainer.sparse)
    for theirs, ours in zip(vllm.weight_patches(patches), patches, strict=True):
        assert (theirs.name, theirs.full_shape) == (ours.name, ours.shape)
        assert theirs.indices.dtype is torch.int32 and theirs.values.dtype is torch.bfloat16
        assert theirs.indices.dim() == theirs.values.dim() == 1
    pretend_vllm("name", "indices", "values")
    with pytest.raises(SyncError, match=r"checkpoint coordinates.*pip install 'vllm>=0.33'"):
        vllm.weight_patches(patches)


def test_what_vllm_cannot_take_is_refused_before_it_is_sent(trainer) -> None:
    trainer.step()
    patches = sync.changed(trainer.sparse)
    patches.weights[0].values[0] = float("nan")
    with pytest.raises(SyncError, match="NaN"):
        vllm.weight_patches(patches)
    wide = sync.WeightPatch("w", (1 << 16, 1 << 15), torch.tensor([1 << 31]), torch.zeros(1))
    with pytest.raises(SyncError, match=r"2,147,483,648 entries, vLLM takes int32"):
        vllm.weight_patches(sync.Patches((wide,), {}, "", 1, 0, "", ""))
    with pytest.raises(SyncError, match="call connect"):
        vllm.VllmServer("http://127.0.0.1:9").send(patches)
    with pytest.raises(SyncError, match=r"127.0.0.1:9/pause\?mode=keep, expected an answer of vLLM"):
        vllm.VllmServer("http://127.0.0.1:9", timeout_seconds=5).pause()


# --- SGLang -----------------------------------------------------------------------------------------------------------


class Engine:
    """An engine as SGLang's: it imports the loader by its path, and refuses weights outside a session."""

    def __init__(self, model: nn.Module):
        self.model, self.session = model, False

    def begin_weight_update(self):
        self.session = True
        return True, "Success"

    def end_weight_update(self):
        self.session = False
        return True, "Success"

    def update_weights_from_tensor(self, named_tensors, load_format=None, flush_cache=True):
        if not self.session:
            return False, "update_weights_from_tensor must run between begin_weight_update() and end_weight_update()"
        module, name = load_format.rsplit(".", 1)
        getattr(importlib.import_module(module), name)(self.model, named_tensors)
        return True, "Success"


def test_sglangs_loader_applies_what_send_packs(trainer, base) -> None:
    engine = Engine(FusedServer(base))
    for _ in range(3):
        trainer.step()
        sglang.send(engine, sync.changed(trainer.sparse))
    expected = FusedServer(trainer.model)
    assert all(torch.equal(engine.model.held[key], expected.held[key]) for key in expected.held)
    with pytest.raises(SyncError, match="got a tensor 'lm_head.weight'"):
        sglang.load(engine.model, [("lm_head.weight", torch.zeros(1))])
    engine.begin_weight_update = lambda: (False, "busy")
    with pytest.raises(SyncError, match="got 'busy' from SGLang"):
        sglang.send(engine, sync.full(trainer.sparse))


def test_what_we_call_in_sglang_is_there() -> None:
    engine = methods(classes(source_of("sglang.srt.entrypoints.engine"))["Engine"])
    assert engine["update_weights_from_tensor"] == ["named_tensors", "load_format", "flush_cache"]
    assert "begin_weight_update" in engine and "end_weight_update" in engine
    updater = source_of("sglang.srt.model_executor.model_runner_components.weight_updater").read_text()
    assert "custom_loader(self.get_model(), named_tensors)" in updater


# --- TRL --------------------------------------------------------------------------------------------------------------


def test_our_transfer_has_the_methods_of_trls_protocol() -> None:
    theirs = methods(classes(source_of("trl.experimental.async_grpo.async_grpo_trainer"))["WeightTransferProtocol"])
    ours = {name: list(inspect.signature(getattr(trl.SparseWeightTransfer, name)).parameters)[1:] for name in PROTOCOL}
    assert theirs == ours


class Direct:
    """A connection to a model in this process."""

    def __init__(self, model: nn.Module):
        self.model, self.calls, self.broken = model, [], False

    def connect(self):
        self.calls.append("connect")

    def pause(self):
        self.calls.append("pause")

    def send(self, patches):
        if self.broken:
            raise OSError("the server is gone")
        self.calls.append(patches.since)
        sync.apply(self.model, patches.to_bytes())

    def resume(self):
        self.calls.append("resume")

    def close(self):
        self.calls.append("close")


def test_trls_trainer_drives_our_transfer(trainer, base) -> None:
    connection = Direct(base)
    transfer = trl.SparseWeightTransfer(connection)
    with pytest.raises(SyncError, match="transfer.model = trainer.model"):
        transfer.send_weights(iter(()))
    transfer.model = trainer.sparse
    seen = []
    transfer.init_weight_transfer()
    for _ in range(3):  # as `_sync_weight_merged` does it
        trainer.step()
        transfer.pause()
        transfer.send_weights((name, seen.append(name)) for name, _ in base.named_parameters())
        transfer.resume()
        assert same_weights(base, trainer.model)
    assert len(seen) == 3 * len(list(base.parameters()))  # other processes wait in collectives for each of these
    connection.broken = True
    with pytest.raises(OSError, match="gone"):
        transfer.send_weights(iter(()))
    connection.broken = False
    with pytest.raises(SyncError, match="restart the server with the base"):
        transfer.send_weights(iter(()))
    transfer.destroy()
    assert connection.calls == ["connect", *["pause", 0, "resume", "pause", 1, "resume", "pause", 2, "resume"], "close"]


def test_trls_own_async_trainer_syncs_through_our_transfer(tiny_model, base, tmp_path, monkeypatch) -> None:
    """Its training needs a GPU and a server; what it does for a sync runs here."""
    module = pytest.importorskip("trl.experimental.async_grpo.async_grpo_trainer")
    from datasets import Dataset

    from scale_sft import peft

    class Worker:
        rollout_buffer, metrics_queue = queue.Queue(), queue.Queue()
        update_model_version = start = stop = check_health = lambda self, *_: None

    monkeypatch.setattr(module, "get_peak_flops_per_device", lambda *_: 1.0)
    monkeypatch.setattr(module, "VLLMClient", lambda *_: None)
    transfer = trl.SparseWeightTransfer(Direct(base))
    trainer = module.AsyncGRPOTrainer(
        str(tiny_model("llama", "bfloat16")),
        reward_funcs=lambda **_: [0.0],
        args=module.AsyncGRPOConfig(output_dir=str(tmp_path), max_steps=4, report_to=[], dtype="bfloat16", bf16=False),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "hi"}]}]),
        peft_config=peft.SpielConfig(density=0.05, total_steps=4),
        rollout_worker=Worker(),
        weight_transfer=transfer,
    )
    transfer.model = trainer.model
    for _ in range(2):
        with torch.no_grad():
            for name, values in trainer.model.named_parameters():
                if ".spiel_values." in name:
                    values.add_(0.5)
        peft.write(trainer.model)
        trainer._sync_weight()
        whole = trainer.model.get_base_model().state_dict()
        for name, weight in base.named_parameters():
            assert torch.equal(weight, whole.get(name, whole.get(name.replace(".weight", ".base_layer.weight"))))
    assert sync.version(base) == trainer.model_version == 2
