"""The folder of a run: claimed by one process at a time, filled with files that appear whole."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from scale_sft.adapters.format import Adapter
from scale_sft.config.loading import load, to_yaml
from scale_sft.config.options import MAY_CHANGE, Config
from scale_sft.errors import UserError
from scale_sft.files import write_text
from scale_sft.reporting.metrics_file import METRICS_FILE, read_metrics

OWN_FILES = ("config.yaml", METRICS_FILE, "adapter", "best_adapter", "checkpoints", "merged")


class RunFolder:
    """Paths of a run's files. `refuse_if_taken`, then `lock`, then `claim`; the lock ends with the process."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.adapter = self.path / "adapter"
        self.best = self.path / "best_adapter"
        self.merged = self.path / "merged"
        self.checkpoints = self.path / "checkpoints"
        self._lock: IO[str] | None = None

    def is_used(self) -> bool:
        """Whether a run has left anything here."""
        return any((self.path / name).exists() for name in OWN_FILES)

    def has_record(self, event: str) -> bool:
        """Whether metrics.jsonl holds a record of this kind.

        Raises:
            UserError: the file is damaged.
        """
        file = self.path / METRICS_FILE
        try:
            return file.is_file() and any(record.get("event") == event for record in read_metrics(file))
        except (OSError, ValueError) as error:
            raise UserError(f"output_dir: {error}") from None

    def refuse_if_taken(self, config: Config) -> None:
        """Raises UserError if the folder holds a run that cannot go on with this configuration."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir: {self.path} is a file; choose a folder")
        present = next((name for name in OWN_FILES if (self.path / name).exists()), None)
        if present is None:
            return
        reason = self._why_taken(config)
        if reason:
            raise UserError(
                f"output_dir: {self.path} already holds a run ({present}){reason}; choose a new folder, or move that "
                "one away"
            )

    def _why_taken(self, config: Config) -> str | None:
        resume = config.run.resume
        if resume == "never":
            return ", and resume is never"
        if resume != "auto" and self.path.resolve() not in (Path(resume).resolve(), *Path(resume).resolve().parents):
            return f", not that of {resume}"
        if self.has_record("end"):
            return " that is finished"
        if self.checkpoints.is_dir():
            return None
        if self.adapter.exists() or self.merged.exists():
            return " without checkpoints"
        return self._other_options(config)

    def _other_options(self, config: Config) -> str | None:
        """Why a run that never saved a checkpoint was another one: what its config.yaml has otherwise."""
        file = self.path / "config.yaml"
        if not file.exists():
            return " without its configuration"
        before, now = (
            {name: value for section in dataclasses.asdict(one).values() for name, value in section.items()}
            for one in (load(file, {}), config)
        )
        differing = [name for name in now if name not in MAY_CHANGE and before[name] != now[name]]
        return f" with another {', '.join(differing)}" if differing else None

    def lock(self) -> None:
        """Make the folder this process's own, until it ends in whatever way.

        Raises:
            UserError: another process has it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("a+", encoding="utf-8")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
                return  # this file system has no locks
            self._lock.seek(0)
            holder = self._lock.read(200).strip() or "another process"
            raise UserError(
                f"output_dir: {self.path} is in use by {holder}; wait for it to end, end it, or choose another folder"
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()

    def claim(self, config: Config) -> None:
        """Write the resolved configuration."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "config.yaml", to_yaml(config))

    def keeps_best(self, config: Config) -> bool:
        """Whether the adapter of the lowest held-out loss is kept: with one evaluation at the end there is no choice."""
        return config.run.keep_best and config.run.eval_every_steps is not None

    def save_adapter(self, adapter: Adapter) -> None:
        adapter.save(self.adapter)
