"""What forked ranks do: several small runs over one process group, since starting one costs more than such a run."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import torch

from scale_sft import train
from scale_sft.config.loading import load
from scale_sft.distributed.cluster import Cluster
from scale_sft.distributed.exit import end_process
from scale_sft.training import lifecycle
from scale_sft.training.inputs import read_inputs
from scale_sft.training.run_folder import RunFolder


def run_all(plan: list[dict[str, Any]], report: bool) -> None:
    """Train once for the options of each item of `plan`; with `report` the first writes one, which takes longer."""
    inputs = [read_inputs(load(None, options)) for options in plan]
    sharded = inputs[0].placement.sharded
    config = inputs[0].config.model
    cluster = Cluster.start(sharded=sharded, dtype=torch.float32, ds_config=config.ds_config, timeout_seconds=120)
    try:
        for number, each in enumerate(inputs):
            if number or not report:
                lifecycle.write_report = lambda folder: folder / "report.html"
            train.run_on(cluster, each, RunFolder(each.config.run.output_dir))
    finally:
        cluster.close()
    end_process()


def run_all_with_their_own_operations(plan: list[dict[str, Any]], report: bool) -> None:
    """`run_all`, where compiled blocks run the operations of the model, and so compute the same bits."""
    from scale_sft.model import compiled_blocks

    compiled_blocks.BACKEND = "eager"
    run_all(plan, report)


def end_at_once() -> NoReturn:
    """End a process whose group another library has started: `end_process`, which knows the groups of runs only.

    To return would destroy the last references to the group, while a thread of it may wait for the interpreter.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def run_command(arguments: list[str]) -> None:
    """Run `scale-sft` with these arguments."""
    from scale_sft.cli.main import main

    main(arguments)


def replay_trace(arguments: list[str]) -> None:
    """Run tests/conformance/run_trace.py with these arguments."""
    import runpy
    import sys

    sys.argv = ["run_trace.py", *arguments]
    runpy.run_path("tests/conformance/run_trace.py", run_name="__main__")


def plain_loop(method: str, folder: str) -> None:
    """A loop over `scale_sft.attach`: this rank's share of each batch, and what came of it into a file."""
    from pathlib import Path

    from transformers import AutoModelForCausalLM

    import scale_sft

    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:
        torch.distributed.init_process_group("gloo")
    base = Path(scale_sft.__file__).parent / "assets" / "demo" / "base"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    sparse = scale_sft.attach(
        model,
        method=method,
        density=0.02,
        total_steps=8,
        update_interval_steps=3,
        estimation_steps=2,
        max_grad_norm=1.0,
    )
    optimizer = sparse.optimizer(lr=1e-2)
    for number in range(1, 9):
        rows = torch.randint(
            0, model.config.vocab_size, (4, 24), generator=torch.Generator().manual_seed(number)
        ).chunk(size)[rank]
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
    sparse.save(Path(folder) / f"adapter{size}")
    store = sparse.tuning.store
    found = {"indices": {d.name: d.indices for d in store}, "deltas": {d.name: d.deltas.clone() for d in store}}
    found["saved"] = (Path(folder) / f"adapter{size}" / "adapter_model.safetensors").stat().st_size
    torch.save(found, Path(folder) / f"{rank}of{size}.pt")
    if size > 1:
        torch.distributed.destroy_process_group()
    end_at_once()


def under_library(library: str, late: bool, folder: str) -> None:
    """Train under another library's launcher, attached before or after it initialises torch.distributed."""
    from pathlib import Path

    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    import scale_sft

    base = Path(scale_sft.__file__).parent / "assets" / "demo" / "base"
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def begin() -> Any:
        if library == "trainer":
            return TrainingArguments(
                folder, max_steps=8, per_device_train_batch_size=4 // size, use_cpu=True, report_to=[], seed=1,
                disable_tqdm=True, max_grad_norm=0.0, save_strategy="no", dataloader_pin_memory=False,
                logging_strategy="no",
            )  # fmt: skip
        if library == "accelerate":
            from accelerate import Accelerator

            return Accelerator(cpu=True)
        if size > 1:
            torch.distributed.init_process_group("gloo")
        return None

    started = None if late else begin()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    sparse = scale_sft.attach(
        model, method="ag", density=0.02, total_steps=8, update_interval_steps=3, estimation_steps=3, max_grad_norm=1.0
    )
    optimizer = sparse.optimizer(lr=1e-2)
    if late:
        started = begin()
    batches = [
        torch.randint(0, model.config.vocab_size, (4, 24), generator=torch.Generator().manual_seed(number))
        for number in range(8)
    ]
    if library == "trainer":
        rows = [{"input_ids": row, "labels": row} for batch in batches for row in batch]
        Trainer(model, started, train_dataset=rows, optimizers=(optimizer, None)).train()
    else:
        forward, stepping = started.prepare(model, optimizer) if started else (model, optimizer)
        for batch in batches:
            rows = batch.chunk(size)[rank]
            forward(input_ids=rows, labels=rows).loss.backward()
            stepping.step()
            stepping.zero_grad()
    store = sparse.tuning.store
    found = {"indices": {d.name: d.indices for d in store}, "deltas": {d.name: d.deltas.clone() for d in store}}
    torch.save(found, Path(folder) / f"{rank}of{size}.pt")
    sparse.save(Path(folder) / f"adapter{size}")
    sparse.detach()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    end_at_once()


def under_peft(folder: str) -> None:
    """Train a SpIEL adapter of PEFT under TRL; leave this rank's entries."""
    from pathlib import Path

    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    import scale_sft
    from scale_sft.peft import SpielConfig

    base = Path(scale_sft.__file__).parent / "assets" / "demo" / "base"
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = SpielConfig(method="ag", density=0.02, update_interval_steps=3, estimation_steps=3)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (64, 24), generator=generator)
    options = {
        "output_dir": folder, "max_steps": 8, "per_device_train_batch_size": 4 // size, "use_cpu": True, "seed": 1,
        "report_to": [], "disable_tqdm": True, "save_strategy": "no", "dataloader_pin_memory": False,
        "logging_strategy": "no", "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
    }  # fmt: skip
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    trainer = SFTTrainer(
        model, SFTConfig(**options, bf16=False), train_dataset=rows, peft_config=config,
        processing_class=AutoTokenizer.from_pretrained(base),
    )  # fmt: skip
    trainer.train()
    tuner = trainer.model.base_model
    found = {
        "indices": {layer.weight_name: layer.spiel_indices["default"] for layer in tuner.spiel_layers()},
        "deltas": {layer.weight_name: layer.spiel_values["default"].detach().clone() for layer in tuner.spiel_layers()},
        "reallocations": tuner.sessions["default"].reallocations,
    }
    torch.save(found, Path(folder) / f"{rank}of{size}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    end_at_once()


def peft_in_shards(folder: str) -> None:
    """Cut a PEFT model into FSDP2's shards, and leave what its callback says to that."""
    import types
    from pathlib import Path

    from peft import get_peft_model
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    import scale_sft
    from scale_sft.errors import UserError
    from scale_sft.peft import SpielCallback, SpielConfig

    torch.distributed.init_process_group("gloo")
    base = Path(scale_sft.__file__).parent / "assets" / "demo" / "base"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), SpielConfig())
    fully_shard(model)
    arguments = types.SimpleNamespace(deepspeed=None, fsdp=None)
    try:
        SpielCallback().on_train_begin(arguments, None, None, model=model, optimizer=None)
    except UserError as error:
        (Path(folder) / f"{torch.distributed.get_rank()}.txt").write_text(str(error))
    torch.distributed.destroy_process_group()
    end_at_once()
