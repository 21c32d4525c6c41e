"""Collective operations of ranks: sum, gather, and agree.

Reduce inputs, then decide: only gradients are summed over ranks. Every decision that follows is deterministic and
therefore the same everywhere; digests prove it.
Shapes: W ranks; n entries of a rank's tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scale_sft.errors import UserError

from .heartbeat import Heartbeat


@dataclass(kw_only=True)
class Ranks:
    """This rank among all ranks, and their collectives. Every method must be called by all of them, in one order."""

    rank: int
    size: int
    device: torch.device
    heartbeat: Heartbeat | None = None  # None: there is only one rank
    traffic_bytes: Counter[str] = field(default_factory=Counter, init=False)
    """Payload that this rank contributed to collectives, by purpose, since the counter was last cleared."""

    @property
    def is_main(self) -> bool:
        """True on the rank that writes the files."""
        return self.rank == 0

    def mark(self) -> None:
        """Tell the heartbeat that this rank begins a collective."""
        if self.heartbeat:
            self.heartbeat.mark()

    # --- sums ---------------------------------------------------------------------------------------------------

    def sum_(self, flat: Tensor, purpose: str = "gradients") -> None:
        """Sum a contiguous tensor over the ranks, in place: one flat all-reduce."""
        if self.size == 1:
            return
        self.mark()
        self.traffic_bytes[purpose] += flat.numel() * flat.element_size()
        torch.distributed.all_reduce(flat)

    def sum_floats(self, *values: float) -> list[float]:
        """Sum a few numbers over the ranks, in double precision."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        self.sum_(tensor, "scalars")
        return tensor.tolist()

    # --- gathers ------------------------------------------------------------------------------------------------

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate all ranks' tensors [n] in the order of ranks: [W * n]."""
        self.mark()
        pieces = [torch.empty_like(tensor) for _ in range(self.size)]
        torch.distributed.all_gather(pieces, tensor)
        return torch.cat(pieces)

    def gather_objects(self, value: Any) -> list[Any]:
        """Collect a small Python object from every rank, in the order of ranks."""
        if self.size == 1:
            return [value]
        self.mark()
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def share(
        self, layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]], own: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Send the main rank's tensors to every rank, one broadcast each.

        Args:
            layout: (shape, dtype) of each tensor by name.
            own: the tensors; only the main rank needs them.
        """
        shared = {}
        for name, (shape, dtype) in layout.items():
            tensor = own[name].to(self.device) if self.is_main else torch.empty(shape, dtype=dtype, device=self.device)
            if self.size > 1:
                self.mark()
                tensor = tensor.contiguous()
                torch.distributed.broadcast(tensor.view(-1).view(torch.uint8), 0)  # no backend sends every dtype
            shared[name] = tensor
        return shared

    # --- agreement ----------------------------------------------------------------------------------------------

    def check_identical(self, take_digests: Callable[[], Mapping[str, str]], what: str) -> None:
        """Stop the run if ranks differ in any of the named digests (hex SHA-256); a single rank takes none.

        Raises:
            UserError: names the first weight (or item) and the ranks that differ from the majority.
        """
        if self.size == 1:
            return
        digests = take_digests()
        own = bytearray(b"".join(bytes.fromhex(value) for value in digests.values()))
        tensor = torch.frombuffer(own, dtype=torch.uint8).to(self.device)
        rows = self.gather(tensor).view(self.size, len(digests), -1).cpu()
        for n, name in enumerate(digests):
            kinds = Counter(bytes(rows[rank, n].tolist()) for rank in range(self.size))
            if len(kinds) > 1:
                usual = kinds.most_common(1)[0][0]
                odd = [rank for rank in range(self.size) if bytes(rows[rank, n].tolist()) != usual]
                raise UserError(f"ranks disagree on {what}: {name} differs on rank {', '.join(map(str, odd))}")

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Let the main rank do `work` (files) while the others wait; return its small result on every rank.

        Raises:
            Exception: whatever `work` raised, on the main rank.
            UserError: `work` failed, on the other ranks.
        """
        failure = result = None
        if self.is_main:
            try:
                result = work()
            except Exception as error:  # must reach the other ranks, or they would wait forever
                failure = error
        reason = None if failure is None else f"{type(failure).__name__}: {failure}"
        main_reason, result = self.gather_objects((reason, result))[0]
        if failure is not None:
            raise failure
        if main_reason is not None:
            raise UserError(f"rank 0 stopped: {main_reason}")
        return result
