"""Handling of errors in a faster backend that gputune tries.

The next backend trains instead. The plan, a warning or a note names the error. This does not hide
an error of the user's own module, because the backend that trains in the end raises it again.
"""

import os

STRICT = "GPUTUNE_STRICT_BACKENDS"
"""The environment variable that makes an error of a tried backend end the search, with its
traceback.

It is for tests and bug reports.
"""


def is_strict() -> bool:
    """Return whether an error of a backend that gputune tries ends the search."""
    return os.environ.get(STRICT, "") not in ("", "0")


def words_unless_strict(error: Exception) -> str:
    """Return the type and the first line of an error that a tried backend raised.

    Raises the error again if ``is_strict``.
    """
    if is_strict():
        raise error
    lines = str(error).strip().splitlines()
    name = type(error).__name__
    return f"{name}: {lines[0].rstrip('.')}" if lines else name
