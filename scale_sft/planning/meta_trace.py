"""Measure the memory of a forward and backward pass by running it on the meta device, without numbers.

Every storage that the pass creates is counted until autograd frees it, so the count is valid for any architecture,
with the taps of this package in place. Memory used inside a kernel is not seen.
Shapes: B sequences, L tokens, V vocabulary, N entries of a weight, K active entries, C candidates.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scale_sft.config.options import SparseConfig
from scale_sft.errors import UserError
from scale_sft.model.cross_entropy import cross_entropies
from scale_sft.model.empty import empty_model
from scale_sft.model.loading import enable_checkpointing
from scale_sft.model.loss import predictions
from scale_sft.model.output_layer import assumed_output_layer
from scale_sft.model.targets import Target, attach_taps, targets_of, transposed_names
from scale_sft.model.tilings import tilings_of
from scale_sft.spiel.tile_recorder import sketched
from scale_sft.spiel.tiles import Tiles, Tiling
from scale_sft.spiel.topk import CHUNK_ENTRIES

_ATTENTION = "scale_sft_plan"
_TRACED_LAYERS = (3, 5)
"""Deep models are traced with these numbers of blocks, and extrapolated: each block adds the same."""


@dataclass(frozen=True)
class StepMemory:
    """The bytes of one micro-step, at their peaks, without the base and the deltas' state."""

    activations: int  # kept from forward to backward
    logits: int  # what the loss takes at its peak, beyond what the backward pass needs anyway
    peak: int  # of everything that the pass allocates, including the above

    @property
    def working(self) -> int:
        """The rest of the peak without activations and logits: gradients, a weight's dW."""
        return max(0, self.peak - self.activations - self.logits)


class LiveBytes(TorchDispatchMode):
    """A count of live bytes, and their peak, of all storages created inside the `with` block.

    Args:
        model: its weights and buffers, and views of them, do not count.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, storage._cdata, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def step_memory(
    model_config: Any,
    dtype: torch.dtype,
    *,
    sequences: int,
    tokens: int,
    sparse: SparseConfig | None = None,
    active: Mapping[str, int] | None = None,
    proposes: bool = True,
    checkpointing: bool = False,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
    faults: Mapping[str, str] | None = None,
) -> StepMemory:
    """Measure a micro-step of `sequences` sequences of `tokens` tokens, all of which count in the loss.

    Args:
        active: K by weight name; also taken as the number of candidates where `proposes`.
        attention: only eager keeps the [L, L] attention matrices.
        faults: of the whole model, see `choose_targets`, so that the few blocks that are traced need no probe of their
            own; None: probe what is traced.

    Raises:
        UserError: the architecture needs actual numbers, which the meta device lacks (some mixtures of experts).
    """
    trace = lambda config: _trace(
        config,
        dtype,
        sequences,
        tokens,
        sparse or SparseConfig(),
        active or {},
        proposes,
        checkpointing,
        attention,
        trust_remote_code,
        faults,
    )
    text = model_config.get_text_config()
    layers = text.num_hidden_layers
    try:
        if layers <= max(_TRACED_LAYERS) or _chooses(sparse):
            return trace(model_config)
        few, more = (trace(_with_layers(model_config, count)) for count in _TRACED_LAYERS)
    except (NotImplementedError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"plan: this architecture cannot be traced without its weights: {first}") from None
    factor = (layers - _TRACED_LAYERS[0]) / (_TRACED_LAYERS[1] - _TRACED_LAYERS[0])
    grown = {key: int(value + factor * (vars(more)[key] - value)) for key, value in vars(few).items()}
    return StepMemory(**grown)


def _chooses(sparse: SparseConfig | None) -> bool:
    """Return True if options name layers: then blocks may differ in what is trained of them."""
    return sparse is not None and (sparse.target_modules is not None or sparse.exclude_modules is not None)


def _with_layers(model_config: Any, count: int) -> Any:
    config = copy.deepcopy(model_config)
    text = config.get_text_config()
    text.num_hidden_layers = count
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:count]
    return config


def _trace(
    model_config,
    dtype,
    sequences,
    tokens,
    sparse,
    active,
    proposes,
    checkpointing,
    attention,
    trust_remote_code,
    faults=None,
) -> StepMemory:
    _register_attention()
    fused = "eager" if attention == "eager" else _ATTENTION
    model = empty_model(model_config, attention=fused, trust_remote_code=trust_remote_code)
    model = model.to(dtype).requires_grad_(False).train()
    if checkpointing:
        enable_checkpointing(model)
    targets = targets_of(model, sparse, faults)
    tilings = tilings_of(sparse, {target.name: target.shape for target in targets}, transposed_names(targets))

    pending: dict[str, Tensor] = {}  # gradients that come in parts, while these propose candidates

    def record(name: str, left: Tensor, right: Tensor, *, more: bool = False) -> None:
        # of an embedding: the rows that the batch's tokens looked up, at most one for each of them
        gradient = right.float() if left.dim() == 1 else left.t() @ right
        if more and proposes:
            pending.setdefault(name, gradient)
        else:
            _record(pending.pop(name, gradient), active.get(name, 1), proposes)

    if tilings and active and not sparse.selection_batches:
        _trace_tiles(targets, tilings, active, proposes=proposes)
    else:
        attach_taps(targets, record)
    ids = torch.zeros(sequences, tokens, dtype=torch.int64, device="meta")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    places, wanted = (found.to("meta") for found in predictions(torch.zeros(sequences, tokens, dtype=torch.int64)))
    layer = assumed_output_layer(model)
    with LiveBytes(model) as count, torch.device("meta"):
        if layer is not None:
            loss = layer.losses(model, inputs, places, wanted).sum()
        else:
            logits = model(**inputs, use_cache=False).logits
            loss = cross_entropies(logits.flatten(0, 1), places, wanted).sum()
            del logits
        activations, before = count.live, count.peak
        count.peak = count.live
        loss.backward()
    return StepMemory(activations, max(0, before - count.peak), max(before, count.peak))


def _trace_tiles(
    targets: list[Target], tilings: Mapping[str, Tiling], active: Mapping[str, int], *, proposes: bool
) -> None:
    """Tap layers of which whole columns, rows or blocks are trained; which ones makes no difference to memory.

    The products of blocks, one after the other, are too small to count. Where tiles move, the peak is in a phase, whose
    sketches need whole inputs.
    """
    first = {name: torch.arange(active[name] // tiling.size, device="meta") for name, tiling in tilings.items()}
    tiles = {name: Tiles(tiling, first[name]) for name, tiling in tilings.items() if tiling.is_band}

    def record(name: str, left: Tensor, right: Tensor, *, more: bool = False) -> None:
        if proposes and left.dim() > 1:
            sketch = torch.empty(sketched(tilings[name]), dtype=left.dtype, device="meta")
            del sketch
        for _, product in tiles[name].products(left, right) if name in tiles and left.dim() > 1 else ():
            del product

    def needed(name: str, factor: Tensor, left: bool) -> Tensor:
        return factor if proposes or name not in tiles else tiles[name].needed(factor, left=left)

    attach_taps(targets, record, needed=needed)


def _record(gradient: Tensor, active: int, proposes: bool) -> None:
    """Allocate like the recorder for one weight's gradient: active entries, and the search for candidates."""
    flat = gradient.reshape(-1)
    unpacked = torch.empty(2 * active, dtype=torch.int32, device="meta")  # flat indices, while computed from rows
    del unpacked
    if proposes:
        chunk = min(flat.numel(), CHUNK_ENTRIES)
        entries = min(chunk, 2 * active)
        scratch = torch.empty(chunk * (flat.element_size() + 1) + entries * 32, dtype=torch.uint8, device="meta")
        del scratch


def _register_attention() -> None:
    """Register an attention that keeps as much as fused kernels: query, key, value, output and one number per row."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs) -> tuple:
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.shape[0] > 1:  # batches have padding, and fused kernels with a mask need ungrouped heads
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return _Fused.apply(query, key, value).transpose(1, 2).contiguous(), None


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        row = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, output, row)
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor):
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
