"""Commands around finished adapters: merge, export, arithmetic, inspection."""

from __future__ import annotations

import json
from pathlib import Path

import click

from scale_sft.errors import UserError

_ADAPTER = click.Path(path_type=Path)
_LICENCE = click.option(
    "--licence",
    "--license",
    "licence",
    help="Licence for the model card, as the hub knows it (apache-2.0, llama3 ...).",
)


@click.command()
@click.argument("adapter", type=_ADAPTER)
@click.option("--output", required=True, type=_ADAPTER, help="New folder for the model.")
@click.option("--base", help="Folder or hub id of the base, if it is not where the adapter says.")
@click.option("--unmerge", metavar="MERGED", type=_ADAPTER, help="Undo: write the base back from this merged folder.")
@click.option(
    "--quantize",
    type=click.Choice(["nf4", "fp4", "int8"]),
    help="Write the merged model of a quantised base in 4 or 8 bits again; reports the loss.",
)
@_LICENCE
def merge(
    adapter: Path, output: Path, base: str | None, unmerge: Path | None, quantize: str | None, licence: str | None
) -> None:
    r"""Write base + ADAPTER as a plain transformers folder (ADAPTER: the adapter/ folder of a run).

    Its logits are those of the trained model, bit for bit. Needs the memory of one weight at a time. A base in 4 or 8
    bits is dequantised, and the result is written in bfloat16.

    \b
    scale-sft merge runs/mine/adapter --output merged
    scale-sft merge runs/mine/adapter --unmerge merged --output base
    """
    from scale_sft.adapters import merge as merging

    if quantize:
        from scale_sft.evaluation.requantize import merge_into_few_bits

        click.echo(merge_into_few_bits(adapter, output, quantize, base, licence=licence))
    elif unmerge is not None:
        if licence:
            raise UserError(f"licence: got {licence} with --unmerge, which writes no model card. Fix: leave it out")
        click.echo(f"base: {merging.unmerge(adapter, unmerge, output)}")
    else:
        click.echo(f"merged model: {merging.merge(adapter, output, base, licence=licence)}")


@click.command()
@click.argument("adapter", type=_ADAPTER)
@click.option("--to", required=True, type=click.Choice(["shira", "supertuning", "merged"]), help="What to write.")
@click.option("--output", required=True, type=_ADAPTER, help="New folder for the result.")
@click.option("--base", help="Folder or hub id of the base, if it is not where the adapter says.")
@click.option("--verify", is_flag=True, help="Load the result in stock peft / transformers and compare all logits.")
@_LICENCE
@click.option("--push-to-hub", metavar="REPOSITORY", help="Upload the result to this repository of the hub.")
@click.option("--private", is_flag=True, help="Make the repository of the hub private.")
def export(
    adapter: Path,
    to: str,
    output: Path,
    base: str | None,
    verify: bool,
    licence: str | None,
    push_to_hub: str | None,
    private: bool,
) -> None:
    r"""Write ADAPTER for stock peft (shira: peft >= 0.17, supertuning: peft >= 0.21) or as a merged model.

    All three give the logits of the trained model, bit for bit; --verify proves it.

    \b
    scale-sft export runs/mine/adapter --to shira --output peft --verify
    """
    from scale_sft.adapters import export as exporting
    from scale_sft.adapters import verify as verifying

    if verify:
        verifying.require_verifiable(adapter, to)
    written = exporting.export(adapter, to, output, base=base, licence=licence)
    click.echo(f"{to}: {output}: {written.active:,} active entries" + _remarks(written))
    if verify:
        result = verifying.verify(adapter, to, output, base=base)
        if not result.identical:
            raise UserError(
                f"verify: logits differ from the trained model's by up to {result.largest_difference:.3g} "
                f"({result.logits:,} compared)"
            )
        click.echo(f"verified: {result.logits:,} logits equal those of the trained model, bit for bit")
    if push_to_hub:
        click.echo(f"uploaded: {exporting.push_to_hub(output, push_to_hub, private=private)}")


@click.command()
@click.argument("adapter", type=_ADAPTER)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with a row per weight.")
@click.option("--html", type=_ADAPTER, help="Write one HTML page with plots to this file.")
@click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, help="Most moved weights to name.")
def inspect(adapter: Path, as_json: bool, html: Path | None, top: int) -> None:
    r"""Show what ADAPTER holds: entries, magnitudes, layers, rows and columns, most moved weights, provenance.

    \b
    scale-sft inspect runs/mine/adapter --html adapter.html
    """
    from scale_sft.adapters.inspection import inspect as read

    found = read(adapter, top=top)
    if html is not None:
        from scale_sft.adapters.inspection_page import write_page
        from scale_sft.files import disk_errors_in_one_line

        html = html.expanduser()
        with disk_errors_in_one_line("inspect", html):
            html.parent.mkdir(parents=True, exist_ok=True)
            write_page(found, html)
    if as_json:
        click.echo(json.dumps(found.as_document(), indent=2, ensure_ascii=False))
    elif html is not None:
        click.echo(f"page: {html}")
    else:
        from scale_sft.adapters.inspection_page import print_inspection

        print_inspection(found)


COMMANDS = (merge, export, inspect)


def _remarks(written) -> str:
    padding = f", {written.padding:,} unused positions of value 0 as padding" if written.padding else ""
    whole = (
        f"; {written.whole:,} weights too small for SHiRA's rank are written whole (modules_to_save)"
        if written.whole
        else ""
    )
    doubled = (
        f"; {written.doubled:,} entries are added in two steps because a bf16 addend is too short for them (exact on "
        "CPUs; on GPUs, which may add in either order, such an entry can be off by its last bits: --to shira has none)"
        if written.doubled
        else ""
    )
    return padding + whole + doubled
