"""The reference of preference tuning: the base, or the base with an adapter, in the model that is trained.

The deltas leave the weights, bit for bit, and come back, in time proportional to K: there is no second model. Its
log-probabilities are measured once and kept in the cache of tokens, or measured in each step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scale_sft.data.preferences import Preferences
from scale_sft.distributed.cluster import Cluster
from scale_sft.files import write_atomically
from scale_sft.model.fingerprints import combine_fingerprints
from scale_sft.model.resident import ResidentDeltas
from scale_sft.model.sparse_model import SparseModel
from scale_sft.model.transient import TransientDeltas
from scale_sft.spiel.deltas import DeltaStore

from .log_probabilities import GROUP_TOKENS, of_all

REFERENCE_FORMAT = 3

Entries = Mapping[str, tuple[Tensor, Tensor]]
"""Indices [K] and deltas [K] of an adapter by weight."""


class ReferenceWeights:
    """The weights of the reference, which take the place of the trained ones for a while.

    Args:
        sparse: the model that is trained.
        adapter: what the reference has in addition to the base, for some or all of the target weights; None: nothing.
    """

    def __init__(self, sparse: SparseModel, adapter: Entries | None = None):
        self.sparse = sparse
        self._adapter: DeltaStore | None = None
        self._carrier: ResidentDeltas | None = None
        self._identity: str | None = None
        if adapter is not None:
            device, shapes = sparse.tuning.store.device, {name: sparse.shapes[name] for name in adapter}
            store = DeltaStore(shapes, {name: indices for name, (indices, _) in adapter.items()}, device=device)
            for delta in store:
                delta.deltas.copy_(adapter[delta.name][1])
            self._adapter = store

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the weights of the reference for the length of the block; the trained ones come back exactly.

        No backward pass may run inside.
        """
        carrier = self.sparse.carrier
        if isinstance(carrier, TransientDeltas):
            with carrier.without(self._adapter or ()):
                yield
            return
        with carrier.without():
            if self._adapter is None:
                yield
                return
            if self._carrier is None:  # reads the base values of its entries
                self._carrier = ResidentDeltas(self._adapter, carrier.parts, carrier.settle, carrier.written)
            self._carrier.write()
            try:
                yield
            finally:
                self._carrier.restore()

    def identity(self) -> str:
        """Hash all weights of the base, trained or not, and the adapter: 64 hex digits, the same on every rank.

        The first call reads those that are not trained, whose fingerprints nobody has taken; they stay as they are.
        """
        if self._identity is not None:
            return self._identity
        sparse, group = self.sparse, self.sparse.group
        with sparse.carrier.without():
            weights = sparse.model.named_parameters(remove_duplicate=False)
            others = {name: group.part_of(weight) for name, weight in weights if name not in sparse.shapes}
            prints = group.fingerprints(others)
        sha = hashlib.sha256(sparse.base_hash.encode())
        sha.update(combine_fingerprints(prints, dict.fromkeys(prints, (0, 0))).encode())
        for delta in self._adapter or ():
            sha.update(delta.name.encode())
            for tensor in (delta.indices.long(), delta.deltas.float()):
                sha.update(tensor.cpu().contiguous().numpy().tobytes())
        self._identity = sha.hexdigest()
        return self._identity


@dataclass(frozen=True)
class Reference:
    """The reference's log-probabilities: measured on its weights by all ranks, and kept in a cache."""

    weights: ReferenceWeights
    cluster: Cluster
    pad_id: int
    cache: Path | None = None
    """Folder of the cache; None: they are measured whenever they are asked for."""
    facts: tuple[str, ...] = ()
    """What else they depend on: dtype, attention, settings of the model."""

    def log_probabilities(self, examples: Preferences, report: Callable[[str], Any] = lambda label: None) -> Tensor:
        """Measure all sequences, or take them from the cache: [S] fp32 on the CPU, the same on every rank.

        Args:
            examples: the data.
            report: told where they come from.
        """
        path = self._path(examples) if self.cache is not None else None
        cluster, count = self.cluster, examples.sequences
        own: dict[str, Tensor] = {}  # what the main rank has read

        def is_known() -> bool:
            if (found := _read(path, count)) is not None:
                own["values"] = found
            return bool(own)

        if cluster.on_main(is_known):
            report(f"reference: log-probabilities of {count:,} answers are from the cache")
            return cluster.share({"values": ((count,), torch.float32)}, own)["values"].cpu()
        with self.weights.in_place():
            values = of_all(self.weights.sparse.model, examples, cluster, self.pad_id)
        report(f"reference: log-probabilities of {count:,} answers are measured")
        if path is not None:
            cluster.on_main(lambda: _write(path, values))
        return values

    def _path(self, examples: Preferences) -> Path:
        content = {
            "format": REFERENCE_FORMAT,
            "weights": self.weights.identity(),
            "data": examples.digest(),
            "facts": self.facts,
            "group": GROUP_TOKENS,
            "torch": torch.__version__,
            "device": self.cluster.device.type,
        }
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
        assert self.cache is not None
        return self.cache / f"reference-{key}.safetensors"


def _read(path: Path | None, count: int) -> Tensor | None:
    """Read a table of log-probabilities; None: there is none, or it is damaged."""
    if path is None or not path.is_file():
        return None
    try:
        values = load_file(path)["log_probabilities"]
    except (OSError, SafetensorError, KeyError):
        return None
    return values if values.shape == (count,) and values.dtype is torch.float32 else None


def _write(path: Path, values: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: save_file({"log_probabilities": values}, temporary))
