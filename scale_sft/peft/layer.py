"""The layer: a linear layer whose weight holds the effective values of one adapter at a time.

Shapes: O rows, I columns of the weight; K active entries of an adapter; T tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from scale_sft.errors import UserError
from scale_sft.model.fingerprints import fingerprint
from scale_sft.model.resident import WeightPart, effective_values, read_entries, write_entries
from scale_sft.spiel.taps import WeightTap

BASE_KEY = "spiel_indices.__base__."
"""In a model's whole state dict, before the name of the resident adapter: the base values of its entries."""


class Owner(Protocol):
    """The tuner, as a layer sees it."""

    def check(self, layer: Linear) -> None:
        """Refuse a forward pass whose weights lag behind the deltas."""

    def gradient(self, layer: Linear, adapter: str, left: Tensor, right: Tensor) -> Tensor:
        """Compute the gradient of a layer's deltas, [K] fp32, from the factors of its weight's gradient."""

    def written(self, adapter: str) -> None:
        """Note that a weight has taken an adapter's present values."""

    def reloaded(self, layer: Linear) -> None:
        """Note that a layer has loaded other indices and values."""


class SpielLayer(BaseTunerLayer):
    """The mark of a layer of this method, and the names of what it holds for each adapter."""

    adapter_layer_names = ("spiel_values",)
    other_param_names = ("spiel_indices",)


class Linear(nn.Module, SpielLayer):
    """A linear layer with the sparse deltas of any number of adapters, one of them resident in its weight.

    The forward pass is that of `base_layer`. `spiel_values[adapter]` is a parameter [K] fp32, `spiel_indices[adapter]`
    a buffer of [K] flat indices, sorted and unique. `resident` names the adapter whose effective values the weight
    holds now; None: the weight is the base, bit for bit.

    Args:
        base_layer: `nn.Linear`, or GPT-2's `Conv1D` (weight [I, O]).
        weight_name: of its weight in the base's state dict.
        owner: the tuner.
    """

    owner: Owner

    def __init__(self, base_layer: nn.Module, weight_name: str, owner: Owner):
        super().__init__()
        self.base_layer = base_layer
        self.weight_name = weight_name
        self.__dict__["owner"] = owner  # a module: as an attribute it would be a part of this layer
        self.spiel_values = nn.ParameterDict()
        self.spiel_indices = BufferDict(persistent=True)
        self.tap = WeightTap(base_layer, weight_name, None, transposed=type(base_layer).__name__ == "Conv1D")
        self.resident: str | None = None
        self._base: Tensor | None = None  # [K] base values of the resident entries
        self._print: tuple[int, int] | None = None
        self._loading: tuple[str, Tensor] | None = None
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        rows, columns = self.weight.shape
        self.out_features, self.in_features = (columns, rows) if self.tap.transposed else (rows, columns)
        self.register_load_state_dict_pre_hook(_before_load)
        self.register_load_state_dict_post_hook(_after_load)

    # --- the adapters ---------------------------------------------------------------------------------------------

    @property
    def weight(self) -> nn.Parameter:
        """The base layer's weight."""
        return cast(nn.Parameter, self.base_layer.weight)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the weight as it is stored."""
        rows, columns = self.weight.shape
        return rows, columns

    def add(self, adapter: str, indices: Tensor, values: Tensor | None = None) -> None:
        """Give the layer an adapter: indices [K] sorted, unique; values [K], default: zeros."""
        device = self.weight.device
        values = torch.zeros(indices.shape) if values is None else values
        self.spiel_indices[adapter] = indices.to(device, copy=True)
        self.spiel_values[adapter] = nn.Parameter(values.to(device, torch.float32, copy=True))

    def replace(self, adapter: str, indices: Tensor, values: Tensor) -> None:
        """Give an adapter other entries, of the same number (in place) or of another."""
        self.show(None)
        if self.spiel_values[adapter].shape == values.shape:
            self.spiel_indices[adapter].copy_(indices)
            self.spiel_values[adapter].data.copy_(values)
        else:
            trained = self.spiel_values[adapter].requires_grad
            self.add(adapter, indices, values)
            self.spiel_values[adapter].requires_grad_(trained)
        self.owner.reloaded(self)
        self.settle()

    def has(self, adapter: str) -> bool:
        """Return True if the layer has entries of this adapter."""
        return adapter in self.spiel_values

    def fingerprint(self) -> tuple[int, int]:
        """Fingerprint the base's weight; the first call reads all of it."""
        if self._print is None:
            self.show(None)
            self._print = fingerprint(WeightPart.whole(self.weight))
            self.settle()
        return self._print

    def base_values(self) -> Tensor:
        """Return the base values [K] of the resident adapter's entries."""
        if self._base is None:
            raise UserError(f"{self.weight_name}: no adapter is in the weight. Fix: set_adapter or enable one first")
        return self._base

    # --- what the weight holds --------------------------------------------------------------------------------------

    def entries(self) -> Tensor:
        """Return the weight [N] flat, in place."""
        return self.weight.data.view(-1)

    def wanted(self) -> str | None:
        """Name the adapter that the weight should hold."""
        if self.disable_adapters:
            return None
        active = cast(list[str], self.active_adapters)
        names = self.merged_adapters or [name for name in active if self.has(name)]
        return names[0] if names else None

    def settle(self) -> None:
        """Bring the wanted adapter into the weight, in O(K)."""
        self.show(self.wanted())

    @torch.no_grad()
    def show(self, adapter: str | None) -> None:
        """Replace the resident adapter by another, or by the base."""
        if adapter == self.resident:
            return
        if self.resident is not None:
            write_entries(self.entries(), self.spiel_indices[self.resident], self.base_values())
            self.resident = self._base = None
        if adapter is None or self.weight.is_meta or self.spiel_values[adapter].is_meta:
            return
        self._base = read_entries(self.entries(), self.spiel_indices[adapter])
        self.resident = adapter
        self.write(adapter)
        self.owner.written(adapter)

    @torch.no_grad()
    def write(self, adapter: str) -> None:
        """Write the present effective values of an adapter, if the weight holds it."""
        if self.resident == adapter:
            values = effective_values(self.base_values(), self.spiel_values[adapter].detach().float())
            write_entries(self.entries(), self.spiel_indices[adapter], values)

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        """Move or cast the base and the deltas, each for itself."""
        self.show(None)
        self._print = None
        try:
            return super()._apply(fn, recurse)
        finally:
            self.settle()

    # --- forward and backward ---------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the base layer's output [..., O]; its weight holds the deltas."""
        adapter = self.resident
        if self.disable_adapters or self.merged or adapter is None or not torch.is_grad_enabled():
            if self.disable_adapters and self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        values = self.spiel_values[adapter]
        if not values.requires_grad:
            return self.base_layer(x, *args, **kwargs)
        self.owner.check(self)
        return _SparseLinear.apply(x, values, self)

    def require_resident(self, adapter: str) -> None:
        """Raise UserError if a backward pass finds other deltas than its forward pass."""
        if self.resident != adapter:
            raise UserError(
                f"backward: adapter '{adapter}' was disabled or swapped between the forward and the backward pass. "
                "Fix: call backward() before set_adapter, disable_adapter or delete_adapter"
            )

    # --- PEFT's interface -------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter active, and bring it into the weight in O(K).

        Raises:
            UserError: there are two; nothing has changed.
        """
        require_one(adapter_names)
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.settle()

    def enable_adapters(self, enabled: bool) -> None:
        """Bring the active adapter back, or the base, bit for bit."""
        super().enable_adapters(enabled)
        self.settle()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; the weight holds the next active one, or the base."""
        if self.resident == adapter_name:
            self.show(None)
        super().delete_adapter(adapter_name)
        self.settle()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Mark an adapter as merged: the weight holds it, and its layer is not trained until `unmerge`.

        Raises:
            UserError: there are two.
            ValueError: safe_merge, and a merged value is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.has(name)]
        if not names:
            return
        require_one([*self.merged_adapters, *names], "merge")
        self.show(names[0])
        held = read_entries(self.entries(), self.spiel_indices[names[0]])
        if safe_merge and not bool(torch.isfinite(held).all()):
            self.settle()
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken")
        self.merged_adapters.append(names[0])

    def unmerge(self) -> None:
        """Undo `merge`: the weight holds the active adapter, or the base if adapters are disabled."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters.clear()
        self.settle()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Release the base layer with an adapter in its weight, or without any."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        else:
            self.merged_adapters.clear()
            self.show(None)
        return self.base_layer

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the delta as a dense tensor, of the weight's shape, fp32."""
        dense = torch.zeros(self.shape, device=self.weight.device)
        dense.view(-1)[self.spiel_indices[adapter].long()] = self.spiel_values[adapter].detach().float()
        return dense

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.resident is not None:  # next to a weight that holds them, the values needed to take them out again
            destination[f"{prefix}{BASE_KEY}{self.resident}"] = self.base_values()

    def __repr__(self) -> str:
        return "spiel." + super().__repr__()


class _SparseLinear(torch.autograd.Function):
    """The base layer under autograd: only the input is kept, never the weight, nor anything of its size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, layer: Linear) -> Tensor:
        ctx.layer, ctx.adapter, ctx.dtype = layer, layer.resident, x.dtype
        y = layer.base_layer(x)
        ctx.save_for_backward(x.to(y.dtype))  # autocast: the product is of another dtype than its operands
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x,) = ctx.saved_tensors  # must come first: with checkpointing this recomputes the block
        layer = ctx.layer
        layer.require_resident(ctx.adapter)
        dx = layer.tap.input_gradient(dy).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        gradient = None
        if ctx.needs_input_grad[1]:
            gradient = layer.owner.gradient(layer, ctx.adapter, *layer.tap.factors(x, dy))
        return dx, gradient, None


def require_one(adapter_names: str | list[str], what: str = "set_adapter") -> None:
    """Raise UserError for several adapters at once: a weight holds the effective values of one."""
    if not isinstance(adapter_names, str) and len(set(adapter_names)) > 1:
        raise UserError(
            f"{what}: got {' and '.join(map(repr, adapter_names))}, expected one adapter, as a weight holds one at a "
            "time. Fix: add_weighted_adapter makes one of several"
        )


def require_whole(weight: Tensor, name: str) -> None:
    """Raise UserError for a weight that FSDP or ZeRO-3 has cut into shards."""
    if hasattr(weight, "ds_id") or hasattr(weight, "device_mesh") or weight.dim() != 2:
        raise UserError(
            f"model: got '{name}' in shards (FSDP or DeepSpeed ZeRO-3), expected whole weights under PEFT. Fix: use "
            "DDP; or train with `scale-sft train`, which shards the base over ranks"
        )


def _before_load(layer: Linear, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take the deltas out before a state dict is loaded, and refuse one of another budget."""
    for key in [key for key in state if key.startswith(prefix + BASE_KEY)]:
        adapter, base = key.removeprefix(prefix + BASE_KEY), state.pop(key)
        if f"{prefix}base_layer.weight" in state:
            layer._loading = adapter, base
    for adapter, values in layer.spiel_values.items():
        found = state.get(f"{prefix}spiel_values.{adapter}")
        if found is not None and found.shape != values.shape:
            raise UserError(
                f"load_state_dict: '{layer.weight_name}' has {found.numel():,} entries in the checkpoint, expected "
                f"{values.numel():,} as in adapter '{adapter}'. Fix: use the density of the checkpoint, or load its "
                "folder with PeftModel.from_pretrained"
            )
    if f"{prefix}base_layer.weight" in state:
        layer._print = None
    layer.show(None)


def _after_load(layer: Linear, _: Any) -> None:
    """Bring the deltas back after a state dict was loaded, onto the base that belongs to it."""
    loading, layer._loading = layer._loading, None
    if loading is not None:  # the state dict's weight holds this adapter's values
        adapter, base = loading
        write_entries(layer.entries(), layer.spiel_indices[adapter], base.to(layer.weight))
    layer.owner.reloaded(layer)
    layer.settle()
