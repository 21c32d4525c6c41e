"""Benchmark the available ways to compute sampled weight-gradient entries once at startup, then reuse the fastest.

Nothing is measured without a GPU and Triton; `cpu.sampled_columns` is the CPU's way.
Shapes: T tokens; R rows, C columns of a weight; K entries.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from scale_sft.spiel.deltas import DeltaStore
from scale_sft.spiel.indices import Entries
from scale_sft.spiel.recorder import dense_products

from .operands import Wanted

Path = Callable[[Tensor, Tensor, Wanted], None]
"""(left [T, R], right [T, C], wanted): adds entries of left^T right to each `out`."""

Timer = Callable[[Callable[[], None]], float]
"""Runs a piece of work once on the device; returns the seconds it took."""

PLAIN = "plain"
SAMPLED = "sampled"
PICKED = "picked"
REPEATS = 9
HOPELESS = 1.5  # times the plain path's time in the first trial: not tried again
WORTHWHILE = 0.97  # of the plain path's time: a smaller gain may be noise, and the plain path stays
LARGEST_ERROR = 0.01  # relative to the norm; rounding dW to bf16 alone makes 0.002
FLUSH_BYTES = 256 << 20  # more than any second-level cache


class Case(NamedTuple):
    """A class of calls treated as equal: same shape and dtype, tokens and entries within a factor of 2."""

    rows: int
    width: int
    dtype: str
    tokens_bits: int  # of T - 1
    share_bits: int  # of R * C / K, with K summed over all wanted entries


@dataclass(frozen=True)
class Measurement:
    """The result of measuring one case."""

    chosen: str
    seconds: dict[str, float]  # median, by path; the first trial for hopeless paths
    refused: dict[str, str]  # by path: the reason it cannot be used here


class GradientPath:
    """A computation of recorded entries by the fastest path measured for their case, by default the plain one.

    Paths differ in the order of fp32 sums, and the plain one rounds dW to the factors' dtype before it gathers. A run
    that resumes bit for bit must therefore keep its choices: `state` and `load_state`. Ranks may choose differently:
    the sum over ranks is still the same on all of them.

    Args:
        device: of the factors. Without a GPU or Triton there is only the plain path, the full product.
        paths: paths by name, `plain` among them; None: all that the device supports.
        timer: see `Timer`; None: by CUDA events, with caches flushed.
    """

    def __init__(self, device: torch.device | str, paths: Mapping[str, Path] | None = None, timer: Timer | None = None):
        self.device = torch.device(device)
        self.paths = dict(paths or paths_of(self.device))
        self._timer = timer
        self.measured: dict[Case, Measurement] = {}
        self._chosen: dict[Case, str] = {}

    def products(self, left: Tensor, right: Tensor, wanted: Wanted) -> bool:
        """Compute out[k] += (left^T right)[row(k), column(k)] for all wanted entries: a `Products`, always True.

        This does not wait for the device.

        Args:
            left: [T, R], right: [T, C]; fp32, bf16 or fp16, both the same.
            wanted: see `Wanted`.
        """
        wanted_entries = sum(entries.count for entries, _ in wanted)
        case = _case(left.shape[1], right.shape[1], left.shape[0], wanted_entries, left.dtype)
        self.paths[self.choice(case)](left, right, wanted)
        return True

    def choice(self, case: Case) -> str:
        """Look up the path for a case: as measured, else as for the nearest number of tokens, else plain.

        A K just beyond a power of 2 uses the choice of the K that was measured.
        """
        if case in self._chosen:
            return self._chosen[case]

        def distance(other: Case) -> tuple[int, int]:
            return abs(other.share_bits - case.share_bits), abs(other.tokens_bits - case.tokens_bits)

        alike = [other for other in self._chosen if other[:3] == case[:3] and distance(other)[0] <= 1]
        return self._chosen[min(alike, key=distance)] if alike else PLAIN

    def measure(
        self, rows: int, width: int, tokens: int, entries: Sequence[int], dtype: torch.dtype, seed: int = 0
    ) -> Measurement:
        """Time all paths on factors [T, R] and [T, C] with this many `entries` wanted at once, and keep the fastest.

        Of several similar cases only the first is timed. A path that fails here, or disagrees with the plain one, is
        refused; the measurement gives the reason. This waits for the device; call it before the first step.

        Args:
            seed: of the factors and of the entries' places, which are drawn on the device.
        """
        if not self.has_kernels:
            return Measurement(PLAIN, {}, {})
        case = _case(rows, width, tokens, sum(entries), dtype)
        if case in self.measured:
            return self.measured[case]
        generator = torch.Generator(self.device).manual_seed(seed)
        left, right = (
            torch.randn(tokens, n, generator=generator, device=self.device, dtype=dtype) for n in (rows, width)
        )
        spread = [_spread_evenly(rows, width, k, generator) for k in entries]
        wanted = [(some, torch.zeros(some.count, device=self.device)) for some in spread]
        refused = self._wrong_paths(left, right, wanted)
        timer = self._timer or _EventTimer(self.device)
        works = {name: partial(path, left, right, wanted) for name, path in self.paths.items() if name not in refused}
        seconds = {name: timer(work) for name, work in works.items()}
        trials: dict[str, list[float]] = {name: [] for name in works if seconds[name] <= HOPELESS * seconds[PLAIN]}
        for _ in range(REPEATS):
            for name, times in trials.items():
                times.append(timer(works[name]))
        seconds |= {name: statistics.median(times) for name, times in trials.items()}
        fastest = min(seconds, key=lambda name: seconds[name])
        chosen = fastest if seconds[fastest] < WORTHWHILE * seconds[PLAIN] else PLAIN
        self.measured[case] = Measurement(chosen, seconds, refused)
        self._chosen[case] = chosen
        return self.measured[case]

    def measure_store(self, store: DeltaStore, candidates: Mapping[str, int], tokens: int, dtype: torch.dtype) -> None:
        """Measure the requests of backward passes of `tokens` tokens: active entries alone, and with candidates.

        Args:
            candidates: C of each weight; empty where none are estimated.
            dtype: of the factors.
        """
        for delta in store:
            self.measure(*delta.shape, tokens, [delta.active], dtype)
            if candidates:
                self.measure(*delta.shape, tokens, [delta.active, candidates[delta.name]], dtype)

    def _wrong_paths(self, left: Tensor, right: Tensor, wanted: Wanted) -> dict[str, str]:
        """Find the paths that cannot be used, with the reason by name; this also warms up each path."""
        expected, refused = self._result_of(PLAIN, left, right, wanted), {}
        for name in [name for name in self.paths if name != PLAIN]:
            try:
                found = self._result_of(name, left, right, wanted)
            except Exception as error:  # a compiler or driver may raise anything; the plain path remains
                refused[name] = f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"
                continue
            distance = float((found - expected).norm() / expected.norm())
            if not distance <= LARGEST_ERROR:
                refused[name] = f"differs from the dense product by {distance:.2g} of its norm"
        return refused

    def _result_of(self, name: str, left: Tensor, right: Tensor, wanted: Wanted) -> Tensor:
        for _, out in wanted:
            out.zero_()
        self.paths[name](left, right, wanted)
        return torch.cat([out for _, out in wanted])

    @property
    def has_kernels(self) -> bool:
        """Return True if there is any path but the plain one."""
        return self.paths.keys() != {PLAIN}

    def summary(self) -> str:
        """Summarise in one line how many cases use each path."""
        if not self.has_kernels:
            return "without kernels (they need a GPU and Triton)"
        counts = Counter(self._chosen.values())
        return ", ".join(f"{name} in {count} of {len(self._chosen)} cases" for name, count in counts.most_common())

    def state(self) -> dict[str, str]:
        """Return the choices as a JSON object."""
        return {" ".join(map(str, case)): chosen for case, chosen in self._chosen.items()}

    def load_state(self, state: Mapping[str, str]) -> None:
        """Load choices from `state` for all paths that exist here; cases measured later keep to them too."""
        for words, chosen in state.items():
            rows, width, dtype, tokens_bits, share_bits = words.split()
            case = Case(int(rows), int(width), dtype, int(tokens_bits), int(share_bits))
            if chosen in self.paths:
                self._chosen[case] = chosen
                self.measured[case] = Measurement(chosen, {}, {})


def paths_of(device: torch.device) -> dict[str, Path]:
    """List the paths that a device supports, by name; `plain` always."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return {PLAIN: dense_products}
    from scale_sft.kernels.gpu.picked import picked_entries
    from scale_sft.kernels.gpu.sampled import sampled_dots
    from scale_sft.kernels.gpu.tiled import FP32_TILE, TILES, product_entries

    paths: dict[str, Path] = {PLAIN: dense_products, PICKED: picked_entries, SAMPLED: sampled_dots}
    for tile in (*TILES, FP32_TILE):
        name = f"product_{tile.block_r}x{tile.block_c}x{tile.block_t}"
        paths[name] = partial(product_entries, tile=tile)
    return paths


def _case(rows: int, width: int, tokens: int, entries: int, dtype: torch.dtype) -> Case:
    share_bits = (rows * width // max(1, entries)).bit_length()
    return Case(rows, width, str(dtype).removeprefix("torch."), max(0, tokens - 1).bit_length(), share_bits)


def _spread_evenly(rows: int, width: int, count: int, generator: torch.Generator) -> Entries:
    """Spread `count` entries evenly over rows and, from a random column on, within each; on the generator's device."""
    device = generator.device
    starts = torch.arange(rows + 1, device=device) * count // rows
    counts = starts.diff()
    row = torch.repeat_interleave(torch.arange(rows, device=device), counts)
    shifts = torch.rand(rows, generator=generator, dtype=torch.float64, device=device)
    place = torch.arange(count, device=device) - starts[row] + shifts[row]
    column = (place * width / counts[row]).long().clamp_(max=width - 1)
    return Entries(row * width + column, (rows, width))


class _EventTimer:
    """A timer of work on a GPU, between two events on its stream, with a cold cache."""

    def __init__(self, device: torch.device):
        self.device = device
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, work: Callable[[], None]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self.device):
            self.flush.zero_()
            start.record()
            work()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1000
