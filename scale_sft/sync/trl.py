"""TRL: `AsyncGRPOTrainer(weight_transfer=...)` that ships patches instead of every weight.

    transfer = SparseWeightTransfer(VllmServer("http://127.0.0.1:8000"))
    trainer = AsyncGRPOTrainer("BASE", ..., peft_config=SpielConfig(density=0.01), weight_transfer=transfer)
    transfer.model = trainer.model
    trainer.train()

The trainer loads the model itself, so the transfer gets it afterwards. `SparseWeightTransfer` has the methods of
`trl.experimental.async_grpo.async_grpo_trainer.WeightTransferProtocol`. Written against TRL 1.16.0; nothing of it is
imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from .compose import changed, full
from .patches import Patches, Snapshot, SyncError


class Connection(Protocol):
    """A way to one rollout server; `VllmServer` is one."""

    def connect(self) -> None:
        """Open it, before the first patches."""

    def pause(self) -> None:
        """Keep the server from generating."""

    def send(self, patches: Patches) -> None:
        """Write patches into the server's weights."""

    def resume(self) -> None:
        """Let the server generate."""

    def close(self) -> None:
        """Release it."""


class SparseWeightTransfer:
    """A weight transfer of TRL's that sends what has changed since its last one.

    Args:
        connection: to the server, which holds the base when training starts.

    Attributes:
        model: the trained model, a PEFT model with a SpielConfig or what `scale_sft.attach` returned; set it before
            training. TRL calls the transfer in its main process only, so each process holds the base whole.
    """

    def __init__(self, connection: Connection):
        self.model: Any = None
        self._connection = connection
        self._sent: Snapshot | None = None
        self._failed = False

    def init_weight_transfer(self) -> None:
        """Connect to the server."""
        self._connection.connect()

    def pause(self) -> None:
        """Pause the server."""
        self._connection.pause()

    def send_weights(self, iterator: Iterator[tuple[str, Tensor]]) -> None:
        """Send the entries that changed since the last call; the first call sends all that differ from the base.

        Args:
            iterator: of TRL, over the whole weights. It is run through without a copy, as the other processes run
                through theirs.

        Raises:
            SyncError: an earlier call failed half-way, so nobody knows what the server holds; or `model` is not set.
        """
        for _ in iterator:
            pass
        if self.model is None:
            raise SyncError("send_weights: got no model. Fix: transfer.model = trainer.model, before trainer.train()")
        if self._failed:
            raise SyncError(
                "send_weights: got a call after one that failed, so the server's weights are unknown. Fix: restart the "
                "server with the base, and training from its checkpoint"
            )
        patches = full(self.model) if self._sent is None else changed(self.model, since=self._sent)
        self._failed = True
        self._connection.send(patches)
        self._failed, self._sent = False, patches.snapshot

    def resume(self) -> None:
        """Resume the server."""
        self._connection.resume()

    def destroy(self) -> None:
        """Release the connection."""
        self._connection.close()
