"""Log-probabilities of whole answers: of a micro-batch with gradient, and of all data in one pass without.

Shapes: S sequences.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from scale_sft.data.preference_batches import Layout, PreferenceBatches, SequenceBatch
from scale_sft.data.preferences import Preferences
from scale_sft.distributed.cluster import Cluster
from scale_sft.model.dropout import without_noise
from scale_sft.model.loss import losses_at

GROUP_TOKENS = 8192
"""Padded tokens of one forward pass over the data. This is not an option: the last bits of a log-probability depend on
what is computed with it, and must not change with the number of ranks or the batch size of a resumed run."""


def log_probabilities(model: nn.Module, batch: SequenceBatch) -> Tensor:
    """Sum the log-probabilities of the target tokens of each sequence: [S] fp32 with gradient.

    No logits but a chunk's exist at once, see `model.output_layer`.
    """
    losses = losses_at(model, batch.inputs, batch.places, batch.targets)
    if not batch.counts:
        return losses.sum()[None][:0]  # part of the graph: every rank has a backward pass
    return -torch.stack([part.sum() for part in losses.split(batch.counts)])


@torch.no_grad()
def of_all(model: nn.Module, examples: Preferences, cluster: Cluster, pad_id: int) -> Tensor:
    """Compute the log-probabilities of all sequences, spread over the ranks: [S] fp32 on the CPU, the same on each.

    Groups of sequences depend on the data alone, so the bits are the same for any number of ranks, and no module draws
    random numbers.

    Raises:
        Interrupted: a signal asks the run to stop.
    """
    found = torch.zeros(examples.sequences, dtype=torch.float32)
    batches = PreferenceBatches(examples, Layout(), pad_id, cluster.device)
    groups = list(_groups(examples))
    with without_noise(model):
        for start in range(0, len(groups), cluster.size):
            cluster.agree_to_stop()
            of_round = groups[start : start + cluster.size]
            own = of_round[cluster.rank] if cluster.rank < len(of_round) else []  # without one, it computes along
            found[own] = log_probabilities(model, batches.padded(own)).cpu()
    whole = found.to(cluster.device)
    cluster.sum_(whole, "reference")  # exact: all ranks but one add 0
    return whole.cpu()


def _groups(examples: Preferences) -> Iterator[list[int]]:
    """Yield all sequences in groups of about GROUP_TOKENS padded tokens, longest first."""
    lengths = examples.sequence_lengths
    order = sorted(range(examples.sequences), key=lambda number: (-lengths[number], number))
    start = 0
    while start < len(order):
        size = max(1, GROUP_TOKENS // max(1, int(lengths[order[start]])))
        yield order[start : start + size]
        start += size
