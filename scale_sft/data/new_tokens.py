"""A base with new tokens: its tokenizer knows them, and its embeddings have rows for them.

Deltas never change a weight's shape, so the rows are added before training and belong to the base: an adapter that was
trained on them applies to this base alone. The rows start as the mean of the old ones, so the same command always makes
the same base, bit for bit.
Shapes: V rows of an embedding, H hidden size.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_sft.config.options import ModelConfig
from scale_sft.errors import UserError, first_line
from scale_sft.files import new_folder, write_json
from scale_sft.model.empty import model_class, text_config
from scale_sft.model.loading import base_location, load_model_config, load_tokenizer, silence_progress_bars

from .chat import use_template

RECORD_FILE = "new_tokens.json"
"""Says in the folder of such a base what it was made from, and how."""


@dataclass(frozen=True)
class NewTokens:
    """What was added to a base."""

    ids: dict[str, int]  # by token
    rows_before: int  # V
    rows: int


def add_tokens(
    base: str,
    tokens: Sequence[str],
    output: str | Path,
    *,
    pad_to_multiple_of: int | None = None,
    chat_template: str | None = None,
    revision: str | None = None,
) -> NewTokens:
    """Write a base whose tokenizer has more special tokens, and whose embeddings have a row for each.

    Rows that the base has to spare are used first. Every new row, of the embedding and of the output layer, is the mean
    of the rows of the old tokens, rounded once.

    Args:
        base: folder, hub id, or demo.
        tokens: to add; none that the tokenizer has already.
        output: a new folder, or an empty one.
        pad_to_multiple_of: make V a multiple of this.
        chat_template: name of a shipped one, or a Jinja file, for the new tokenizer; None: the base's own.
        revision: of a base on the hub.

    Raises:
        UserError: a token is there already or given twice, the base is quantised or does not load, or `output` is not
            empty. Nothing is left behind.
    """
    config = ModelConfig(base=base, revision=revision)
    model_config = load_model_config(config)
    if getattr(model_config, "quantization_config", None) is not None:
        raise UserError(
            f"base: got '{base}', which is quantised, expected one that is not. Fix: give the base that it was made "
            "from; it can be quantised while it is loaded"
        )
    tokenizer = use_template(load_tokenizer(config), chat_template)
    before = len(tokenizer)
    _refuse_known(tokenizer, tokens)
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in tokens}
    with new_folder(Path(output).expanduser(), "add-tokens") as work:
        model = _load(config, model_config)
        rows_before = model.get_input_embeddings().weight.shape[0]
        rows = max(rows_before, max(ids.values()) + 1)
        if pad_to_multiple_of:
            rows = -(-rows // pad_to_multiple_of) * pad_to_multiple_of
        known = torch.arange(min(before, rows_before))
        if rows > rows_before:
            model.resize_token_embeddings(rows, mean_resizing=False)
        fresh = torch.tensor(sorted({*ids.values(), *range(rows_before, rows)}))
        _start_as_mean(model, known, fresh)
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        record = {"base": base, "revision": revision, "tokens": list(tokens), "pad_to_multiple_of": pad_to_multiple_of}
        write_json(work / RECORD_FILE, {**record, "rows_before": rows_before, "rows": rows})
    return NewTokens(ids, rows_before, rows)


def command_of(base: Path) -> str | None:
    """Write the command that `add_tokens` made a base with, but for its template; None for other bases."""
    try:
        made = json.loads((base / RECORD_FILE).read_text(encoding="utf-8"))
        words = [made["base"], "--tokens", ",".join(made["tokens"])]
        words += ["--revision", made["revision"]] if made["revision"] else []
        words += ["--pad-to-multiple-of", str(made["pad_to_multiple_of"])] if made["pad_to_multiple_of"] else []
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return f"scale-sft models add-tokens {shlex.join(words)} --output BASE"


def _refuse_known(tokenizer: Any, tokens: Sequence[str]) -> None:
    vocabulary = tokenizer.get_vocab()
    twice = next((token for token in tokens if tokens.count(token) > 1), None)
    known = next((token for token in tokens if token in vocabulary), None)
    if known is not None:
        raise UserError(f"tokens: got {known!r}, which the tokenizer has ({vocabulary[known]}). Fix: leave it out")
    if twice is not None or not tokens or not all(tokens):
        got = f"{twice!r} twice" if twice else "an empty token" if tokens else "none"
        raise UserError(f"tokens: got {got}, expected different tokens. Fix: --tokens '<|im_start|>,<|im_end|>'")


def _load(config: ModelConfig, model_config: Any) -> Any:
    """Load the base whole, in the dtype that it is stored in."""
    silence_progress_bars()
    location = base_location(config.base)
    try:
        model: Any = model_class(model_config).from_pretrained(
            location, revision=config.revision, dtype="auto", use_safetensors=True
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"base: '{config.base}' does not load: {first_line(error)}") from None
    if not hasattr(text_config(model.config), "vocab_size"):
        raise UserError(f"base: got {type(model).__name__}, expected a model whose configuration has a vocab_size")
    return model


@torch.no_grad()
def _start_as_mean(model: Any, known: Tensor, fresh: Tensor) -> None:
    """Set the `fresh` rows of embedding and output layer to the mean of their `known` rows, in fp32, rounded once."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    tensors = [getattr(end, leaf, None) for end in ends for leaf in ("weight", "bias")]
    for tensor in {id(tensor): tensor for tensor in tensors if tensor is not None}.values():
        tensor[fresh] = tensor[known].float().mean(0).to(tensor.dtype)
