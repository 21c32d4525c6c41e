"""Follow every step of every torch optimizer, whoever calls it: a Trainer, Accelerate, a plain loop."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


class Follower(Protocol):
    """An object whose parameters an optimizer may have moved."""

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Follow one step of an optimizer, of these parameters or of others."""


_followers: weakref.WeakSet[Any] = weakref.WeakSet()
_hook: Any = None


def follow_steps(follower: Follower) -> None:
    """Call `after_step` of an object after each step of any torch optimizer, as long as the object lives."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_step)
    _followers.add(follower)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for follower in list(_followers):
        follower.after_step(optimizer)
