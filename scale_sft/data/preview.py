"""Examples for the eye: text as the model sees it, the tokens that count in colour, and how long examples are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from scale_sft.model.loss import IGNORED

from .examples import Examples
from .preferences import Marked, Pairs, Preferences

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
        for heading, side in sides(examples, n):
            console.print(f"[dim]{heading}[/dim]", highlight=False)
            text = Text()
            for piece, counts in pieces(side, tokenizer):
                piece = shown(piece)
                piece = f"{quotes[0]}{piece}{quotes[1]}" if counts and not console.is_terminal else piece
                text.append(piece, style=COUNTS if counts else None)
            console.print(text, soft_wrap=True)
    console.rule("lengths in tokens")
    console.print(histogram(examples.lengths, bar), highlight=False)
    tokens = examples.all_tokens(range(total))
    count_of = f"{total:,} {unit_of(examples)}, {tokens:,} tokens, {targets:,} count ({targets / tokens:.0%})"
    console.print(f"{count_of}; {left_out(examples)}", soft_wrap=True, highlight=False)


def unit_of(examples: Examples) -> str:
    """Name what is counted: pairs or examples."""
    return "pairs" if isinstance(examples, Pairs) else "examples"


def left_out(examples: Examples) -> str:
    """Count what was cut to max_length, and what was dropped, by reason."""
    if not isinstance(examples, Preferences):
        cut = f"{examples.truncated:,} examples cut to max_length"
        return f"{cut}, {examples.dropped:,} dropped (no token that counts was left)"
    reasons = ", ".join(f"{count:,} because {reason}" for reason, count in examples.drops.items())
    answers = "sides" if isinstance(examples, Pairs) else "answers"
    counts = f"{examples.truncated:,} {answers} cut to max_length, {examples.dropped:,} dropped"
    return counts + (f" ({reasons})" if reasons else "")


def sides(examples: Examples, n: int) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """Yield a heading, ids and labels of an example, or of each of its two sides."""
    if isinstance(examples, Pairs):
        shared = examples.shared_tokens(n)
        for side, name in enumerate(("chosen", "rejected")):
            number = 2 * n + side
            length, count = examples.sequence_lengths[number], examples.target_counts[number]
            yield f"pair {n}, {name}: {length} tokens, {count} count, {shared} shared", examples.sequence(number)
        return
    mark = f", {'good' if examples.good[n] else 'bad'}" if isinstance(examples, Marked) else ""
    yield (
        f"example {n}{mark}: {examples.lengths[n]} tokens, {examples.target_tokens([n])} count",
        examples.tokens(n),
    )


def _signs(encoding: str) -> tuple[str, tuple[str, str]]:
    """Choose a bar and quotes that an encoding has."""
    try:
        "█«»".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return "#", ("<<", ">>")
    return "█", ("«", "»")


def pieces(tokens: tuple[np.ndarray, np.ndarray], tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """Yield ids and labels as stretches of text, and whether their tokens count."""
    ids, labels = tokens
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
