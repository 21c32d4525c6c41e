"""Examples for the eye: text as the model sees it, the tokens that count in colour, and how long examples are."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from scale_sft.model.loss import IGNORED

from .examples import Examples

COUNTS = "bold green"
BAR_WIDTH = 40
BINS = 10


def show_examples(
    examples: Examples, tokenizer: Any, *, title: str, first: int, count: int, console: Console | None = None
) -> None:
    """Print examples `first`, `first` + 1 ...; the tokens that count are green and, without colours, in «quotes»."""
    console = console or Console()
    total = len(examples)
    targets = examples.target_tokens(range(total))
    console.rule(f"{title}: {examples.source}")
    for n in range(first, min(first + count, total)):
        console.print(f"[dim]example {n}: {examples.lengths[n]} tokens, {examples.target_tokens([n])} count[/dim]")
        console.print(marked(examples, tokenizer, n, quotes=not console.is_terminal), soft_wrap=True)
    console.rule("lengths in tokens")
    console.print(histogram(examples.lengths), highlight=False)
    tokens = examples.all_tokens(range(total))
    console.print(
        f"{total:,} examples, {tokens:,} tokens, {targets:,} count ({targets / tokens:.0%}); {examples.truncated:,} "
        f"cut to max_length, {examples.dropped:,} dropped (no token that counts was left)",
        soft_wrap=True,
        highlight=False,
    )


def marked(examples: Examples, tokenizer: Any, n: int, *, quotes: bool) -> Text:
    """One example as text; stretches of tokens that count in colour and, with `quotes`, in «»."""
    ids, labels = examples.tokens(n)
    edges = np.flatnonzero(np.diff((labels != IGNORED).astype(np.int8))) + 1
    text = Text()
    for piece in np.split(np.arange(len(ids)), edges):
        counts = labels[piece[0]] != IGNORED
        decoded = tokenizer.decode(ids[piece])
        text.append(f"«{decoded}»" if counts and quotes else decoded, style=COUNTS if counts else None)
    return text


def histogram(lengths: np.ndarray) -> str:
    """Counts of lengths [N] in bins of equal width, as bars."""
    counts, edges = np.histogram(lengths, bins=min(BINS, int(np.ptp(lengths)) + 1))
    lines = []
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        bar = "█" * round(BAR_WIDTH * count / counts.max())
        lines.append(f"{low:8.0f} to {high:6.0f} {count:9,} {bar}")
    return "\n".join(lines)
