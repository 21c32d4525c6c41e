"""Race one optimizer step on pairs: `scale-sft bench step --objective dpo`.

As in `race`, each contestant makes one step per round. Then the peak memory of one more step of each is measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from rich.console import Console

from ..contestants import Contestant
from ..peak import peak_of
from ..workload import Base
from .pair_contestants import PAIR_CONTESTANTS, Preferring, impossible
from .pair_page import PEERS, table_of
from .pairs import PairBatches
from .race import Effort, Race, rich_table

PEAKS = 3
"""Steps of each whose peaks are measured, for their median."""


class PairRace(Race):
    """All rounds of one case on pairs, and the peak memory that a step adds."""

    benchmark: ClassVar[str] = "dpo"
    contestants: ClassVar[Mapping[str, Callable[..., Contestant]]] = PAIR_CONTESTANTS
    peers: ClassVar[tuple[str, ...]] = PEERS
    impossible = staticmethod(impossible)

    def __init__(self, base: Base, names: Sequence[str], effort: Effort):
        super().__init__(base, names, effort)
        self.measured: dict[str, dict[str, int]] = {}

    def make_batches(self) -> PairBatches:
        """Make the pairs of all contestants."""
        return PairBatches(self.base.case, self.base.model_config.vocab_size, self.base.device)

    def make(self, name: str) -> Contestant:
        """Make a contestant from the base, with the reference's log-probabilities if they are precomputed."""
        return PAIR_CONTESTANTS[name](self.base, self.batches)

    def settings(self) -> dict[str, Any]:
        """Return the settings of the case, for its rows."""
        return {**super().settings(), "objective": "dpo", "prompt_tokens": self.batches.prompt_tokens}

    def after_rounds(self) -> None:
        """Measure the peak of some more steps of each, and count the tokens that a step computes."""
        case, device = self.base.case, self.base.device
        for name in self.names:
            contestant = self.ready(name)
            peaks = [peak_of(partial(contestant.step, self.batches, n), device).added for n in range(PEAKS)]
            tokens = contestant.positions if isinstance(contestant, Preferring) else case.micro_batch * case.length
            self.measured[name] = {"peak_bytes": int(statistics.median(peaks)), "tokens": tokens}

    def result(self, name: str) -> dict[str, Any]:
        """Return the result of one contestant, for its row; without the peak if the race was interrupted."""
        return {**super().result(name), **self.measured.get(name, {})}

    def show(self, rows: Sequence[dict[str, Any]], console: Console) -> None:
        """Print the rows of the case."""
        console.print(rich_table(*table_of(rows)))
