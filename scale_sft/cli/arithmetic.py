"""Commands that calculate with adapters."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import click

from scale_sft.errors import UserError

_ADAPTER = click.Path(path_type=Path)
_OUTPUT = click.option("--output", required=True, type=_ADAPTER, help="New folder for the resulting adapter.")
_VERBOSE = click.option("-v", "--verbose", is_flag=True, help="Also print the overlap of each two adapters, per layer.")
_SEVERAL = click.argument("adapters", nargs=-1, required=True, type=_ADAPTER)


@click.command()
@_SEVERAL
@_OUTPUT
@_VERBOSE
@click.option("--weights", help="One factor per adapter, as in 1,0.5; default: all 1.")
def add(adapters: tuple[Path, ...], output: Path, weights: str | None, verbose: bool) -> None:
    r"""Add up ADAPTERS of one base, weighted: several tasks in one adapter, on the union of their entries.

    \b
    scale-sft add runs/a/adapter runs/b/adapter --weights 1,0.5 --output both
    """
    from scale_sft.adapters import arithmetic

    try:
        factors = [float(part) for part in weights.split(",")] if weights else None
    except ValueError:
        raise UserError(f"add: --weights: got {weights!r}, expected numbers as in 1,0.5") from None
    operands = _read(adapters, at_least=2)
    _save(arithmetic.add(operands, factors), output)
    if verbose:
        _overlaps(adapters, operands)


@click.command()
@click.argument("adapter", type=_ADAPTER)
@click.option("--factor", required=True, type=float, help="Number to multiply all deltas by.")
@_OUTPUT
def scale(adapter: Path, factor: float, output: Path) -> None:
    r"""Multiply all deltas of ADAPTER: a factor of 0.5 halves its effect on the weights, 2 doubles it.

    \b
    scale-sft scale runs/a/adapter --factor 0.5 --output half
    """
    from scale_sft.adapters import arithmetic

    (operand,) = _read([adapter])
    _save(arithmetic.scale(operand, factor), output)


@click.command()
@click.argument("adapter", type=_ADAPTER)
@_OUTPUT
def negate(adapter: Path, output: Path) -> None:
    r"""Negate ADAPTER, to steer the model away from its task.

    \b
    scale-sft negate runs/a/adapter --output away
    """
    from scale_sft.adapters import arithmetic

    (operand,) = _read([adapter])
    _save(arithmetic.scale(operand, -1), output)


@click.command()
@_SEVERAL
@_OUTPUT
@_VERBOSE
def intersect(adapters: tuple[Path, ...], output: Path, verbose: bool) -> None:
    r"""Keep the deltas of the first of ADAPTERS at the entries that all the others have too.

    \b
    scale-sft intersect runs/a/adapter runs/b/adapter --output shared
    """
    from scale_sft.adapters import arithmetic

    operands = _read(adapters, at_least=2)
    _save(arithmetic.intersect(operands), output)
    if verbose:
        _overlaps(adapters, operands)


@click.command()
@_SEVERAL
@_OUTPUT
@_VERBOSE
def difference(adapters: tuple[Path, ...], output: Path, verbose: bool) -> None:
    r"""Keep the deltas of the first of ADAPTERS at the entries that none of the others has.

    \b
    scale-sft difference runs/a/adapter runs/b/adapter --output only_a
    """
    from scale_sft.adapters import arithmetic

    operands = _read(adapters, at_least=2)
    _save(arithmetic.difference(operands), output)
    if verbose:
        _overlaps(adapters, operands)


@click.command()
@click.argument("adapter", type=_ADAPTER)
@click.option("--density", required=True, type=float, help="Fraction of each target weight to keep.")
@_OUTPUT
def prune(adapter: Path, density: float, output: Path) -> None:
    r"""Keep only the largest deltas of each weight of ADAPTER.

    \b
    scale-sft prune runs/a/adapter --density 0.005 --output small
    """
    from scale_sft.adapters import arithmetic

    (operand,) = _read([adapter])
    _save(arithmetic.prune(operand, density), output)


@click.command()
@_SEVERAL
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with a row per weight.")
def overlap(adapters: tuple[Path, ...], as_json: bool) -> None:
    r"""Count the entries that each two of ADAPTERS share, and how often with the same sign, per layer.

    \b
    scale-sft overlap runs/a/adapter runs/b/adapter
    """
    _overlaps(adapters, _read(adapters, at_least=2), as_json)


COMMANDS = (add, scale, negate, intersect, difference, prune, overlap)


def _read(folders: Sequence[Path], at_least: int = 1) -> list:
    from scale_sft.adapters.format import Adapter

    if len(folders) < at_least:
        raise UserError(f"got {len(folders)} adapter, expected {at_least} or more")
    return [Adapter.load(folder) for folder in folders]


def _save(result, output: Path) -> None:
    from scale_sft.adapters.model_card import write_card
    from scale_sft.files import new_folder

    with new_folder(output, "adapter") as work:
        result.save(work)
        write_card(work, name=output.expanduser().resolve().name)
    active = result.active()
    everything = sum(rows * columns for rows, columns in result.shapes.values())
    click.echo(f"adapter: {output}: {active:,} entries in {len(result.shapes)} weights ({active / everything:.3%})")


def _overlaps(folders: Sequence[Path], adapters: Sequence, as_json: bool = False) -> None:
    from scale_sft.adapters.arithmetic import overlap as overlap_of
    from scale_sft.reporting.weight_names import layer_of

    document = []
    for (path_a, first), (path_b, second) in itertools.combinations(zip(folders, adapters, strict=True), 2):
        weights = overlap_of(first, second)
        layers: dict = {}
        for name, found in weights.items():
            layer = layer_of(name)
            layers[layer] = layers[layer].plus(found) if layer in layers else found
        total = next(iter(layers.values()))
        for found in list(layers.values())[1:]:
            total = total.plus(found)
        if as_json:
            rows = {name: found.as_row() for name, found in weights.items()}
            document.append({"first": str(path_a), "second": str(path_b), "total": total.as_row(), "weights": rows})
        else:
            _print_overlap(f"{path_a} and {path_b}", layers, total)
    if as_json:
        click.echo(json.dumps(document, indent=2))


def _print_overlap(title: str, layers: dict, total) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"overlap of {title}", title_justify="left")
    for head in ("layer", "first", "second", "shared", "of the smaller", "by chance", "same sign"):
        table.add_column(head, justify="left" if head == "layer" else "right")
    rows = [("outside" if layer is None else str(layer), found) for layer, found in layers.items()] + [("all", total)]
    for label, found in rows:
        row = found.as_row()
        percent = lambda key, row=row: "-" if row[key] is None else f"{row[key]:.1%}"
        counts = [f"{found.first:,}", f"{found.second:,}", f"{found.shared:,}"]
        table.add_row(label, *counts, percent("shared_fraction"), f"{found.by_chance:,.0f}", percent("sign_agreement"))
    Console(width=110).print(table)
