"""The sparse delta of one weight, and the store of all of them (section 3.1: eta and phi).

Shapes: O rows, I columns of a weight; N = O * I entries, flattened row-major; K active entries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .entries import Entries

INITIAL_COHORT = 0


@dataclass
class SparseDelta:
    """The active entries of one weight.

    `deltas` and `cohort` run parallel to the entries, which are sorted and unique; `deltas` is a view of the store's
    flat buffer. An entry's cohort is the number of the reallocation that grew it (0: chosen at random at the start);
    ages and bias corrections are kept once per cohort and not once per entry.
    """

    name: str
    shape: tuple[int, int]  # (O, I)
    entries: Entries
    deltas: Tensor  # [K] fp32 or bf16
    cohort: Tensor  # [K] uint8 or int16
    reference: Tensor | None = (
        None  # [K] as deltas: deltas at the last reallocation, kept only for drop_criterion `change`
    )

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def active(self) -> int:
        return self.entries.count

    @property
    def indices(self) -> Tensor:
        """[K] flat indices, sorted, int32 (int64 where O * I does not fit): made from `entries` at each call."""
        return self.entries.flat()

    @indices.setter
    def indices(self, indices: Tensor) -> None:
        self.entries = Entries(indices, self.shape)

    @property
    def tensors(self) -> dict[str, list[Tensor]]:
        """What is kept, by what for."""
        kept = {"indices": self.entries.tensors, "deltas": [self.deltas], "ages": [self.cohort]}
        return kept if self.reference is None else {**kept, "reference": [self.reference]}

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint keeps, by name; views, not copies, but for the indices."""
        state = {"indices": self.indices, "deltas": self.deltas, "cohort": self.cohort}
        return state if self.reference is None else {**state, "reference": self.reference}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave; dtypes and shapes are those of this delta."""
        self.indices = state["indices"].to(self.deltas.device, copy=True)  # the caller's may be kept as they are
        self.deltas.copy_(state["deltas"])
        self.cohort = state["cohort"].to(self.cohort.device, copy=True)
        if self.reference is not None:
            self.reference.copy_(state["reference"])


def wrong_with_indices(indices: Tensor, shape: tuple[int, int]) -> str | None:
    """Why `indices` cannot be those of a weight of `shape`, or None: integers [K], in range, sorted, unique."""
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
        return f"indices are {tuple(indices.shape)} {indices.dtype}, expected one row of integers"
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= shape[0] * shape[1]):
        return f"an index lies outside the weight of shape {shape}"
    if bool((indices[1:] <= indices[:-1]).any()):
        return "indices are not sorted and unique"
    return None


class DeltaStore:
    """All sparse deltas of a model, in a fixed order of names, over one flat buffer of deltas.

    Args:
        shapes: (O, I) of each target weight by name.
        active: K of each weight; 1 <= K <= O * I. Need not be uniform.
        seed: of the random initial indices; each weight has a generator of its own, seeded by (seed, purpose, name).
        device: where the state lives.
        cohorts: how many reallocations the run can have at most (decides the width of the cohort tensor).
        keep_reference: keep the deltas of the last reallocation (drop criterion `change`).
        dtype: of the deltas, float32 or bfloat16 (section 3.4); gradients and optimizer state are fp32 in any case.
        indices: initial indices by name instead of random ones: [K], any integer type, sorted, unique.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        active: Mapping[str, int],
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        cohorts: int = 255,
        keep_reference: bool = False,
        dtype: torch.dtype = torch.float32,
        indices: Mapping[str, Tensor] | None = None,
    ):
        self.flat = torch.zeros(sum(active.values()), dtype=dtype, device=device)
        cohort_dtype = torch.uint8 if cohorts <= 255 else torch.int16
        self._deltas: dict[str, SparseDelta] = {}
        start = 0
        for name, shape in shapes.items():
            chosen = indices[name] if indices else random_indices(shape, active[name], seed, name)
            view = self.flat[start : start + active[name]]
            self._deltas[name] = SparseDelta(
                name=name,
                shape=shape,
                entries=Entries(chosen.to(device), shape),
                deltas=view,
                cohort=torch.full(view.shape, INITIAL_COHORT, dtype=cohort_dtype, device=device),
                reference=torch.zeros_like(view) if keep_reference else None,
            )
            start += active[name]

    def __getitem__(self, name: str) -> SparseDelta:
        return self._deltas[name]

    def __iter__(self) -> Iterator[SparseDelta]:
        return iter(self._deltas.values())

    def __len__(self) -> int:
        return len(self._deltas)

    @property
    def names(self) -> list[str]:
        return list(self._deltas)

    @property
    def active(self) -> int:
        """Active entries of all weights: K summed."""
        return self.flat.numel()

    @property
    def device(self) -> torch.device:
        return self.flat.device

    def cohort_counts(self, cohorts: int) -> list[int]:
        """How many active entries belong to each of the cohorts 0 .. cohorts - 1."""
        counts = torch.zeros(cohorts, dtype=torch.int64, device=self.device)
        for delta in self:
            counts += torch.bincount(delta.cohort.int(), minlength=cohorts)
        return counts.tolist()

    def digest(self, name: str, *more: Tensor) -> str:
        """SHA-256 of one weight's state and `more` (that of its optimizer): 64 hex digits."""
        return digest(*self[name].state().values(), *more)


def digest(*tensors: Tensor) -> str:
    """SHA-256 over the bytes, dtypes and shapes of tensors: 64 hex digits."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy())
    return sha.hexdigest()


def seeded_generator(seed: int, purpose: str, name: str = "") -> torch.Generator:
    """A CPU generator for one purpose: the same on every rank, device and Python process."""
    key = hashlib.sha256(f"{seed}\0{purpose}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


def random_indices(shape: tuple[int, int], k: int, seed: int, name: str) -> Tensor:
    """`k` distinct flat indices of an [O, I] weight, uniform, sorted: [k] int64 on the CPU.

    Sparse draws reject repeats instead of permuting all N entries, so memory is O(k).
    """
    n = shape[0] * shape[1]
    generator = seeded_generator(seed, "initial indices", name)
    if 3 * k > n:
        return torch.randperm(n, generator=generator)[:k].sort().values
    found = torch.empty(0, dtype=torch.int64)
    while found.numel() < k:
        found = torch.cat((found, torch.randint(n, (k + k // 4 + 8,), generator=generator))).unique()
    return found[torch.randperm(found.numel(), generator=generator)[:k]].sort().values


def budget(
    shapes: Mapping[str, tuple[int, int]],
    *,
    density: float | None = None,
    tunable_weights: int | None = None,
    rank_equivalent: int | None = None,
) -> dict[str, int]:
    """Active entries K of each weight, from exactly one of three budgets (section 3.2, footnote 2; section 4.3).

    `density`: K = floor(density * N). `tunable_weights`: a total, spread uniformly. `rank_equivalent`:
    K = r * (O + I), the trainable parameters of LoRA of rank r. Never fewer than 1 nor more than N.
    """
    if [density, tunable_weights, rank_equivalent].count(None) != 2:
        raise ValueError("a budget needs exactly one of density, tunable_weights, rank_equivalent")
    size: Callable[[int, int], int] = lambda o, i: o * i
    if rank_equivalent is not None:
        wanted = {name: rank_equivalent * (o + i) for name, (o, i) in shapes.items()}
    elif density is not None:
        wanted = {name: int(density * size(*shape)) for name, shape in shapes.items()}
    else:
        wanted = _spread(tunable_weights, {name: size(*shape) for name, shape in shapes.items()})
    return {name: max(1, min(wanted[name], size(*shapes[name]))) for name in shapes}


def _spread(total: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Shares of `total` in proportion to `sizes`; what rounding leaves goes to the largest remainders, in order."""
    everything = sum(sizes.values())
    shares = {name: total * size // everything for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: -(total * sizes[name] % everything))
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares
