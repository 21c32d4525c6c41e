"""The token that ends an answer, as the data teach it: often one that the base does not know as an end.

A chat template closes a turn with a token of its own (`<|im_end|>`, `<|eot_id|>`). A base model's configuration names
another one, so without this module generation would run past the end of the turn.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scale_sft.files import write_json
from scale_sft.model.loss import IGNORED

from .examples import Examples

EXAMINED = 256
"""How many examples are enough to know how turns end."""

INFO_KEY = "end_token_id"
"""Name of the end token in an adapter's information."""

GENERATION_CONFIG = "generation_config.json"


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Map ids to texts of all special tokens.

    `special_tokens_map` alone would miss Llama 3's `<|eot_id|>`, which its tokenizer only has as an added token.
    """
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return named | {token_id: token.content for token_id, token in _added(tokenizer).items() if token.special}


def _added(tokenizer: Any) -> Mapping[int, Any]:
    return getattr(tokenizer, "added_tokens_decoder", {})


def taught_end(examples: Examples, tokenizer: Any, members: Iterable[int] | None = None) -> int | None:
    """Find the special or added token that ends most of the spans that count; None where ordinary text ends them.

    Most, not all, because examples that are cut at `max_length` end anywhere.

    Args:
        members: the examples to look at; by default the first EXAMINED.
    """
    ends: Counter[int] = Counter()
    for n in range(min(len(examples), EXAMINED)) if members is None else members:
        ids, labels = examples.tokens(n)
        counts = np.append(labels != IGNORED, False)
        ends.update(ids[np.flatnonzero(counts[:-1] & ~counts[1:])].tolist())
    if not ends:
        return None
    special, (token, times) = special_tokens(tokenizer), ends.most_common(1)[0]
    return token if 2 * times > ends.total() and (token in special or token in _added(tokenizer)) else None


def ids_of(eos_token_id: int | list[int] | None) -> list[int]:
    """List the end tokens of a configuration, which names none, one or several."""
    if eos_token_id is None:
        return []
    return list(eos_token_id) if isinstance(eos_token_id, list) else [eos_token_id]


def with_end(eos_token_id: int | list[int] | None, token: int | None) -> int | list[int] | None:
    """Add the taught end token to a configuration's, in the form that transformers expects."""
    known = ids_of(eos_token_id)
    return eos_token_id if token is None or token in known else [*known, token]


def write_taught_end(folder: Path, info: Mapping[str, Any]) -> None:
    """Name the end token of an adapter in the generation configuration of a merged model; others stay.

    Args:
        folder: a transformers folder with its config.json.
        info: of the adapter; nothing is written if it names no end token (an adapter of an earlier version).
    """
    if info.get(INFO_KEY) is None:
        return
    path = folder / GENERATION_CONFIG
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
    else:  # what transformers would take from the model's configuration, which a file replaces
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        settings = {name: config[name] for name in names if config.get(name) is not None}
    ends = with_end(settings.get("eos_token_id"), info[INFO_KEY])
    if ends != settings.get("eos_token_id"):
        write_json(path, settings | {"eos_token_id": ends})
