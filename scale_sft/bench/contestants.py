"""Contestants of a step: ours on its real code path, PEFT's adapters, dense fine-tuning, and the floor of any adapter.

All start from the same frozen model, compute the same loss on the same batches, and end a step ready for the next one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib.util import find_spec
from math import isfinite
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scale_sft.errors import UserError
from scale_sft.model.group import OneProcess
from scale_sft.model.loss import token_loss_sum
from scale_sft.model.sparse_model import SparseModel
from scale_sft.model.sparse_settings import SparseSettings
from scale_sft.model.targets import find_targets

from .workload import RUN_STEPS, Base, Batches, Case

LEARNING_RATE = 1e-4
"""Of all contestants; it has no influence on the time of a step."""


def forward(model: nn.Module, batch: dict[str, Tensor], target_tokens: int) -> Tensor:
    """Mean loss over the target tokens: fp32 scalar with gradient."""
    return token_loss_sum(model, batch, target_tokens)


def backward(loss: Tensor) -> float:
    """All gradients; returns the loss, which every trainer looks at."""
    loss.backward()
    value = loss.item()
    if not isfinite(value):
        raise UserError(f"bench: the loss is {value}; this base in this dtype overflows on random tokens")
    return value


class Contestant(Protocol):
    """One way of training, ready for any number of steps."""

    model: nn.Module
    trainable: int  # parameters

    def warm_up(self, batches: Batches) -> None:
        """Come to the state that a step in the middle of a run has."""

    def step(self, batches: Batches, number: int) -> float:
        """One whole optimizer step on micro-batch `number`; returns the loss."""


class Sparse:
    """Ours: the model and the optimizer that the trainer has, in one process and without files."""

    def __init__(self, base: Base, method: str):
        config = base.config
        settings = SparseSettings(
            sparse=dataclasses.replace(config.sparse, method=method),
            optimizer=dataclasses.replace(config.optimizer, learning_rate=LEARNING_RATE),
            total_steps=RUN_STEPS,
            dtype=base.dtype,
            quantization=base.quantization,
            seed=config.run.seed,
            kernels=config.run.kernels,
        )
        self.sparse = SparseModel(base.load(), settings, OneProcess(base.device))
        self.optimizer = self.sparse.optimizer(LEARNING_RATE)
        self.sparse.measure_kernels(base.case.micro_batch * base.case.length)
        self.model, self.tuning, self.resident = self.sparse.model, self.sparse.tuning, self.sparse.carrier
        self.trainable = self.tuning.store.active

    @property
    def plain_step(self) -> int:
        """A step number of the run that neither estimates nor reallocates: the usual case."""
        return self.tuning.schedule.estimation_steps + 1

    def warm_up(self, batches: Batches) -> None:
        """Reach the first reallocation: after it deltas stand where gradients are large, and have ages that differ."""
        for number in sorted({1, self.tuning.schedule.estimation_steps}):
            self.step_at(number, batches, number)

    def step(self, batches: Batches, number: int) -> float:
        """Do a step that updates and does nothing else."""
        return self.step_at(self.plain_step, batches, number)

    def step_at(self, step: int, batches: Batches, number: int) -> float:
        """Do what the trainer's loop does at optimizer step `step`, on micro-batch `number`; returns the loss."""
        optimizer = self.optimizer
        optimizer.begin(step)
        loss = backward(forward(self.model, batches.take(number), batches.target_tokens))
        optimizer.reduce()
        norm = optimizer.clip().item()
        if not isfinite(norm) or not self.tuning.candidates_are_finite:
            raise UserError(f"bench: the gradient norm is {norm}; this base in this dtype overflows on random tokens")
        optimizer.update()
        if optimizer.reallocates:
            optimizer.reallocate()
        optimizer.end()
        return loss


class Dense:
    """Anything that torch's autograd trains: PEFT's adapters, or the target weights themselves.

    Args:
        model: with `requires_grad` where it is to be trained.
        updates: with AdamW (torch's fused one, the fastest it has); otherwise gradients are formed and dropped.
    """

    def __init__(self, model: nn.Module, *, updates: bool):
        self.model = model
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.trainable = sum(weight.numel() for weight in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True) if updates else None

    def warm_up(self, batches: Batches) -> None:
        """It is as it will be."""

    def step(self, batches: Batches, number: int) -> float:
        """Forward, backward, update if there is one; gradients are dropped."""
        loss = backward(forward(self.model, batches.take(number), batches.target_tokens))
        if self.optimizer is not None:
            self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return loss


def _full(base: Base, *, updates: bool) -> Dense:
    model = base.load()
    for target in find_targets(model, base.config.sparse.target_modules):
        target.module.weight.requires_grad_(True)
    return Dense(model, updates=updates)


def _frozen(base: Base) -> Dense:
    model: Any = base.load()
    model.enable_input_require_grads()  # the output of the embeddings, as the first thing that any adapter changes
    return Dense(model, updates=False)


def _peft(base: Base, kind: str, *, cast: bool = True, **settings: Any) -> Dense:
    """PEFT's adapter of a kind on the same targets; its errors (layers that it does not support) are told as ours."""
    import peft

    if settings.get("target_modules") is True:
        settings["target_modules"] = [name.removesuffix(".weight") for name in base.shapes]
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **settings)
    try:
        model = peft.get_peft_model(base.load(), config, autocast_adapter_dtype=cast)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"contestants: peft's {kind} cannot adapt this base: {error}; leave it out") from None
    return Dense(model.train(), updates=True)


def _lora(base: Base, *, cast: bool = True) -> Dense:
    rank = base.lora_rank
    return _peft(base, "LoraConfig", cast=cast, r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=True)


CONTESTANTS: dict[str, Callable[[Base], Contestant]] = {
    "ours-ag": lambda base: Sparse(base, "ag"),
    "ours-ma": lambda base: Sparse(base, "ma"),
    "ours-static": lambda base: Sparse(base, "static"),
    "peft-lora": _lora,  # as PEFT makes it: adapters and their computation in float32
    "peft-lora-bf16": lambda base: _lora(base, cast=False),
    "peft-ia3": lambda base: _peft(base, "IA3Config"),
    "peft-shira": lambda base: _peft(
        base, "ShiraConfig", r=base.lora_rank, random_seed=base.case.seed, target_modules=True
    ),
    "full": lambda base: _full(base, updates=False),
    "full-adamw": lambda base: _full(base, updates=True),
    "frozen": _frozen,
}


def impossible(name: str, case: Case) -> str | None:
    """Why a contestant takes no part in a case; None: it does.

    Raises:
        UserError: a library that it needs is not installed.
    """
    if name.startswith("peft-") and find_spec("peft") is None:
        raise UserError(
            f"contestants: {name} needs peft >= 0.21, which is not installed: pip install 'scale_sft[bench]', or name "
            "others with --contestants"
        )
    if name.startswith("full") and case.quantization != "none":
        return f"a base in {case.quantization} has no dense weights to train"
    if name == "peft-lora-bf16" and case.dtype != "bfloat16":
        return f"in {case.dtype} it is peft-lora"
    return None
