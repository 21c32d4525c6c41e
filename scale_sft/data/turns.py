"""Conversations as data write them: turns with role and content, which of them are learned, what the template gets.

Next to its turns a row may have `system` (a text), `tools` (functions as JSON schemas) and `chat_template_kwargs` (an
object); a turn may have `weight` (0 or 1) or `train` (false or true). Other fields of turns are the template's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from scale_sft.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
SWITCHES = ("weight", "train", "training")
"""Fields of a turn that say whether it is learned; no template sees them."""
_FINER_SWITCHES = ("train_detail", "training_detail")
_ALL_SWITCHES = (*SWITCHES, *_FINER_SWITCHES)
_RESERVED = ("conversation", "messages", "tools", "chat_template", "tokenize", "add_generation_prompt",
             "continue_final_message", "return_dict", "return_tensors", "return_assistant_tokens_mask", "padding",
             "truncation", "max_length")  # fmt: skip

Turn = dict[str, Any]
Place = Callable[[], str]
"""Place of a conversation, for messages; asked only if something is wrong."""


@dataclass(frozen=True)
class Chat:
    """A conversation, ready for a chat template."""

    turns: list[Turn]
    unlearned: frozenset[int] = frozenset()
    """Assistant turns that do not count, by number from 0."""
    options: dict[str, Any] = field(default_factory=dict)
    """What the template gets in addition to the turns: `tools`, and the row's own settings."""

    def first(self, turns: int) -> Chat:
        """Return the beginning of it."""
        return replace(self, turns=self.turns[:turns])

    def replies(self) -> list[int]:
        """Numbers of the assistant's turns."""
        return [n for n, turn in enumerate(self.turns) if turn["role"] == "assistant"]

    def learned(self) -> list[int]:
        """Numbers of the turns that count."""
        return [n for n in self.replies() if n not in self.unlearned]


def check_turns(turns: Any, where: Place) -> Chat:
    """Check the turns of one conversation; empty fields are left out. JSON text is taken for what it holds.

    Raises:
        UserError: it is not a list of turns with a known role and a text, or a switch of a turn has no clear meaning.
    """
    turns = _unpacked(turns)
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        got = "nothing" if turns is None else f"{type(turns).__name__} {turns!r:.40}"
        raise UserError(f"{where()}: expected a list of turns, got {got}")
    checked = [_check_turn(turn, number, where) for number, turn in enumerate(turns, start=1)]
    unlearned = frozenset(n for n, turn in enumerate(checked) if not _is_learned(turn, n + 1, where))
    if not all(turn.keys().isdisjoint(SWITCHES) for turn in checked):
        checked = [{key: value for key, value in turn.items() if key not in SWITCHES} for turn in checked]
    return Chat(checked, unlearned)


def _check_turn(turn: Any, number: int, where: Place) -> Turn:
    if not isinstance(turn, Mapping):
        raise UserError(f"{where()}: turn {number} is {type(turn).__name__}, expected role and content")
    turn = {key: value for key, value in turn.items() if value is not None}
    if "from" in turn and "value" in turn and "role" not in turn:
        raise UserError(f"{where()}: turn {number} has from and value; rename them to role and content")
    if turn.get("role") not in ROLES:
        role = repr(turn.get("role"))[:40]
        raise UserError(f"{where()}: turn {number} has the unknown role {role}; expected {', '.join(ROLES)}")
    if "tool_calls" in turn and not turn["tool_calls"]:
        del turn["tool_calls"]
    if not isinstance(turn.get("content"), str) and ("content" in turn or not calls(turn)):
        _refuse_images(turn, number, where)
        kind = type(turn.get("content")).__name__
        raise UserError(f"{where()}: the content of turn {number} ({turn['role']}) is {kind}, expected text")
    return turn


def _refuse_images(turn: Turn, number: int, where: Place) -> None:
    """Refuse a content that is a list of parts with something else than text among them."""
    content = turn.get("content")
    kinds = (
        [str(part.get("type")) for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
    )
    other = next((kind for kind in kinds if kind != "text"), None)
    if other is not None:
        raise UserError(
            f"{where()}: the content of turn {number} ({turn['role']}) has a part of type '{other}', expected text "
            "alone, as training reads no images, videos or sounds. Fix: leave such rows out"
        )


def calls(turn: Mapping[str, Any]) -> bool:
    """Return True if a turn calls a tool, in today's or the earlier form."""
    return bool(turn.get("tool_calls") or turn.get("function_call"))


def _is_learned(turn: Mapping[str, Any], number: int, where: Place) -> bool:
    """Return True unless a turn's switches turn it off. `weight` is OpenAI's, `train` and `training` are Axolotl's."""
    if turn.keys().isdisjoint(_ALL_SWITCHES):
        return True
    named = f"turn {number} ({turn['role']})"
    finer = next((name for name in _FINER_SWITCHES if name in turn), None)
    if finer:
        raise UserError(
            f"{where()}: {named} has {finer}; parts of a turn cannot be chosen. Fix: cut the turn, or remove it"
        )
    weight = turn.get("weight", 1)
    if weight not in (0, 1):
        raise UserError(f"{where()}: the weight of {named} is {weight!r:.40}, expected 0 or 1")
    learned = bool(weight)
    for name in ("train", "training"):
        value = turn.get(name, True)
        if not isinstance(value, bool):
            raise UserError(f"{where()}: {name} of {named} is {value!r:.40}, expected true or false")
        if name in turn and value and turn["role"] != "assistant":
            raise UserError(f"{where()}: {named} has {name} true, but only turns of the assistant are learned")
        learned &= value
    return learned


def with_columns(chat: Chat, system: Any, tools: Any, settings: Any, where: Place) -> Chat:
    """Add what other columns of its row say of a conversation: None, or empty, where they say nothing.

    Raises:
        UserError: a column holds something else than the tool that introduced it expects.
    """
    if not (system or tools or settings):
        return chat
    system, tools, settings = _text_of(system, where), _unpacked(tools), _unpacked(settings)
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError(f"{where()}: field 'tools' is {tools!r:.40}, expected a list of functions as JSON schemas")
    if settings and not isinstance(settings, dict):
        raise UserError(f"{where()}: field 'chat_template_kwargs' is {settings!r:.40}, expected an object")
    reserved = next((key for key in settings or () if key in _RESERVED), None)
    if reserved:
        raise UserError(f"{where()}: chat_template_kwargs: '{reserved}' is not the template's to choose; remove it")
    if system:
        first = chat.turns[0]
        if first["role"] not in ("system", "developer"):
            unlearned = frozenset(n + 1 for n in chat.unlearned)
            chat = Chat([{"role": "system", "content": system}, *chat.turns], unlearned)
        elif first.get("content") != system:
            raise UserError(f"{where()}: field 'system' and the first turn are two system prompts; remove one")
    return replace(chat, options={**({"tools": tools} if tools else {}), **(settings or {})})


def _text_of(system: Any, where: Place) -> str | None:
    if system and not isinstance(system, str):
        raise UserError(f"{where()}: field 'system' is {type(system).__name__}, expected text")
    return system or None


def earlier_turns(history: Any, where: Place) -> list[Turn]:
    """Turn the column `history` of LLaMA-Factory, pairs of a question and its answer, into turns.

    Raises:
        UserError: it is not a list of pairs of texts.
    """
    history = _unpacked(history) or []
    turns: list[Turn] = []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise UserError(f"{where()}: field 'history' holds {pair!r:.40}, expected pairs of question and answer")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _unpacked(value: Any) -> Any:
    """Decode a JSON text, as CSV and some JSON Lines files write lists and objects; return other values unchanged."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
