"""Write adapters for stock PEFT: SHiRA (peft >= 0.17) and Super-Tuning (peft >= 0.21).

Both add a sparse delta to a copy of the weight at each forward pass, on `nn.Linear` only. In both, one setting for all
weights determines how many entries each has; a weight with fewer active entries is padded with unused positions of
value 0.
SHiRA adds in fp32 and rounds once: (base.float() + delta).to(base.dtype), which is our rule; the deltas are stored as
they are. Super-Tuning rounds the delta to the base's dtype first; see `exact_addends`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from scale_sft.errors import UserError
from scale_sft.files import write_json
from scale_sft.model.resident import effective_values, read_entries, write_entries

from .format import Adapter
from .safetensors_writer import TensorWriter

PEFT_WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True)
class Exported:
    """The result of an export, in entries of all weights."""

    active: int
    padding: int  # unused positions with value 0, so that every weight has as many as the format wants
    doubled: int = 0  # entries that need two additions (Super-Tuning on a bf16 base)
    whole: int = 0  # weights that are written whole, as they are too small for the format (SHiRA)


class WholeValues(Protocol):
    """Whole base weights, by name."""

    def whole(self, name: str) -> Tensor:
        """Return a new tensor [O * I] in the base's dtype."""


def write_shira(adapter: Adapter, output: Path, base: str, base_values: WholeValues) -> Exported:
    """Write a SHiRA adapter: for each weight fp32 `shira_weight` [n], int32 `shira_indices` [2, n], n = r * (O + I).

    SHiRA cannot hold weights with fewer than O + I entries, even with r = 1 (a gate [1, I]). Their layers are
    written whole, with the deltas added, as peft's `modules_to_save`: small, and exact.

    Args:
        adapter: to write.
        output: folder.
        base: name of the base.
        base_values: read for the weights that are written whole.

    Raises:
        UserError: no rank r fits the weights (r * (O + I) must reach K and not exceed O * I).
    """
    counts = {name: adapter.active(name) for name in adapter.shapes}
    small = {name for name, (o, i) in adapter.shapes.items() if o + i > o * i}
    shapes = {name: shape for name, shape in adapter.shapes.items() if name not in small}
    rank = max([1, *(math.ceil(counts[name] / (o + i)) for name, (o, i) in shapes.items())])
    sizes = {name: rank * (o + i) for name, (o, i) in shapes.items()}
    for name, (o, i) in shapes.items():
        if sizes[name] > o * i:
            raise UserError(
                f"export: SHiRA has one rank for all weights; the densest needs rank {rank}, which is more than "
                f"'{name}' of shape {(o, i)} has entries. Use --to supertuning or --to merged, or prune the adapter"
            )
    if not sizes:
        raise UserError("export: SHiRA can hold none of these weights, all are too small. Use --to merged")
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, size in sizes.items():
        specs[_key(name, "shira_weight")] = (torch.float32, (size,))
        specs[_key(name, "shira_indices")] = (torch.int32, (2, size))
    for name in sorted(small):
        specs[_key(name, "weight")] = (adapter.dtype_of(name), adapter.shapes[name])
    with TensorWriter(output / PEFT_WEIGHTS_FILE, specs, {"format": "pt"}) as file:
        for name, size in sizes.items():
            columns = adapter.shapes[name][1]
            indices, values = _padded(adapter.indices[name], adapter.deltas[name], size)
            file.write(_key(name, "shira_weight"), values)
            file.write(_key(name, "shira_indices"), torch.stack((indices // columns, indices % columns)).int())
        for name in sorted(small):
            weight, indices = base_values.whole(name), adapter.indices[name]
            write_entries(weight, indices, effective_values(read_entries(weight, indices), adapter.deltas[name]))
            file.write(_key(name, "weight"), weight.view(adapter.shapes[name]))
    settings = {"r": rank, "mask_type": "scale_sft", "random_seed": None, "fan_in_fan_out": False, "init_weights": True}
    _write_config(output, "SHIRA", adapter, base, settings, small)
    active = sum(counts.values())
    return Exported(active, sum(sizes.values()) - sum(counts[name] for name in sizes), whole=len(small))


def write_supertuning(adapter: Adapter, output: Path, base: str, base_values: Mapping[str, Tensor]) -> Exported:
    """Write a Super-Tuning adapter: per weight fp32 `supertuning_values` [n] and int32 `supertuning_indices` [n].

    n = int(O * I * (1 - sparsity)) with one sparsity for all weights.

    Args:
        base_values: [K] by weight name, the base at the active entries; may read them at each access.

    Raises:
        UserError: a weight is too large for int32 indices, or too dense.
    """
    needed, doubled = {}, 0
    for name, (o, i) in adapter.shapes.items():
        if o * i > torch.iinfo(torch.int32).max:
            raise UserError(
                f"export: '{name}' has more entries than Super-Tuning's int32 indices reach; use --to shira"
            )
        more = int(exact_addends(base_values[name], adapter.deltas[name])[1].sum())
        needed[name] = adapter.active(name) + more
        doubled += more
    sparsity = _sparsity(needed, adapter.shapes)
    sizes = {name: int(o * i * (1 - sparsity)) for name, (o, i) in adapter.shapes.items()}
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, size in sizes.items():
        specs[_key(name, "supertuning_values")] = (torch.float32, (size,))
        specs[_key(name, "supertuning_indices")] = (torch.int32, (size,))
    with TensorWriter(output / PEFT_WEIGHTS_FILE, specs, {"format": "pt"}) as file:
        for name in adapter.shapes:
            values, twice = exact_addends(base_values[name], adapter.deltas[name])
            second = effective_values(base_values[name], adapter.deltas[name])[twice].float()
            indices = adapter.indices[name]
            indices, values = _padded(indices, values, sizes[name] - second.numel(), more=(indices[twice], second))
            file.write(_key(name, "supertuning_values"), values)
            file.write(_key(name, "supertuning_indices"), indices.int())
    _write_config(output, "SUPERTUNING", adapter, base, {"sparsity": sparsity, "save_precomputed_indices": True})
    active = adapter.active()
    return Exported(active, sum(sizes.values()) - active - doubled, doubled=doubled)


def exact_addends(base: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what to add to `base` [K], in its own dtype, to get the effective values bit for bit.

    A bf16 addend has 8 significant bits; where a delta flips the sign of a larger base value that can be too few. Such
    an entry is added to twice: first -base, which leaves 0, then its effective value.

    Returns:
        addends [K] fp32, exactly representable in base's dtype; and [K] bool, the entries that need the second
        addition of their effective value (their addend is -base). Never any for an fp32 base.
    """
    wanted = effective_values(base, deltas)
    if base.dtype is torch.float32:
        return deltas.clone(), torch.zeros(deltas.shape, dtype=torch.bool)
    near = (wanted.float() - base.float()).to(base.dtype)
    best, found = near.clone(), base + near == wanted
    for step in (-1, 1, -2, 2):
        moved = (near.view(torch.int16) + step).view(base.dtype)
        better = ~found & (base + moved == wanted)
        best[better], found = moved[better], found | better
    best[~found] = -base[~found]
    return best.float(), ~found


def _sparsity(needed: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> float:
    """Find the largest sparsity at which peft's own rounding leaves every weight the entries it needs."""
    densest = max(needed, key=lambda name: needed[name] / math.prod(shapes[name]))
    density = max(needed[densest], 1) / math.prod(shapes[densest])
    if density > 1:
        raise UserError(
            f"export: '{densest}' has more entries than Super-Tuning can hold; use --to shira or --to merged"
        )
    sparsity = 1 - density
    short = lambda value: any(int(math.prod(shapes[n]) * (1 - value)) < max(needed[n], 1) for n in needed)
    step = 2.0**-53
    while sparsity > 0 and short(sparsity):
        sparsity, step = max(0.0, sparsity - step), step * 2
    return sparsity


def _padded(
    indices: Tensor, values: Tensor, size: int, more: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Pad entries [K] to [size] with the smallest unused positions at value 0; then append `more` entries, if any."""
    indices = indices.long()
    missing = size - indices.numel()
    first = torch.arange(size)  # among the first K + missing positions at least `missing` are unused
    unused = first[~torch.isin(first, indices)][:missing]
    parts_i, parts_v = [indices, unused], [values.float(), torch.zeros(missing)]
    if more is not None:
        parts_i.append(more[0].long())
        parts_v.append(more[1].float())
    return torch.cat(parts_i), torch.cat(parts_v)


def _key(name: str, leaf: str) -> str:
    return f"base_model.model.{name.removesuffix('.weight')}.{leaf}"


def _write_config(
    output: Path, kind: str, adapter: Adapter, base: str, settings: dict[str, Any], whole: Collection[str] = ()
) -> None:
    config = {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": adapter.info.get("revision"),
        "inference_mode": True,
        "target_modules": [name.removesuffix(".weight") for name in adapter.shapes if name not in whole],
        "modules_to_save": sorted(name.removesuffix(".weight") for name in whole) or None,
        **settings,
    }
    write_json(output / PEFT_CONFIG_FILE, config)
