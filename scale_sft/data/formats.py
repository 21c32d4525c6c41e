"""Rows of four formats as token ids with the spans of those that count.

    messages            a list of turns with role and content
    prompt, completion  two texts, or two lists of turns
    alpaca              instruction, input (may be missing or empty), output
    text                one text

Spans are half-open pairs of positions. An encoded example is what the tokenizer's own call makes of prompt +
completion, with one end token, for texts, and what the chat template writes for conversations; it is cut at its end
to max_length.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from scale_sft.errors import UserError

from .chat import Span, render, write
from .notes import Notes
from .opening import Part
from .sources import FORMATS, OF_OTHER_TOOLS, recognise
from .tokens import TextTokenizer
from .turns import Chat, calls, check_turns, earlier_turns, with_columns

ENCODED = ("input_ids", "spans", "length", "targets")
"""Columns of an encoded example: ids; the spans that count, as start, stop, start, stop ...; its length before it was
cut; how many tokens count after that (0: dropped)."""
IMAGES = ("images", "image", "videos", "video", "audio", "audios")
"""Columns whose contents would be part of a prompt elsewhere: a row that has some is refused."""
Example = tuple[list[int], list[Span]]
"""Token ids, and which of them count."""
Record = Mapping[str, Any]


class Encoder:
    """Turns batches of rows of one part into encoded examples; see ENCODED."""

    def __init__(self, part: Part, tokenizer: Any, *, max_length: int, loss_on: str, notes: Notes | None = None):
        self.part, self.tokenizer, self.max_length, self.loss_on = part, tokenizer, max_length, loss_on
        self.texts = TextTokenizer(tokenizer)
        self.notes = notes or Notes()
        self.format = recognise(part.columns, part.source, part.origin)
        if self.format == "text" and loss_on != "all":
            raise UserError(
                f"data: {part.origin} holds plain text, in which no token follows a prompt; with loss_on {loss_on} "
                "none would count: set loss_on all"
            )
        used = {part.source.column(name) for names in FORMATS[self.format] for name in names}
        self._unused([name for name in part.columns if name in OF_OTHER_TOOLS and name not in used])

    def __call__(self, rows: Mapping[str, list], places: list[int]) -> dict[str, list]:
        """Encode the rows at `places` of the part.

        Raises:
            UserError: a row is broken; the message has its file and line.
        """
        return self.cut(self.examples([json.loads(text) for text in rows["row"]], places))

    def examples(self, records: Sequence[Record], places: Sequence[int]) -> list[Example]:
        """Encode records, each found at one of `places`, before they are cut.

        Raises:
            UserError: a row is broken, or has images.
        """
        for record, place in zip(records, places, strict=True):
            self._refuse_images(record, place)
        return getattr(self, f"_{self.format}")(list(records), list(places))

    def where(self, place: int) -> str:
        return f"data: {self.part.where(place)}"

    def _where_in(self, place: int, field: str) -> str:
        return f"{self.where(place)}: {field}"

    def _unused(self, columns: Sequence[str]) -> None:
        if columns:
            named = ", ".join(f"'{name}'" for name in columns)
            self.notes.add(f"data: {self.part.origin}: not used with format {self.format}: {named}")

    def _refuse_images(self, record: Record, place: int) -> None:
        name = next((name for name in IMAGES if record.get(name)), None)
        if name is not None:
            raise UserError(
                f"{self.where(place)}: got '{name}', expected text alone, as training reads no images, videos or "
                "sounds. Fix: leave such rows or columns out"
            )

    def _get(self, record: Record, name: str) -> Any:
        return record.get(self.part.source.column(name))

    def _read(self, record: Record, name: str, place: int, empty: bool = True) -> str:
        """Return a text of a record."""
        value = self._get(record, name)
        if not isinstance(value, str):
            kind = "missing" if value is None else f"{type(value).__name__}, expected text"
            fix = " in quotes" if isinstance(value, int | float) and not isinstance(value, bool) else ""
            raise UserError(f"{self.where(place)}: field '{self.part.source.column(name)}' is {kind}{fix}")
        if not value and not empty:
            raise UserError(f"{self.where(place)}: no token to learn from: its {name} is empty; remove it")
        return value

    def _text(self, records: list[Record], places: list[int]) -> list[Example]:
        wholes = [self._read(record, "text", place) for record, place in zip(records, places, strict=True)]
        return self._pairs([""] * len(wholes), wholes, places)

    def _messages(self, records: list[Record], places: list[int]) -> list[Example]:
        chats = []
        for record, place in zip(records, places, strict=True):
            chat = check_turns(self._get(record, "messages"), partial(self.where, place))
            chats.append(self._with_columns(chat, record, place))
        return self._conversations(chats, [0] * len(chats), places)

    def _prompt_completion(self, records: list[Record], places: list[int]) -> list[Example]:
        """Read two texts, or lists of turns; each row independently of its neighbours."""
        kinds = [
            any(isinstance(self._get(record, name), list) for name in ("prompt", "completion")) for record in records
        ]
        examples: dict[int, Example] = {}
        for turns, encode in ((True, self._after_turns), (False, self._after_text)):
            members = [n for n, kind in enumerate(kinds) if kind is turns]
            if members:
                encoded = encode([records[n] for n in members], [places[n] for n in members])
                examples |= zip(members, encoded, strict=True)
        return [examples[n] for n in range(len(records))]

    def _after_text(self, records: list[Record], places: list[int]) -> list[Example]:
        prompts, completions = [], []
        for record, place in zip(records, places, strict=True):
            prompts.append(self._read(record, "prompt", place))
            completions.append(self._read(record, "completion", place, empty=False))
            for name in FORMATS["prompt_completion"][1]:
                if self._get(record, name):
                    self._unused([self.part.source.column(name)])
        return self._pairs(prompts, completions, places)

    def _pairs(self, prompts: list[str], completions: list[str], places: list[int]) -> list[Example]:
        """Prompt and completion as one text; the completion and the end count."""
        wholes = [before + after for before, after in zip(prompts, completions, strict=True)]
        examples = []
        encoded = self.texts.encode(wholes, lambda n: self.where(places[n]))
        for prompt, whole, text in zip(prompts, wholes, encoded, strict=True):
            ids, added = self.texts.framed(text.ids, whole)
            start = 0 if self.loss_on == "all" else added + text.tokens_of((len(prompt), len(whole)))[0]
            examples.append((ids, [(start, len(ids))]))
        return examples

    def _alpaca(self, records: list[Record], places: list[int]) -> list[Example]:
        """Make a conversation of two turns if the tokenizer has a chat template, otherwise text under headings."""
        chats, prompts, answers = [], [], []
        template = bool(self.tokenizer.chat_template)
        for record, place in zip(records, places, strict=True):
            ask = self._read(record, "instruction", place)
            more = self._read(record, "input", place) if self._get(record, "input") is not None else ""
            answer = self._read(record, "output", place, empty=False)
            if template:
                question = {"role": "user", "content": f"{ask}\n\n{more}" if more else ask}
                earlier = earlier_turns(self._get(record, "history"), partial(self.where, place))
                chat = Chat([*earlier, question, {"role": "assistant", "content": answer}])
                chats.append(self._with_columns(chat, record, place))
                continue
            for name in ("system", "history", "tools", "chat_template_kwargs"):
                if self._get(record, name):
                    raise UserError(
                        f"{self.where(place)}: field '{name}' needs a chat template, but the base's tokenizer has "
                        "none; choose one with chat_template"
                    )
            heading = f"### Input:\n{more}\n\n" if more else ""
            prompts.append(f"### Instruction:\n{ask}\n\n{heading}### Response:\n")
            answers.append(answer)
        if template:
            return self._conversations(chats, [0] * len(chats), places)
        return self._pairs(prompts, answers, places)

    def _after_turns(self, records: list[Record], places: list[int]) -> list[Example]:
        """Lists of turns as prompt and completion; a text among them is one turn."""
        chats, prompts = [], []
        for record, place in zip(records, places, strict=True):
            halves = []
            for name, role in (("prompt", "user"), ("completion", "assistant")):
                value = self._get(record, name)
                turns = [{"role": role, "content": value}] if isinstance(value, str) else value
                halves.append(check_turns(turns, partial(self._where_in, place, name)))
            first, second = halves
            unlearned = first.unlearned | {len(first.turns) + n for n in second.unlearned}
            chats.append(self._with_columns(Chat(first.turns + second.turns, unlearned), record, place))
            prompts.append(chats[-1].first(len(chats[-1].turns) - len(second.turns)))
        starts = [0] * len(chats)
        if self.loss_on == "completion":
            starts = [len(text) for text in write(prompts, self.tokenizer, lambda n: self.where(places[n]), ask=True)]
        return self._conversations(chats, starts, places)

    def _with_columns(self, chat: Chat, record: Record, place: int) -> Chat:
        system, tools, settings = (self._get(record, name) for name in ("system", "tools", "chat_template_kwargs"))
        chat = with_columns(chat, system, tools, settings, partial(self.where, place))
        template = self.tokenizer.chat_template
        if isinstance(template, str):  # what the template never mentions, it does not write
            for key in chat.options:
                if key not in template:
                    self.notes.add(f"data: {self.part.origin}: the chat template does not use '{key}'")
            for number, turn in enumerate(chat.turns, start=1):
                if len(turn) > 2 or "content" not in turn:
                    self._refuse_unwritten(turn, template, number, place)
        return chat

    def _refuse_unwritten(self, turn: Mapping[str, Any], template: str, number: int, place: int) -> None:
        for key in turn:
            if key in ("role", "content") or key in template:
                continue
            if calls(turn) and key in ("tool_calls", "function_call"):
                raise UserError(
                    f"{self.where(place)}: turn {number} has {key}, which the chat template does not write; choose "
                    "another with chat_template"
                )
            self.notes.add(f"data: {self.part.origin}: the chat template does not write '{key}' of turns")

    def _conversations(self, chats: list[Chat], starts: list[int], places: list[int]) -> list[Example]:
        """Conversations through the chat template; of the learned turns those from character `starts[n]` on count."""

        def where(n: int) -> str:
            return self.where(places[n])

        everything = self.loss_on == "all"
        for n, chat in enumerate(chats):
            turns = [chat.turns[turn] for turn in chat.learned()]
            if not everything and not any(turn.get("content") or calls(turn) for turn in turns):
                reason = "the conversation has no assistant turn with a text or a tool call"
                if chat.replies() and chat.unlearned:
                    reason = "its assistant turns have weight 0 or train false; remove the conversation"
                raise UserError(f"{where(n)}: no token to learn from: {reason}")
        spans: list[list[Span]] = [[] for _ in chats]
        if everything and not any(chat.unlearned for chat in chats):
            texts = write(chats, self.tokenizer, where)
        else:
            texts, spans = render(chats, self.tokenizer, where, unlearned=everything)
        examples = []
        for text, row, start in zip(self.texts.encode(texts, where), spans, starts, strict=True):
            tokens = [text.tokens_of(span) for span in row if span[1] > start]
            found = [span for span in tokens if span[0] < span[1]]
            examples.append((text.ids, _between(found, len(text.ids)) if everything else found))
        return examples

    def cut(self, examples: list[Example]) -> dict[str, list]:
        """Cut to max_length; an example that keeps no target token is left empty."""
        encoded: dict[str, list] = {name: [] for name in ENCODED}
        limit = self.max_length
        for ids, spans in examples:
            flat: list[int] = []
            targets = 0
            for start, stop in spans:
                stop = min(stop, limit)
                if start < stop:
                    flat += (start, stop)
                    targets += stop - max(start, 1)  # the first token of a sequence is never predicted
            encoded["input_ids"].append(ids[:limit] if targets > 0 else [])
            encoded["spans"].append(flat if targets > 0 else [])
            encoded["length"].append(len(ids))
            encoded["targets"].append(max(targets, 0))
        return encoded


def _between(spans: list[Span], length: int) -> list[Span]:
    """Everything in [0, length) but some spans."""
    edges = [0, *(place for span in spans for place in span), length]
    return list(zip(edges[::2], edges[1::2], strict=True))
