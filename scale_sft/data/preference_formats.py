"""Rows of preferences as token ids: two rows for a pair, chosen then rejected; or single answers with a mark.

    preference   chosen, rejected, with or without prompt; texts, or lists of turns
    marked       prompt, completion, label (true: a good answer)

Without a prompt, and where both sides are conversations that begin alike, the prompt is the common beginning of both.
Both sides are encoded as `formats` encodes prompt and completion. What cannot be learned from is left out whole and
counted by its reason, see DROPPED.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from scale_sft.errors import UserError

from .formats import ENCODED, Encoder, Example
from .notes import Notes
from .opening import Part
from .sources import recognise, with_aliases

DROPPED = (
    "",
    "an answer is empty",
    "both sides are equal",
    "max_length cuts an answer away",
)
"""Reasons why a pair is left out, by their number in column `dropped_for`; 0: it is kept."""
_NOTHING, _EQUAL, _CUT = 1, 2, 3
PAIRED = (*ENCODED, "dropped_for", "shared")
MARKED = (*ENCODED, "dropped_for", "label")
"""Columns of an encoded side, with the number of tokens that both sides share and that can be computed once; and of an
encoded answer, with its mark (1: good)."""

Record = Mapping[str, Any]
Sides = tuple[Any, Any, Any]
"""Prompt, chosen, rejected: texts or lists of turns."""


class PreferenceEncoder:
    """Turns batches of rows of one part into encoded sides; see PAIRED and MARKED."""

    def __init__(self, part: Part, tokenizer: Any, *, max_length: int, loss_on: str, notes: Notes | None = None):
        self.part, self.max_length, self.marked = part, max_length, part.source.kind == "marked"
        self.format = recognise(part.columns, part.source, part.origin)
        self.source = with_aliases(part.source, part.columns)
        answers = ("completion",) if self.format == "marked" else ("chosen", "rejected")
        self.encoders = {}
        for name in answers:
            columns = {**self.source.columns, "completion": self.source.column(name)}
            source = replace(self.source, kind="sft", format="prompt_completion", columns=columns)
            named = (*part.columns, source.column("prompt"))  # which may be found in both sides alone
            of_side = Part(part.rows, part.origin, source, named)
            self.encoders[name] = Encoder(of_side, tokenizer, max_length=max_length, loss_on=loss_on, notes=notes)

    def __call__(self, rows: Mapping[str, list], places: list[int]) -> dict[str, list]:
        """Encode the rows at `places` of the part.

        Raises:
            UserError: a row is broken; the message has its file and line.
        """
        records = [json.loads(text) for text in rows["row"]]
        if self.format == "marked":
            return self._marked(records, places)
        return self._pairs(records, places)

    def _where(self, place: int) -> str:
        return f"data: {self.part.where(place)}"

    def _pairs(self, records: Sequence[Record], places: Sequence[int]) -> dict[str, list]:
        sides = [self._sides(record, place) for record, place in zip(records, places, strict=True)]
        kept = [n for n, (_, chosen, rejected) in enumerate(sides) if _says_something(chosen, rejected)]
        encoded = []
        for number, name in enumerate(("chosen", "rejected"), start=1):
            column, prompt = self.source.column(name), self.source.column("prompt")
            rows = [{**records[n], prompt: sides[n][0], column: sides[n][number]} for n in kept]
            encoded.append(dict(zip(kept, self.encoders[name].examples(rows, [places[n] for n in kept]), strict=True)))
        columns: dict[str, list] = {name: [] for name in (MARKED if self.marked else PAIRED)}
        for n in range(len(records)):
            examples = [side.get(n, ([], [])) for side in encoded]
            cut = [self.encoders["chosen"].cut([example]) for example in examples]
            reasons = [self._reason(example, side) for example, side in zip(examples, cut, strict=True)]
            if not self.marked:
                reasons = [max(reasons) or (_EQUAL if _same(*cut) else 0)] * 2
            shared = 0 if max(reasons) else _shared(*cut)
            for side, reason, label in zip(cut, reasons, (1, 0), strict=True):
                self._add(columns, side, reason, label, shared)
        return columns

    def _marked(self, records: Sequence[Record], places: Sequence[int]) -> dict[str, list]:
        columns: dict[str, list] = {name: [] for name in MARKED}
        completion, encoder = self.source.column("completion"), self.encoders["completion"]
        labels = [self._label(record, place) for record, place in zip(records, places, strict=True)]
        kept = [n for n, record in enumerate(records) if _says_something(record.get(completion))]
        found = encoder.examples([records[n] for n in kept], [places[n] for n in kept])
        encoded = dict(zip(kept, found, strict=True))
        for n, label in enumerate(labels):
            example = encoded.get(n, ([], []))
            side = encoder.cut([example])
            self._add(columns, side, self._reason(example, side), label)
        return columns

    def _label(self, record: Record, place: int) -> int:
        value = record.get(self.source.column("label"))
        if value not in (True, False, 0, 1, "true", "false", "True", "False"):
            raise UserError(
                f"{self._where(place)}: field '{self.source.column('label')}' is {value!r:.40}, expected true for a "
                "good answer, or false"
            )
        return int(str(value).lower() in ("true", "1", "1.0"))

    def _sides(self, record: Record, place: int) -> Sides:
        """Find the prompt: as the row has it, or the common beginning of both sides.

        Raises:
            UserError: there is neither.
        """
        prompt, chosen, rejected = (record.get(self.source.column(name)) for name in ("prompt", "chosen", "rejected"))
        for name, value in (("chosen", chosen), ("rejected", rejected)):
            if not isinstance(value, str | list):
                kind = "missing" if value is None else f"{type(value).__name__}, expected text or a list of turns"
                raise UserError(f"{self._where(place)}: field '{self.source.column(name)}' is {kind}")
        if isinstance(chosen, list) and isinstance(rejected, list):
            shared = _common(chosen, rejected)
            while shared and _role(chosen[shared - 1]) == "assistant":  # the answers begin after a question
                shared -= 1
            if shared:
                return _opening(prompt, chosen, shared), chosen[shared:], rejected[shared:]
        elif prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
            shared = _common(chosen, rejected)
            shared -= shared < len(chosen) and chosen[shared - 1 : shared] == " "  # a word begins with its space
            return chosen[:shared], chosen[shared:], rejected[shared:]
        if prompt is None:
            raise UserError(
                f"{self._where(place)}: no field '{self.source.column('prompt')}', and both sides have no beginning in "
                "common. Fix: name the column of the prompt like this: FILE?prompt=question"
            )
        return prompt, chosen, rejected

    def _reason(self, example: Example, cut: Mapping[str, list]) -> int:
        """Return the reason why a side cannot be learned from, by its number in DROPPED; 0: it can."""
        if not any(stop > max(start, 1) for start, stop in example[1]):
            return _NOTHING
        return 0 if cut["targets"][0] else _CUT

    @staticmethod
    def _add(columns: dict[str, list], side: Mapping[str, list], reason: int, label: int, shared: int = 0) -> None:
        values = {**{name: side[name][0] for name in ENCODED}, "dropped_for": reason, "label": label, "shared": shared}
        if reason:
            values |= {"input_ids": [], "spans": [], "targets": 0}
        for name, column in columns.items():
            column.append(values[name])


def _same(one: Mapping[str, list], other: Mapping[str, list]) -> bool:
    return all(one[name] == other[name] for name in ("input_ids", "spans"))


def _shared(one: Mapping[str, list], other: Mapping[str, list]) -> int:
    """Count the tokens that both sides begin with, but the last before one that counts: each side predicts from it."""
    starts = [side["spans"][0][0] for side in (one, other)]
    return max(0, min(_common(one["input_ids"][0], other["input_ids"][0]), *starts) - 1)


def _common(one: Sequence, other: Sequence) -> int:
    """Length of the common beginning of two texts or lists."""
    length = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        length += 1
    return length


def _opening(prompt: Any, chosen: list, shared: int) -> list:
    """Join a prompt and the `shared` turns that both sides begin with; the conversation may repeat it, or its end.

    A text is part of turns that begin with a question; otherwise it is that question, after the system prompt.
    """
    common = chosen[:shared]
    if isinstance(prompt, str):
        first = next((n for n, turn in enumerate(common) if _role(turn) != "system"), len(common))
        asks = not prompt or (first < len(common) and _role(common[first]) == "user")
        return common if asks else [*common[:first], {"role": "user", "content": prompt}, *common[first:]]
    turns = prompt if isinstance(prompt, list) else []
    repeated = next(n for n in range(len(turns), -1, -1) if turns[len(turns) - n :] == chosen[:n])
    return [*turns[: len(turns) - repeated], *common]


def _role(turn: Any) -> Any:
    return turn.get("role") if isinstance(turn, Mapping) else None


def _says_something(*answers: Any) -> bool:
    """Tell whether no answer is an empty text, an empty list, or turns of which the last is empty."""
    for answer in answers:
        last = answer[-1] if isinstance(answer, list) and answer else answer
        if isinstance(last, Mapping) and _role(last) == "assistant" and not last.get("tool_calls"):
            last = last.get("content")
        if last is None or last in ("", []):
            return False
    return True
