"""The table of backends: the programs that train trials, from the fastest to the slowest.

To add a backend, write its file and add one line here. Its file has a constant with the backend's
name in capital letters, an instance of a subclass of ``Backend`` (``base.py``). Importing the table
does not import the files, because the command line reads the names and must not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gputune.engine.backends.base import Backend

BACKENDS: dict[str, str] = {
    "kernel": "gputune.engine.backends.kernel",
    "compiled": "gputune.engine.backends.compiled",
    "recorded": "gputune.engine.backends.stacked",
    "eager": "gputune.engine.backends.stacked",
    "merged": "gputune.engine.backends.stacked",
    "loop": "gputune.engine.backends.stacked",
}
"""Maps the name of each backend to the module that defines it."""

_EARLIER = {"graph": "recorded"}
"""Maps names of earlier versions of gputune, which users and studies may still have, to names."""


def current_name(name: str) -> str:
    """Return the name of a backend for its name in this or an earlier version of gputune."""
    return _EARLIER.get(name, name)


def backend_named(name: str) -> "Backend":
    """Return a backend by its name, or by its name in an earlier version of gputune."""
    name = current_name(name)
    backend: Backend = getattr(import_module(BACKENDS[name]), name.upper())
    return backend


def backend_words() -> tuple[str, ...]:
    """Return the values of the option ``backend``, without names of earlier versions.

    "auto" chooses the fastest backend. "stacked" chooses the fastest backend that trains all
    members of a module at once.
    """
    return ("auto", *BACKENDS, "stacked")


def is_backend_word(value: object) -> bool:
    """Return whether a value is valid for the option ``backend``."""
    return value in backend_words() or value in _EARLIER
