"""Check model types and write the table of docs/models.md: `python -m tools.models_check [TYPE ...] [--write]`."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import click

from .check import Checker, Findings, as_row
from .page import page
from .tiny import byte_tokenizer
from .tiny import types as every_type

FINDINGS = Path(__file__).with_name("findings.jsonl")
PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@click.command()
@click.argument("types", nargs=-1)
@click.option("--write", is_flag=True, help="Keep the findings, and write docs/models.md from all that are kept.")
@click.option("--seconds", default=120, show_default=True, help="Time for one type.")
def main(types: tuple[str, ...], write: bool, seconds: int) -> None:
    """Check TYPES (default: all that transformers has), one after the other."""
    prepare()
    worker, findings = Worker(), []
    for model_type in types or every_type():
        findings.append(worker.check(model_type, seconds))
        click.echo(line(findings[-1]))
        sys.stdout.flush()
        if write:
            keep(findings[-1])
    worker.stop()
    failed = [found for found in findings if found.failures]
    click.echo(f"{len(findings)} types, {len(failed)} with failures: {', '.join(one.model_type for one in failed)}")
    sys.exit(bool(failed))


def keep(found: Findings) -> None:
    """Replace what was found for a type before, and write the page again."""
    lines = FINDINGS.read_text(encoding="utf-8").splitlines() if FINDINGS.is_file() else []
    kept = {row["model_type"]: Findings(**row) for row in map(json.loads, lines)} | {found.model_type: found}
    ordered = [kept[name] for name in sorted(kept)]
    FINDINGS.write_text("".join(json.dumps(as_row(one)) + "\n" for one in ordered), encoding="utf-8")
    PAGE.write_text(page(ordered), encoding="utf-8")


def prepare() -> None:
    """Import what every check needs, so that its process starts with it."""
    warnings.filterwarnings("ignore")
    import bitsandbytes  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, GenerationMixin, LlamaForCausalLM, logging  # noqa: F401

    import scale_sft.adapters.merge
    import scale_sft.distributed.cluster
    import scale_sft.train
    import scale_sft.training.assemble
    import scale_sft.training.checkpoints
    import scale_sft.training.lifecycle
    import scale_sft.training.result  # noqa: F401

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


class Worker:
    """A process that checks types one after the other; one that dies or takes too long is replaced."""

    def __init__(self) -> None:
        self._process: Any = None
        self._pipe: Any = None

    def check(self, model_type: str, seconds: int) -> Findings:
        """Check one type."""
        if self._process is None:
            context = multiprocessing.get_context("fork")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        self._pipe.send(model_type)
        try:
            if self._pipe.poll(seconds):
                return self._pipe.recv()
            trouble = f"took more than {seconds} s"
        except EOFError:
            trouble = "the process died"
        self.stop()
        return Findings(model_type, {"trains": f"FAILED: {trouble}"})

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = None


def _serve(pipe: Any) -> None:
    """Check what the pipe names, without any output."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    while True:
        model_type = pipe.recv()
        with tempfile.TemporaryDirectory(prefix="scale-sft-models-") as folder:
            pipe.send(Checker(model_type, Path(folder), byte_tokenizer()).run())


def line(found: Findings) -> str:
    """Write findings in one line."""
    cells = "  ".join(f"{name}: {cell}" for name, cell in found.cells.items())
    return f"{found.model_type:<24} {found.seconds:5.1f} s  {cells}  {found.remark}"


if __name__ == "__main__":
    main()
