"""The one kind of error that a user can put right: it is shown as a message, without a traceback."""


class UserError(Exception):
    """Says what is wrong, what was got, what was expected and what to do about it."""
