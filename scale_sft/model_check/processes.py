"""Processes that answer requests, and can be replaced when they die or take too long."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_METHOD = "fork" if sys.platform == "linux" else "spawn"
"""A forked process starts with all that this one has imported: in 0.1 s instead of 10."""


class Died(Exception):
    """A process has ended instead of answering."""


class Child:
    """A silent process of `serve(pipe, *arguments)`, which reads requests from the pipe and answers each."""

    def __init__(self, serve: Callable[..., None], *arguments: Any):
        context: Any = multiprocessing.get_context(_METHOD)
        self._pipe, theirs = context.Pipe()
        self._log = Path(tempfile.mkstemp(prefix="scale-sft-models-", suffix=".log")[1])
        self._process = context.Process(target=_begin, args=(self._log, serve, theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()
        self.answered = True

    def send(self, request: Any) -> None:
        """Ask for something."""
        self._pipe.send(request)
        self.answered = False

    def answer(self, seconds: float, late: Any = None) -> Any:
        """Wait for the answer; returns `late` if it does not come in time.

        Raises:
            Died: the process has ended.
        """
        if not self._pipe.poll(seconds):
            return late
        try:
            found = self._pipe.recv()
        except EOFError:
            raise Died(_last_words(self._log)) from None
        self.answered = True
        return found

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()
        self._log.unlink(missing_ok=True)


def prepare() -> None:
    """Import what every check needs, quietly, and on the CPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.update({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"})
    import warnings

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


def _begin(log: Path, serve: Callable[..., None], pipe: Any, *arguments: Any) -> None:
    """Write all output to the log, leave Ctrl-C to the parent, and serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    handle = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if _METHOD == "spawn":
        prepare()
    with suppress(EOFError):  # the parent has gone
        serve(pipe, *arguments)


def _last_words(log: Path) -> str:
    """Return the last line of a log."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing was said")
