"""Scenes as one rank sees them from inside; the tests fork ranks that play them. FOLDER is theirs to write into.

probe.py memory FOLDER     for `accelerate launch`: that scene in a fresh process
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from scale_sft import train
from scale_sft.config.loading import load
from scale_sft.data.micro_batches import collate
from scale_sft.distributed import candidates
from scale_sft.distributed.cluster import Cluster
from scale_sft.distributed.exit import end_process, leave
from scale_sft.distributed.world import World
from scale_sft.errors import UserError
from scale_sft.model import loss, output_layer
from scale_sft.model.cross_entropy import cross_entropies
from scale_sft.model.memory import PeakMemory, private_bytes
from scale_sft.reporting.metrics import NullMetrics
from scale_sft.spiel.recorder import GradientRecorder
from scale_sft.spiel.topk import largest_magnitudes
from scale_sft.training import assemble
from scale_sft.training.checkpoints import Checkpoints
from scale_sft.training.inputs import read_inputs
from scale_sft.training.run_folder import RunFolder
from tests.candidate_cases import KINDS, gathered_candidates, summands


def options(folder: str, **more) -> dict:
    plain = {"train_data": "demo", "dtype": "float32", "method": "ag", "density": 0.01, "steps": 6}
    return (
        plain
        | {"global_batch_size": 4, "update_interval_steps": 3, "estimation_steps": 2, "output_dir": f"{folder}/run"}
        | more
    )


def planted(folder: str) -> None:
    """Rank 1 changes one delta behind the others' back; the digests must tell."""
    inputs = read_inputs(load(None, options(folder, base_placement="replicate")))
    cluster = Cluster.start(sharded=False, dtype=inputs.dtype, timeout_seconds=60)
    session = assemble.assemble(inputs, cluster)
    delta = list(session.tuning.store)[3]

    class Planting(NullMetrics):
        def step(self, step, **values):
            if step == 3 and cluster.rank == 1:  # after the first reallocation, which would drop it again
                delta.deltas[delta.deltas.abs().argmax()] += 1e-6

    try:
        train.train(session, Planting(), Checkpoints(session, RunFolder(f"{folder}/run")))
    except UserError as error:
        leave(f"{error} [planted in {delta.name}]")


def differing(folder: str) -> None:
    """Rank 1 comes with another seed."""
    world = World.from_environment()
    inputs = read_inputs(load(None, options(folder, base_placement="replicate", seed=world.rank)))
    cluster = Cluster.start(sharded=False, dtype=inputs.dtype, timeout_seconds=60)
    try:
        assemble.assemble(inputs, cluster)
    except UserError as error:
        leave(str(error))


def broken(folder: str) -> None:
    """Half of each gradient of rank 1 is NaN while candidates are proposed."""
    done, record = [0], GradientRecorder.record

    def damaged(recorder, name, gradient, **more):
        if World.from_environment().rank == 1 and done[0] == 3:
            gradient.view(-1)[: gradient.numel() // 2] = torch.nan
        record(recorder, name, gradient, **more)

    class Counting(NullMetrics):
        def step(self, step, **values):
            done[0] = step

    GradientRecorder.record = damaged
    inputs = read_inputs(load(None, options(folder, base_placement="replicate")))
    cluster = Cluster.start(sharded=False, dtype=inputs.dtype, timeout_seconds=60)
    try:
        session = assemble.assemble(inputs, cluster)
        train.train(session, Counting(), Checkpoints(session, RunFolder(f"{folder}/run")))
    except UserError as error:
        leave(str(error))


def losing(folder: str) -> None:
    """The loss of a sharded model without its logits, and with them; one of the two ranks has no target at times.

    Written: the largest difference of losses and of gradients in the embedded tokens, and the largest gradient.
    """
    inputs = read_inputs(load(None, options(folder, base_placement="shard", ds_config="ds_configs/zero3_cpu.json")))
    cluster = Cluster.start(sharded=True, dtype=inputs.dtype, timeout_seconds=60)
    model = assemble.assemble(inputs, cluster).model
    found: list[list[float]] = []
    embedded: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda *call: embedded.append(call[-1].requires_grad_()))
    assert loss.why_all_logits(model) is None
    output_layer.CPU_CHUNK = 5 * model.config.vocab_size
    for members in ([0, 1, 2], [3], [None] if cluster.rank else [4]):
        batch = collate(inputs.train, members, 0, cluster.device)
        places, targets = loss.predictions(batch["labels"])
        ours = loss.token_losses(model, batch)
        of_ours = torch.autograd.grad(ours.sum(), embedded[-1])[0]
        logits = model(batch["input_ids"], batch["attention_mask"], use_cache=False).logits.flatten(0, 1)
        whole = cross_entropies(logits, places, targets)
        of_whole = torch.autograd.grad(whole.sum(), embedded[-1])[0]
        differences = (ours - whole).abs().sum(), (of_ours - of_whole).abs().max(), of_whole.abs().max()
        found.append([len(targets), *map(float, differences)])
    Path(f"{folder}/losses{cluster.rank}.json").write_text(json.dumps(found))
    cluster.close()


def proposing(folder: str) -> None:
    """Ranks choose candidates from gradients of which each has a summand; sums are exact in any order.

    Written per case: its numbers, whether the choice is that of one rank with the sum, whether it is that of ranks that
    gather the tops of all, and whether this rank's own traffic is what the planner counts.
    """
    inputs = read_inputs(load(None, options(folder, base_placement="replicate")))
    cluster = Cluster.start(sharded=False, dtype=inputs.dtype, timeout_seconds=60)
    found = []
    for entries, count, piece in [
        (1, 1, 4),
        (1000, 7, 10**6),
        (1000, 7, 64),
        (1001, 900, 50),
        (997, 997, 13),
        (64, 20, 1),
        (3, 2, 64),
    ]:
        candidates.PROPOSAL_ENTRIES = piece
        for kind in KINDS:
            parts = summands(kind, cluster.size, entries, torch.bfloat16)
            mine, expected = parts[cluster.rank], largest_magnitudes(parts.float().sum(0), count)
            cluster.traffic_bytes.clear()
            chosen = cluster.select_candidates(mine, count)
            nothing = not expected.numel()  # all of the sum is 0: no candidates, and none to exchange
            planned = candidates.proposal_cost(entries, count, cluster.size).payload
            exchanged = cluster.traffic_bytes["proposal"]
            gathered = gathered_candidates(cluster, mine, count, piece)
            found.append(
                {
                    "case": [entries, count, piece, kind],
                    "as alone": torch.equal(chosen, expected),
                    "as gathered": nothing or torch.equal(chosen, gathered),
                    "as planned": exchanged < planned if nothing else exchanged == planned,
                }
            )
    Path(folder, f"proposed{cluster.rank}.json").write_text(json.dumps(found))
    cluster.close()


def memory(folder: str) -> None:
    """Private memory of this rank while the base in FOLDER is loaded, sharded and used."""
    settings = options(folder, base=f"{folder}/base", base_placement="shard", ds_config="ds_configs/zero3_cpu.json")
    inputs = read_inputs(load(None, settings))
    cluster = Cluster.start(sharded=True, dtype=inputs.dtype, timeout_seconds=120)
    before = private_bytes()
    with PeakMemory(cluster.device) as watch:
        session = assemble.assemble(inputs, cluster)
    session.resident.settle()
    settled = private_bytes()
    train.train(session, NullMetrics(), Checkpoints(session, RunFolder(f"{folder}/run")))
    session.resident.settle()
    gathered = sum(p.ds_status.name != "NOT_AVAILABLE" for p in session.model.parameters())
    figures = {
        "rank": cluster.rank,
        "settled": settled - before,
        "load_peak": watch.added,
        "after_training": private_bytes() - before,
        "gathered": gathered,
        "base": sum(p.ds_numel for p in session.model.parameters()) * 4,
        "state": sum(t.nbytes for t in (session.tuning.store.flat, session.tuning.recorder.flat)),
    }
    Path(folder, f"memory{cluster.rank}.json").write_text(json.dumps(figures))
    cluster.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"memory": memory}[sys.argv[1]](sys.argv[2])
    end_process()
