"""The layers of a model that PEFT wraps: the default ones, and what is refused."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from scale_sft.errors import UserError
from scale_sft.model.experts import fused_in
from scale_sft.model.packed_weights import is_quantized_layer
from scale_sft.model.targets import find_targets

from .layer import Linear, require_whole


def default_targets(model: nn.Module) -> set[str]:
    """List all linear layers inside the transformer blocks, those with adapters too."""
    wrapped = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    if wrapped:
        return wrapped
    targets = find_targets(model, None)
    experts = [target for target in targets if target.fused is not None]
    if experts:
        warnings.warn(
            f"SpielConfig: {len(experts):,} experts in fused parameters stay as they are, as PEFT wraps layers; "
            "scale_sft.attach and `scale-sft train` train them",
            stacklevel=2,
        )
    found = {target.name.removesuffix(".weight") for target in targets if target.fused is None}
    if not found:
        raise UserError(
            "target_modules: got a model whose only targets are experts in fused parameters, expected layers, which "
            "PEFT can wrap. Fix: use scale_sft.attach"
        )
    return found


def refuse_target(target: nn.Module, name: str) -> None:
    """Raise UserError for a layer that cannot hold deltas in its weight."""
    if is_quantized_layer(target):
        raise UserError(
            f"target_modules: '{name}' is quantised, expected a float dtype, as deltas are written into the weight. "
            "Fix: load the base unquantised; or train with `scale-sft train --quantization nf4` or "
            "scale_sft.attach, which add the deltas to dequantised weights"
        )
    if any(fused_in(name, target)):
        raise UserError(
            f"target_modules: '{name}' is a {type(target).__name__} layer, whose experts are fused into parameters, "
            "expected nn.Linear or Conv1D. Fix: leave it out, or train it with scale_sft.attach or `scale-sft train`"
        )
    if type(target) is not nn.Linear and type(target).__name__ != "Conv1D":
        raise UserError(
            f"target_modules: '{name}' is a {type(target).__name__} layer, expected nn.Linear or Conv1D. Fix: leave it "
            "out"
        )
    weight = target.weight
    require_whole(weight, name)  # type: ignore[arg-type]
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(
            f"target_modules: '{name}' is in {weight.dtype}, expected float32, bfloat16 or float16. Fix: load the "
            "model in one of them"
        )


def refuse_tied(model: nn.Module, layers: list[Linear]) -> None:
    """Raise UserError for a weight that another layer shares."""
    targets = {id(layer.weight): layer.weight_name for layer in layers}
    seen: set[int] = set()
    for _, weight in model.named_parameters(remove_duplicate=False):
        if id(weight) in seen and id(weight) in targets:
            raise UserError(
                f"target_modules: '{targets[id(weight)]}' is tied to another layer (usually the embeddings), which "
                "would change with it. Fix: leave it out"
            )
        seen.add(id(weight))
