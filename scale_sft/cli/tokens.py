"""`scale-sft models add-tokens`: a base with new tokens, before training."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("add-tokens")
@click.argument("base")
@click.option("--tokens", required=True, help="Tokens to add, with commas between them: '<|im_start|>,<|im_end|>'.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="New folder for the base.")
@click.option("--pad-to-multiple-of", type=click.IntRange(min=1), help="Make the number of rows a multiple of this.")
@click.option("--chat-template", help="Chat template that uses them: a shipped one (chatml) or a Jinja file.")
@click.option("--revision", help="Branch, tag or commit of a BASE on the hub.")
def add_tokens(
    base: str,
    tokens: str,
    output: Path,
    pad_to_multiple_of: int | None,
    chat_template: str | None,
    revision: str | None,
) -> None:
    r"""Write BASE (a folder, a hub id or demo) with new special tokens and a row of the embeddings for each.

    Train the new rows with --train_embeddings both. The adapter then applies to this base alone: ship the merged model,
    or this base with it. The same command makes the same base, bit for bit.

    \b
    scale-sft models add-tokens demo --tokens '<|im_start|>,<|im_end|>' --chat-template chatml --output bases/chat
    scale-sft train --config new_tokens --base bases/chat
    """
    from scale_sft.data import new_tokens

    names = [token.strip() for token in tokens.split(",")]
    added = new_tokens.add_tokens(
        base,
        names,
        output,
        pad_to_multiple_of=pad_to_multiple_of,
        chat_template=chat_template,
        revision=revision,
    )
    listed = ", ".join(f"{token} = {number}" for token, number in added.ids.items())
    click.echo(f"base: {output}: {listed}; {added.rows_before:,} rows of the embeddings before, {added.rows:,} now")
    click.echo("train the new rows: --train_embeddings both (or input, output)")
