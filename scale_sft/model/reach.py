"""Probe what a pass over text does with each layer of a base, on the meta device, before any weight is loaded.

A tap sees a layer's forward pass. A weight that is also used past it (`self.dt_proj.weight @ x`) would get only part of
its gradient; one that text never reaches (a vision tower) would get none. Both are found here and left out.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from scale_sft.errors import UserError, first_line
from scale_sft.spiel.embedding_taps import EmbeddingTap, why_not_embedding
from scale_sft.spiel.taps import WeightTap, attach, detach, shape_of

from .dropout import switch_off_randomness
from .embeddings import embeddings_of
from .empty import text_config
from .experts import fused_in
from .linear_kinds import is_conv1d, why_not_linear

PAST_ITS_FORWARD = "used past its module's forward"
NOT_BY_TEXT = "takes no part in the output for text"
PROBE_TOKENS = (2, 6)
REAL_PARAMETERS = 1 << 25
"""A model that the meta device cannot run is probed with random numbers if it has no more parameters than this."""

_READ: tuple[Any, ...] = (torch.Tensor.dtype, torch.Tensor.data)
_EXPERT = ".experts."  # in the paths of experts that are modules of their own: a few tokens do not reach all of them
_UNCOMPARED = ("dtype", "torch_dtype", "quantization_config", "_name_or_path", "transformers_version")


@dataclass(frozen=True)
class Reach:
    """What the probe found."""

    faults: dict[str, str]  # reason by path of a layer that cannot be trained
    read: tuple[str, ...] = ()  # paths of layers whose dtype or data other code reads
    random: tuple[str, ...] = ()  # modules whose forward pass draws random numbers in training mode
    unproved: str | None = None  # why there was no probe


_PROBED: dict[tuple[type, str], Reach] = {}


def reach_of(model: Any) -> Reach:
    """Probe a model of transformers, with or without its weights; the result is kept for models of the same config."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return Reach({}, unproved="not a model of transformers")
    described = {key: value for key, value in config.to_dict().items() if key not in _UNCOMPARED}
    key = (type(model), json.dumps(described, sort_keys=True, default=str))
    if key not in _PROBED:
        with torch.random.fork_rng(devices=[]):
            _PROBED[key] = _probe(type(model), config)
    return _PROBED[key]


def _probe(kind: Any, config: Any) -> Reach:
    reasons: list[str] = []
    for device, masked in (("meta", True), ("meta", False), ("cpu", True)):
        try:
            if device == "cpu" and _entries(_twin(kind, config, "meta")) > REAL_PARAMETERS:
                break
            return _run(_twin(kind, config, device), masked)
        except Exception as error:  # a model's own code, with inputs that it may not take: no proof
            reasons.append(f"{type(error).__name__}: {first_line(error)}")
    return Reach({}, unproved="; ".join(dict.fromkeys(reasons)))


def _entries(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def _twin(kind: Any, config: Any, device: str) -> Any:
    """Build a random model of the same configuration, in float32 and in training mode."""
    config = copy.deepcopy(config)
    switch_off_randomness(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    sets_experts = device == "meta" and kind._can_set_experts_implementation()
    chosen = {"experts_implementation": "batched_mm"} if sets_experts else {}  # its shapes do not depend on numbers
    with torch.device(device):
        model = kind._from_config(config, dtype=torch.float32, attn_implementation="eager", **chosen)
    return model.requires_grad_(False).train()


def _run(model: Any, masked: bool) -> Reach:
    """Run one pass over a few tokens, forward and backward, with a tap on every layer that may be trained."""
    layers = {path: module for path, module in candidates(model) if why_not_linear(module) is None}
    device = next(model.parameters()).device
    reached: set[str] = set()

    def record(name: str, left: Any, right: Any, *, more: bool = False) -> None:
        reached.add(name)

    for path, module in layers.items():
        module.weight.requires_grad_(True)
        attach(WeightTap(module, path, record, transposed=is_conv1d(module)))
    experts = {path: module for path, module in model.named_modules() if any(fused_in(path, module))}
    called: set[str] = set()
    hooks = [module.register_forward_hook(_noting(path, called)) for path, module in experts.items()]
    ends = embeddings_of(model)
    if ends.input and ends.embedding is not None and why_not_embedding(ends.embedding) is None:
        layers = {ends.input: ends.embedding} | layers
        ends.embedding.weight.requires_grad_(True)
        attach(EmbeddingTap(ends.embedding, ends.input, record))
    try:
        ids = torch.arange(PROBE_TOKENS[0] * PROBE_TOKENS[1], device=device).view(PROBE_TOKENS) + 3
        ids = ids.remainder(text_config(model.config).vocab_size)
        with _Draws(model) as draws, _Reads(layers, draws.inside) as reads:
            mask = {"attention_mask": torch.ones_like(ids)} if masked else {}
            logits = model(input_ids=ids, **mask, use_cache=False).logits
        logits.float().sum().backward()
    finally:
        for module in layers.values():
            detach(module)
        for hook in hooks:
            hook.remove()
    owners = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    faults = {path: NOT_BY_TEXT for path in experts if path not in called}
    for path, module in layers.items():
        if owners[id(module.weight)] > 1 and not (ends.tied and path in (ends.input, ends.output)):
            continue  # refused as tied
        if module.weight.grad is not None:
            faults[path] = PAST_ITS_FORWARD
        elif path not in reached and _EXPERT not in path:
            faults[path] = NOT_BY_TEXT
    return Reach(faults, tuple(sorted(reads.paths)), tuple(sorted(draws.where)))


def _noting(path: str, called: set[str]) -> Callable[..., None]:
    return lambda *_: called.add(path)


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers whose weight is a matrix, with their paths; embeddings are none."""
    yield from ((path, module) for path, module in model.named_modules() if candidate(module))


def candidate(module: nn.Module) -> bool:
    """Return True for a layer whose weight is a matrix, and that embeds nothing."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or isinstance(module, nn.Embedding):
        return False
    return len(shape_of(weight)) == 2


class _Draws(TorchDispatchMode):
    """The kinds of modules that draw random numbers inside the block."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.where: set[str] = set()
        self._model, self.inside = model, [type(model).__name__]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        attention = "scaled_dot_product" in func.name()  # tagged for its dropout, which is off
        if torch.Tag.nondeterministic_seeded in func.tags and not attention:
            self.where.add(self.inside[-1])
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self._hooks = list(_watch(self._model.modules(), self.inside))
        return super().__enter__()

    def __exit__(self, *what):
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*what)


class _Reads(TorchFunctionMode):
    """The layers whose weight other code asks for dtype or data: `x.to(layer.weight.dtype)`, `.data.clamp_()`."""

    def __init__(self, layers: Mapping[str, nn.Module], inside: list[str]):
        super().__init__()
        self.paths: set[str] = set()
        self._layers = {id(module.weight): (path, type(module).__name__) for path, module in layers.items()}
        self._inside = inside

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if any(func == read.__get__ for read in _READ) and id(args[0]) in self._layers:
            path, kind = self._layers[id(args[0])]
            if self._inside[-1] != kind:
                self.paths.add(path)
        return func(*args, **(kwargs or {}))


def _watch(modules: Iterable[nn.Module], inside: list[str]) -> Iterator[Any]:
    """Keep the names of the modules that are running on a stack."""
    for module in modules:
        yield module.register_forward_pre_hook(lambda module, _: inside.append(type(module).__name__))
        yield module.register_forward_hook(lambda *_: inside.pop() and None)


def refuse_randomness(model: nn.Module, *, allowed: bool) -> str | None:
    """Refuse a base whose forward pass is random in training mode; returns a note where it is allowed.

    Raises:
        UserError: names the modules that draw random numbers.
    """
    drawing = ", ".join(reach_of(model).random)
    if not drawing:
        return None
    if allowed:
        return f"allow_randomness: {drawing} draws random numbers in each pass; this run does not repeat bit for bit"
    raise UserError(
        f"base: got a model whose {drawing} draws random numbers in training mode, expected a forward pass that "
        "depends on its batch alone. Fix: --allow_randomness true, which gives up bit-for-bit repeats and resumes"
    )
