"""What share of a base's blocks its targets reach, and why the rest is not trained."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import nn

from scale_sft.config.options import SparseConfig
from scale_sft.spiel.taps import shape_of

from .experts import fused_in
from .linear_kinds import why_not_linear
from .packed_weights import is_quantized_layer
from .targets import Choice, Target, choice_of, in_a_block

FUSED_EXPERTS = "experts fused in a way of their own, which cannot carry deltas yet"
NOT_CHOSEN = "not named by target_modules"
_LISTED = 4


@dataclass(frozen=True)
class Rest:
    """Weights of the blocks that are no targets, of one kind and for one reason."""

    kind: str  # the last name in their paths, or the part of the model that they are in: gate, experts.down_proj
    reason: str
    weights: int
    entries: int


@dataclass(frozen=True)
class Coverage:
    """The weights inside a model's blocks: matrices and larger; biases, norms and embeddings do not count."""

    entries: int
    reached: int
    rest: tuple[Rest, ...]  # the largest first
    outside: tuple[str, ...] = ()  # the names of targets that are not in a block: embed_tokens, lm_head

    @property
    def share(self) -> float:
        """The share of the entries that are in targets, in [0, 1]."""
        return self.reached / self.entries if self.entries else 1.0

    def line(self) -> str:
        """Say it in one line: "61.3 % are targets; not trained: 38.2 % experts.down_proj (why), ..."."""
        said = f"{_percent(self.share)} of the weights in the blocks are targets"
        said += f", and {' and '.join(self.outside)}" if self.outside else ""
        if not self.rest:
            return said
        by_reason: dict[str, list[Rest]] = defaultdict(list)
        for one in self.rest:
            by_reason[one.reason].append(one)
        parts = []
        for reason, group in by_reason.items():
            kinds = [one.kind for one in group]
            more = f" and {len(kinds) - _LISTED} more kinds" if len(kinds) > _LISTED else ""
            share = _percent(sum(one.entries for one in group) / self.entries)
            parts.append(f"{share} {', '.join(kinds[:_LISTED])}{more} ({reason})")
        return f"{said}; not trained: {'; '.join(parts)}"

    def document(self) -> dict[str, Any]:
        """Describe it as plain JSON."""
        outside = {"outside": list(self.outside)} if self.outside else {}
        rest = [dict(vars(one)) for one in self.rest]
        return {"entries": self.entries, "reached": self.reached, "rest": rest} | outside

    @classmethod
    def of_document(cls, document: dict[str, Any]) -> Coverage:
        """Undo `document`."""
        return cls(
            document["entries"],
            document["reached"],
            tuple(Rest(**one) for one in document["rest"]),
            tuple(document.get("outside", ())),
        )


def coverage_of(model: nn.Module, sparse: SparseConfig) -> Coverage:
    """Compute what the options reach of a model, with its weights or without.

    Raises:
        UserError: see `choose_targets`.
    """
    return coverage(model, choice_of(model, sparse))


def coverage(model: nn.Module, choice: Choice) -> Coverage:
    """Compute what a choice of targets reaches of a model."""
    whole = {id(target.weight) for target in choice.targets if target.fused is None}
    slices = {target.name for target in choice.targets if target.fused is not None}
    everything = reached = 0
    rest: dict[tuple[str, str], list[int]] = {}

    def leave(kind: str, reason: str, entries: int) -> None:
        counts = rest.setdefault((kind, reason), [0, 0])
        counts[0] += 1
        counts[1] += entries

    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        fused = {one.leaf: one for one in fused_in(path, module)}
        for leaf, weight in module.named_parameters(recurse=False):
            entries = _entries(module, leaf, weight)
            if not entries or not in_a_block(path):
                continue
            everything += entries
            if leaf in fused:
                of_each = entries // fused[leaf].experts
                for name in fused[leaf].slice_names():
                    if name in slices:
                        reached += of_each
                    else:
                        leave(_kind(path, leaf), choice.left_out.get(name, NOT_CHOSEN), of_each)
            elif id(weight) in whole:
                reached += entries
            else:
                leave(_kind(path, leaf), _reason(path, leaf, module, weight, choice), entries)
    listed = [Rest(kind, reason, *counts) for (kind, reason), counts in rest.items()]
    outside = tuple(_end_of(target) for target in choice.targets if not in_a_block(target.name))
    return Coverage(everything, reached, tuple(sorted(listed, key=lambda one: -one.entries)), outside)


def _end_of(target: Target) -> str:
    """Name a target outside the blocks by the last part of its path."""
    tied = " (tied to the output layer)" if target.output is not None else ""
    return target.name.removesuffix(".weight").rpartition(".")[2] + tied


def _entries(module: Any, leaf: str, weight: nn.Parameter) -> int:
    """Count the entries of a matrix or larger weight, whole and dequantised; 0 for vectors, whatever their shape."""
    if leaf == "weight" and is_quantized_layer(module):
        return int(module.out_features * module.in_features)
    if leaf.endswith("bias"):  # of experts: a vector each
        return 0
    shape = shape_of(weight)
    linear = isinstance(module, nn.Linear) and leaf == "weight"
    if len(shape) < 2 or (not linear and sum(size > 1 for size in shape) < 2):
        return 0
    return int(getattr(weight, "ds_numel", weight.numel()))


def _kind(path: str, leaf: str) -> str:
    """Name a weight by what it has in common with those of other blocks."""
    own = re.split(r"\.\d+\.", path)[-1].split(".")
    if leaf == "weight":
        return own[-1] if not own[-1].isdigit() else ".".join(path.split(".")[-2:])
    return ".".join((own[-1], leaf))


def _reason(path: str, leaf: str, module: nn.Module, weight: nn.Parameter, choice: Choice) -> str:
    if leaf == "weight" and path in choice.left_out:
        return choice.left_out[path]
    shape = shape_of(weight)
    if len(shape) == 3 and "expert" in path.rpartition(".")[2].lower() + type(module).__name__.lower():
        return FUSED_EXPERTS
    if leaf != "weight":
        return f"a parameter of {type(module).__name__}, not nn.Linear"
    return why_not_linear(module) or NOT_CHOSEN


def _percent(share: float) -> str:
    digits = 0 if share in (0, 1) else 1 if share >= 0.001 else 3
    return f"{share:.{digits}%}".replace("%", " %")
