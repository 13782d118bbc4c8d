"""Handling of errors when gputune tries a faster backend.

After an error, the next slower backend trains instead. The plan, a warning or a note names the
error. An error of the user's own module stays visible, because the backend that trains in the end
raises the error again.
"""

import os

STRICT = "GPUTUNE_STRICT_BACKENDS"
"""The environment variable that makes an error of a faster backend end the search, with its
traceback.

This variable is for tests and bug reports.
"""


def is_strict() -> bool:
    """Return True if an error of a faster backend must end the search, for tests and bug
    reports."""
    return os.environ.get(STRICT, "") not in ("", "0")


def words_unless_strict(error: Exception) -> str:
    """Return the type and the first line of an error that a faster backend raised.

    If ``is_strict()``, raises the error again instead.
    """
    if is_strict():
        raise error
    lines = str(error).strip().splitlines()
    name = type(error).__name__
    return f"{name}: {lines[0].rstrip('.')}" if lines else name
