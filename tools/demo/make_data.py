"""Write the demo's fine-tuning data: `python -m tools.demo.make_data --output DIR` -> train.jsonl, eval.jsonl.

Each line is a row `{"prompt", "completion"}`. No prompt is in both files. The same seed gives the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from tools.demo.tasks import demo_rows

TRAIN_ROWS = 2500
EVAL_ROWS = 256


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    """One JSON object per line, UTF-8, on every platform with plain newlines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write the two files to.")
@click.option("--seed", type=int, default=0, help="Seed of the phrases.")
def main(output: Path, seed: int) -> None:
    """Write train.jsonl and eval.jsonl of the demo."""
    rows = demo_rows(str(seed), TRAIN_ROWS + EVAL_ROWS)
    output.mkdir(parents=True, exist_ok=True)
    write_jsonl(output / "train.jsonl", rows[:TRAIN_ROWS])
    write_jsonl(output / "eval.jsonl", rows[TRAIN_ROWS:])
    click.echo(f"wrote {TRAIN_ROWS} and {EVAL_ROWS} rows to {output}")


if __name__ == "__main__":
    main()
