"""Rows of four formats as token ids with the spans of those that count.

    messages            a list of turns with role and content
    prompt, completion  two texts, or two lists of turns
    alpaca              instruction, input (may be missing or empty), output
    text                one text

Spans are half-open pairs of positions. An encoded example is [bos] prompt completion [eos] for texts, and what the chat
template writes for conversations; it is cut at its end to max_length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scale_sft.errors import UserError

from .chat import Span, check_turns, prompt_length, render, write
from .sources import COLUMNS, Part

ENCODED = ("input_ids", "spans", "length", "targets")
"""Columns of an encoded example: ids; the spans that count, as start, stop, start, stop ...; its length before it was
cut; how many tokens count after that (0: dropped)."""


def recognise(columns: Sequence[str], part: Part) -> str:
    """The format of a source: as it says, or from its columns.

    Raises:
        UserError: the columns fit no format, or not the one that was asked for.
    """
    have = {name for name in COLUMNS if part.source.columns.get(name, name) in columns}
    needs = {
        "messages": {"messages"},
        "prompt_completion": {"prompt", "completion"},
        "alpaca": {"instruction", "output"},
        "text": {"text"},
    }
    asked = part.source.format
    for name, wanted in needs.items():
        if asked in (None, name) and wanted <= have:
            return name
    expected = (
        " and ".join(sorted(needs[asked]))
        if asked
        else ("messages; prompt and completion; instruction, input and output; or text")
    )
    raise UserError(
        f"data: {part.origin}: expected the fields {expected}; got {', '.join(columns) or 'none'}. Name other columns "
        "like this: FILE?prompt=question&completion=answer"
    )


class Encoder:
    """Turns batches of rows of one part into encoded examples; see ENCODED."""

    def __init__(self, part: Part, tokenizer: Any, *, max_length: int, loss_on: str):
        self.part, self.tokenizer, self.max_length, self.loss_on = part, tokenizer, max_length, loss_on
        self.format = recognise(part.rows.column_names, part)
        self.columns = part.source.columns
        if self.format == "text" and loss_on != "all":
            raise UserError(
                f"data: {part.origin} holds plain text, in which no token follows a prompt; with loss_on {loss_on} "
                "none would count: set loss_on all"
            )

    def __call__(self, rows: Mapping[str, list], places: list[int]) -> dict[str, list]:
        """Encoded examples of the rows at `places` of the part.

        Raises:
            UserError: a row is broken; the message has its file and line.
        """
        column = lambda name: rows.get(self.columns.get(name, name)) or [None] * len(places)
        if self.format == "text":
            whole = self._texts(column("text"), "text", places)
            ids, spans = self._pairs([""] * len(whole), whole)
        elif self.format == "messages":
            ids, spans = self._conversations(column("messages"), [0] * len(places), places)
        elif self.format == "alpaca":
            ids, spans = self._alpaca(column("instruction"), column("input"), column("output"), places)
        elif any(isinstance(value, list) for value in (*column("prompt"), *column("completion"))):
            ids, spans = self._turns_after_turns(column("prompt"), column("completion"), places)
        else:
            prompts = self._texts(column("prompt"), "prompt", places)
            ids, spans = self._pairs(prompts, self._texts(column("completion"), "completion", places, empty=False))
        return self._cut(ids, spans)

    def where(self, place: int) -> str:
        return f"data: {self.part.where(place)}"

    def _texts(self, values: list, name: str, places: list[int], empty: bool = True) -> list[str]:
        for place, value in zip(places, values, strict=True):
            if not isinstance(value, str):
                kind = "missing" if value is None else f"{type(value).__name__}, expected text"
                raise UserError(f"{self.where(place)}: field '{name}' is {kind}")
            if not value and not empty:
                raise UserError(f"{self.where(place)}: no token to learn from: its {name} is empty; remove it")
        return values

    def _pairs(self, prompts: list[str], completions: list[str]) -> tuple[list, list[list[Span]]]:
        """[bos] prompt completion [eos]; the completion and its end count."""
        tokenizer, everything = self.tokenizer, self.loss_on == "all"
        first = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        last = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        pieces, _ = self._tokenise([*prompts, *completions])
        ids, spans = [], []
        for before, after in zip(pieces[: len(prompts)], pieces[len(prompts) :], strict=True):
            ids.append([*first, *before, *after, *last])
            spans.append([(0 if everything else len(first) + len(before), len(ids[-1]))])
        return ids, spans

    def _alpaca(self, instructions: list, inputs: list, outputs: list, places: list[int]) -> tuple[list, list]:
        """A conversation of two turns where the tokenizer has a chat template, otherwise text under headings."""
        asked = self._texts(instructions, "instruction", places)
        more = self._texts([text or "" for text in inputs], "input", places)
        answers = self._texts(outputs, "output", places, empty=False)
        if not self.tokenizer.chat_template:
            prompts = [
                f"### Instruction:\n{ask}\n\n" + (f"### Input:\n{text}\n\n" if text else "") + "### Response:\n"
                for ask, text in zip(asked, more, strict=True)
            ]
            return self._pairs(prompts, answers)
        chats = [
            [
                {"role": "user", "content": f"{ask}\n\n{text}" if text else ask},
                {"role": "assistant", "content": answer},
            ]
            for ask, text, answer in zip(asked, more, answers, strict=True)
        ]
        return self._conversations(chats, [0] * len(chats), places)

    def _turns_after_turns(self, prompts: list, completions: list, places: list[int]) -> tuple[list, list]:
        """Lists of turns as prompt and completion; a text among them is one turn."""
        as_turns = lambda value, role: [{"role": role, "content": value}] if isinstance(value, str) else value
        chats, starts = [], []
        for place, prompt, completion in zip(places, prompts, completions, strict=True):
            before = check_turns(as_turns(prompt, "user"), lambda place=place: f"{self.where(place)}: prompt")
            after = lambda place=place: f"{self.where(place)}: completion"
            chats.append(before + check_turns(as_turns(completion, "assistant"), after))
            only_completion = self.loss_on == "completion"
            where = lambda _, place=place: self.where(place)
            starts.append(prompt_length(before, self.tokenizer, where) if only_completion else 0)
        return self._conversations(chats, starts, places)

    def _conversations(self, chats: list, starts: list[int], places: list[int]) -> tuple[list, list[list[Span]]]:
        """Conversations through the chat template; of the assistant turns those from character `starts[n]` on count."""
        where = lambda n: self.where(places[n])
        everything = self.loss_on == "all"
        chats = [check_turns(turns, lambda n=n: where(n)) for n, turns in enumerate(chats)]
        for n, turns in enumerate(chats):
            if not everything and not any(turn["role"] == "assistant" and turn.get("content") for turn in turns):
                raise UserError(
                    f"{where(n)}: no token to learn from: the conversation has no assistant turn with a text"
                )
        if everything:
            texts, spans = write(chats, self.tokenizer, where), []
        else:
            texts, spans = render(chats, self.tokenizer, where)
        ids, encodings = self._tokenise(texts, places=not everything)
        if everything:
            return ids, [[(0, len(row))] for row in ids]
        tokens = []
        for n, (row, start) in enumerate(zip(spans, starts, strict=True)):
            kept = [span for span in row if span[1] > start]
            if encodings is not None:
                tokens.append([_token_span(encodings[n], span) for span in kept])
            else:
                tokens.append([self._token_span_by_prefix(ids[n], texts[n], span, where(n)) for span in kept])
        return ids, tokens

    def _tokenise(self, texts: list[str], places: bool = False) -> tuple[list[list[int]], list[Any] | None]:
        """Ids of texts without special tokens; with `places`, encodings that know where each token stands, if this
        tokenizer has them. Straight to the Rust tokenizer: the dictionaries that transformers makes cost a third.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"], None
        backend.no_truncation()
        backend.no_padding()
        encode = backend.encode_batch if places else backend.encode_batch_fast
        encodings = encode(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings], encodings

    def _token_span_by_prefix(self, ids: list[int], text: str, span: Span, where: str) -> Span:
        """The same for a tokenizer that does not tell where its tokens stand: by encoding what comes before."""
        ends = []
        for cut in span:
            before = self.tokenizer(text[:cut], add_special_tokens=False)["input_ids"]
            if ids[: len(before)] != before:
                raise UserError(f"{where}: a token runs over the edge of an assistant turn, which cannot be told apart")
            ends.append(len(before))
        return ends[0], ends[1]

    def _cut(self, ids: list[list[int]], spans: list[list[Span]]) -> dict[str, list]:
        """Cut to max_length; an example that keeps no target token is left empty."""
        encoded: dict[str, list] = {name: [] for name in ENCODED}
        limit = self.max_length
        for row, counted in zip(ids, spans, strict=True):
            flat, targets = [], 0
            for start, stop in counted:
                stop = min(stop, limit)
                if start < stop:
                    flat += (start, stop)
                    targets += stop - max(start, 1)  # the first token of a sequence is never predicted
            encoded["input_ids"].append(row[:limit] if targets > 0 else [])
            encoded["spans"].append(flat if targets > 0 else [])
            encoded["length"].append(len(row))
            encoded["targets"].append(max(targets, 0))
        return encoded


def _token_span(encoding: Any, span: Span) -> Span:
    """The tokens of an encoding that hold any of the characters of a span."""
    start, stop = span
    first = next((t for c in range(start, stop) if (t := encoding.char_to_token(c)) is not None), None)
    last = next((t for c in range(stop - 1, start - 1, -1) if (t := encoding.char_to_token(c)) is not None), None)
    return (0, 0) if first is None or last is None else (first, last + 1)
