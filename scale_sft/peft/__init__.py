"""SpIEL as a method of PEFT: `get_peft_model(model, SpielConfig(density=0.01))`, under any Trainer.

Importing this package registers the method. It needs peft; nothing else in scale_sft imports it.

config           the options of an adapter
registry         the method in PEFT's mappings
layer            a linear layer whose weight holds one adapter's effective values
tuner            all layers of one model, and their adapters
targets          which layers of a model they are
session          the training of one adapter: candidates, drop and grow, writes
optimizer_state  somebody else's optimizer across drop and grow
hooks            every step of every torch optimizer
callback         the number of steps, from a Trainer
files            a folder that PEFT and scale_sft both read
combine          adapters into one: sums, TIES, DARE
"""

import importlib.metadata
from pathlib import Path

import peft.mapping
import torch
from torch import nn

from scale_sft.adapters.format import Adapter
from scale_sft.errors import UserError

from . import files, registry
from .callback import SpielCallback, add_to_trainers
from .config import SpielConfig
from .tuner import SpielModel, tuner_of

__all__ = ["SpielCallback", "SpielConfig", "SpielModel", "hotswap", "resume", "write"]

registry.require_version(importlib.metadata.version("peft"))
registry.register(SpielModel, peft.mapping)
add_to_trainers()


def write(model: nn.Module) -> None:
    """Write the deltas into the weights, after a step of an optimizer that is not one of torch."""
    tuner_of(model).write()


def resume(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Continue a training from an optimizer's loaded state, in a loop of your own; Trainers do this themselves."""
    tuner_of(model).begin(getattr(optimizer, "optimizer", optimizer))


def hotswap(model: nn.Module, adapter: str | Path | Adapter, adapter_name: str = "default") -> None:
    """Replace the entries of an adapter in a model by those of a folder, in O(K); the base is checked.

    PEFT's own `hotswap_adapter` knows LoRA alone.

    Raises:
        UserError: the folder is damaged, or of another base or other weights; nothing has changed.
    """
    tuner = tuner_of(model)
    if adapter_name not in tuner.peft_config:
        raise UserError(f"adapter_name: got '{adapter_name}', expected one of {', '.join(tuner.peft_config)}")
    new = adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)
    files.replace_entries(list(tuner.spiel_layers(adapter_name)), adapter_name, new)
