"""Dropout, switched off in a model in memory for as long as its deltas are trained."""

from __future__ import annotations

from typing import Any

from torch import nn


class DropoutOff:
    """A model without dropout until `restore`: its dropout layers, the rates in its modules, and those in its config.

    The paper trains sparse deltas without dropout, and the command line does so too.
    """

    def __init__(self, model: nn.Module):
        self._rates: list[tuple[Any, str, float]] = []
        seen = set()
        for module in model.modules():
            for owner in (module, getattr(module, "config", None)):
                if owner is None or id(owner) in seen:
                    continue
                seen.add(id(owner))
                self._switch_off(owner)

    def _switch_off(self, owner: Any) -> None:
        layer = isinstance(owner, nn.modules.dropout._DropoutNd)
        for name, value in list(getattr(owner, "__dict__", {}).items()):
            if ("drop" in name or (layer and name == "p")) and isinstance(value, float) and value > 0:
                self._rates.append((owner, name, value))
                setattr(owner, name, 0.0)

    def restore(self) -> None:
        """Give every rate its earlier value back."""
        for owner, name, value in self._rates:
            setattr(owner, name, value)
        self._rates = []
