"""The adapter that a run starts from: its own folder, or what a checkpoint of the run recorded of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scale_sft.adapters.start import Start
from scale_sft.config.options import Config

from .checkpoint_files import STATE, Damaged, find_checkpoints, read_json
from .run_folder import RunFolder

START_DIGEST = "start_from (digest of its indices and deltas)"
TARGETS = "target weights"
"""Keys of a checkpoint's identity."""


def start_of(config: Config) -> Start | None:
    """Read the adapter of option start_from; None: the run starts from the base.

    A run that has checkpoints resumes without the folder: what counts of it is recorded in each of them.

    Raises:
        UserError: the adapter is missing or damaged.
    """
    folder = config.sparse.start_from
    if folder is None:
        return None
    if config.run.resume != "never" and not Path(folder).exists():
        recorded = _recorded(folder, RunFolder(config.run.output_dir).checkpoints_of(config.run.resume))
        if recorded:
            return recorded
    return Start.read(folder, config.sparse.delta_dtype)


def recorded_counts(config: Config) -> dict[str, int] | None:
    """Return the active entries of each weight in the checkpoints of a run whose budget is global.

    Its first choice has decided them. None: the budget is another one, or there is no readable checkpoint.
    """
    if config.sparse.budget != "global" or config.run.resume == "never":
        return None
    for identity in _identities(RunFolder(config.run.output_dir).checkpoints_of(config.run.resume)):
        try:
            return {name: int(active) for name, (_, _, active) in identity[TARGETS].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
    return None


def _identities(checkpoints: Path) -> Iterator[dict[str, Any]]:
    """Yield what readable checkpoints recorded of their run, newest first; nothing of it is checked."""
    single = checkpoints.name.startswith("step_")
    for path in [checkpoints] if single else [found.path for found in find_checkpoints(checkpoints)]:
        try:
            yield read_json(path / STATE)["identity"]
        except (Damaged, OSError, KeyError, TypeError, ValueError, AttributeError):
            continue


def _recorded(folder: str, checkpoints: Path) -> Start | None:
    """Return what the newest readable checkpoint recorded; that it is sound is checked when it is loaded."""
    for identity in _identities(checkpoints):
        try:
            targets = {name: tuple(map(int, sizes)) for name, sizes in identity[TARGETS].items()}
            shapes = {name: (rows, columns) for name, (rows, columns, _) in targets.items()}
            counts = {name: active for name, (_, _, active) in targets.items()}
            digest = identity[START_DIGEST]
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
        if isinstance(digest, str):
            return Start(folder, shapes, counts, digest, None)
    return None
