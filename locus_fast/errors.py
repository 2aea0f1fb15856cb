"""The one exception for a user's mistake: every command prints its sentence and exits with code 2, without a
traceback."""

SHOWN = 200  # characters of a value that a sentence repeats


class UserError(Exception):
    """Input that cannot be used as given. The message is one sentence that names the file, line or field and
    what to do."""


def reason(error: Exception) -> str:
    """An error's kind and the first line of what it says, for a sentence about it."""
    return ", ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def short(value: object) -> str:
    """A value as a sentence repeats it, cut if it is long."""
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 20]}... ({len(text):,} characters)"
