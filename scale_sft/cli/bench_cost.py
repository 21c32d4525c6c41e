"""The commands that measure costs: `scale-sft bench memory | reallocate | scale | sync`."""

from __future__ import annotations

from pathlib import Path

import click

from scale_sft.config.click_options import flattened, option

from .bench_options import OUTPUT, cases_from, several, with_cases


class Count(click.ParamType):
    """A whole number, also in the form 1e6."""

    name = "count"

    def __init__(self, low: int, high: int):
        self.low, self.high = low, high

    def convert(self, value, param, ctx) -> int:
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not self.low <= number <= self.high or number != int(number):
            self.fail(f"'{value}' is not a whole number from {self.low:,} to {self.high:,}", param, ctx)
        return int(number)


@click.command()
@with_cases
@several("--contestants", "names", click.STRING, "ours-ag,ours-ma,ours-static,peft-lora,full-adamw", "As in bench step")
@click.option(
    "--limit/--no-limit",
    default=True,
    show_default=True,
    help="Find the smallest memory limit, in whole GiB, under which 30 steps pass; needs a GPU.",
)
@OUTPUT
def memory(names: tuple, limit: bool, output: Path, **asked) -> None:
    r"""Measure the memory of a training step above the frozen base, and bytes per trained parameter by part.

    Each contestant runs in its own process.

    \b
    scale-sft bench memory
    scale-sft bench memory --dtype bfloat16 --quantization none,nf4 --contestants ours-ag,peft-lora
    """
    from scale_sft.bench.device import this_device
    from scale_sft.bench.memory import measure as module
    from scale_sft.bench.show import report

    cases = cases_from(**asked)
    chosen = module.known(flattened(names))
    device = this_device()
    if limit and device.type == "cpu":
        click.echo(f"smallest limit under which {module.LIMIT_STEPS} steps pass: left out, {module.NO_GPU}", err=True)
    found = module.run(chosen, cases, device=device, limit_steps=module.LIMIT_STEPS if limit else None)
    report(output, "memory", found, count=len(chosen) * len(cases), columns=module.COLUMNS, cells=module.cells)


@click.command()
@several("--weights", "weights", Count(4, 10**11), "1e5,1e6,1e7,1e8", "Number of entries N of the weight")
@several("--density", "densities", click.FloatRange(0, 1, min_open=True), "0.001,0.01,0.05", "Active fraction K / N")
@several("--method", "methods", click.Choice(["ag", "ma"]), "ag,ma", "Method of reallocation")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Dtype of weight and gradient.",
)
@click.option(
    "--replaced",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Fraction of K up for replacement: 1 at the first reallocation of a run, then 0.2 or less.",
)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Reallocations per median.")
@OUTPUT
def reallocate(weights: tuple, densities: tuple, methods: tuple, repeats: int, output: Path, **others) -> None:
    r"""Measure time and peak memory of reallocating one weight, AG proposals included.

    \b
    scale-sft bench reallocate
    scale-sft bench reallocate --weights 1e9 --density 0.002 --repeats 1
    """
    from scale_sft.bench import reallocate as module
    from scale_sft.bench.device import this_device
    from scale_sft.bench.show import report

    device = this_device()
    chosen = module.cases(flattened(weights), flattened(densities), flattened(methods), device, **others)
    found = module.run(chosen, repeats=repeats, device=device)
    report(output, "reallocate", found, count=len(chosen), columns=module.COLUMNS, cells=module.cells)


@click.command()
@several("--ranks", "ranks", click.IntRange(1, 1024), "1,2,4", "Numbers of ranks on this machine")
@click.option(
    "--base_placement",
    type=click.Choice(["replicate", "shard"]),
    default="replicate",
    show_default=True,
    help="Keep the base whole on every rank, or shard it (ZeRO-3).",
)
@click.option("--sharded/--replicated", default=None, hidden=True)  # earlier spellings
@click.option("--weak/--strong", default=True, show_default="weak", help="Keep the same batch per rank, or in total.")
@click.option("--batch", type=click.IntRange(min=1), default=4, show_default=True, help="Sequences of that batch.")
@click.option(
    "--base", default="demo", show_default=True, help="Model folder or hub id, or demo, the small model that ships."
)
@option(
    "--train_data",
    "data",
    also=["--train-data", "--data"],
    default="demo",
    show_default=True,
    help="Training data, as in a recipe.",
)
@option(
    "--max_length",
    also=["--max-length"],
    type=click.IntRange(min=2),
    default=128,
    show_default=True,
    help="Tokens per sequence.",
)
@click.option("--method", type=click.Choice(["ag", "ma"]), default="ag", show_default=True, help="Method of the runs.")
@click.option(
    "--density",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.02,
    show_default=True,
    help="Density of the runs.",
)
@OUTPUT
def scale(ranks: tuple, weak: bool, base_placement: str, sharded: bool | None, output: Path, **options) -> None:
    r"""Measure time, memory and traffic of a step on several ranks, and model larger worlds.

    Each number of ranks is a separate run under `accelerate launch`, as a user would start it.

    \b
    scale-sft bench scale --ranks 1,2
    scale-sft bench scale --ranks 2 --base_placement shard --strong --batch 8
    """
    from scale_sft.bench.scale import measure as module
    from scale_sft.bench.show import report

    counts = sorted(flattened(ranks))
    shard = base_placement == "shard" if sharded is None else sharded
    worlds = module.Worlds(strong=not weak, sharded=shard, **options)
    module.check(worlds, counts)
    count = len(counts) + len(module.predicted(worlds, counts))
    report(output, "scale", module.run(worlds, counts), count=count, columns=module.COLUMNS, cells=module.cells)


@click.command()
@several("--base", "bases", click.STRING, "demo", "Model folder or hub id, or demo, the small model that ships")
@several("--density", "densities", click.FloatRange(0, 1, min_open=True), "0.01", "Density of the trained deltas")
@click.option(
    "--steps",
    type=click.IntRange(min=2),
    default=8,
    show_default=True,
    help="Steps, each with a sync and a whole copy.",
)
@OUTPUT
def sync(bases: tuple, densities: tuple, steps: int, output: Path) -> None:
    r"""Measure bytes and time of a sparse weight sync, compared with shipping every weight.

    \b
    scale-sft bench sync
    scale-sft bench sync --base models/smollm2-135m --density 0.001,0.01
    """
    from scale_sft.bench import sync as module
    from scale_sft.bench.show import report

    cases = [
        module.Case(base=base, density=density, steps=steps)
        for base in flattened(bases)
        for density in flattened(densities)
    ]
    report(output, "sync", module.run(cases), count=len(cases), columns=module.COLUMNS, cells=module.cells)


COMMANDS = (memory, reallocate, scale, sync)
