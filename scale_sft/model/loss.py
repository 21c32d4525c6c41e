"""Cross entropy of the target tokens of a batch, without all of its logits wherever the model allows it.

Shapes: B sequences, L tokens; T target tokens.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from .cross_entropy import cross_entropies
from .output_layer import OutputLayer, output_layer

IGNORED = -100
"""Label of a token that does not count."""


def token_losses(model: nn.Module, batch: dict[str, Tensor], over: float = 1) -> Tensor:
    """Compute the cross entropies of a [B, L] batch's target tokens, row by row: [T] fp32 with gradient.

    The labels belong on the CPU: to find the targets among them elsewhere, the CPU would have to wait for the device.

    Args:
        over: what the caller will divide them by; see `OutputLayer.losses`.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return losses_at(model, inputs, *predictions(batch["labels"]), over)


def losses_at(model: nn.Module, inputs: dict[str, Tensor], places: Tensor, targets: Tensor, over: float = 1) -> Tensor:
    """Compute the cross entropies of some predictions of a [B, L] batch: [T] fp32 with gradient.

    Args:
        model: a causal language model.
        inputs: of the model, input_ids [B, L] among them.
        places: [T] int64, which of the B * L tokens predict, without repetition. targets: [T] int64, what.
        over: as in `token_losses`.
    """
    device = inputs["input_ids"].device
    places, targets = (found.to(device, non_blocking=True) for found in (places, targets))
    layer = output_layer(model)
    if isinstance(layer, OutputLayer) and not layer.needs_all_logits:
        return layer.losses(model, inputs, places, targets, over)
    logits = model(**inputs, use_cache=False).logits
    return cross_entropies(logits.flatten(0, 1), places, targets)


def token_loss_sum(model: nn.Module, batch: dict[str, Tensor], over: float = 1) -> Tensor:
    """Sum the cross entropies of a batch's target tokens, and divide by `over`: fp32 scalar with gradient."""
    return token_losses(model, batch, over).sum() / over


def predictions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Find which of the B * L tokens predict a target, and which one: [T] int64 each, where the labels [B, L] are."""
    following = functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()  # the last token predicts nothing
    places = (following != IGNORED).nonzero().squeeze(1)
    return places, following[places]


def why_all_logits(model: nn.Module) -> str | None:
    """Say why this model's loss makes all logits of a micro-batch at once; None: it does not."""
    layer = output_layer(model)
    if isinstance(layer, str):
        return layer
    return "the output layer is trained by autograd" if layer.needs_all_logits else None
