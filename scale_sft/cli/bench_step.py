"""`scale-sft bench step`: one optimizer step of each contestant in turn."""

from __future__ import annotations

from pathlib import Path

import click

from scale_sft.config.click_options import Several, flattened

from .bench_options import OUTPUT, cases_from, with_cases


@click.command()
@with_cases
@click.option(
    "--objective",
    type=click.Choice(["sft", "dpo"]),
    default="sft",
    show_default=True,
    help="dpo: a step on pairs of answers, two sequences each, compared with a step of sft on the same tokens and with "
    "TRL's DPOTrainer, and its peak memory.",
)
@click.option(
    "--contestants",
    "names",
    type=Several(click.STRING),
    multiple=True,
    help="Choose from ours-ag, ours-ma, ours-static, ours-columns, peft-lora, peft-lora-bf16, peft-ia3, peft-shira, "
    "peft-supertuning, spiel-peft, full, full-adamw, frozen; of dpo from ours-sft, ours-dpo, ours-dpo-packed, "
    "ours-dpo-swapped, trl-dpo, trl-dpo-swapped; separate several with commas.  [default: all]",
)
@click.option(
    "--kernels",
    type=click.Choice(["off", "cpu", "auto"]),
    default="auto",
    show_default=True,
    help="Kernels of our methods, as in a run: auto uses C on a CPU and Triton on a GPU, cpu only C, off none.",
)
@click.option(
    "--attention",
    type=click.Choice(["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"]),
    default="auto",
    show_default=True,
    help="Attention of all contestants, as in a run; auto: eager on a CPU in bfloat16 up to 256 tokens, where it is "
    "faster than sdpa, and sdpa otherwise.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=6, show_default=True, help="Steps of each contestant.")
@click.option(
    "--warm-up",
    "warm_up_steps",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Steps of each contestant before the first that counts.",
)
@click.option(
    "--breakdown/--no-breakdown",
    default=True,
    show_default=True,
    help="Time the pieces of our steps of sft as well.",
)
@click.option(
    "--together/--one-by-one",
    default=None,
    help="Keep all contestants in memory, or load each again in each round.  [default: together if they fit]",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of torch on a CPU.  [default: torch's]")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of weights, data and order."
)
@OUTPUT
def step(
    objective: str, names: tuple, rounds: int, warm_up_steps: int, breakdown: bool, together: bool | None,
    threads: int | None, output: Path, **asked,
) -> None:  # fmt: skip
    r"""Time one optimizer step: our methods, PEFT's adapters, dense fine-tuning, and a lower bound for any adapter.

    \b
    scale-sft bench step
    scale-sft bench step --dtype bfloat16 --max_length 512 --contestants ours-ag,peft-lora,full
    scale-sft bench step --objective dpo
    """
    import torch
    from rich.console import Console

    from scale_sft.bench.page import write_page
    from scale_sft.bench.rows import read_rows
    from scale_sft.bench.step.pair_race import PairRace
    from scale_sft.bench.step.race import Effort, Race, run

    kind = PairRace if objective == "dpo" else Race
    cases = cases_from(**asked)
    if threads:
        torch.set_num_threads(threads)
    effort = Effort(rounds=rounds, warm_up_steps=warm_up_steps, breakdown=breakdown and kind is Race, together=together)
    try:
        run(cases, flattened(names) or None, effort, output, Console(width=110, highlight=False), kind)
    except KeyboardInterrupt:
        if read_rows(output, kind.benchmark):
            click.echo(f"rows of the finished rounds are in {write_page(output)}")
        raise
    click.echo(f"page: {write_page(output)}")


COMMANDS = (step,)
