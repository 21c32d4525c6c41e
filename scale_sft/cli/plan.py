"""The command that tells what a run needs before it starts."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import click

from scale_sft.config.click_options import SuggestingCommand, with_field_options
from scale_sft.errors import UserError
from scale_sft.files import ASSETS

_SHAPES = ASSETS / "shapes"


@click.command(cls=SuggestingCommand)
@click.argument("recipe", required=False)
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="Devices, one rank on each.")
@click.option("--gpu-memory", type=float, help="Memory of one device in GB, to judge whether the run fits.")
@click.option(
    "--shape",
    help="Plan for the shape 3b, 7b, 13b, 70b, 405b (Llama) or 30b-a3b (Qwen3) instead of the recipe's base.",
)
@click.option("--check", is_flag=True, help="Exit with status 1 if the run does not fit; needs --gpu-memory.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, in bytes.")
@with_field_options
def plan(
    recipe: str | None, gpus: int, gpu_memory: float | None, shape: str | None, check: bool, as_json: bool, **options
) -> None:
    r"""Compute the memory of RECIPE (a shipped name or a file) per device, and the smallest change that makes it fit.

    This reads the base's config.json, never its weights.

    \b
    scale-sft plan llama2_7b_ag --shape 7b --gpus 8 --gpu-memory 80
    scale-sft plan --shape 70b --density 0.01 --global_batch_size 64 --gpus 64 --gpu-memory 80
    scale-sft plan recipe.yaml --gpu-memory 24 --check && scale-sft train --config recipe.yaml
    """
    from scale_sft.config.loading import load
    from scale_sft.model.loading import load_model_config
    from scale_sft.planning.planner import Planner
    from scale_sft.planning.suggestions import smallest_change

    if check and gpu_memory is None:
        raise click.UsageError("--check needs --gpu-memory")
    if shape is not None:
        options["base"] = str(_shape_folder(shape))
    config = load(recipe, options)
    model_config = load_model_config(config.model)
    planner = Planner(model_config)
    planner.counts = _counts_of_adapter(config, planner)
    found = planner.plan(config, gpus=gpus, gpu_memory_gb=gpu_memory)
    change = (
        None
        if found.fits or gpu_memory is None
        else smallest_change(planner, config, gpus=gpus, gpu_memory_gb=gpu_memory)
    )
    if as_json:
        document = {**_document(found, change), "block_weights": planner.facts(config).coverage.document()}
        click.echo(json.dumps(document, indent=2))
    else:
        _print(found, change, gpus, gpu_memory)
        click.echo(planner.facts(config).coverage.line())
        click.echo(f"learning rate: {found.learning_rate:g} at its peak")
        if note := planner.note(config):
            click.echo(note)
    if check and not found.fits:
        sys.exit(1)


def _counts_of_adapter(config, planner) -> dict[str, int] | None:
    """Count the entries per weight of the adapter that the run starts from; None: its budget counts."""
    if config.sparse.start_from is None:
        return None
    from scale_sft.adapters.start import Start
    from scale_sft.model.loading import resolve_dtype
    from scale_sft.model.quantization import resolve_quantization

    start = Start.read(config.sparse.start_from, config.sparse.delta_dtype)
    dtype = resolve_dtype(config.model, planner.model_config)
    quantization = resolve_quantization(config.model, planner.model_config)
    facts = planner.facts(config)
    start.refuse_misfit(config.sparse, facts.shapes, dtype, quantization, facts.transposed)
    return start.counts


def _shape_folder(shape: str) -> Path:
    from scale_sft.config.spelling import unknown

    if not (_SHAPES / shape.lower()).is_dir():
        raise UserError(unknown(f"shape '{shape}'", shape, sorted(path.name for path in _SHAPES.iterdir())))
    return _SHAPES / shape.lower()


def _document(found, change) -> dict:
    document = dataclasses.asdict(found)
    document |= {"step_peak": found.step_peak, "peak": found.peak, "fits": found.fits if found.room else None}
    if change:
        document["smallest_change"] = {"options": change[0], "peak": change[1].peak}
    return document


def _print(found, change, gpus: int, gpu_memory: float | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110, highlight=False)
    console.print(
        f"{_count(found.entries)} weights, {_count(found.active)} of them trained; base {found.placement} on {gpus} "
        f"GPU{'s' * (gpus > 1)}"
    )
    totals = {
        "peak of a step": found.step_peak,
        "peak while the base is loaded": found.load_peak,
        "main memory per rank while loading": found.host_peak,
    }
    table = Table("memory per GPU at the peak of a step", "", show_edge=False)
    table.columns[1].justify = "right"
    size = in_one_unit([*found.rows.values(), *totals.values()])
    for name, count in found.rows.items():
        if count:
            table.add_row(name, size(count))
    table.add_section()
    for name, count in totals.items():
        table.add_row(name, size(count))
    console.print(table)
    if found.traffic:
        traffic = Table("sent by each GPU per optimizer step", "", show_edge=False)
        traffic.columns[1].justify = "right"
        size = in_one_unit(found.traffic.values())
        for name, count in found.traffic.items():
            traffic.add_row(name, size(count))
        console.print(traffic)
    if found.room is None:
        return
    alone = lambda count: in_one_unit([count])(count)
    usable = max(0, found.room)
    told = f"{alone(found.peak)} of {alone(usable)} usable on a GPU of {gpu_memory:g} GB"
    told += f", {alone(abs(usable - found.peak))}"
    if found.fits:
        console.print(f"fits: {told} to spare")
        return
    console.print(f"does not fit: {told} too much")
    if change is None:
        console.print("no single change of batch, checkpointing, placement, length or density makes it fit")
    else:
        console.print(f"smallest change that fits: {change[0]} ({alone(change[1].peak)})")


def in_one_unit(byte_counts: Iterable[float]) -> Callable[[float], str]:
    """Choose the unit for the largest of some byte counts; returns a function that formats counts in it."""
    largest = max(byte_counts, default=0)
    exponent = 3 if largest >= 2**30 else 2 if largest >= 2**20 else 1
    return lambda count: f"{count / 1024**exponent:,.2f} {('KiB', 'MiB', 'GiB')[exponent - 1]}"


def _count(number: float) -> str:
    if number >= 1e9:
        return f"{number / 1e9:.2f} billion"
    return f"{number / 1e6:,.1f} million" if number >= 1e7 else f"{number:,.0f}"


COMMANDS = (plan,)
