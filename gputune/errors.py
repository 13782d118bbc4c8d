"""The exceptions that gputune raises on purpose, and a warning."""

import sys
import warnings
from importlib import import_module
from numbers import Integral
from types import ModuleType
from typing import Any

TOO_BIG = "out of memory"
"""How the reason of a trial begins that memory does not hold; others were given up for another
reason."""


class InputError(ValueError):
    """Bad input. The command line ends with exit code 2 on it; every other error ends with 1."""


class InputWarning(UserWarning):
    """Input that can be read in two ways, of which one was taken."""


class UntrustedCodeError(InputError):
    """A file names code that nobody has said to trust, and nothing of it has run.

    code  which code that is, in words without a remedy: each door has its own
    """

    def __init__(self, code: str, remedy: str = "If you trust it, pass trust_code=True.") -> None:
        super().__init__(f"{code} {remedy}")
        self.code = code


class DivergedError(ArithmeticError):
    """A training that was asked for a finite result went to infinity or NaN."""


class ClusterError(RuntimeError):
    """A cluster failed while it trained: workers, or all nodes, were lost. What was finished is
    kept."""


class CheckFailedError(RuntimeError):
    """A law does not hold on a device; ``report`` is what the command line prints of the check."""

    def __init__(self, message: str, *, report: str) -> None:
        super().__init__(message)
        self.report = report


class SearchFailedError(RuntimeError):
    """No trial of the search has a finite score."""


class StudyCorruptError(InputError):
    """A study file that is damaged, or a file that is no study. Nothing was read from it or changed
    in it."""


class StudyVersionError(InputError):
    """A study file of a format that this version of gputune does not know."""


class MissingExtraError(InputError, ImportError):
    """An optional library is not installed; the message says which extra brings it. It is an
    ImportError too."""


class SearchInterrupted(KeyboardInterrupt):
    """A search was ended by Ctrl-C or SIGTERM, after what is finished was kept.

    study   the Study so far
    signal  number of the signal: 2 for Ctrl-C, 15 for SIGTERM
    report  what the command line prints of it on standard output
    at_once whether a second signal ended the running epoch too
    """

    def __init__(
        self, message: str, *, study: Any, signal: int, report: str = "", at_once: bool = False
    ) -> None:
        super().__init__(message)
        self.study = study
        self.signal = signal
        self.report = report
        self.at_once = at_once


class Terminated(KeyboardInterrupt):
    """SIGTERM ended a command while it did not train."""


def check_count(
    value: object, name: str, *, least: int = 1, none: bool = False, remedy: str = ""
) -> None:
    """Raise InputError unless a value is an integer from ``least`` on, or None where that is
    allowed."""
    if none and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        or_none = ", or None" if none else ""
        raise InputError(
            f"{name} must be an integer of at least {least}{or_none}, got {value!r}.{remedy}"
        )


def warn(message: str | Warning, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the user's that called gputune, however deep within it this is."""
    # sklearn wraps the methods of estimators
    packages = ("gputune", "contextlib", "functools", "joblib", "sklearn")
    level = 1
    frame = sys._getframe()
    while (
        frame.f_back is not None
        and frame.f_globals.get("__name__", "").partition(".")[0] in packages
    ):
        level = level + 1
        frame = frame.f_back
    warnings.warn(message, category, stacklevel=level)


def import_extra(module: str, *, extra: str, used_by: str) -> ModuleType:
    """Return the module; MissingExtraError, which says what to install, where it cannot be
    imported.

    used_by: what the user asked for, as the error calls it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{used_by} needs {module.partition('.')[0]}, which cannot be imported ({error}): "
            f'pip install "gputune[{extra}]".'
        ) from error
