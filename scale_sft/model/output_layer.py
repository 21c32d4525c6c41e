"""The output layer and the loss in one, chunk by chunk: neither all logits nor their gradient ever exist.

The model runs as it is, with its own code around its output layer; only the layer's forward is replaced, for the length
of one call. It gets the last hidden states and forms, for a chunk of the tokens that predict a target, their logits,
their cross entropies, and the gradient of each cross entropy in its own hidden state. That gradient is kept: it is as
small as the hidden states, while forming it in the backward pass would cost one product with the whole weight more. A
layer that is trained pays for that product: its backward pass makes the logits again, chunk by chunk, and hands each
chunk's factors of the weight gradient to the layer's tap.

What a model does to its logits afterwards (scales, soft caps) is known for those in transformers and proven by a probe
before it is relied on; models that fail it have all their logits at once.
Shapes: B sequences, L tokens; N = B * L; T target tokens; H hidden size; V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from scale_sft.spiel.indices import pieces
from scale_sft.spiel.taps import WeightTap

from .cross_entropy import cross_entropies
from .dropout import without_noise
from .empty import text_config

Operation = Callable[[Tensor], Tensor]

CPU_CHUNK, GPU_CHUNK = 1 << 24, 1 << 26
"""Logits of one chunk. The more rows, the less often the weight is read: 512 rows at a vocabulary of 128k use a GPU
fully, and take 0.13 GB in 16 bits, as their gradient does."""

_PROBE_SHAPE = (2, 4)
_PROBE_RANGE = 64.0
"""Of the logits that the probe puts in place of the layer's: far enough to meet any soft cap."""


# --- what models do to their logits ---------------------------------------------------------------------------------


def _times(factor: float) -> Operation:
    return lambda logits: logits * factor


def _over(divisor: float) -> Operation:
    return lambda logits: logits / divisor


def _capped(cap: float) -> Operation:
    return lambda logits: torch.tanh(logits / cap) * cap


_KNOWN: tuple[tuple[str, tuple[Callable[[float], Operation], ...]], ...] = (
    ("logit_scale", (_times,)),  # Cohere
    ("lm_head_multiplier", (_times,)),  # Falcon-H1
    ("output_multiplier", (_times,)),  # Muse
    ("logits_scaling", (_over, _times)),  # Granite; HyperCLOVA X
    ("final_logit_softcapping", (_capped,)),  # Gemma 2, 3, 3n, 4; Beam; Mistral Large 4
    ("logits_soft_cap", (_capped,)),  # RecurrentGemma
)
"""Settings by name, in the order in which they act, and what each may do: one that is met with two meanings has both,
and the probe chooses."""


def known_operations(model: Any) -> Iterator[Operation]:
    """What the model may do to its logits by its settings, the likeliest first; nothing at all comes last."""
    meanings = [
        [make(value) for make in makers] for name, makers in _KNOWN if (value := _setting(model, name)) is not None
    ]
    for start in (_unchanged, Tensor.float):
        for chosen in product(*meanings):
            yield _in_turn(start, *chosen)
    if meanings:
        yield _unchanged


def _setting(model: Any, name: str) -> float | None:
    config: Any = getattr(model, "config", None)
    for owner in (text_config(config), model, getattr(model, "model", None)):
        value = getattr(owner, name, None)
        if isinstance(value, int | float):
            return value
    return None


def _unchanged(logits: Tensor) -> Tensor:
    return logits


def _in_turn(*operations: Operation) -> Operation:
    def all_of_them(logits: Tensor) -> Tensor:
        for operation in operations:
            logits = operation(logits)
        return logits

    return all_of_them


# --- the layer --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputLayer:
    """A model's output layer, and what the model does to the logits that come from it."""

    module: nn.Module
    afterwards: Operation
    vocabulary: int  # V

    @property
    def needs_all_logits(self) -> bool:
        """Whether autograd waits for the gradient of its weight, which only all logits give it."""
        return any(weight.requires_grad for weight in self.module.parameters())

    def losses(
        self, model: nn.Module, inputs: Mapping[str, Any], places: Tensor, targets: Tensor, over: float = 1
    ) -> Tensor:
        """Cross entropies [T] fp32 with gradient, in one pass through the model.

        Args:
            model: that has this layer.
            inputs: of the model, input_ids [B, L] among them.
            places: [T] int64, which of the N tokens predict. targets: [T] int64, what they should.
            over: what the caller divides the losses by. Their gradients are formed for that, and rounded once; with any
                other divisor they are right too, but are rounded twice.

        Raises:
            ValueError: the model calls the layer never, twice, or with something else than [B, L, H].
        """
        forward = self.module.forward
        found: list[Tensor] = []

        def formed(hidden: Tensor) -> Tensor:
            if found or hidden.shape[:-1] != inputs["input_ids"].shape:
                raise ValueError(f"output layer: got {tuple(hidden.shape)}, expected one call with [B, L, H]")
            losses = self._losses(forward, hidden.flatten(0, -2), places, targets, over)
            return losses.view(*hidden.shape[:-1], 1)

        def taken(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            found.append(output)
            return torch.zeros_like(output)  # for the model to handle and to return

        # the losses leave through the layer's output: DeepSpeed's hooks gather and release by what they see there
        hook = self.module.register_forward_hook(taken)
        try:
            with _forward_replaced(self.module, formed):
                model(**inputs, use_cache=False)
        finally:
            hook.remove()
        if not found:
            raise ValueError("output layer: got no call")
        return found[0].flatten().index_select(0, places)

    def _losses(self, forward: Operation, hidden: Tensor, places: Tensor, targets: Tensor, over: float) -> Tensor:
        """[N] fp32 from hidden states [N, H], 0 where there is no target; even a sharded weight is whole meanwhile."""
        tap = getattr(forward, "tap", None)
        if tap is not None and tap.record is not None and torch.is_grad_enabled():
            return _Trained.apply(hidden, tap.anchor, tap, self, places, targets)
        learns = torch.is_grad_enabled() and hidden.requires_grad
        losses = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        share = torch.ones((), device=hidden.device) / over
        slopes = hidden.new_empty(len(targets) if learns else 0, hidden.shape[-1])
        for part in pieces(len(targets), self.rows_at_once(hidden.device)):
            rows = hidden.detach().index_select(0, places[part]).requires_grad_(learns)
            every = torch.arange(len(rows), device=rows.device)
            of_part = cross_entropies(self.afterwards(forward(rows)), every, targets[part])
            losses.index_copy_(0, places[part], of_part.detach())
            if learns:
                (slopes[part],) = torch.autograd.grad(of_part, rows, share.expand_as(of_part))
        return _Formed.apply(hidden, losses, slopes, places, share) if learns else losses

    def slope(self, logits: Tensor, targets: Tensor, gradient: Tensor) -> Tensor:
        """Compute the gradient [T, V] of losses in the layer's own logits, from theirs, [T]."""
        with torch.enable_grad():
            own = logits.detach().requires_grad_()
            losses = cross_entropies(self.afterwards(own), torch.arange(len(own), device=own.device), targets)
        return torch.autograd.grad(losses, own, gradient)[0]

    def chunks(self, targets: Tensor) -> list[slice]:
        """Cut targets [T] into chunks, at least one: every rank offers a gradient, even one without targets."""
        return list(pieces(len(targets), self.rows_at_once(targets.device))) or [slice(0, 0)]

    def rows_at_once(self, device: torch.device) -> int:
        """Tokens of one chunk."""
        return max(1, (CPU_CHUNK if device.type == "cpu" else GPU_CHUNK) // self.vocabulary)


class _Formed(torch.autograd.Function):
    """Losses [N] whose gradients in the hidden states, [T, H] times a share, are there already."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, losses: Tensor, slopes: Tensor, places: Tensor, share: Tensor) -> Tensor:
        ctx.save_for_backward(slopes, places, share)
        ctx.shape = hidden.shape
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        slopes, places, share = ctx.saved_tensors
        of_hidden = slopes.new_zeros(ctx.shape).index_copy_(0, places, slopes)
        return of_hidden.mul_((gradient / share)[:, None]), None, None, None, None


class _Trained(torch.autograd.Function):
    """Losses [N] of a layer whose weight is trained, 0 where there is no target; only the hidden states are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        anchor: Tensor,
        tap: WeightTap,
        layer: OutputLayer,
        places: Tensor,
        targets: Tensor,
    ) -> Tensor:
        # `anchor` requires a gradient and gets none: it makes backward run even if nothing before the layer is trained
        ctx.tap, ctx.layer = tap, layer
        ctx.save_for_backward(hidden, places, targets)
        losses = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        for part in layer.chunks(targets):
            logits = layer.afterwards(tap.output(hidden.index_select(0, places[part])))
            every = torch.arange(len(logits), device=logits.device)
            losses.index_copy_(0, places[part], cross_entropies(logits, every, targets[part]))
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        hidden, places, targets = ctx.saved_tensors
        tap, layer, slopes = ctx.tap, ctx.layer, torch.zeros_like(hidden)
        chunks = layer.chunks(targets)
        with tap.materialize(tap.module.weight):
            for number, part in enumerate(chunks, start=1):
                rows = hidden.index_select(0, places[part])
                of_logits = layer.slope(tap.output(rows), targets[part], gradient.index_select(0, places[part]))
                slopes.index_copy_(0, places[part], tap.input_gradient(of_logits))
                tap.offer(rows, of_logits, more=number < len(chunks))
                del of_logits  # before the next chunk's
        return slopes, None, None, None, None, None


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Replace a module's forward inside the block; hooks around it stay."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before


# --- the probe --------------------------------------------------------------------------------------------------------

_probed: weakref.WeakKeyDictionary[nn.Module, OutputLayer | str] = weakref.WeakKeyDictionary()


def output_layer(model: nn.Module) -> OutputLayer | str:
    """A model's output layer, once it has been proven; or the reason why all logits must be made. Probed once.

    A sharded model is probed on all ranks together.
    """
    known = _probed.get(model)
    if known is None or (isinstance(known, OutputLayer) and known.module is not _named_by(model)):
        known = _probed[model] = _probe(model)
    return known


def assumed_output_layer(model: Any) -> OutputLayer | None:
    """What a probe would find, if the model is of a kind that is known; for a model without weights."""
    module = _named_by(model)
    if module is None or not isinstance(getattr(module, "out_features", None), int):
        return None
    return OutputLayer(module, next(known_operations(model)), module.out_features)


def _named_by(model: Any) -> Any:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


@torch.no_grad()
def _probe(model: Any) -> OutputLayer | str:
    """Run the model twice on a few tokens: over made-up logits, and over its own, whose losses must be the same.

    The made-up ones, far from zero, show what it does to logits even where its own would hardly change.
    """
    name = type(model).__name__
    module = _named_by(model)
    if not isinstance(module, nn.Module):
        return f"{name} names no output layer"
    device = next(model.parameters()).device
    ids = torch.arange(_PROBE_SHAPE[0] * _PROBE_SHAPE[1], device=device).view(_PROBE_SHAPE)
    inputs = {"input_ids": ids % model.config.get_text_config().vocab_size, "attention_mask": torch.ones_like(ids)}
    forward, made = module.forward, []

    def far(hidden: Tensor) -> Tensor:
        own = forward(hidden)
        numbers = torch.linspace(-_PROBE_RANGE, _PROBE_RANGE, own.numel(), dtype=torch.float32, device=own.device)
        made.append(numbers.to(own.dtype).view(own.shape))
        return made[-1].clone()

    try:
        with without_noise(model):
            with _forward_replaced(module, far):
                logits = model(**inputs, use_cache=False).logits
            if len(made) != 1:
                return f"{name} calls its output layer {len(made)} times"
            same = lambda after: torch.equal(after(made[0]).float(), logits.float())
            afterwards = next((after for after in known_operations(model) if same(after)), None)
            if afterwards is None:
                return f"{name} does something unknown to its logits"
            layer = OutputLayer(module, afterwards, made[0].shape[-1])
            places, targets = torch.arange(ids.numel(), device=device), inputs["input_ids"].flatten()
            logits = model(**inputs, use_cache=False).logits.flatten(0, 1)
            whole, formed = cross_entropies(logits, places, targets), layer.losses(model, inputs, places, targets)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError) as error:
        return f"{name} cannot be probed: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
    within = 32 * torch.finfo(logits.dtype).eps
    if not torch.allclose(whole, formed, rtol=within, atol=within * float(logits.abs().max().clamp(min=1))):
        return f"{name} gives other losses without its logits"
    return layer
