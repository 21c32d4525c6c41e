"""Texts as token ids that know where their characters went, and the special tokens that frame a text.

A text is always encoded as one piece. A token counts to a span of characters if it holds any of them: one that runs
over the border of prompt and completion counts as completion.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from typing import Any

from scale_sft.errors import UserError

from .chat import Span


class Encoded:
    """Token ids of one text, from a tokenizer that tells where its tokens stand."""

    def __init__(self, encoding: Any, text: str):
        self.ids: list[int] = encoding.ids
        self._encoding, self._length = encoding, len(text)

    def tokens_of(self, span: Span) -> Span:
        """Return the tokens that hold any of the characters of a span."""
        start, stop = span
        first = self._first_beyond(start)
        return (first, max(first, self._first_from(stop))) if start < stop else (0, 0)

    def _first_beyond(self, place: int) -> int:
        """Number of the first token that ends after a character position."""
        if place <= 0:
            return 0
        if place >= self._length:
            return len(self.ids)
        token = self._encoding.char_to_token(place)
        # byte-level tokenizers may leave spaces out of a token's offsets
        return bisect_right([stop for _, stop in self._encoding.offsets], place) if token is None else token

    def _first_from(self, place: int) -> int:
        """Number of the first token that begins at a character position or after it."""
        if place >= self._length:
            return len(self.ids)
        token = self._encoding.char_to_token(place)
        if token is not None and self._encoding.token_to_chars(token)[0] >= place:
            return token
        return bisect_left([start for start, _ in self._encoding.offsets], place)


class EncodedSlowly:
    """The same for a tokenizer that does not tell: by encoding what comes before."""

    def __init__(self, tokenizer: Any, text: str, where: Callable[[], str]):
        self._tokenizer, self._text, self._where = tokenizer, text, where
        self.ids = self._encode(text)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def tokens_of(self, span: Span) -> Span:
        """Return the tokens of a span of characters.

        Raises:
            UserError: a token runs over its end.
        """
        start, stop = span
        before = self._encode(self._text[:start])
        first = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.ids, before, strict=False)))
        if stop >= len(self._text):
            return first, len(self.ids)
        last = self._encode(self._text[:stop])
        if self.ids[: len(last)] != last:
            raise UserError(f"{self._where()}: a token runs over the end of an assistant turn and cannot be cut")
        return first, len(last)


class TextTokenizer:
    """A tokenizer as data need it: texts without special tokens, and the frame that the tokenizer's own call adds."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        own = list(tokenizer("a")["input_ids"])
        bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        places = [n for n in range(len(own) - len(bare) + 1) if own[n : n + len(bare)] == bare]
        place = places[0] if places else 0
        self._before = own[:place] if places else []
        self._after = own[place + len(bare) :] if places else []
        self._end: int | None = tokenizer.eos_token_id
        if self._end is not None and self._end not in self._after:
            self._after.append(self._end)

    def encode(self, texts: Sequence[str], where: Callable[[int], str]) -> Sequence[Encoded | EncodedSlowly]:
        """Encode texts, without special tokens but those that they spell out.

        Straight to the Rust tokenizer: the dictionaries that transformers makes cost a third.

        Raises:
            UserError: a text holds half a character; `where(n)` is its place.
        """
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        try:
            if backend is None:
                return [EncodedSlowly(self._tokenizer, text, partial(where, n)) for n, text in enumerate(texts)]
            backend.no_truncation()
            backend.no_padding()
            encodings = backend.encode_batch(texts, add_special_tokens=False)
            return [Encoded(encoding, text) for encoding, text in zip(encodings, texts, strict=True)]
        except UserError:
            raise
        except Exception:
            _refuse_surrogates(texts, where)
            raise

    def framed(self, ids: list[int], text: str) -> tuple[list[int], int]:
        """Add what the tokenizer's own call adds, and the end: ids, and how many were added in front.

        What the text spells out itself is not added a second time.
        """
        before, after = self._before, self._after
        if before and ids[: len(before)] == before:
            before = []
        if self._end is not None and self._ends(ids, text):
            after = []
        return [*before, *ids, *after], len(before)

    def _ends(self, ids: list[int], text: str) -> bool:
        """Return True if the end token is the last of a text, except for white space."""
        if ids[-1:] == [self._end]:
            return True
        return text[-1:].isspace() and self._end in ids and text.rstrip().endswith(self._tokenizer.eos_token)


def _refuse_surrogates(texts: Sequence[str], where: Callable[[int], str]) -> None:
    for n, text in enumerate(texts):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            raise UserError(
                f"{where(n)}: holds {half}, half of a surrogate pair. Fix: write both halves or neither"
            ) from None
