"""Measure a sparse weight sync: bytes and seconds of shipping what changed, compared with shipping every weight.

A trainer makes real steps on random tokens; after each, a receiver in the same process follows by `scale_sft.sync`, and
then takes a whole copy: all weights as safetensors, read and copied. Both go through bytes; a network would add time in
proportion to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from scale_sft import sync
from scale_sft.api import attach
from scale_sft.config.options import DEMO
from scale_sft.errors import UserError
from scale_sft.model.loading import base_location

from .page import Part, part_of_groups
from .peak import seconds_of
from .rows import Row, by_case, machine_name, newest


@dataclass(frozen=True, kw_only=True)
class Case:
    """One trainer: a base, how much of it is trained, and how."""

    base: str
    density: float
    dtype: str = "bfloat16"
    steps: int = 8
    update_interval_steps: int = 2
    learning_rate: float = 1e-3
    tokens: int = 32  # per step


def run(cases: Sequence[Case]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield (settings, result) of each case, as soon as it is measured."""
    for case in cases:
        trained, receiver = _load(case), _load(case)
        settings = asdict(case) | {
            "base": DEMO if case.base == DEMO else Path(case.base).name,
            "parameters": sum(weight.numel() for weight in receiver.parameters()),
            "device": "cpu",
            "threads": torch.get_num_threads(),
        }
        yield settings, measure(case, trained, receiver)


def measure(case: Case, trained: nn.Module, receiver: nn.Module) -> dict[str, Any]:
    """Train, sync after each step, and compare with whole copies.

    Returns:
        Medians over the steps but the first: `bytes` of a sync and `entries` in it, `compose_seconds` to find and
        serialise them, `apply_seconds` to check and write them, the same of all weights (`whole_...`), and
        `time_ratio` of the two ways in one step; `most_bytes` of a sync; `full_set_bytes` for a restarted receiver.

    Raises:
        UserError: the receiver's weights are not the trainer's at the end.
    """
    device = torch.device("cpu")
    sparse = attach(
        trained,
        density=case.density,
        total_steps=max(100, case.steps),
        update_interval_steps=case.update_interval_steps,
        estimation_steps=1,
    )
    optimizer = sparse.optimizer(lr=case.learning_rate)
    vocabulary = int(trained.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    weights = {name: weight.data for name, weight in receiver.named_parameters()}
    box: dict[str, Any] = {}

    def compose() -> None:
        box["patches"] = sync.changed(sparse)
        box["data"] = box["patches"].to_bytes()

    def write_all() -> None:
        box["whole"] = save(weights)

    def read_all() -> None:
        for name, value in load(box["whole"]).items():
            weights[name].copy_(value)

    works = {
        "compose_seconds": compose,
        "apply_seconds": lambda: sync.apply(receiver, box["data"]),
        "whole_send_seconds": write_all,
        "whole_apply_seconds": read_all,
    }
    rounds: list[dict[str, float]] = []
    for step in range(case.steps + 1):
        ids = torch.randint(0, vocabulary, (1, case.tokens), generator=torch.Generator().manual_seed(step))
        trained(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        taken = {name: seconds_of(work, device) for name, work in works.items()}
        whole = taken["whole_send_seconds"] + taken["whole_apply_seconds"]
        taken["time_ratio"] = (taken["compose_seconds"] + taken["apply_seconds"]) / whole
        if step:  # the first also proves the base
            rounds.append({"bytes": len(box["data"]), "entries": box["patches"].entries, **taken})
    sync.verify(receiver)
    return {
        **{name: median(one[name] for one in rounds) for name in rounds[0]},
        "most_bytes": max(one["bytes"] for one in rounds),
        "full_set_bytes": len(sync.full(sparse).to_bytes()),
        "whole_bytes": len(box["whole"]),
    }


def _load(case: Case) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            base_location(case.base), dtype=getattr(torch, case.dtype)
        ).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"base: got '{case.base}', which transformers cannot load: {error}") from None
    for weight in model.parameters():
        weight.data = weight.data.clone()  # a mapped file is read when it is used
    return model


COLUMNS = (
    "base", "density", "entries", "sync", "share of whole", "x density", "time", "full set", "whole", "time of whole",
    "time ratio",
)  # fmt: skip


def cells(settings: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """Format one line of the table."""
    share = result["bytes"] / result["whole_bytes"]
    return [
        f"{settings['base']}, {settings['parameters'] / 1e6:,.1f} M",
        f"{settings['density']:.2%}",
        f"{result['entries']:,.0f}",
        _size(result["bytes"]),
        f"{share:.3%}",
        f"{share / settings['density']:.2f}",
        _milliseconds(result["compose_seconds"] + result["apply_seconds"]),
        _size(result["full_set_bytes"]),
        _size(result["whole_bytes"]),
        _milliseconds(result["whole_send_seconds"] + result["whole_apply_seconds"]),
        f"{result['time_ratio']:.2f}",
    ]


def part(rows: list[Row]) -> Part:
    """Make a table for each machine, with each case's newest row."""
    groups = [newest(group) for group in by_case(rows, (*Case.__dataclass_fields__, "parameters"))]
    return part_of_groups(
        title="Sparse weight sync",
        text=(
            "What reaches a rollout server after an optimizer step: the entries that changed (docs/sync.md), compared "
            "with all weights, both as bytes of safetensors. Medians over steps of training on random tokens, with a "
            "reallocation every other step; the first sync is left out. x density is the share of the whole copy's "
            "bytes divided by the density: 3 if every entry of the model were a target and every delta visible in "
            "bf16. Full set is what a restarted receiver gets. Times are those of both sides in one process, without "
            "a network; time ratio is the median of the ratios of the same step."
        ),
        columns=COLUMNS,
        cells=cells,
        groups=groups,
        title_of=lambda group: f"{group[0]['settings']['dtype']}: {machine_name(group[0]['machine'])}",
        plots=lambda group: [],
    )


def _size(count: float) -> str:
    return f"{count / 1e6:,.2f} MB"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"
