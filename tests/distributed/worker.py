"""Several small runs, one after the other, over one process group: starting one costs far more than such a run.

    accelerate launch ... tests/distributed/worker.py PLAN.json

PLAN is a list of {"options": {...}, "sharded": bool}; every run writes into its own output_dir.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from scale_sft import train
from scale_sft.config.loading import load
from scale_sft.distributed.cluster import Cluster
from scale_sft.distributed.exit import end_process
from scale_sft.training.inputs import read_inputs
from scale_sft.training.run_folder import RunFolder


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    inputs = [read_inputs(load(None, item["options"])) for item in plan]
    sharded = inputs[0].placement.sharded
    config = inputs[0].config.model
    cluster = Cluster.start(sharded=sharded, dtype=torch.float32, ds_config=config.ds_config, timeout_seconds=120)
    try:
        for each in inputs:
            train.run_on(cluster, each, RunFolder(each.config.run.output_dir))
    finally:
        cluster.close()
    end_process()


if __name__ == "__main__":
    main()
