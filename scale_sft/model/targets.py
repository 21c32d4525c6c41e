"""Find the layers to train and route them through taps.

Supported: `nn.Linear` and subclasses that compute the same, GPT-2's `Conv1D` (transposed weight), either of them
quantised by bitsandbytes, and the input embedding.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from scale_sft.config.options import SparseConfig
from scale_sft.errors import UserError
from scale_sft.spiel.budgets import as_lora_spends, budget
from scale_sft.spiel.embedding_taps import why_not_embedding
from scale_sft.spiel.taps import Materialize, Needed, Record, WeightTap, attach

from .embeddings import Embeddings, attach_embedding_taps, embeddings_of
from .linear_kinds import is_conv1d, why_not_linear
from .packed_weights import is_quantized_layer
from .reach import NOT_BY_TEXT, candidates, reach_of
from .tilings import in_whole_tiles, tilings_of

EXCLUDED = "named by exclude_modules"


@dataclass(frozen=True)
class Target:
    """A layer whose weight gets a sparse delta."""

    name: str  # of the weight, as in the state dict: "model.layers.0.mlp.up_proj.weight"
    module: nn.Module
    shape: tuple[int, int]  # of the weight: (out, in); (in, out) for Conv1D; dequantised where it is quantised
    transposed: bool
    output: nn.Module | None = None  # the output layer, if it shares the weight of this embedding

    @property
    def modules(self) -> list[nn.Module]:
        """List the layers that use the weight."""
        return [self.module] if self.output is None else [self.module, self.output]

    @property
    def weight(self) -> nn.Parameter:
        """The layer's weight as stored: whole, in shards or packed."""
        return cast(nn.Parameter, self.module.weight)

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


Wanted = tuple[str, ...] | str | None
"""Layers by name (a module path or its end), or by one regular expression that matches whole module paths."""


@dataclass(frozen=True)
class Choice:
    """The layers to train, and those that are left out although a default or a name covers them."""

    targets: list[Target]
    left_out: dict[str, str]  # reason by path


def find_targets(
    model: nn.Module, wanted: Wanted, excluded: Wanted = None, train_embeddings: str = "none"
) -> list[Target]:
    """Find the layers to train, in the model's order; see `choose_targets`."""
    return choose_targets(model, wanted, excluded, train_embeddings).targets


def targets_of(model: nn.Module, sparse: SparseConfig) -> list[Target]:
    """Find the layers that options choose; see `choose_targets`."""
    return choice_of(model, sparse).targets


def choice_of(model: nn.Module, sparse: SparseConfig) -> Choice:
    """Choose layers by options; see `choose_targets`."""
    return choose_targets(model, sparse.target_modules, sparse.exclude_modules, sparse.train_embeddings)


def choose_targets(model: nn.Module, wanted: Wanted, excluded: Wanted = None, train_embeddings: str = "none") -> Choice:
    """Choose the layers to train, in the model's order.

    Args:
        wanted: None for all linear layers inside the transformer blocks that can be trained.
        excluded: layers to leave out, even if `wanted` names them.
        train_embeddings: input, output or both in addition to `wanted`. If they share a weight, it is one target under
            the name of the input embedding.

    Raises:
        UserError: a name matches nothing, a layer that was named cannot carry a delta, or a weight is shared (tied)
            otherwise.
    """
    ends = embeddings_of(model)
    layers = ({ends.input: ends.embedding} if ends.input and ends.embedding else {}) | dict(candidates(model))
    chosen = set(_choose(layers, wanted, "target_modules") if wanted is not None else filter(in_a_block, layers))
    asked = set(ends.chosen_by(train_embeddings))
    out = dict.fromkeys(_choose(layers, excluded, "exclude_modules") if excluded is not None else (), EXCLUDED)
    faults = {path: why for path in layers if (why := why_no_target(layers[path]))} | reach_of(model).faults
    if wanted is None:
        out = {path: why for path, why in faults.items() if path in chosen and path not in asked} | out
    else:
        out |= {path: NOT_BY_TEXT for path in chosen if faults.get(path) == NOT_BY_TEXT and path not in out}
    chosen |= asked
    taken = {path: module for path, module in layers.items() if path in chosen and path not in out}
    if not taken:
        raise UserError(_why_nothing(layers, chosen, out))
    bad = next((path for path in taken if path in faults), None)
    if bad:
        raise UserError(
            f"target_modules: got '{bad}' ({faults[bad]}), expected layers that can carry a delta: nn.Linear and "
            "Conv1D, as they are or in 4 or 8 bits of bitsandbytes, or the input embedding. "
            f"Fix: --exclude_modules {bad.rpartition('.')[2]}"
        )
    owners = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    targets: dict[str, Target] = {}
    for path, module in taken.items():
        tied, output = ends.tied and path in (ends.input, ends.output), None
        if owners[id(module.weight)] > (2 if tied else 1):
            raise UserError(
                f"target_modules: the weight of '{path}' is tied to another layer, which would change with it. Fix: "
                "leave it out"
            )
        if tied:
            path, module, output = _tied(ends, out)
        name = f"{path}.weight"
        targets[name] = Target(name, module, _shape(module), is_conv1d(module), output)
    return Choice(list(targets.values()), out)


def _tied(ends: Embeddings, out: dict[str, str]) -> tuple[str, nn.Module, nn.Module]:
    """Return path and module of an input embedding, and the output layer that shares its weight."""
    path, module, output = ends.input, ends.embedding, ends.layer
    assert path is not None and module is not None and output is not None
    if why := why_not_linear(output):
        raise UserError(f"target_modules: got '{path}', which shares its weight with '{ends.output}' ({why})")
    left = next((end for end in (path, ends.output) if end in out), None)
    if left:
        raise UserError(
            f"exclude_modules: got '{left}', which shares its weight with a target ('{path}' and '{ends.output}' are "
            "tied). Fix: leave out both, or neither"
        )
    return path, module, output


def why_no_target(module: nn.Module) -> str | None:
    """Say why a layer cannot carry a delta; None: it can."""
    return why_not_embedding(module) if isinstance(module, nn.Embedding) else why_not_linear(module)


def in_a_block(path: str) -> bool:
    """Return True for a path through a numbered list of modules, as blocks are."""
    return re.search(r"\.\d+\.", path) is not None


def _why_nothing(layers: dict[str, nn.Module], chosen: set[str], out: dict[str, str]) -> str:
    """Say why there is nothing to train."""
    if not chosen:
        return f"target_modules: this model has no linear layers in its blocks; layers: {_listing(layers)}"
    reasons = Counter(out[path] for path in chosen)
    return (
        f"target_modules: none of the {len(chosen)} layers that match can be trained: "
        f"{', '.join(f'{why} ({count}x)' for why, count in reasons.most_common())}. Fix: choose others; this model has "
        f"{_listing(layers)}"
    )


def budget_of(
    sparse: SparseConfig, shapes: dict[str, tuple[int, int]], transposed: Collection[str] = ()
) -> dict[str, int]:
    """Compute K of each weight: of single entries, or of whole columns, rows or blocks.

    Args:
        sparse: the options.
        shapes: (O, I) of each target weight by name.
        transposed: see `tilings_of`.

    Raises:
        UserError: see `tilings_of`, `in_whole_tiles`; a total that exceeds the targets' entries, or is less than one
            entry for each; a rank whose LoRA has more parameters than a weight has entries.
    """
    everything, total = sum(o * i for o, i in shapes.values()), sparse.tunable_weights
    if total and not len(shapes) <= total <= everything:
        raise UserError(
            f"tunable_weights: got {total:,}, expected {len(shapes):,} to {everything:,}: the targets are "
            f"{len(shapes):,} weights of {everything:,} entries, and each gets at least one"
        )
    rank = sparse.rank_equivalent
    smallest = min(shapes, key=lambda name: _largest_rank(shapes[name]))
    if rank and rank > (largest := _largest_rank(shapes[smallest])):
        rows, columns = shapes[smallest]
        raise UserError(
            f"rank_equivalent: got {rank:,}, expected 1 to {largest:,}: the target '{smallest}' is a weight of "
            f"{rows * columns:,} entries, and LoRA of rank {rank:,} has {rank * (rows + columns):,} parameters for it"
        )
    counts = budget(
        shapes,
        density=sparse.density,
        tunable_weights=sparse.tunable_weights,
        rank_equivalent=sparse.rank_equivalent,
    )
    counts = as_lora_spends(counts, shapes) if sparse.budget == "rank" else counts
    tilings = tilings_of(sparse, shapes, transposed)
    return in_whole_tiles(sparse, counts, tilings) if tilings else counts


def attach_taps(
    targets: list[Target], record: Record, materialize: Materialize = nullcontext, needed: Needed | None = None
) -> None:
    """Route the targets' layers through taps that offer each weight gradient to `record`."""
    for target in targets:
        if isinstance(target.module, nn.Embedding):
            attach_embedding_taps(target.module, target.output, target.name, record, materialize=materialize)
            continue
        tap = WeightTap(
            target.module,
            target.name,
            record,
            transposed=target.transposed,
            materialize=materialize,
            needed=needed,
        )
        attach(tap)


def transposed_names(targets: list[Target]) -> frozenset[str]:
    """Name the weights that are stored as [in, out]."""
    return frozenset(target.name for target in targets if target.transposed)


def _largest_rank(shape: tuple[int, int]) -> int:
    """Compute the largest r with r * (O + I) <= O * I; at least 1."""
    return max(1, shape[0] * shape[1] // (shape[0] + shape[1]))


def _shape(module: Any) -> tuple[int, int]:
    """Return the weight's shape: whole if it is sharded, dequantised if it is packed."""
    if is_quantized_layer(module):
        return (module.out_features, module.in_features)
    return tuple(getattr(module.weight, "ds_shape", module.weight.shape))


def _choose(layers: dict[str, nn.Module], wanted: tuple[str, ...] | str, option: str) -> list[str]:
    """List the paths that `wanted` matches, in the model's order."""
    names = (wanted,) if isinstance(wanted, str) else wanted
    chosen: set[str] = set()
    for name in names:
        matches = {path for path in layers if path == name or path.endswith("." + name)}
        if not matches and isinstance(wanted, str):
            try:
                matches = {path for path in layers if re.fullmatch(wanted, path)}
            except re.error as error:
                raise UserError(f"{option}: '{wanted}' is not a regular expression: {error}") from None
        if not matches:
            raise UserError(f"{option}: '{name}' matches no layer; this model has {_listing(layers)}")
        chosen |= matches
    return [path for path in layers if path in chosen]


def _listing(layers: dict[str, nn.Module]) -> str:
    """List the kinds of layers: 'q_proj (8x), ...'."""
    counts = Counter(path.rsplit(".", 1)[-1] for path in layers)
    return ", ".join(f"{leaf} ({count}x)" for leaf, count in counts.items()) or "none"
