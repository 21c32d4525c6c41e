"""`scale-sft preprocess`, `data show` and `eval`: thin layers over the data and evaluation modules."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from scale_sft.config.click_options import SuggestingCommand, with_options_of
from scale_sft.config.loading import load_sections
from scale_sft.errors import UserError

if TYPE_CHECKING:
    from scale_sft.data.examples import Examples
from .commands import Commands


@click.command(cls=SuggestingCommand)
@click.option("--refresh", is_flag=True, help="Tokenise again, even if a cached result exists.")
@with_options_of("model", "data", "objective")
def preprocess(recipe: str | None, refresh: bool, **options: str | None) -> None:
    r"""Tokenise the data of a recipe ahead of time.

    Runs with the same data, tokenizer and options reuse the result.

    \b
    scale-sft preprocess --config recipe.yaml
    """
    from scale_sft.data.preview import left_out, unit_of

    for split, examples, seconds in _load(load_sections(recipe, options), refresh=refresh):
        for note in examples.notes:
            click.echo(f"note: {note}", err=True)
        total = examples.all_tokens(range(len(examples)))
        click.echo(
            f"{split}_data: {examples.source}: {len(examples):,} {unit_of(examples)}, {total:,} tokens, "
            f"{examples.target_tokens(range(len(examples))):,} of them targets; {left_out(examples)}; {seconds:.1f} s"
        )


@click.group(cls=Commands)
def data() -> None:
    """Inspect the data of a recipe."""


@data.command("show", cls=SuggestingCommand)
@click.option("--count", default=3, show_default=True, help="Number of examples to show.")
@click.option("--first", default=0, show_default=True, help="Index of the first example, counted from 0.")
@with_options_of("model", "data", "objective")
def show(recipe: str | None, count: int, first: int, **options: str | None) -> None:
    r"""Show a few examples as the model sees them, with the target tokens marked.

    Below them: a histogram of lengths, and how many examples were cut or dropped.

    \b
    scale-sft data show --config recipe.yaml --count 5
    """
    from scale_sft.data.cache import with_writable_cache
    from scale_sft.data.chat import use_template
    from scale_sft.data.preview import show_examples
    from scale_sft.model.loading import load_tokenizer

    sections = load_sections(recipe, options)
    tokenizer = use_template(load_tokenizer(sections["model"]), sections["data"].chat_template)
    with tempfile.TemporaryDirectory() as spare:
        sections["data"], notes = with_writable_cache(sections["data"], Path(spare))
        for note in notes:
            click.echo(f"note: {note}", err=True)
        for split, examples, _ in _load(sections):
            show_examples(examples, tokenizer, title=f"{split}_data", first=first, count=count)


def _load(sections: dict[str, Any], *, refresh: bool = False) -> Iterator[tuple[str, Examples, float]]:
    """Yield (split, examples, seconds it took) of the training and the held-out data; tokenise what is not cached."""
    from scale_sft.data.cache import load_examples
    from scale_sft.data.chat import use_template
    from scale_sft.data.preferences import kind_of
    from scale_sft.model.loading import load_model_config, load_tokenizer, max_length

    config, kind = sections["data"], kind_of(sections["objective"].objective)
    tokenizer = use_template(load_tokenizer(sections["model"]), config.chat_template)
    config = replace(config, max_length=max_length(config.max_length, load_model_config(sections["model"])))
    wanted = [
        ("train", config.train_data, config.max_train_examples),
        ("eval", config.eval_data, config.max_eval_examples),
    ]
    for split, source, limit in wanted:
        if source:
            began = time.perf_counter()
            examples = load_examples(
                source, split, tokenizer, config, limit, kind=kind, progress=sys.stderr.isatty(), refresh=refresh
            )
            yield split, examples, time.perf_counter() - began


@click.command("eval", cls=SuggestingCommand)
@click.argument("adapter", required=False, type=click.Path(path_type=Path))
@click.option("--tasks", help="Benchmarks of lm-evaluation-harness, comma-separated; 'paper' for those of the paper.")
@click.option("--limit", type=int, help="Use only this many examples of each task.")
@click.option(
    "--eval_batch_size", "--eval-batch-size", default=16, show_default=True, help="Sequences per forward pass."
)
@click.option("--output", type=click.Path(path_type=Path), help="Also write the results to this file, as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@with_options_of("model", "data")
def evaluate(
    adapter: Path | None,
    tasks: str | None,
    limit: int | None,
    eval_batch_size: int,
    output: Path | None,
    as_json: bool,
    recipe: str | None,
    **options: str | None,
) -> None:
    r"""Measure held-out loss and perplexity of a base, a base with ADAPTER, or a merged model.

    With --exact_match_examples it also generates greedy answers and compares them with the expected ones; with
    --tasks it runs benchmarks.

    \b
    scale-sft eval --base runs/a/merged --eval_data test.jsonl
    scale-sft eval runs/a/adapter --eval_data test.jsonl --exact_match_examples 200 --answer_pattern gsm8k
    accelerate launch --config_file launch/zero3_8gpu.yaml -m scale_sft.cli eval ... --base_placement shard
    """
    from scale_sft.distributed.exit import end_process, leave
    from scale_sft.evaluation.evaluate_model import evaluate_model, for_people, model_section

    try:
        sections = load_sections(recipe, options)
        if not tasks and not sections["data"].eval_data:
            raise UserError(
                "eval: got no data, expected something to evaluate on. Fix: --eval_data FILE, or --tasks mmlu,gsm8k"
            )
        base_given = options.get("base") is not None or recipe is not None
        model = model_section(sections["model"], adapter, base_given=base_given)
        result = evaluate_model(
            model, sections["data"], adapter, tasks=tasks, limit=limit, batch_size=eval_batch_size, output=output
        )
    except UserError as error:
        leave(str(error))
    if result is not None:
        click.echo(json.dumps(result, indent=2, ensure_ascii=False) if as_json else for_people(result))
    end_process()


COMMANDS = (preprocess, data, evaluate)
