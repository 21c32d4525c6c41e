"""Randomness in training mode, switched off: dropout and the jitter of routers, in configurations and in models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_JITTER: dict[str, Any] = {"jitter_noise": 0.0, "input_jitter_noise": 0.0, "moe_jitter_eps": None}
"""Settings of routers that multiply their input by noise, and their values without it."""
_ROUTER_JITTER = "router_jitter_noise"  # as above, except where input_jitter_noise is the noise and this a threshold


def switch_off_randomness(config: Any) -> None:
    """Switch dropout and jitter off in a configuration of transformers, and in all that it contains.

    Differs from transformers in training mode: a frozen base under sparse deltas is trained without dropout (the paper
    uses none for SFT), so that a step depends on its batch alone.
    """
    for owner in _nested(config):
        for name, _, still in list(_random_settings(owner)):
            setattr(owner, name, still)


class DropoutOff:
    """A model without dropout and jitter until `restore`: its layers, the rates in its modules, and its configs.

    The paper trains sparse deltas without dropout, and the command line does so too.
    """

    def __init__(self, model: nn.Module):
        self._rates: list[tuple[Any, str, float]] = []
        seen = set()
        for module in model.modules():
            for owner in (module, *_nested(getattr(module, "config", None))):
                if id(owner) in seen:
                    continue
                seen.add(id(owner))
                self._switch_off(owner)

    def _switch_off(self, owner: Any) -> None:
        for name, value, still in list(_random_settings(owner)):
            self._rates.append((owner, name, value))
            setattr(owner, name, still)

    def restore(self) -> None:
        """Give every rate its earlier value back."""
        for owner, name, value in self._rates:
            setattr(owner, name, value)
        self._rates = []


@contextmanager
def without_noise(model: nn.Module) -> Iterator[None]:
    """Let forward passes inside the block draw no random numbers, as training may where `allow_randomness` is set."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _nested(config: Any) -> Iterator[Any]:
    """Yield a configuration and those inside it, at any depth."""
    from transformers import PretrainedConfig

    if isinstance(config, PretrainedConfig):
        yield config
        for value in list(vars(config).values()):
            yield from _nested(value)


def _random_settings(owner: Any) -> Iterator[tuple[str, float, float | None]]:
    """Yield the settings of a configuration or module that make training random: name, value, value without it."""
    layer = isinstance(owner, nn.modules.dropout._DropoutNd)
    settings = getattr(owner, "__dict__", {})
    for name, value in settings.items():
        if not isinstance(value, float) or value <= 0:
            continue
        if "drop" in name or (layer and name == "p"):
            yield name, value, 0.0
        elif name in _JITTER:
            yield name, value, _JITTER[name]
        elif name == _ROUTER_JITTER and "input_jitter_noise" not in settings:
            yield name, value, 0.0
