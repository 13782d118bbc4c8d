"""What happens if a faster way to train fails while gputune tries it.

The next way trains, and the plan, a warning or a note says which error was the reason. An error of
the user's own module is not hidden by this: it is raised again by the way that trains in the end.
"""

import os

STRICT = "GPUTUNE_STRICT_BACKENDS"
"""The environment variable that lets such an error end the search, with its traceback: for tests
and bug reports."""


def is_strict() -> bool:
    """Whether an error of a backend that is tried ends the search."""
    return os.environ.get(STRICT, "") not in ("", "0")


def failure_in_words(error: Exception) -> str:
    """Return the type and the first line of an error that a backend raised while it was tried.

    Raises the error again if ``is_strict``.
    """
    if is_strict():
        raise error
    lines = str(error).strip().splitlines()
    name = type(error).__name__
    return f"{name}: {lines[0].rstrip('.')}" if lines else name
