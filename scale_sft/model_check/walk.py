"""A walk through types of models: one process checks them one after the other, and a pair of ranks trains them too."""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from .findings import FAILED, RANKS, REFUSED, TRAINS, Findings, code_version
from .processes import Child, Died, prepare
from .ranks import Pair
from .tiny import tiny_config, tiny_like


class Walk:
    """Checks models one after the other. Use it in a `with` block: its processes end with it.

    Args:
        seconds: time for one model, and again for its ranks; a check that takes longer counts as failed.
        ranks: also train on two ranks, where DeepSpeed is there (Linux).
    """

    def __init__(self, *, seconds: float = 120, ranks: bool = True):
        self.seconds, self.ranks = seconds, ranks and sys.platform == "linux"
        self._worker: Child | None = None
        self._pair = Pair()

    def __enter__(self) -> Walk:
        prepare()
        return self

    def __exit__(self, *what: object) -> None:
        self._drop_worker()
        self._pair.stop()

    def check(self, model_type: str, like: Any = None) -> Findings:
        """Check one type; `like`: a configuration whose switches the tiny model takes."""
        with tempfile.TemporaryDirectory(prefix="scale-sft-models-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            found = self._alone(model_type, like, folder)
            if self.ranks and found.trains:
                options = {"allow_randomness": True} if found.cells[TRAINS] != "yes" else {}
                try:
                    found.cells[RANKS], remark = self._pair.check(folder, options, self.seconds)
                except Died as death:
                    self._pair.stop()
                    found.cells[RANKS], remark = f"{FAILED}: a rank died: {death}", ""
                found.remark += f"{RANKS}: {remark} " if remark and found.cells[RANKS] == REFUSED else ""
        return found

    def _alone(self, model_type: str, like: Any, folder: Path) -> Findings:
        if self._worker is None:
            self._worker = Child(_serve)
        self._worker.send((model_type, like, folder))
        try:
            found = self._worker.answer(self.seconds)
            trouble = f"took more than {self.seconds} s"
        except Died as death:
            found, trouble = None, f"the process died: {death}"
        if found is None:
            self._drop_worker()
            return Findings(model_type, {TRAINS: f"{FAILED}: {trouble}"}, code=code_version())
        return found

    def _drop_worker(self) -> None:
        if self._worker is not None:
            self._worker.stop()
        self._worker = None


def _serve(pipe: Any) -> None:
    """Check what the pipe names."""
    from .checks import Checker

    while True:
        model_type, like, folder = pipe.recv()
        make = partial(tiny_config, model_type) if like is None else partial(tiny_like, like)
        pipe.send(Checker(model_type, folder, make).run())
