"""The sparse delta of one weight, and the store of all of them (section 3.1: eta and phi).

Shapes: O rows, I columns of a weight; N = O * I entries, flattened row-major; K active entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .indices import Entries, FlatEntries, JoinedEntries, Part, Rows, on_device, piece_entries, pieces
from .seeding import FEW_ENTRIES, random_indices, random_indices_of_many, slice_of_many
from .tiles import Tiles

INITIAL_COHORT = 0

Active = Mapping[str, int] | Mapping[str, Tensor] | Mapping[str, Tiles]
"""By weight: how many entries, at random indices; or their indices; or the tiles that they make up."""


@dataclass
class SparseDelta:
    """The active entries of one weight.

    `deltas`, `cohort` and `reference` run parallel to the entries, which are sorted and unique; all are views of the
    store's flat buffers. An entry's cohort is the number of the reallocation that grew it (0: chosen at random at the
    start); ages and bias corrections are kept once per cohort and not once per entry.
    """

    name: str
    shape: tuple[int, int]  # (O, I)
    entries: Entries
    deltas: Tensor  # [K] fp32 or bf16
    cohort: Tensor  # [K] uint8 or int16
    reference: Tensor | None = None  # [K] as deltas: those at the last reallocation, for drop_criterion `change` only
    tiles: Tiles | None = None  # that the entries make up, where whole tiles are trained

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def active(self) -> int:
        return self.entries.count

    @property
    def indices(self) -> Tensor:
        """The [K] flat indices, sorted, int32 (int64 where O * I does not fit), computed from `entries` each time."""
        return self.entries.flat()

    @indices.setter
    def indices(self, indices: Tensor) -> None:
        if self.tiles is not None:
            self.tiles = self.tiles.tiling.chosen_in(indices)
        self.entries.replace(indices)

    @property
    def tensors(self) -> dict[str, list[Tensor]]:
        """Return the tensors that are kept, by purpose."""
        kept = {"indices": self.entries.tensors, "deltas": [self.deltas], "ages": [self.cohort]}
        return kept if self.reference is None else {**kept, "reference": [self.reference]}

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint keeps, by name: views, except for the indices."""
        state = {"indices": self.indices, "deltas": self.deltas, "cohort": self.cohort}
        return state if self.reference is None else {**state, "reference": self.reference}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy a result of `state`, of this delta's dtypes and shapes, into this delta."""
        self.indices = state["indices"].to(self.deltas.device)
        self.deltas.copy_(state["deltas"])
        self.cohort.copy_(state["cohort"])
        if self.reference is not None:
            self.reference.copy_(state["reference"])


@dataclass(frozen=True)
class TogetherDelta:
    """The active entries of several weights, as drop and grow see them: as a `SparseDelta`, with joined indices."""

    entries: JoinedEntries
    deltas: Tensor  # [n]
    cohort: Tensor  # [n]
    reference: Tensor | None


class DeltaStore:
    """All sparse deltas of a model, in a fixed order of names, over flat buffers.

    Args:
        shapes: (O, I) of each target weight by name.
        active: K of each weight, 1 <= K <= O * I, at random indices; or its initial indices [K], any integer type,
            sorted, unique; or tiles, which are trained whole.
        seed: of the random initial indices; each weight has a generator of its own, seeded by (seed, purpose, name).
        device: where the state lives.
        cohorts: how many reallocations the run can have at most (decides the width of the cohort tensor).
        keep_reference: keep the deltas of the last reallocation (drop criterion `change`).
        dtype: of the deltas, float32 or bfloat16 (section 3.4); gradients and optimizer state are fp32 in any case.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        active: Active,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        cohorts: int = 255,
        keep_reference: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        counts = [_count(active[name]) for name in shapes]
        self.places = FlatEntries(Rows(list(shapes.values()), torch.device(device)), counts)
        self.flat = torch.zeros(sum(counts), dtype=dtype, device=device)
        cohort_dtype = torch.uint8 if cohorts <= 255 else torch.int16
        self.cohort = torch.full(self.flat.shape, INITIAL_COHORT, dtype=cohort_dtype, device=device)
        self.reference = torch.zeros_like(self.flat) if keep_reference else None
        self._deltas: dict[str, SparseDelta] = {}
        self._numbers = {name: number for number, name in enumerate(shapes)}
        for name, shape in shapes.items():
            given, number = active[name], self._numbers[name]
            entries = self.places.range_of(number)
            self._deltas[name] = SparseDelta(
                name=name,
                shape=shape,
                entries=self.places.entries(number),
                deltas=self.flat[entries],
                cohort=self.cohort[entries],
                reference=self.reference[entries] if self.reference is not None else None,
                tiles=given.to(device) if isinstance(given, Tiles) else None,
            )
        self._choose(shapes, active, seed)

    def _choose(self, shapes: Mapping[str, tuple[int, int]], active: Active, seed: int) -> None:
        """Make the initial indices active."""
        alike: dict[tuple[tuple[int, int], int], list[str]] = {}
        chosen: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            given = active[name]
            if isinstance(given, Tensor):
                chosen[name] = given
            elif isinstance(given, Tiles):
                chosen[name] = given.indices()
            elif slice_of_many(name) and shape[0] * shape[1] <= FEW_ENTRIES:
                alike.setdefault((shape, given), []).append(name)
            else:
                chosen[name] = random_indices(shape, given, seed, name)
        for ((rows, columns), count), names in alike.items():
            together = random_indices_of_many(rows * columns, count, seed, names)
            chosen |= dict(zip(names, together, strict=True))
        names = list(shapes)
        for part in self.places.groups():
            indices = [chosen[names[number]].to(self.device) for number in part.numbers]
            if len(indices) == 1:
                self._deltas[names[part.weights.start]].indices = indices[0]
            else:
                before = self.places.rows.offsets(part.weights)[:-1]
                counts = on_device([one.numel() for one in indices], torch.int64, self.device)
                shift = torch.repeat_interleave(on_device(before, torch.int64, self.device), counts)
                self.places.replace(part, torch.cat(indices).long().add_(shift))

    def __getitem__(self, name: str) -> SparseDelta:
        return self._deltas[name]

    def __iter__(self) -> Iterator[SparseDelta]:
        return iter(self._deltas.values())

    def __len__(self) -> int:
        return len(self._deltas)

    def number_of(self, name: str) -> int:
        """Return a weight's place in the order of names."""
        return self._numbers[name]

    def entries_of(self, name: str) -> slice:
        """Return where one weight's entries are in the flat buffers."""
        return self.places.range_of(self._numbers[name])

    def together(self, part: Part) -> TogetherDelta:
        """Return the deltas of some whole weights as one: views, not copies."""
        return TogetherDelta(
            entries=JoinedEntries(self.places, part),
            deltas=self.flat[part.entries],
            cohort=self.cohort[part.entries],
            reference=self.reference[part.entries] if self.reference is not None else None,
        )

    @property
    def names(self) -> list[str]:
        return list(self._deltas)

    @property
    def active(self) -> int:
        """Active entries of all weights: the sum of K."""
        return self.flat.numel()

    @property
    def device(self) -> torch.device:
        return self.flat.device

    def cohort_counts(self, cohorts: int) -> list[int]:
        """Count the active entries of each of the cohorts 0 .. cohorts - 1."""
        counts = torch.zeros(cohorts, dtype=torch.int64, device=self.device)
        for part in pieces(self.active, piece_entries(self.device)):
            counts += torch.bincount(self.cohort[part].int(), minlength=cohorts)
        return counts.tolist()


def _count(active: int | Tensor | Tiles) -> int:
    """Count the entries that one weight of `Active` has."""
    if isinstance(active, Tiles):
        return active.numbers.numel() * active.tiling.size
    return active.numel() if isinstance(active, Tensor) else active
