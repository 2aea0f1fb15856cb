"""The one exception for a user's mistake: every command prints its sentence and exits with code 2, without a traceback."""


class UserError(Exception):
    """Input that cannot be used as given. The message is one sentence that names the file, line or field and the mend."""


def reason(error: Exception) -> str:
    """An error's kind and the first line of what it says, for a sentence about it."""
    return ", ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
