"""Check that a tokenizer fits its model: every token that can reach the embedding must have a row there."""

from __future__ import annotations

from typing import Any

from scale_sft.errors import UserError
from scale_sft.model.empty import text_config

from .examples import Examples


def refuse_misfit(tokenizer: Any, model_config: Any, *sets: Examples | None) -> None:
    """Refuse data that the model cannot look up. Cheap, so it comes before the weights load.

    Tokens that no example uses may be beyond the embedding: some models are published so.

    Raises:
        UserError: an example, or the padding, has a token beyond the rows of the embedding.
    """
    rows = getattr(text_config(model_config), "vocab_size", None)
    if not rows:
        return
    used = [(examples.largest_token(), examples.source) for examples in sets if examples is not None]
    for token, source in [(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else -1, "the padding"), *used]:
        if token >= rows:
            raise UserError(
                f"base: {source} uses the token {tokenizer.convert_ids_to_tokens(token)!r} ({token}), but the model's "
                f"embedding has {rows:,} rows. Fix: use the tokenizer that belongs to the model, or resize the "
                "embedding (model.resize_token_embeddings) and save the model"
            )
