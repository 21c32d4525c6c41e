"""Examples for the eye: text as the model sees it, the tokens that count in colour, and how long examples are."""

from __future__ import annotations

from collections.abc import Iterator
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
    r"""Print examples `first`, `first` + 1 ...; the tokens that count are green and, without colours, in «quotes».

    A terminal that cannot show a character gets its escape, such as \xe9, and ASCII for bars and quotes.
    """
    console = console or Console()
    total = len(examples)
    targets = examples.target_tokens(range(total))
    bar, quotes = _signs(console.encoding)
    shown = lambda text: text.encode(console.encoding, "backslashreplace").decode(console.encoding)
    console.rule(shown(f"{title}: {examples.source}"))
    for note in examples.notes:
        console.print(Text(shown(f"note: {note}")), soft_wrap=True)
    for n in range(first, min(first + count, total)):
        console.print(f"[dim]example {n}: {examples.lengths[n]} tokens, {examples.target_tokens([n])} count[/dim]")
        text = Text()
        for piece, counts in pieces(examples, tokenizer, n):
            piece = shown(piece)
            piece = f"{quotes[0]}{piece}{quotes[1]}" if counts and not console.is_terminal else piece
            text.append(piece, style=COUNTS if counts else None)
        console.print(text, soft_wrap=True)
    console.rule("lengths in tokens")
    console.print(histogram(examples.lengths, bar), highlight=False)
    tokens = examples.all_tokens(range(total))
    console.print(
        f"{total:,} examples, {tokens:,} tokens, {targets:,} count ({targets / tokens:.0%}); {examples.truncated:,} "
        f"cut to max_length, {examples.dropped:,} dropped (no token that counts was left)",
        soft_wrap=True,
        highlight=False,
    )


def _signs(encoding: str) -> tuple[str, tuple[str, str]]:
    """Choose a bar and quotes that an encoding has."""
    try:
        "█«»".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return "#", ("<<", ">>")
    return "█", ("«", "»")


def pieces(examples: Examples, tokenizer: Any, n: int) -> Iterator[tuple[str, bool]]:
    """Yield one example as stretches of text, and whether their tokens count."""
    ids, labels = examples.tokens(n)
    edges = np.flatnonzero(np.diff((labels != IGNORED).astype(np.int8))) + 1
    for piece in np.split(np.arange(len(ids)), edges):
        yield tokenizer.decode(ids[piece]), bool(labels[piece[0]] != IGNORED)


def histogram(lengths: np.ndarray, bar: str = "█") -> str:
    """Draw counts of lengths [N] in bins of equal width, as bars."""
    counts, edges = np.histogram(lengths, bins=min(BINS, int(np.ptp(lengths)) + 1))
    lines = []
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        lines.append(f"{low:8.0f} to {high:6.0f} {count:9,} {bar * round(BAR_WIDTH * count / counts.max())}")
    return "\n".join(lines)
