"""What forked ranks do: several small runs over one process group, since starting one costs more than such a run."""

from __future__ import annotations

from typing import Any

import torch

from scale_sft import train
from scale_sft.config.loading import load
from scale_sft.distributed.cluster import Cluster
from scale_sft.distributed.exit import end_process
from scale_sft.training import lifecycle
from scale_sft.training.inputs import read_inputs
from scale_sft.training.run_folder import RunFolder


def run_all(plan: list[dict[str, Any]], report: bool) -> None:
    """Train once for the options of each item of `plan`; reports take longer than the runs and can be left out."""
    if not report:
        lifecycle.write_report = lambda folder: folder / "report.html"
    inputs = [read_inputs(load(None, options)) for options in plan]
    sharded = inputs[0].placement.sharded
    config = inputs[0].config.model
    cluster = Cluster.start(sharded=sharded, dtype=torch.float32, ds_config=config.ds_config, timeout_seconds=120)
    try:
        for each in inputs:
            train.run_on(cluster, each, RunFolder(each.config.run.output_dir))
    finally:
        cluster.close()
    end_process()


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
