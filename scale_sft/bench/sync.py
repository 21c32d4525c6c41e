"""Measure a sparse weight sync: bytes and seconds of shipping what changed, compared with shipping every weight.

A trainer makes real steps on random tokens; after each, a receiver in the same process follows by `scale_sft.sync`, and
the median counts. The whole copy is what a trainer without a record of its changes sends: all weights as safetensors,
read and copied into the receiver. Both go through bytes; a network would add time in proportion to them.
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
from scale_sft.errors import UserError

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
            "base": Path(case.base).name,
            "parameters": sum(weight.numel() for weight in receiver.parameters()),
            "device": "cpu",
            "threads": torch.get_num_threads(),
        }
        yield settings, measure(case, trained, receiver)


def measure(case: Case, trained: nn.Module, receiver: nn.Module) -> dict[str, Any]:
    """Train, sync after each step, and compare with whole copies.

    Returns:
        Medians: `bytes` of a sync and the largest of them, `entries` it sends; `compose_seconds` to find and serialise
        them, `apply_seconds` to check and write them; `full_set_bytes` for a receiver that restarts; `whole_bytes`,
        `whole_send_seconds`, `whole_apply_seconds` of all weights.

    Raises:
        RuntimeError: the receiver's weights differ from the trainer's.
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
    box: dict[str, Any] = {}
    found: dict[str, list[float]] = {"bytes": [], "entries": [], "compose_seconds": [], "apply_seconds": []}
    for step in range(case.steps):
        ids = torch.randint(0, vocabulary, (1, case.tokens), generator=torch.Generator().manual_seed(step))
        trained(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

        def compose() -> None:
            box["patches"] = sync.changed(sparse)
            box["data"] = box["patches"].to_bytes()

        compose_seconds = seconds_of(compose, device)
        apply_seconds = seconds_of(lambda: sync.apply(receiver, box["data"]), device)
        if step:  # the first also proves the base
            found["bytes"].append(len(box["data"]))
            found["entries"].append(box["patches"].entries)
            found["compose_seconds"].append(compose_seconds)
            found["apply_seconds"].append(apply_seconds)
    sync.verify(receiver)
    full_set = len(sync.full(sparse).to_bytes())
    weights = {name: weight.data for name, weight in receiver.named_parameters()}

    def write_all() -> None:
        box["data"] = save(weights)

    def read_all() -> None:
        for name, value in load(box["data"]).items():
            weights[name].copy_(value)

    whole = [(seconds_of(write_all, device), seconds_of(read_all, device)) for _ in range(3)]
    return {
        **{name: median(values) for name, values in found.items()},
        "most_bytes": max(found["bytes"]),
        "full_set_bytes": full_set,
        "whole_bytes": len(box["data"]),
        "whole_send_seconds": median(send for send, _ in whole),
        "whole_apply_seconds": median(take for _, take in whole),
    }


def _load(case: Case) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(case.base, dtype=getattr(torch, case.dtype)).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"base: got '{case.base}', which transformers cannot load: {error}") from None
    for weight in model.parameters():
        weight.data = weight.data.clone()  # a mapped file is read when it is used
    return model


COLUMNS = (
    "base", "parameters", "density", "entries", "sync", "share of whole", "x density", "compose", "apply", "full set",
    "whole copy", "whole: send", "whole: apply", "time / whole",
)  # fmt: skip


def cells(settings: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """Format one line of the table."""
    share = result["bytes"] / result["whole_bytes"]
    seconds = result["compose_seconds"] + result["apply_seconds"]
    return [
        settings["base"],
        f"{settings['parameters'] / 1e6:,.1f} M",
        f"{settings['density']:.2%}",
        f"{result['entries']:,.0f}",
        _size(result["bytes"]),
        f"{share:.3%}",
        f"{share / settings['density']:.2f}",
        _milliseconds(result["compose_seconds"]),
        _milliseconds(result["apply_seconds"]),
        _size(result["full_set_bytes"]),
        _size(result["whole_bytes"]),
        _milliseconds(result["whole_send_seconds"]),
        _milliseconds(result["whole_apply_seconds"]),
        f"{seconds / (result['whole_send_seconds'] + result['whole_apply_seconds']):.2f}",
    ]


def part(rows: list[Row]) -> Part:
    """Make a table for each machine, with each case's newest row."""
    groups = [newest(group) for group in by_case(rows, (*Case.__dataclass_fields__, "parameters"))]
    return part_of_groups(
        title="Sparse weight sync",
        text=(
            "What reaches a rollout server after each optimizer step: the entries that changed (docs/sync.md) compared "
            "with all weights, both as bytes of safetensors. The first sync is left out. `x density` is the share of "
            "the whole copy's bytes divided by the density; 3 would be all trained entries of all weights, at 4 bytes "
            "of index and 2 of value. `full set` is what a restarted receiver gets. Times are without a network."
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
