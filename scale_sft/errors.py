"""The one kind of error that a user can put right: it is shown as a message, without a traceback."""


class UserError(Exception):
    """Says what is wrong, what was got, what was expected and what to do about it."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
