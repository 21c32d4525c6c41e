"""Unpack weights that bitsandbytes keeps in 4 or 8 bits, read their scales, and fingerprint them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scale_sft.errors import UserError

from .experts import FusedWeight
from .fingerprints import fingerprint
from .resident import WeightPart

FOUR_BIT_LAYERS = ("Linear4bit", "LinearNF4", "LinearFP4")
EIGHT_BIT_LAYERS = ("Linear8bitLt",)
BLOCK_ENTRIES = 64  # per scale, in 4 bits
SCALES_PER_BLOCK = 256  # quantised together by double quantisation
CHUNK_ENTRIES = 1 << 22
INT8_PIECES = 16  # at least: the fp32 temporary is at most an eighth of the bf16 weight
_MASK64 = (1 << 64) - 1


def is_quantized_layer(module: nn.Module) -> bool:
    """Return True for a bitsandbytes layer that `PackedWeight` can dequantise."""
    return type(module).__name__ in FOUR_BIT_LAYERS + EIGHT_BIT_LAYERS


def is_four_bit(module: nn.Module) -> bool:
    """Return True if a quantised layer stores 4 bits, False for 8."""
    return type(module).__name__ in FOUR_BIT_LAYERS


def _state_of(name: str, module: Any) -> Any:
    """Return the scales of a quantised layer, without changing it.

    Raises:
        UserError: it has none, or its weight was repacked, so that it cannot be dequantised.
    """
    weight, kind = module.weight, type(module).__name__
    if is_four_bit(module):
        state = getattr(weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise UserError(
                f"quantization: bitsandbytes has repacked {name!r} in an earlier evaluation, expected weights "
                "as they were loaded. Fix: attach the model before its first forward pass"
            )
    else:
        state = getattr(weight, "SCB", None)
        if state is None:  # a forward pass moves them
            state = getattr(getattr(module, "state", None), "SCB", None)
    if state is None:
        raise UserError(
            f"quantization: the {kind} layer of '{name}' holds no scales, so it cannot be "
            "dequantised; expected a layer that bitsandbytes has quantised"
        )
    return state


class PackedWeight:
    """The quantised weight [O, I] of one layer, before or after its packed parameter was cut into shards.

    Args:
        name: of the weight, for messages.
        module: a bitsandbytes layer, just loaded.
        dtype: of the dequantised values.
        device: where the computation runs; the scales move there.

    Raises:
        UserError: the layer has no scales, so it cannot be dequantised.
    """

    transposed = False  # even for GPT-2's Conv1D, whose weight is transposed when it is quantised
    fused: FusedWeight | None = None  # bitsandbytes packs no fused parameters
    number = 0

    def __init__(self, name: str, module: Any, dtype: torch.dtype, device: torch.device):
        self.module, self.dtype = module, dtype
        self.shape = (module.out_features, module.in_features)
        self.four_bit = is_four_bit(module)
        state = _state_of(name, module)
        self.state: Any = None
        self.scales: Any = None
        if self.four_bit:
            # On CPUs with AVX512-bf16 the layer would repack its weight in place in the first evaluation; under ZeRO-3
            # only the gathered copy, which corrupts it.
            self._repacks = getattr(module, "support_avx512bf16_for_cpu", False)
            module.support_avx512bf16_for_cpu = False
            state.to(device)
            state.dtype = dtype  # dequantise straight into the compute dtype: one copy, one rounding
            self.state = state
        else:
            self.scales = state.to(device=device, dtype=torch.float32)
            module.weight.CB = module.weight.SCB = None  # a second reference would keep the whole weight, not its shard

    @property
    def weight(self) -> nn.Parameter:
        """The packed parameter as stored."""
        return self.module.weight

    def give_back(self) -> None:
        """Return the layer to its own computation."""
        if self.four_bit:
            self.module.support_avx512bf16_for_cpu = self._repacks
        elif getattr(self.module.state, "CB", None) is None:
            self.module.weight.CB, self.module.weight.SCB = self.module.weight.data, self.scales

    def dequantize(self, packed: Tensor) -> Tensor:
        """Dequantise the [P] packed bytes of the whole weight into a new tensor [O, I] in the compute dtype."""
        if not self.four_bit:
            return self._dequantize_int8(packed.view(self.shape))
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(packed, self.state)

    def _dequantize_int8(self, packed: Tensor) -> Tensor:
        """Dequantise in pieces, so that the fp32 product of entry and scale never exists for the whole weight."""
        weight = torch.empty(self.shape, dtype=self.dtype, device=packed.device)
        rows = max(1, min(CHUNK_ENTRIES // self.shape[1], self.shape[0] // INT8_PIECES))
        for first in range(0, self.shape[0], rows):
            part = slice(first, first + rows)
            weight[part] = (packed[part] * self.scales[part, None]).mul_(1 / 127)
        return weight

    def _state_tensors(self) -> list[Tensor]:
        if not self.four_bit:
            return [self.scales]
        if not self.state.nested:
            return [self.state.absmax]
        return [self.state.absmax, self.state.state2.absmax, self.state.offset.reshape(1)]

    @property
    def state_bytes(self) -> int:
        """Count the bytes of the scales."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._state_tensors())

    def with_state(self, packed_print: tuple[int, int]) -> tuple[int, int]:
        """Add the scales, which every rank holds, to the fingerprint of the packed bytes; returns the weight's."""
        prints = [packed_print]
        for number, tensor in enumerate(self._state_tensors(), start=1):
            start = number << 48  # far beyond the indices of packed entries
            flat = tensor.detach().contiguous().view(-1)
            prints.append(fingerprint(WeightPart(partial(_same, flat), start, start + flat.numel())))
        return sum(a for a, _ in prints) & _MASK64, sum(b for _, b in prints) & _MASK64


def _same(flat: Tensor) -> Tensor:
    return flat


class PlainWeight:
    """A target whose own weight is unquantised in a quantised base; dequantising it is copying it.

    Args:
        module: has the weight.
        transposed: the weight is [I, O].
        fused: the parameter of which the weight is slice `number`, if it is one.
    """

    state_bytes = 0

    def __init__(
        self,
        module: Any,
        transposed: bool,
        *,
        fused: FusedWeight | None = None,
        number: int = 0,
        output: nn.Module | None = None,
    ):
        self.module, self.transposed, self.fused, self.number = module, transposed, fused, number
        self.output = output  # see `Target`

    @property
    def weight(self) -> nn.Parameter:
        """The parameter as stored; of a slice, the one that contains it."""
        return self.fused.weight if self.fused else self.module.weight

    def dequantize(self, stored: Tensor) -> Tensor:
        """Copy the weight out of the whole parameter."""
        return (stored[self.number] if self.fused else stored).clone()

    def with_state(self, own_print: tuple[int, int]) -> tuple[int, int]:
        """Return the weight's own fingerprint."""
        return own_print


def packed_weights(model: nn.Module, dtype: torch.dtype, device: torch.device) -> dict[str, PackedWeight]:
    """Collect all quantised weights of a freshly loaded model, by name; call it before the model is sharded.

    Raises:
        UserError: it has none, or one that cannot be dequantised.
    """
    layers = {f"{path}.weight": module for path, module in model.named_modules() if is_quantized_layer(module)}
    if not layers:
        raise UserError("quantization: this model has no layers that bitsandbytes can quantise")
    for name, module in layers.items():  # all of them before the first is changed
        _state_of(name, module)
    return {name: PackedWeight(name, module, dtype, device) for name, module in layers.items()}


def cast_the_rest(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the unquantised parameters of a base that is quantised on disk to the compute dtype, in place.

    transformers leaves them in their stored dtype. Buffers stay as they are.
    """
    packed = {id(module.weight) for module in model.modules() if is_quantized_layer(module)}
    for parameter in model.parameters():
        if id(parameter) not in packed and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
