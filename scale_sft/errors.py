"""The one kind of error that a user can put right: it is shown as a message, without a traceback."""

from __future__ import annotations

import errno


class UserError(Exception):
    """Says what is wrong, what was got, what was expected and what to do about it."""


def explain(error: OSError) -> str:
    """Describe a failed system call in one line: the file and the reason, without Python's error number."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: {error}"
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    files = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return f"{' -> '.join(files)}: {reason}" if files else reason


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
