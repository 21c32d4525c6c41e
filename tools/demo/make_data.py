"""Write the demo's data: `python -m tools.demo.make_data --output DIR`.

train.jsonl and eval.jsonl hold rows `{"prompt", "completion"}`, preferences_train.jsonl and preferences_eval.jsonl rows
`{"prompt", "chosen", "rejected"}`, chat_train.jsonl and chat_eval.jsonl rows `{"messages"}`. No phrase is in both train
and eval. The same seed gives the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tools.demo.tasks import demo_rows

TRAIN_ROWS = 2500
EVAL_ROWS = 256
TRAIN_PAIRS = 600
EVAL_PAIRS = 128
TRAIN_CHATS = 600
EVAL_CHATS = 128


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object per line, UTF-8, on every platform with plain newlines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


def pair_of(row: dict[str, str]) -> dict[str, str]:
    """Make two right answers to an open question; the shorter one is preferred."""
    phrase = row["prompt"].partition(": ")[2].strip()
    return {
        "prompt": f"Write as one word: {phrase}\n",
        "chosen": row["completion"],
        "rejected": phrase.replace(" ", "_"),
    }


def chat_of(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """Make a conversation of one question and its answer."""
    turns = (("user", row["prompt"].rstrip("\n")), ("assistant", row["completion"]))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write the files to.")
@click.option("--seed", type=int, default=0, help="Seed of the phrases.")
def main(output: Path, seed: int) -> None:
    """Write the demo's six files."""
    rows = demo_rows(str(seed), TRAIN_ROWS + EVAL_ROWS)
    output.mkdir(parents=True, exist_ok=True)
    write_jsonl(output / "train.jsonl", rows[:TRAIN_ROWS])
    write_jsonl(output / "eval.jsonl", rows[TRAIN_ROWS:])
    write_jsonl(output / "preferences_train.jsonl", [pair_of(row) for row in rows[:TRAIN_PAIRS]])
    write_jsonl(output / "preferences_eval.jsonl", [pair_of(row) for row in rows[TRAIN_ROWS:][:EVAL_PAIRS]])
    write_jsonl(output / "chat_train.jsonl", [chat_of(row) for row in rows[:TRAIN_CHATS]])
    write_jsonl(output / "chat_eval.jsonl", [chat_of(row) for row in rows[TRAIN_ROWS:][:EVAL_CHATS]])
    click.echo(f"wrote {TRAIN_ROWS} and {EVAL_ROWS} rows, {TRAIN_PAIRS} and {EVAL_PAIRS} pairs to {output}")


if __name__ == "__main__":
    main()
