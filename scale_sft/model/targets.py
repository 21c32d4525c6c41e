"""Find the layers to train and route them through taps.

Supported: `nn.Linear` and subclasses that compute the same, GPT-2's `Conv1D` (transposed weight), either of them
quantised by bitsandbytes; each expert's slice of a fused parameter; the input embedding; and routers, if named.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from scale_sft.config.options import SparseConfig
from scale_sft.errors import UserError
from scale_sft.spiel.budgets import as_lora_spends, budget
from scale_sft.spiel.embedding_taps import why_not_embedding
from scale_sft.spiel.taps import Materialize, Needed, Record, RecordMany, WeightTap, attach, shape_of

from .embeddings import Embeddings, attach_embedding_taps, embeddings_of
from .expert_taps import RouterTap, attach_expert_taps
from .experts import FusedWeight, fused_in, layer_kind, slice_name
from .held import Held, parts_held
from .layer_names import listing, paths_named
from .linear_kinds import is_conv1d, why_not_linear
from .packed_weights import is_quantized_layer
from .reach import NOT_BY_TEXT, candidate, reach_of
from .resident import WeightPart
from .routers import is_free_router, routers
from .tilings import in_whole_tiles, tilings_of

EXCLUDED = "named by exclude_modules"
ROUTER = "a router, frozen unless it is named"


@dataclass(frozen=True)
class Target:
    """A layer whose weight gets a sparse delta."""

    name: str  # of the weight, as in the state dict: "model.layers.0.mlp.up_proj.weight"; of a slice: see `experts`
    module: nn.Module
    shape: tuple[int, int]  # of the weight: (out, in); (in, out) for Conv1D; dequantised where it is quantised
    transposed: bool
    fused: FusedWeight | None = None  # the parameter that the weight is a slice of
    number: int = 0  # of the slice
    output: nn.Module | None = None  # the output layer, if it shares the weight of this embedding

    @property
    def modules(self) -> list[nn.Module]:
        """List the layers that use the weight."""
        return [self.module] if self.output is None else [self.module, self.output]

    @property
    def by_rows(self) -> bool:
        """Return True if the gradient is 0 outside the rows of a batch's tokens, and never dense."""
        return isinstance(self.module, nn.Embedding) and self.output is None

    @property
    def weight(self) -> nn.Parameter:
        """The layer's weight as stored: whole, in shards or packed; of a slice, the parameter that contains it."""
        return self.fused.weight if self.fused else cast(nn.Parameter, self.module.weight)

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


def targets_of(model: nn.Module, sparse: SparseConfig, faults: Mapping[str, str] | None = None) -> list[Target]:
    """Find the layers that options choose; see `choose_targets`."""
    return choice_of(model, sparse, faults).targets


def choice_of(model: nn.Module, sparse: SparseConfig, faults: Mapping[str, str] | None = None) -> Choice:
    """Choose layers by options; see `choose_targets`."""
    return choose_targets(model, sparse.target_modules, sparse.exclude_modules, sparse.train_embeddings, faults)


def choose_targets(
    model: nn.Module,
    wanted: Wanted,
    excluded: Wanted = None,
    train_embeddings: str = "none",
    known: Mapping[str, str] | None = None,
) -> Choice:
    """Choose the layers to train, in the model's order.

    Args:
        wanted: None for all linear layers inside the transformer blocks that can be trained.
        excluded: layers to leave out, even if `wanted` names them.
        train_embeddings: input, output or both in addition to `wanted`. If they share a weight, it is one target under
            the name of the input embedding.
        known: the faults that `reach_of` found in a model of which this one has the first blocks; None: probe this one.

    Raises:
        UserError: a name matches nothing, a layer that was named cannot carry a delta, or a weight is shared (tied)
            otherwise.
    """
    ends = embeddings_of(model)
    layers = _layers(model, ends)
    chosen = set(paths_named(layers, wanted, "target_modules") if wanted is not None else filter(in_a_block, layers))
    asked = set(ends.chosen_by(train_embeddings))
    out = dict.fromkeys(paths_named(layers, excluded, "exclude_modules") if excluded is not None else (), EXCLUDED)
    reach = reach_of(model).faults if known is None else known
    faults = {path: why for path, layer in layers.items() if (why := layer.why_not(reach))}
    if wanted is None:
        frozen = dict.fromkeys((path for path, layer in layers.items() if layer.router), ROUTER)
        out = {path: why for path, why in (faults | frozen).items() if path in chosen and path not in asked} | out
    else:
        out |= {path: NOT_BY_TEXT for path in chosen if faults.get(path) == NOT_BY_TEXT and path not in out}
    chosen |= asked
    taken = {path: layer for path, layer in layers.items() if path in chosen and path not in out}
    if not taken:
        raise UserError(_why_nothing(layers, chosen, out))
    bad = next((path for path in taken if path in faults), None)
    if bad:
        raise UserError(
            f"target_modules: got '{bad}' ({faults[bad]}), expected layers that can carry a delta: nn.Linear and "
            "Conv1D, as they are or in 4 or 8 bits of bitsandbytes, or the input embedding. "
            f"Fix: --exclude_modules {layers[bad].kind}"
        )
    owners = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    targets: dict[str, Target] = {}
    for path, layer in taken.items():
        tied = ends.tied and path in (ends.input, ends.output)
        if owners[id(layer.weight)] > (2 if tied else 1):
            raise UserError(
                f"target_modules: the weight of '{path}' is tied to another layer, which would change with it. Fix: "
                "leave it out"
            )
        target = _tied(ends, out) if tied else layer.target()
        targets[target.name] = target
    return Choice(list(targets.values()), out)


def _tied(ends: Embeddings, out: dict[str, str]) -> Target:
    """Make one target of an input embedding and the output layer that shares its weight."""
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
    return Target(f"{path}.weight", module, _shape(module), is_conv1d(module), output=output)


def why_no_target(module: nn.Module) -> str | None:
    """Say why a layer cannot carry a delta; None: it can."""
    return why_not_embedding(module) if isinstance(module, nn.Embedding) else why_not_linear(module)


@dataclass(frozen=True)
class _Layer:
    """A weight that may be trained: that of a layer, or an expert's slice."""

    path: str
    module: Any
    router: bool = False
    fused: FusedWeight | None = None
    number: int = 0

    @property
    def weight(self) -> nn.Parameter:
        return self.fused.weight if self.fused else self.module.weight

    @property
    def kind(self) -> str:
        """What it has in common with those of other blocks: the last names of its path."""
        return layer_kind(self.path) if self.fused else self.path.rpartition(".")[2]

    @property
    def names(self) -> tuple[str, ...]:
        """The paths by which options may mean it: a slice also by its parameter and by the module of experts."""
        return (self.path,) if self.fused is None else (self.path, self.fused.name, self.fused.path)

    def why_not(self, reach: Mapping[str, str]) -> str | None:
        """Say why it cannot carry a delta; None: it can."""
        if self.fused is not None:
            return self.fused.why_not() or reach.get(self.fused.path)
        return (None if self.router else why_no_target(self.module)) or reach.get(self.path)

    def target(self) -> Target:
        if self.fused is not None:
            shape = self.fused.slice_shape
            return Target(self.path, self.module, shape, self.fused.transposed, self.fused, self.number)
        return Target(f"{self.path}.weight", self.module, _shape(self.module), is_conv1d(self.module))


def _layers(model: nn.Module, ends: Embeddings) -> dict[str, _Layer]:
    """Find the weights that may be trained, by path, in the model's order."""
    found = {ends.input: _Layer(ends.input, ends.embedding)} if ends.input and ends.embedding is not None else {}
    routing = routers(model)
    for path, module in model.named_modules():
        fused = list(fused_in(path, module))
        for one in fused:
            for number in range(one.experts):
                name = slice_name(one.name, number)
                found[name] = _Layer(name, module, fused=one, number=number)
        if not fused and candidate(module):
            found[path] = _Layer(path, module, router=path in routing)
    return found


def block_of(path: str) -> str | None:
    """Return the path of the block that a path leads through, a member of a numbered list; None: through none."""
    found = re.match(r"(.+?\.\d+)\.", path)
    return found[1] if found else None


def in_a_block(path: str) -> bool:
    """Return True for a path through a numbered list of modules, as blocks are."""
    return block_of(path) is not None


def _why_nothing(layers: dict[str, _Layer], chosen: set[str], out: dict[str, str]) -> str:
    """Say why there is nothing to train."""
    if not chosen:
        return f"target_modules: this model has no linear layers in its blocks; layers: {listing(layers)}"
    reasons = Counter(out[path] for path in chosen)
    return (
        f"target_modules: none of the {len(chosen)} layers that match can be trained: "
        f"{', '.join(f'{why} ({count}x)' for why, count in reasons.most_common())}. Fix: choose others; this model has "
        f"{listing(layers)}"
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


def depth_of(names: Iterable[str]) -> int:
    """Count the blocks of the model that hold these weights; at least 1."""
    return max(1, len(set(map(block_of, names)) - {None}))


def parts_of(targets: Iterable[Target], part_of: Callable[[nn.Parameter], WeightPart]) -> dict[str, WeightPart]:
    """Describe what this process holds of each target's weight, by name.

    Args:
        part_of: describes a whole parameter.
    """
    return parts_held(
        {target.name: Held(target.weight, target.number if target.fused else None) for target in targets}, part_of
    )


def unreached(targets: Iterable[Target], received: Container[str]) -> list[str]:
    """List the weights that no gradient has reached, other than slices of experts that may have met no token.

    Args:
        received: names of the weights that one has reached.
    """
    missing: list[str] = []
    alive: set[str] = set()
    silent: dict[str, list[Target]] = {}
    for target in targets:
        if target.fused is None:
            if target.name not in received:
                missing.append(target.name)
        elif target.name in received:
            alive.add(target.fused.name)
        else:
            silent.setdefault(target.fused.name, []).append(target)
    for parameter, slices in silent.items():
        fused = slices[0].fused
        if parameter not in alive and fused is not None and len(slices) == fused.experts:
            missing.append(slices[0].name)
    return missing


def attach_taps(
    targets: Sequence[Target],
    record: Record,
    materialize: Materialize = nullcontext,
    needed: Needed | None = None,
    record_many: RecordMany | None = None,
) -> None:
    """Route the targets' layers through taps that offer each weight gradient to `record`, or to `record_many`."""
    experts: dict[int, tuple[str, nn.Module]] = {}
    for target in targets:
        if target.fused is not None:
            experts[id(target.module)] = (target.fused.path, target.module)
        elif isinstance(target.module, nn.Embedding):
            attach_embedding_taps(target.module, target.output, target.name, record, materialize=materialize)
        elif is_free_router(target.module):
            attach(RouterTap(target.module, target.name, record))
        else:
            tap = WeightTap(
                target.module,
                target.name,
                record,
                transposed=target.transposed,
                materialize=materialize,
                needed=needed,
            )
            attach(tap)
    trained = [target.name for target in targets if target.fused is not None]
    attach_expert_taps(experts.values(), trained, record, materialize, record_many=record_many)


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
    rows, columns = shape_of(module.weight)
    return rows, columns
