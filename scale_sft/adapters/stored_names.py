"""How a base's files hold the weights of the model: under other names, fused, split or in another layout.

transformers renames and converts tensors while it loads a model. Its own tables of that are used here in both
directions, so that a merged file has the names and the layout of the base's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from scale_sft.errors import UserError, first_line
from scale_sft.model.experts import parse_slice


@dataclass
class Source:
    """Tensors of the files that make up weights of the model: one each, unless a conversion is between them."""

    stored: list[str]  # names in the files
    weight: str  # name in memory; of a conversion, the one that transformers knows it by
    conversion: Any = None  # of transformers; None: the tensor is the weight
    model: Any = None  # on the meta device, for the conversion
    renamed: dict[str, tuple[str, str]] = field(default_factory=dict)  # (name, pattern) by stored name, as it enters
    expert: int | None = None  # the tensors are those of one expert, and `weight` has its slice alone: [1, R, C]
    copies: list[str] = field(default_factory=list)  # names in the files of the same weight again, where it is tied

    def to_memory(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert tensors of the files, by stored name, into weights of the model by name; see `part` for slices."""
        if self.conversion is None:
            return {self.weight: tensors[self.stored[0]]}
        conversion = copy.deepcopy(self.conversion)
        for stored in self.stored:
            conversion.add_tensor(self.weight, stored, self.renamed[stored][1], tensors[stored])
        return _singles(conversion.convert(self.weight, model=self.model, config=self.model.config))

    def part(self, weights: Mapping[str, Tensor], name: str) -> Tensor | None:
        """Find a target in what `to_memory` returned: a weight, or a view of a slice [R, C]; None: it is not there."""
        if name in weights:
            return weights[name]
        parameter, number = parse_slice(name) or (name, 0)
        number -= self.expert or 0
        whole = weights.get(parameter)
        return whole[number] if whole is not None and whole.dim() == 3 and 0 <= number < whole.shape[0] else None

    def to_files(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Undo `to_memory`.

        Raises:
            ValueError: the conversion does not lead back to the tensors of the files.
        """
        if self.conversion is None:
            return {self.stored[0]: weights[self.weight]}
        from transformers.core_model_loading import apply_converters

        back = self.conversion.reverse_transform()
        first = None
        for name in sorted(weights):
            renamed, pattern = apply_converters(name, [back])
            if pattern is None:
                raise ValueError(f"no way back for {name}")
            first = first or renamed
            back.add_tensor(first, name, pattern, weights[name])
        found = _singles(back.convert(first, model=self.model, config=self.model.config))
        names = {entered: stored for stored, (entered, _) in self.renamed.items()}
        out = {names.get(name) or _ending(names, name) or name: tensor for name, tensor in found.items()}
        if set(out) != set(self.stored):
            raise ValueError(f"it leads back to {sorted(found)[0]}")
        return out


def sources_of(model: Any, stored: Iterable[str]) -> dict[str, Source]:
    """Map the weights of a model to the tensors of files, by the model's names.

    Args:
        model: of transformers, on the meta device.
        stored: all names in the files.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        apply_renamings,
        dot_natural_key,
        rename_source_key,
    )

    every = get_model_conversion_mapping(model)
    renamings = [one for one in every if isinstance(one, WeightRenaming)]
    converters = [one for one in every if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    groups: dict[str, Source] = {}
    for name in sorted(stored, key=dot_natural_key):
        weight, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if weight not in state and name in state:
            weight, pattern = rename_source_key(name, [], [], prefix, state)
        if weight not in state:
            continue
        source = groups.setdefault(weight, Source([], weight, by_pattern.get(pattern), model))
        source.stored.append(name)
        if pattern is not None:
            source.renamed[name] = apply_renamings(name, renamings), pattern
    return _by_weight(groups.values())


def _by_weight(sources: Iterable[Source]) -> dict[str, Source]:
    """List sources under every weight that they make up: a conversion may split one tensor into several."""
    found: dict[str, Source] = {}
    for source in sources:
        names = [source.weight]
        if source.conversion is not None and len(source.conversion.target_patterns) > 1:
            patterns = source.conversion.target_patterns
            names = [source.weight.replace(patterns[0], pattern, 1) for pattern in patterns]
        found |= dict.fromkeys(names, source)
    return found


def expert_sources(source: Source) -> list[Source]:
    """Cut the source of a fused parameter [E, R, C] into one per expert, where the files hold experts one by one.

    So no more than one expert is in memory at a time. The conversion of one expert gives [1, R, C].

    Returns:
        A source for each expert; the given one alone where its tensors hold all experts, or are mixed over them.
    """
    from transformers.core_model_loading import Chunk, Concatenate, Interleave, MergeModulelist

    first, *others = getattr(source.conversion, "operations", None) or [None]
    alone = isinstance(first, MergeModulelist) and first.dim == 0
    if not alone or not all(isinstance(one, Chunk | Concatenate | Interleave) and one.dim > 0 for one in others):
        return [source]
    by_pattern: dict[str, list[str]] = {}
    for stored in source.stored:  # as transformers stacks them: in the order of their numbers
        by_pattern.setdefault(source.renamed[stored][1], []).append(stored)
    if len({len(names) for names in by_pattern.values()}) != 1:
        return [source]
    entered = {pattern: source.renamed[names[0]][0] for pattern, names in by_pattern.items()}  # of expert 0, always
    return [
        replace(
            source,
            stored=list(names),
            renamed={name: (entered[pattern], pattern) for name, pattern in zip(names, by_pattern, strict=True)},
            expert=number,
        )
        for number, names in enumerate(zip(*by_pattern.values(), strict=True))
    ]


def tied_names(model: Any) -> dict[str, list[str]]:
    """List the other names of each weight that several modules share."""
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    shared = [group for group in names.values() if len(group) > 1]
    return {name: [other for other in group if other != name] for group in shared for name in group}


def with_copies(source: Source | None, name: str, others: Iterable[Source]) -> Source | None:
    """Add what files hold under a tied weight's other names; they may hold it there alone.

    Args:
        source: of the weight under its own name, if there is one.
        name: of the weight.
        others: of its other names.
    """
    for other in others:
        if other.conversion is not None or (source is not None and source.conversion is not None):
            continue
        if source is None:
            source = Source(list(other.stored), name)
        else:
            source.copies += [stored for stored in other.stored if stored not in (*source.stored, *source.copies)]
    return source


def check_conversion(source: Source, shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple]) -> str | None:
    """Check on shapes alone that a conversion gives the wanted weights and leads back; says what is wrong.

    Args:
        source: to check.
        shapes: of the tensors of the files, by stored name.
        wanted: shapes of weights, by name.
    """
    if source.conversion is None and len(source.stored) > 1:
        return f"both '{source.stored[0]}' and '{source.stored[1]}' are stored for it"
    tensors = {name: torch.empty(shapes[name], device="meta") for name in source.stored}
    try:
        weights = source.to_memory(tensors)
        for name, shape in wanted.items():
            part = source.part(weights, name)
            if part is None or tuple(part.shape) != tuple(shape):
                return f"got {'nothing' if part is None else tuple(part.shape)}, expected {tuple(shape)}"
        back = source.to_files(weights)
    except Exception as error:  # the conversion is code of transformers: whatever fails, it cannot be used
        return f"its conversion cannot be undone: {first_line(error)}"
    wrong = next((name for name in source.stored if back[name].shape != tensors[name].shape), None)
    return f"its conversion cannot be undone: '{wrong}' comes back in another shape" if wrong else None


def converted_back(source: Source, tensors: Mapping[str, Tensor], weights: dict[str, Tensor], where: Any) -> None:
    """Prove bit for bit that a conversion leads back from weights to the tensors that they were made of.

    Raises:
        UserError: it does not, so that a merged file would differ from the base where no delta is.
    """
    back = source.to_files(weights)
    wrong = next((name for name in source.stored if not torch.equal(back[name], tensors[name])), None)
    if wrong is not None:
        raise UserError(f"base: '{wrong}' of '{where}' is converted in a way that cannot be undone bit for bit")


def _singles(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value[0] if isinstance(value, list) else value for name, value in tensors.items()}


def _ending(names: Mapping[str, str], name: str) -> str | None:
    """Find the only name that differs by a prefix of modules."""
    same = [
        stored
        for entered, stored in names.items()
        if f".{entered}".endswith(f".{name}") or name.endswith(f".{entered}")
    ]
    return same[0] if len(same) == 1 else None
