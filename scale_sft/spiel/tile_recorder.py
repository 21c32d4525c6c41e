"""Record, in the backward pass, gradients of whole columns or rows, and sketches of all others where these may move.

The norms of the columns of G = L^T R [O, I], summed over micro-batches, ranks and the steps of an estimation phase, are
not sums of norms. A sketch is linear, so it may be summed: S = Z^T G = (L Z)^T R [r, I], with a random Z [O, r] of
independent entries +-1/sqrt(r). The squared norm of S[:, j] has the mean of that of G[:, j], and a relative standard
deviation of at most sqrt(2 / r) (Achlioptas 2003, Database-friendly random projections). Of rows it is
S = (R Z)^T L [r, O]. No step forms G; a phase adds T r (O + I) products per weight and keeps all of R for them.
Shapes: O rows, I columns of a weight; m columns or rows of it, of n entries each; T tokens; r sketched numbers of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .deltas import DeltaStore
from .recorder import GradientRecorder
from .schedules import Phase
from .seeding import seeded_generator
from .tiles import Tiles, Tiling

SKETCHED = 64
"""r at most: norms are off by 9 % (one standard deviation), less than gradients of batches are; a power of 4, so that
Z is exact in bfloat16. In a weight of 4,096 rows it takes 1.6 % of what G would. Lines of up to r entries are exact."""

SKETCH = "candidate_sketch"
"""The name of a weight's sketch in checkpoints."""


def sketched(tiling: Tiling) -> tuple[int, int]:
    """Compute the shape (r, m) of a weight's sketch.

    Raises:
        ValueError: tiles are not single columns or rows.
    """
    if (tiling.width != 1 and tiling.height != 1) or not tiling.is_band:
        raise ValueError(
            f"got tiles of {tiling.height} x {tiling.width} in a weight of {tiling.shape[0]} x {tiling.shape[1]}, "
            "expected single columns or rows"
        )
    return min(SKETCHED, tiling.size), tiling.count


class TileRecorder(GradientRecorder):
    """The receiver of gradient factors where whole tiles are trained; in estimation phases it sketches the gradients.

    Sketches stand where other recorders have candidates' gradients: behind the active ones in `flat`. So one call sums
    both over ranks, clipping scales both, and the estimates are means of both kinds over a phase (Eq. 8).

    Args:
        store: the deltas, all of whole tiles.
        estimation_steps: G, over which Eq. 8 averages.
        dtype: see `GradientRecorder`.
        seed: of the signs.
        round_number: returns the number of the next reallocation, which draws new signs.
    """

    def __init__(
        self,
        store: DeltaStore,
        *,
        estimation_steps: int = 5,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        round_number: Callable[[], int] = lambda: 1,
    ):
        self.seed, self.round_number = seed, round_number
        self._signs: dict[int, Tensor] = {}  # of the open phase, by n: weights of the same length share them
        super().__init__(store, estimation_steps=estimation_steps, dtype=dtype)

    # --- sketches ---------------------------------------------------------------------------------------------------

    def _allocate(self, candidates: int) -> None:
        store = self.store
        shapes = {delta.name: sketched(self.tiles(delta.name).tiling) for delta in store} if candidates else {}
        sizes = [r * m for r, m in shapes.values()]
        self.flat = torch.zeros(store.active + sum(sizes), dtype=self.dtype, device=store.device)
        of_each = self.flat.split([delta.active for delta in store] + sizes)
        self.estimates = torch.zeros(sum(sizes), device=store.device)
        self._active = dict(zip(store.names, of_each, strict=False))
        self._sketch = {name: part.view(shapes[name]) for name, part in zip(shapes, of_each[len(store) :], strict=True)}
        means = self.estimates.split(sizes) if sizes else ()
        self._mean = {name: part.view(shapes[name]) for name, part in zip(shapes, means, strict=True)}
        self._signs = {}

    def open_estimation(self) -> None:
        """Forget sketches and allocate new ones."""
        self._allocate(1)

    @property
    def has_estimates(self) -> bool:
        """True if a step of the phase has recorded a gradient; the host waits for the device."""
        return bool(self.estimates.any())

    def norms_of(self, name: str) -> Tensor:
        """Estimate the norms of all columns, or rows, of a weight's mean gradient: [m] fp32."""
        return self._mean[name].double().square().sum(0).sqrt().float()

    def estimation_state(self, name: str) -> dict[str, Tensor]:
        """Return what a checkpoint keeps of an open phase: views."""
        return {SKETCH: self._mean[name]} if self._mean else {}

    def estimation_tensors(self, name: str) -> list[Tensor]:
        """Return the sketch of one weight in an open phase."""
        return list(self.estimation_state(name).values())

    def load_estimation(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Load a result of `estimation_state` for one weight, in an open estimation phase."""
        self._mean[name].copy_(state[SKETCH])

    def _signs_of(self, length: int, like: Tensor) -> Tensor:
        """Draw Z [length, r] of +-1/sqrt(r), in the dtype and on the device of `like`: the same on every rank."""
        if length not in self._signs or self._signs[length].dtype is not like.dtype:
            generator = seeded_generator(self.seed, "sketch", f"{self.round_number()} {length}")
            bits = torch.randint(2, (length, SKETCHED), generator=generator, dtype=torch.int8)
            self._signs[length] = (bits.to(like.device, like.dtype) * 2 - 1) / SKETCHED**0.5
        return self._signs[length]

    def _add_sketch(self, name: str, left: Tensor, right: Tensor) -> None:
        """Add the sketch of left^T right to that of a weight: left [T, O], or [T] int64 of an embedding; right [T, I].

        Raises:
            ValueError: a factor is not whole.
        """
        tiling, out = self.tiles(name).tiling, self._sketch[name]
        rows, columns = tiling.shape
        if right.shape[1] < columns or (left.dim() > 1 and left.shape[1] < rows):
            raise ValueError(
                f"'{name}': got a part of its input in an estimation phase, expected all of it: the forward pass was "
                "of an earlier step"
            )
        if tiling.width == 1 and tiling.height == rows:
            out += (self._projected(left, rows, right).t() @ right).to(out.dtype)
        elif left.dim() > 1:
            out += (self._projected(right, columns, right).t() @ left).to(out.dtype)
        else:
            projected = self._projected(right, columns, right).t().float()
            out += torch.zeros_like(out, dtype=torch.float32).index_add_(1, left, projected).to(out.dtype)

    def _projected(self, factor: Tensor, length: int, like: Tensor) -> Tensor:
        """Compute factor Z [T, r] of a factor [T, length], or of a one-hot one that is given by its places [T]."""
        if length > SKETCHED:
            signs = self._signs_of(length, like)
            return signs.index_select(0, factor) if factor.dim() == 1 else factor @ signs
        if factor.dim() > 1:
            return factor
        return torch.eye(length, dtype=like.dtype, device=like.device).index_select(0, factor)

    # --- a step -----------------------------------------------------------------------------------------------------

    def begin_step(self, phase: Phase, *, watch: bool = False) -> None:
        """Forget the last step's gradients, and open an estimation phase where one begins.

        Args:
            phase: what this step records.
            watch: collect the weights that get a gradient in `received`.
        """
        self.phase, self._watching = phase, watch
        if phase is Phase.PROPOSE or (phase is Phase.ESTIMATE and not self._mean):
            self.open_estimation()
        else:
            self.flat.zero_()

    def tiles(self, name: str) -> Tiles:
        """Return the tiles that are trained of one weight."""
        tiles = self.store[name].tiles
        if tiles is None:
            raise ValueError(f"'{name}': got single entries, expected whole tiles")
        return tiles

    def record_product(self, name: str, left: Tensor, right: Tensor, *, more: bool = False) -> None:
        """Record the gradient of whole tiles by dense products of their size alone, and sketch that of all in a phase.

        Args:
            left: [T, O], or [T] int64 of an embedding: see `Record`.
            right: [T, I], of the same dtype. Of both what `needed` returns is enough outside of phases.
            more: without effect, as nothing is chosen before the end of a phase.
        """
        if self.phase is not Phase.OFF:
            self._add_sketch(name, left, right)
        if left.dim() == 1:
            super().record_product(name, left, right)
            return
        tiles = self.tiles(name)
        if self._watching and name not in self.received:
            widths = self.store[name].shape
            whole = [factor for factor, width in zip((left, right), widths, strict=True) if factor.shape[1] == width]
            if all(bool(factor.any()) for factor in whole):
                self.received.add(name)
        out = self._active[name]
        for entries, product in tiles.products(left, right):
            out[entries] += product.to(out.dtype)

    def record_many(self, names: Sequence[str], left: Tensor, right: Tensor, bounds: Sequence[tuple[int, int]]) -> None:
        """Record left[a:b]^T right[a:b] of several weights, one after the other; see `record_product`."""
        for name, (start, stop) in zip(names, bounds, strict=True):
            self.record_product(name, left[start:stop], right[start:stop])

    def needed(self, name: str, factor: Tensor, *, left: bool) -> Tensor:
        """Return the columns of a factor that `record_product` needs outside of phases: [T, n] of [T, O or I].

        A forward pass keeps them for its backward pass.
        """
        return self.tiles(name).needed(factor, left=left)

    def _proposes(self, name: str) -> bool:
        """Return False: nothing is chosen from the gradient of one backward pass."""
        return False

    def end_step(self) -> None:
        """Add one term to the running estimates (Eq. 8), after the buffer was summed over ranks."""
        self._watching = False
        if self.phase is not Phase.OFF:
            self.estimates.add_(self.flat[self.store.active :], alpha=1 / self.estimation_steps)
