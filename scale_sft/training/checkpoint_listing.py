"""The listing of `scale-sft checkpoint ls` and `verify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from scale_sft.errors import UserError

from .checkpoint_files import Checkpoint, Damaged, find_checkpoints, inspect, verify

_HEADER = ("step", "MiB", "active entries", "bytes per entry", "saved at", "state")


def checkpoints_in(folder: Path) -> list[Checkpoint]:
    """Find the checkpoints of a run, of a `checkpoints/` folder, or the one that `folder` is; newest first.

    Raises:
        UserError: there is none.
    """
    if folder.name.startswith("step_"):
        return [inspect(folder)]
    inner = folder / "checkpoints"
    found = find_checkpoints(inner if inner.is_dir() else folder)
    if not found:
        raise UserError(f"checkpoint: {folder} holds none, expected a run, its checkpoints/, or a step_... in it")
    return found


def verified(checkpoint: Checkpoint) -> Checkpoint:
    """Read all of a checkpoint; return it with the problem that came up, if any."""
    try:
        return verify(checkpoint.path)
    except Damaged as problem:
        return replace(checkpoint, problem=str(problem))


def table(found: Sequence[Checkpoint], good: str) -> str:
    """Format one line per checkpoint, columns aligned; `good` is the state of those without a problem."""
    rows = [_HEADER]
    for one in found:
        figures = ("?", "?", "?", "?")
        if one.manifest:
            active = one.manifest["active_entries"]
            per_entry = f"{one.bytes / active:.1f}" if active else "?"
            figures = (f"{one.bytes / 2**20:.2f}", f"{active:,}", per_entry, str(one.manifest["saved_at"]))
        rows.append((str(one.step), *figures, one.problem or good))
    widths = [max(len(row[n]) for row in rows) for n in range(len(_HEADER) - 1)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=False)) + f"  {row[-1]}" for row in rows
    )
