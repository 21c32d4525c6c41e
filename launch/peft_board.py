"""PEFT's MetaMathQA comparison with sparse deltas: data, training, export to SHiRA's format, accuracy and forgetting.

    python launch/peft_board.py                                   needs a GPU of 48 GB and the hub
    python launch/peft_board.py --learning_rate 3e-3              any option of the trainer wins over the recipe
    python launch/peft_board.py --base FOLDER --train A.jsonl --test B.jsonl --text C.jsonl    without the hub

A file has the columns of its hub data set: query and response (MetaMathQA), question and answer (GSM8K), text.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

RECIPE = "metamathqa_llama32_3b"
TEMPLATE = "Question: {} Think step by step.\nAnswer:"
MOST_CHARACTERS = 1300  # of a query and its response with a space between: the comparison leaves longer ones out
TEXTS = 100
# The last number after "#### " (GSM8K) or "The answer is" (MetaMathQA).
ANSWER = r"(?:####|[Tt]he answer is:?)\s*\$?(-?[\d.,]*\d)"


def rows_of(source: str, split: str, subset: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a .jsonl file, or of a data set of the hub."""
    if Path(source).is_file():
        with open(source, encoding="utf-8") as file:
            yield from map(json.loads, file)
        return
    from datasets import load_dataset

    yield from load_dataset(source, subset, split=split, streaming=True)


def prompts(pairs: Iterable[tuple[str, str]]) -> Iterator[dict[str, str]]:
    """Put questions into the comparison's template."""
    return ({"prompt": TEMPLATE.format(question), "completion": answer} for question, answer in pairs)


def write(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    """Write rows as JSON lines, unless an earlier run has; returns the path."""
    if not path.is_file():
        from scale_sft.files import write_text

        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def prepare(folder: Path, train: str, test: str, text: str) -> dict[str, str]:
    """Write the data of all parts to `folder`; returns their paths by name.

    Raises:
        UserError: an earlier run has made them from other sources.
    """
    from scale_sft.errors import UserError
    from scale_sft.files import write_text

    folder.mkdir(parents=True, exist_ok=True)
    sources, made_of = {"train": train, "test": test, "text": text}, folder / "sources.json"
    before = json.loads(made_of.read_text(encoding="utf-8")) if made_of.is_file() else sources
    if other := next((name for name in sources if before[name] != sources[name]), None):
        raise UserError(
            f"--{other}: got {sources[other]}, but {folder} was made of {before[other]}. Fix: another --output_dir"
        )
    write_text(made_of, json.dumps(sources) + "\n")
    questions = ((row["query"], row["response"]) for row in rows_of(train, "train"))
    short = (pair for pair in questions if len(" ".join(pair)) <= MOST_CHARACTERS)
    exam = ((row["question"], row["answer"]) for row in rows_of(test, "test", "main"))
    texts = ({"text": row["text"]} for row, _ in zip(rows_of(text, "train"), range(TEXTS), strict=False))
    return {
        "train": write(folder / "train.jsonl", prompts(short)),
        "test": write(folder / "test.jsonl", prompts(exam)),
        "text": write(folder / "text.jsonl", texts),
    }


@dataclass(frozen=True)
class Exam:
    """How a model is measured."""

    data: dict[str, str]  # paths, see `prepare`
    questions: int
    answer_tokens: int
    text_tokens: int  # of a general text


def measured(base: str, adapter: Path | None, exam: Exam) -> dict[str, float]:
    """Measure accuracy on the exam, and the loss per token on general text, of the base or with an adapter."""
    from scale_sft.config.loading import load_sections
    from scale_sft.evaluation.evaluate_model import evaluate_model, model_section

    def held_out(**options: Any) -> dict[str, Any]:
        sections = load_sections(None, {"base": base, **options})
        model = model_section(sections["model"], adapter, base_given=True)
        found = evaluate_model(model, sections["data"], adapter, tasks=None, limit=None, batch_size=16, output=None)
        return found["held_out"] if found else {}

    answers = held_out(
        eval_data=exam.data["test"],
        max_eval_examples=exam.questions,
        exact_match_examples=exam.questions,
        answer_pattern=ANSWER,
        max_new_tokens=exam.answer_tokens,
    )
    general = held_out(eval_data=exam.data["text"], max_length=exam.text_tokens, loss_on="all")
    return {"accuracy": answers["exact_match"], "text_loss": general["loss"]}


@click.command(context_settings={"ignore_unknown_options": True, "max_content_width": 110})
@click.option("--base", default="meta-llama/Llama-3.2-3B", show_default=True, help="Base: hub id or folder.")
@click.option("--train", default="meta-math/MetaMathQA", show_default=True, help="Training data: hub id or .jsonl.")
@click.option("--test", default="openai/gsm8k", show_default=True, help="Exam: hub id or .jsonl.")
@click.option("--text", default="HuggingFaceFW/finewiki", show_default=True, help="General text: hub id or .jsonl.")
@click.option("--test_examples", default=1319, show_default=True, help="Questions of the exam to answer.")
@click.option("--answer_tokens", default=512, show_default=True, help="Longest answer in tokens.")
@click.option("--text_tokens", default=768, show_default=True, help="Tokens of each general text.")
@click.option("--output_dir", default="runs/metamathqa", type=click.Path(path_type=Path), show_default=True)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(
    base: str,
    train: str,
    test: str,
    text: str,
    test_examples: int,
    answer_tokens: int,
    text_tokens: int,
    output_dir: Path,
    options: tuple[str, ...],
) -> None:
    """Train on MetaMathQA with the recipe metamathqa_llama32_3b, export the adapter, measure accuracy and forgetting.

    OPTIONS are those of the trainer, such as --learning_rate 3e-3 --rank_equivalent 64. Run again it resumes.
    """
    import scale_sft
    from scale_sft.adapters.export import export
    from scale_sft.errors import UserError

    try:
        given = dict(zip((name.removeprefix("--") for name in options[::2]), options[1::2], strict=True))
    except ValueError:
        raise click.UsageError(f"got {' '.join(options)}, expected --option VALUE pairs") from None
    try:
        data = prepare(output_dir / "data", train, test, text)
        run = scale_sft.train(RECIPE, base=base, train_data=data["train"], output_dir=str(output_dir), **given)
        shira = output_dir / "shira"
        if not shira.is_dir():
            export(run.adapter, "shira", shira)
        exam = Exam(data, test_examples, answer_tokens, text_tokens)
        before, after = measured(base, None, exam), measured(base, run.adapter, exam)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    result = {
        "accuracy": after["accuracy"],
        "accuracy of the base": before["accuracy"],
        "forgetting": after["text_loss"] - before["text_loss"],
        "text loss of the base": before["text_loss"],
        "SHiRA adapter": str(shira),
        "bytes": sum(file.stat().st_size for file in shira.glob("*.safetensors")),
    }
    (output_dir / "board.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    sys.exit(main())
