"""Conversations as the tokenizer's chat template writes them, and which characters of that text an assistant wrote.

Spans are half-open pairs of character positions in the rendered text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scale_sft.errors import UserError, first_line
from scale_sft.files import ASSETS

from .turn_ends import special_tokens
from .turns import Chat

SHIPPED_TEMPLATES = ASSETS / "templates"
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_LOOKS_LIKE_A_MARK = re.compile(r"<.+>|\[.+\]")

Span = tuple[int, int]
Where = Callable[[int], str]
"""Place of the n-th conversation of a batch, for messages."""


def shipped_templates() -> list[str]:
    """Names of the chat templates that come with the package."""
    return sorted(path.stem for path in SHIPPED_TEMPLATES.glob("*.jinja"))


def use_template(tokenizer: Any, written: str | None) -> Any:
    """Set the tokenizer's chat template: the name of a shipped one, or a Jinja file; None keeps its own.

    Raises:
        UserError: the template does not exist.
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
    """Return True if a template marks generated text: {% generation %} ... {% endgeneration %}."""
    return bool(_MARKS.search(template))


def render(
    chats: Sequence[Chat], tokenizer: Any, where: Where, *, marks: bool | None = None, unlearned: bool = False
) -> tuple[list[str], list[list[Span]]]:
    """Write a batch of conversations; find the spans of the turns that are learned, with the tokens that end them.

    Args:
        marks: take the spans from the template's generation marks, or by comparing prefixes; default: from the marks
            where there are any.
        unlearned: find the assistant turns that are not learned instead.

    Raises:
        UserError: the tokenizer has no template, it refuses a conversation, or it rewrites earlier turns and has no
            marks.
    """
    template = tokenizer.chat_template
    if not template:
        raise UserError(
            f"{where(0)}: a conversation, but the base's tokenizer has no chat template; "
            f"choose one with chat_template: {', '.join(shipped_templates())}, or a Jinja file"
        )
    if marks is None:
        marks = isinstance(template, str) and has_marks(template)
    wanted = [sorted(chat.unlearned & {*chat.replies()}) if unlearned else chat.learned() for chat in chats]
    return (_by_marks if marks else _by_prefixes)(chats, wanted, tokenizer, where)


def _by_marks(
    chats: Sequence[Chat], wanted: list[list[int]], tokenizer: Any, where: Where
) -> tuple[list[str], list[list[Span]]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = [], []
    for number, (chat, turns) in enumerate(zip(chats, wanted, strict=True)):
        try:
            text, marked = render_jinja_template(
                conversations=[chat.turns],
                chat_template=tokenizer.chat_template,
                return_assistant_tokens_mask=True,
                **{**tokenizer.special_tokens_map, **chat.options},
            )
        except Exception as error:  # jinja's, and whatever the template raises
            raise UserError(f"{where(number)}: the chat template refuses it: {first_line(error)}") from None
        texts += text
        found, replies = marked[0], chat.replies()
        if turns != replies:
            if len(found) != len(replies):
                raise UserError(
                    f"{where(number)}: the chat template marks {len(found)} stretches as generated, but there are "
                    f"{len(replies)} turns of the assistant; which of them has weight 0 cannot be told"
                )
            found = [found[replies.index(turn)] for turn in turns]
        spans.append([(start, stop) for start, stop in found if stop > start])
    return texts, spans


def _by_prefixes(
    chats: Sequence[Chat], wanted: list[list[int]], tokenizer: Any, where: Where
) -> tuple[list[str], list[list[Span]]]:
    """Find the text that each turn adds: the difference of the texts with it and up to it, asking for an answer."""
    whole = write(chats, tokenizer, where)
    replies = [(c, n) for c, turns in enumerate(wanted) for n in turns]

    def place(reply: int) -> str:
        return where(replies[reply][0])

    before = write([chats[c].first(n) for c, n in replies], tokenizer, place, ask=True)
    inner = [(c, n) for c, n in replies if n + 1 < len(chats[c].turns)]  # the text up to the last turn is the whole
    cut = write([chats[c].first(n + 1) for c, n in inner], tokenizer, lambda m: where(inner[m][0]))
    after = dict(zip(inner, cut, strict=True))
    ends = _end_tokens(tokenizer)
    spans: list[list[Span]] = [[] for _ in chats]
    for (c, n), start in zip(replies, before, strict=True):
        stop = after.get((c, n), whole[c])
        if not (whole[c].startswith(stop) and stop.startswith(start)):
            raise UserError(
                f"{where(c)}: the chat template writes turn {n + 1} differently once more turns follow, so its tokens "
                "cannot be told apart; give the template generation marks ({% generation %})"
            )
        spans[c].append((len(start), len(start) + _end_of_turn(stop[len(start) :], ends)))
    return whole, spans


def _end_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Texts of what may end a turn: special tokens, and other added ones that look like marks."""
    added = {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
    marks = {text for text in added if _LOOKS_LIKE_A_MARK.fullmatch(text)}
    return tuple(text for text in {*special_tokens(tokenizer).values(), *marks} if text.strip())


def _end_of_turn(added: str, ends: tuple[str, ...]) -> int:
    """Length of a turn up to and with the token that ends it: white space between turns is never generated."""
    bare = added.rstrip()
    return len(bare) if bare.endswith(ends) else len(added)


def write(chats: Sequence[Chat], tokenizer: Any, where: Where, ask: bool = False) -> list[str]:
    """Write a batch of conversations; `ask` ends each with what asks for an answer.

    Raises:
        UserError: the template refuses a conversation.
    """
    texts = [""] * len(chats)
    groups: dict[str, list[int]] = {}
    for n, chat in enumerate(chats):
        groups.setdefault(json.dumps(chat.options, sort_keys=True) if chat.options else "", []).append(n)
    for members in groups.values():
        options: Mapping[str, Any] = {**chats[members[0]].options, "tokenize": False, "add_generation_prompt": ask}
        try:
            written = tokenizer.apply_chat_template([chats[n].turns for n in members], **options)
        except Exception:  # find the one that is refused
            for n in members:
                try:
                    tokenizer.apply_chat_template(chats[n].turns, **options)
                except Exception as error:  # jinja's, and whatever the template raises
                    raise UserError(f"{where(n)}: the chat template refuses it: {first_line(error)}") from None
            raise
        for n, text in zip(members, written, strict=True):
            texts[n] = text
    return texts
