"""Define the contestants of a step: ours on its real code path, PEFT's adapters, dense fine-tuning, and a lower bound.

All start from the same frozen model and compute the same loss on the same batches. After a step each is ready for the
next.
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
from scale_sft.model.experts import parse_slice
from scale_sft.model.group import OneProcess
from scale_sft.model.loss import token_loss_sum
from scale_sft.model.sparse_model import SparseModel
from scale_sft.model.sparse_settings import SparseSettings
from scale_sft.model.targets import budget_of, targets_of

from .workload import RUN_STEPS, Base, Batches, Case

LEARNING_RATE = 1e-4
"""The rate of all contestants; it does not affect the time of a step."""


def forward(model: nn.Module, batch: dict[str, Tensor], target_tokens: int) -> Tensor:
    """Compute the mean loss over the target tokens: fp32 scalar with gradient."""
    return token_loss_sum(model, batch, target_tokens)


def backward(loss: Tensor) -> float:
    """Compute all gradients; returns the loss, which every trainer reads."""
    loss.backward()
    return finite(loss.item())


def finite(loss: float) -> float:
    """Return a loss that is a number.

    Raises:
        UserError: it is none.
    """
    if not isfinite(loss):
        raise UserError(f"bench: the loss is {loss}; this base in this dtype overflows on random tokens")
    return loss


class Contestant(Protocol):
    """A way of training, ready for any number of steps."""

    model: nn.Module
    trainable: int  # parameters

    def warm_up(self, batches: Batches) -> None:
        """Reach the state of a step in the middle of a run."""

    def step(self, batches: Batches, number: int) -> float:
        """Do one whole optimizer step on micro-batch `number`; returns the loss."""


class Sparse:
    """Our contestant: the trainer's own model and optimizer, in one process and without files."""

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
        self.model, self.tuning, self.resident = self.sparse.model, self.sparse.tuning, self.sparse.carrier
        self.trainable = self.tuning.store.active

    @property
    def plain_step(self) -> int:
        """The number of a step that neither estimates nor reallocates, the usual case."""
        return self.tuning.schedule.estimation_steps + 1

    def warm_up(self, batches: Batches) -> None:
        """Do the first reallocation: then deltas are where gradients are large, and their ages differ."""
        for number in sorted({1, self.tuning.schedule.estimation_steps}):
            self.step_at(number, batches, number)

    def step(self, batches: Batches, number: int) -> float:
        """Do a step that only updates."""
        return self.step_at(self.plain_step, batches, number)

    def step_at(self, step: int, batches: Batches, number: int) -> float:
        """Do the trainer's optimizer step `step` on micro-batch `number`; returns the loss."""
        optimizer = self.optimizer
        optimizer.begin(step)
        loss = self.gradients(batches, number)
        optimizer.reduce()
        norm = optimizer.clip().item()
        if not isfinite(norm) or not self.tuning.candidates_are_finite:
            raise UserError(f"bench: the gradient norm is {norm}; this base in this dtype overflows on random tokens")
        optimizer.update()
        if optimizer.reallocates:
            optimizer.reallocate()
        optimizer.end()
        return loss

    def gradients(self, batches: Batches, number: int) -> float:
        """Compute the gradients of micro-batch `number`; returns the loss."""
        return backward(forward(self.model, batches.take(number), batches.target_tokens))


class Dense:
    """A contestant that torch's autograd trains: PEFT's adapters, or the target weights themselves.

    Args:
        model: with `requires_grad` set on the parameters to train.
        updates: update with torch's fused AdamW, its fastest; otherwise gradients are computed and dropped.
    """

    def __init__(self, model: nn.Module, *, updates: bool):
        self.model = model
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.trainable = sum(weight.numel() for weight in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True) if updates else None

    def warm_up(self, batches: Batches) -> None:
        """Do nothing: its steps are all alike."""

    def kept(self) -> dict[str, Any]:
        """Return what it keeps besides the model and the optimizer's state, by purpose."""
        return {}

    def step(self, batches: Batches, number: int) -> float:
        """Do forward, backward, and the update if there is one, and drop the gradients."""
        loss = backward(forward(self.model, batches.take(number), batches.target_tokens))
        if self.optimizer is not None:
            self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return loss


def _full(base: Base, *, updates: bool) -> Dense:
    model = base.load()
    for target in targets_of(model, base.config.sparse):
        target.weight.requires_grad_(True)
    return Dense(model, updates=updates)


def _frozen(base: Base) -> Dense:
    model: Any = base.load()
    model.enable_input_require_grads()  # the output of the embeddings, the input of the first adapter
    return Dense(model, updates=False)


def _peft(base: Base, kind: str, *, cast: bool = True, **settings: Any) -> Dense:
    """Make PEFT's adapter of a kind; its errors, as for unsupported layers, become UserErrors."""
    import peft

    config = getattr(peft, kind)(task_type="CAUSAL_LM", **settings)
    try:
        model = peft.get_peft_model(base.load(), config, autocast_adapter_dtype=cast)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"contestants: peft's {kind} cannot adapt this base: {error}. Fix: leave it out") from None
    return Dense(model.train(), updates=True)


def _layers(base: Base) -> list[str]:
    """Name the layers of our target weights as PEFT does.

    Raises:
        UserError: some are experts of fused parameters, which are no layers.
    """
    if experts := [name for name in base.shapes if parse_slice(name)]:
        raise UserError(
            f"contestants: peft cannot wrap the experts of this base ('{experts[0]}', ...), so its adapters would "
            "train other layers than ours. Fix: leave out LoRA, SHiRA and Super-Tuning"
        )
    return [name.removesuffix(".weight") for name in base.shapes]


def _supertuning(base: Base) -> Dense:
    """Make Super-Tuning's adapter; its one sparsity for all weights gives it our total of trained entries."""
    entries = sum(rows * columns for rows, columns in base.shapes.values())
    active = sum(budget_of(base.config.sparse, base.shapes).values())
    return _peft(base, "SupertuningConfig", sparsity=1 - active / entries, target_modules=_layers(base))


class SpielPeft(Dense):
    """Our method under PEFT, with torch's fused AdamW: the steps between two phases of drop and grow."""

    def __init__(self, base: Base):
        import peft

        from scale_sft.peft import SpielConfig

        sparse = base.config.sparse
        config = SpielConfig(
            density=sparse.density,
            rank_equivalent=sparse.rank_equivalent,
            total_steps=RUN_STEPS,
            update_interval_steps=RUN_STEPS,
            estimation_steps=1,
            kernels=base.config.run.kernels,
            task_type="CAUSAL_LM",
        )
        super().__init__(peft.get_peft_model(base.load(), config).train(), updates=True)

    def warm_up(self, batches: Batches) -> None:
        """Do the first reallocation, which only this step estimates."""
        self.step(batches, 1)

    def kept(self) -> dict[str, Any]:
        """Return the session and what its layers keep, by purpose."""
        tuner: Any = self.model.base_model
        (session,) = tuner.sessions.values()
        layers = list(tuner.spiel_layers())
        return {
            "indices": [layer.spiel_indices["default"] for layer in layers],
            "store": session.store,
            "recorder": session.recorder,
            "resident": [layer.base_values() for layer in layers],
        }


def lora_settings(base: Base) -> dict[str, Any]:
    """Return the settings of a LoRA on our target weights, of the rank whose parameters are nearest to ours."""
    return {"r": base.lora_rank, "lora_alpha": 2 * base.lora_rank, "lora_dropout": 0.0, "target_modules": _layers(base)}


def _lora(base: Base, *, cast: bool = True) -> Dense:
    return _peft(base, "LoraConfig", cast=cast, **lora_settings(base))


CONTESTANTS: dict[str, Callable[[Base], Contestant]] = {
    "ours-ag": lambda base: Sparse(base, "ag"),
    "ours-ma": lambda base: Sparse(base, "ma"),
    "ours-static": lambda base: Sparse(base, "static"),
    "ours-columns": lambda base: Sparse(base, "columns"),
    "peft-lora": _lora,  # PEFT's default: adapters and their computation in float32
    "peft-lora-bf16": lambda base: _lora(base, cast=False),
    "peft-ia3": lambda base: _peft(base, "IA3Config"),
    "peft-shira": lambda base: _peft(
        base, "ShiraConfig", r=base.lora_rank, random_seed=base.case.seed, target_modules=_layers(base)
    ),
    "peft-supertuning": _supertuning,
    "spiel-peft": SpielPeft,
    "full": lambda base: _full(base, updates=False),
    "full-adamw": lambda base: _full(base, updates=True),
    "frozen": _frozen,
}


def impossible(name: str, case: Case) -> str | None:
    """Explain why a contestant cannot take part in a case; None if it can.

    Raises:
        UserError: a library that it needs is not installed.
    """
    if (name.startswith("peft-") or name == "spiel-peft") and find_spec("peft") is None:
        raise UserError(
            f"contestants: {name} needs peft >= 0.21, which is not installed: pip install 'scale_sft[bench]', or name "
            "others with --contestants"
        )
    if name.startswith("full") and case.quantization != "none":
        return f"a base in {case.quantization} has no dense weights to train"
    if name in ("spiel-peft", "peft-supertuning") and case.quantization != "none":
        return f"it does not train on a base in {case.quantization}"
    if name == "peft-lora-bf16" and case.dtype != "bfloat16":
        return f"in {case.dtype} it is peft-lora"
    return None
