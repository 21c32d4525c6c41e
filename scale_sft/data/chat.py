"""Conversations as the tokenizer's chat template writes them, and which characters of that text an assistant wrote.

Spans are half-open pairs of character positions in the rendered text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scale_sft.errors import UserError, first_line
from scale_sft.files import ASSETS

from .turn_ends import special_tokens

SHIPPED_TEMPLATES = ASSETS / "templates"
ROLES = ("system", "developer", "user", "assistant", "tool")
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]
Where = Callable[[int], str]
"""Place of the n-th conversation of a batch, for messages."""


def shipped_templates() -> list[str]:
    """Names of the chat templates that come with the package."""
    return sorted(path.stem for path in SHIPPED_TEMPLATES.glob("*.jinja"))


def use_template(tokenizer: Any, written: str | None) -> Any:
    """The tokenizer with another chat template: the name of a shipped one, or a Jinja file; None: its own.

    Raises:
        UserError: there is no such template.
    """
    if written is None:
        return tokenizer
    path = SHIPPED_TEMPLATES / f"{written}.jinja" if written in shipped_templates() else Path(written)
    if not path.is_file():
        names = ", ".join(shipped_templates())
        raise UserError(f"chat_template: '{written}' is neither a file nor one of: {names}")
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    return tokenizer


def has_marks(template: str) -> bool:
    """Whether a template says itself which text is generated: {% generation %} ... {% endgeneration %}."""
    return bool(_MARKS.search(template))


def check_turns(turns: Any, where: Callable[[], str]) -> list[dict[str, Any]]:
    """The turns of one conversation, without empty fields; `where` is asked for its place only if something is wrong.

    Raises:
        UserError: it is no list of turns with a known role and a text.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        got = "nothing" if turns is None else f"{type(turns).__name__} {turns!r:.40}"
        raise UserError(f"{where()}: expected a list of turns, got {got}")
    return [_check_turn(turn, number, where) for number, turn in enumerate(turns, start=1)]


def _check_turn(turn: Any, number: int, where: Callable[[], str]) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise UserError(f"{where()}: turn {number} is {type(turn).__name__}, expected role and content")
    turn = {key: value for key, value in turn.items() if value is not None}
    if "from" in turn and "value" in turn and "role" not in turn:
        raise UserError(f"{where()}: turn {number} has from and value; rename them to role and content")
    if turn.get("role") not in ROLES:
        role = repr(turn.get("role"))[:40]
        raise UserError(f"{where()}: turn {number} has the unknown role {role}; expected {', '.join(ROLES)}")
    if not isinstance(turn.get("content"), str) and "tool_calls" not in turn:
        kind = type(turn.get("content")).__name__
        raise UserError(f"{where()}: the content of turn {number} ({turn['role']}) is {kind}, expected text")
    return turn


def render(
    conversations: Sequence[Sequence[Mapping]], tokenizer: Any, where: Where, *, marks: bool | None = None
) -> tuple[list[str], list[list[Span]]]:
    """Texts of a batch of conversations, and the spans of their assistant turns with the tokens that end them.

    Args:
        marks: take the spans from the template's generation marks, or by comparing prefixes; default: from the marks
            where there are any.

    Raises:
        UserError: there is no template, it refuses a conversation, or it rewrites earlier turns and has no marks.
    """
    template = tokenizer.chat_template
    if not template:
        raise UserError(
            f"{where(0)}: a conversation, but the base's tokenizer has no chat template; "
            f"choose one with chat_template: {', '.join(shipped_templates())}, or a Jinja file"
        )
    if marks is None:
        marks = isinstance(template, str) and has_marks(template)
    return _by_marks(conversations, tokenizer, where) if marks else _by_prefixes(conversations, tokenizer, where)


def prompt_length(turns: Sequence[Mapping], tokenizer: Any, where: Where) -> int:
    """Characters of the text that asks for an answer to `turns`."""
    return len(write([list(turns)], tokenizer, where, ask=True)[0])


def _by_marks(conversations: Sequence, tokenizer: Any, where: Where) -> tuple[list[str], list[list[Span]]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = [], []
    for number, turns in enumerate(conversations):
        try:
            text, marked = render_jinja_template(
                conversations=[turns],
                chat_template=tokenizer.chat_template,
                return_assistant_tokens_mask=True,
                **tokenizer.special_tokens_map,
            )
        except Exception as error:  # jinja's, and whatever the template raises
            raise UserError(f"{where(number)}: the chat template refuses it: {first_line(error)}") from None
        texts += text
        spans.append([(start, stop) for start, stop in marked[0] if stop > start])
    return texts, spans


def _by_prefixes(conversations: Sequence, tokenizer: Any, where: Where) -> tuple[list[str], list[list[Span]]]:
    """What a turn adds is the difference of the texts up to it (asking for an answer) and with it."""
    whole = write(conversations, tokenizer, where)
    replies = [(c, n) for c, turns in enumerate(conversations) for n, turn in enumerate(turns) if _is_reply(turn)]
    place = lambda m: where(replies[m][0])
    before = write([conversations[c][:n] for c, n in replies], tokenizer, place, ask=True)
    last = {c: len(turns) for c, turns in enumerate(conversations)}
    inner = [(c, n) for c, n in replies if n + 1 < last[c]]  # the text up to the last turn is the whole
    after = dict(zip(inner, write([conversations[c][: n + 1] for c, n in inner], tokenizer, place), strict=True))
    ends = [text for text in special_tokens(tokenizer).values() if text]
    spans: list[list[Span]] = [[] for _ in conversations]
    for (c, n), start in zip(replies, before, strict=True):
        stop = after.get((c, n), whole[c])
        if not (whole[c].startswith(stop) and stop.startswith(start)):
            raise UserError(
                f"{where(c)}: the chat template writes turn {n + 1} differently once more turns follow, so its tokens "
                "cannot be told apart; give the template generation marks ({% generation %})"
            )
        spans[c].append((len(start), len(start) + _end_of_turn(stop[len(start) :], ends)))
    return whole, spans


def _is_reply(turn: Mapping) -> bool:
    return turn["role"] == "assistant"


def _end_of_turn(added: str, ends: Sequence[str]) -> int:
    """Length of a turn up to and with the token that ends it: white space between turns is never generated."""
    bare = added.rstrip()
    return len(bare) if any(bare.endswith(end) for end in ends) else len(added)


def write(conversations: Sequence, tokenizer: Any, where: Where, ask: bool = False) -> list[str]:
    """The texts of a batch of conversations; `ask` ends each with what asks for an answer.

    Raises:
        UserError: the template refuses a conversation.
    """
    if not conversations:
        return []
    try:
        return tokenizer.apply_chat_template(list(conversations), tokenize=False, add_generation_prompt=ask)
    except Exception:  # find the one that is refused
        for number, turns in enumerate(conversations):
            try:
                tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)
            except Exception as error:  # jinja's, and whatever the template raises
                raise UserError(f"{where(number)}: the chat template refuses it: {first_line(error)}") from None
        raise
