"""The output folder of a run: claimed by one process at a time, filled with files that appear whole."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import shlex
import socket
from pathlib import Path
from typing import IO, Any

from scale_sft.adapters.format import Adapter
from scale_sft.config.loading import load, to_yaml
from scale_sft.config.options import FREE, MAY_CHANGE, Config
from scale_sft.errors import UserError, first_line
from scale_sft.files import write_text
from scale_sft.reporting.metrics_file import METRICS_FILE, read_metrics

NEW_LENGTH = " (a run of another length is a new run: its learning rate and reallocations follow other schedules)"
OWN_FILES = ("config.yaml", METRICS_FILE, "adapter", "best_adapter", "checkpoints", "merged")


class RunFolder:
    """The files of a run. Call `finished`, `refuse_if_taken`, `lock`, `claim`; the lock ends with the process."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.adapter = self.path / "adapter"
        self.best = self.path / "best_adapter"
        self.merged = self.path / "merged"
        self.checkpoints = self.path / "checkpoints"
        self._lock: IO[str] | None = None

    def checkpoints_of(self, resume: str) -> Path:
        """Return the folder of checkpoints that option `resume` names, or the single checkpoint (`step_...`)."""
        if resume == "auto":
            return self.checkpoints
        folder = Path(resume)
        within = folder / "checkpoints"
        return within if not folder.name.startswith("step_") and within.is_dir() else folder

    def is_used(self) -> bool:
        """Tell whether a run has left anything here."""
        return any((self.path / name).exists() for name in OWN_FILES)

    def has_record(self, event: str) -> bool:
        """Tell whether metrics.jsonl holds a record of this kind.

        Raises:
            UserError: the file is damaged.
        """
        return self._last(event) is not None

    def _last(self, event: str) -> dict[str, Any] | None:
        """Return the last record of a kind in metrics.jsonl, if there is one."""
        file = self.path / METRICS_FILE
        try:
            records = read_metrics(file) if file.is_file() else []
        except (OSError, ValueError) as error:
            raise UserError(f"output_dir: {error}") from None
        return next((record for record in reversed(records) if record.get("event") == event), None)

    def finished(self, config: Config) -> str | None:
        """Say how the run that this configuration describes ended here, if it is finished; otherwise return None.

        Schedulers and scripts start a command again until it is done, so this is not an error.
        """
        if config.run.resume != "auto" or (end := self._last("end")) is None or not self.adapter.is_dir():
            return None
        if self._changed(config, FREE) or (config.run.save_merged and not self.merged.is_dir()):
            return None
        return f"finished already at step {end['step']}, adapter in {self.adapter}"

    def refuse_if_taken(self, config: Config) -> None:
        """Refuse a folder that cannot be written, or holds a run that cannot resume with this configuration.

        Raises:
            UserError: says why.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir: {self.path} is a file. Fix: choose a folder")
        existing = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
            why = f"no permission in {existing}" if existing.is_dir() else f"{existing} is a file"
            raise UserError(f"output_dir: {self.path} cannot be written: {why}. Fix: choose another folder")
        present = next((name for name in OWN_FILES if (self.path / name).exists()), None)
        if present is None:
            return
        reason = self._why_taken(config)
        if reason:
            fix = "choose a new folder, or move that one away"
            if reason.endswith(NEW_LENGTH) and self.adapter.is_dir():
                fix = (
                    "train its adapter further in a new run, with --start_from "
                    f"{shlex.quote(str(self.adapter))} --output_dir NEW; or {fix}"
                )
            raise UserError(f"output_dir: {self.path} already holds a run ({present}){reason}. Fix: {fix}")

    def _why_taken(self, config: Config) -> str | None:
        resume = config.run.resume
        if resume == "never":
            return ", and resume is never"
        if resume != "auto" and self.path.resolve() not in (Path(resume).resolve(), *Path(resume).resolve().parents):
            return f", not that of {resume}"
        if self.has_record("end"):
            return f" that is finished{self._why_not_this_one(config)}"
        if self.checkpoints.is_dir():
            return None
        if self.adapter.exists() or self.merged.exists():
            return " without checkpoints"
        if not (self.path / "config.yaml").exists():
            return " without its configuration"
        changed = self._changed(config, MAY_CHANGE)
        return f" that differs in {', '.join(changed)}" if changed else None

    def _why_not_this_one(self, config: Config) -> str:
        """Say what keeps a finished run from being the one that is asked for."""
        changed = self._changed(config, FREE)
        if changed:
            length = NEW_LENGTH * bool({"steps", "epochs"} & {*changed})
            return f" and differs in {', '.join(changed)}{length}"
        if config.run.save_merged and not self.merged.is_dir():
            return f" without a merged model (scale-sft merge {self.adapter} {self.merged} writes it)"
        return ""

    def _changed(self, config: Config, ignored: frozenset[str]) -> list[str]:
        """Name the options that config.yaml has otherwise; none where it is missing."""
        file = self.path / "config.yaml"
        if not file.exists():
            return []
        before, now = (
            {name: value for section in dataclasses.asdict(one).values() for name, value in section.items()}
            for one in (load(file, {}), config)
        )
        return [name for name in now if name not in ignored and before[name] != now[name]]

    def lock(self) -> None:
        """Make the folder this process's own until the process ends.

        Raises:
            UserError: another process has it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"output_dir: {self.path} cannot be written: {first_line(error)}") from None
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
                return  # this file system has no locks
            self._lock.seek(0)
            holder = self._lock.read(200).strip() or "another process"
            raise UserError(
                f"output_dir: {self.path} is in use by {holder}. Fix: wait for it to end, end it, or choose another "
                "folder"
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()

    def claim(self, config: Config) -> None:
        """Write the resolved configuration."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "config.yaml", to_yaml(config))

    def keeps_best(self, config: Config) -> bool:
        """Tell whether to keep the adapter of the lowest held-out loss: pointless with one evaluation at the end."""
        return config.run.keep_best and config.run.eval_every_steps is not None

    def save_adapter(self, adapter: Adapter) -> None:
        """Write the result of the run."""
        adapter.save(self.adapter)
