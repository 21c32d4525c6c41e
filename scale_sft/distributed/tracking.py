"""Experiment trackers, through Accelerate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from scale_sft.config.spelling import unknown
from scale_sft.errors import UserError, first_line

Log: TypeAlias = Callable[[dict[str, "float | str"], int], None]
"""Takes values by name, and the step that they belong to."""


def refuse_unknown_tracker(name: str | None) -> None:
    """Refuse a tracker that Accelerate does not know or that is not installed: it would leave the run untracked.

    Raises:
        UserError: names the nearest tracker, or the package to install.
    """
    if name is None:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name == "all":
        return
    if name not in LOGGER_TYPE_TO_CLASS:
        raise UserError(f"tracker: {unknown(repr(name), name, sorted(LOGGER_TYPE_TO_CLASS))}")
    if name not in [str(tracker) for tracker in get_available_trackers()]:
        raise UserError(f"tracker: got {name!r}, which is not installed. Fix: pip install {name}, or leave tracker out")


def open_tracker(accelerator: Any, name: str, settings: Mapping[str, Any]) -> Log | None:
    """Start the trackers that an accelerator was made with; None where there are none. For the main rank.

    Args:
        accelerator: Accelerate's.
        name: of the project.
        settings: hyper-parameters, shown with the run.

    Raises:
        UserError: a tracker does not start.
    """
    if not accelerator.log_with:
        return None
    flat = {key: value if isinstance(value, (int, float, str, bool)) else str(value) for key, value in settings.items()}
    boards = [kind for kind in accelerator.log_with if str(kind) == "tensorboard"]
    # TensorBoard would show hyper-parameters as runs of their own: they go into the one run below
    try:
        accelerator.init_trackers(name, config=None if boards == accelerator.log_with else flat)
    except Exception as error:  # no login, no network, no disk: each tracker has errors of its own
        kinds = ", ".join(map(str, accelerator.log_with))
        raise UserError(
            f"tracker: {kinds} does not start: {first_line(error)}. Fix that, or leave tracker out"
        ) from error
    for board in (tracker for tracker in accelerator.trackers if tracker.name == "tensorboard"):
        _write_settings(board.tracker, flat)
    return lambda values, step: accelerator.log(values, step=step)


def _write_settings(writer: Any, settings: Mapping[str, Any]) -> None:
    """Write hyper-parameters into the run that a TensorBoard writer writes; its own method would begin another."""
    from torch.utils.tensorboard.summary import hparams

    for summary in hparams(dict(settings), {}):
        writer.file_writer.add_summary(summary)
