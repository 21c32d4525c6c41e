"""A PEFT model with a SpielConfig as a source: its layers are known by what they have, so peft is not imported.

K active entries of the adapter that is in a weight now.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from scale_sft.errors import UserError
from scale_sft.model.resident import bits_of, effective_values, read_entries

from .names import unwrapped
from .source import Pieces, Source, TrainedWeight, register


@register
def _of_peft_model(model: Any) -> Source | None:
    layers = [one for one in model.modules() if hasattr(one, "spiel_values")] if isinstance(model, nn.Module) else []
    return PeftSource(unwrapped(model), layers) if layers else None


class PeftSource:
    """The weights of one PEFT model, with the entries of whichever adapter is active.

    Args:
        model: the PEFT model.
        layers: of `scale_sft.peft.layer`.

    Raises:
        UserError: other parameters are trained too, which patches would leave behind.
    """

    def __init__(self, model: nn.Module, layers: list[Any]):
        others = [n for n, one in model.named_parameters() if one.requires_grad and ".spiel_values." not in n]
        if others:
            raise UserError(
                f"sync: got '{others[0]}', which is trained whole; expected sparse deltas only. Fix: leave out "
                "modules_to_save"
            )
        self._model, self._layers = model, layers

    @property
    def model(self) -> nn.Module:
        whole = getattr(self._model, "get_base_model", None)
        return whole() if callable(whole) else self._model

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        return {layer.weight_name: layer.shape for layer in self._layers}

    def base_prints(self, pieces: Pieces) -> Mapping[str, tuple[int, int]]:
        prints = {layer.weight_name: layer.fingerprint() for layer in self._layers}
        return {piece.name: prints[name] for name, (piece,) in pieces.items()}

    def weights(self) -> Iterator[TrainedWeight]:
        if all(layer.resident is None for layer in self._layers):
            raise UserError("sync: got a model whose adapters are disabled, expected an active one. Fix: enable it")
        for layer in self._layers:
            entries = layer.entries()
            if layer.resident is None:  # the active adapter leaves this weight as it is
                none = torch.empty(0, dtype=torch.int32, device=entries.device)
                yield TrainedWeight(layer.weight_name, none, entries[:0], entries[:0])
                continue
            indices = layer.spiel_indices[layer.resident].clone()  # drop and grow writes into it
            base, values = layer.base_values(), read_entries(entries, indices)
            deltas = layer.spiel_values[layer.resident].detach().float()
            if not torch.equal(bits_of(values), bits_of(effective_values(base, deltas))):
                raise UserError(
                    f"sync: got '{layer.weight_name}' whose deltas have changed since they were written into it, "
                    "expected them written. Fix: call scale_sft.peft.write(model) after each step"
                )
            yield TrainedWeight(layer.weight_name, indices, values, base)
