"""The exceptions that gputune raises on purpose, and a warning."""

import sys
import warnings
from importlib import import_module
from numbers import Integral
from types import ModuleType
from typing import Any

TOO_BIG = "out of memory"
"""The first words of the reason of a trial that does not fit into memory.

Other reasons begin differently.
"""


class InputError(ValueError):
    """Bad input: an argument, a file or an option that gputune cannot use.

    It is a ValueError. The command line ends with exit code 2 on it, and with 1 on every other
    error.
    """


class InputWarning(UserWarning):
    """A warning about ambiguous input. gputune has chosen one of two readings."""


class UntrustedCodeError(InputError):
    """A study or model names code that you have not trusted. gputune has not run it.

    Pass ``trust_code=True`` (``--trust-code`` on the command line) if you trust the code.

    Args:
        code: description of the code, without a remedy.
        remedy: the sentence that says how to trust the code. Each interface has its own.
    """

    def __init__(self, code: str, remedy: str = "If you trust it, pass trust_code=True.") -> None:
        super().__init__(f"{code} {remedy}")
        self.code = code


class DivergedError(ArithmeticError):
    """A training that must return a finite result went to infinity or NaN."""


class ClusterError(RuntimeError):
    """Workers or all nodes of a Ray cluster were lost during training.

    Finished results are kept.
    """


class CheckFailedError(RuntimeError):
    """``gputune check`` found a device on which a guarantee does not hold.

    Args:
        message: summary of the failure.
        report: the text that the command line prints about the check.
    """

    def __init__(self, message: str, *, report: str) -> None:
        super().__init__(message)
        self.report = report


class SearchFailedError(RuntimeError):
    """No trial of the search has a finite score."""


class StudyCorruptError(InputError):
    """A study file is damaged, or the file is not a study.

    Nothing was read from it or changed in it.
    """


class StudyVersionError(InputError):
    """A study file has a format that this version of gputune cannot read."""


class MissingExtraError(InputError, ImportError):
    """An optional library is not installed. The message names the extra that installs it.

    It is an ImportError too.
    """


class SearchInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended a search. The finished results are kept.

    It is a KeyboardInterrupt.

    Attributes:
        study: the Study so far.
        signal: number of the signal, 2 for Ctrl-C and 15 for SIGTERM.
        report: the text that the command line prints on standard output.
        at_once: whether a second signal ended the running epoch too.
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
    """SIGTERM ended a command that was not training."""


def check_count(
    value: object, name: str, *, least: int = 1, none: bool = False, remedy: str = ""
) -> None:
    """Raise InputError unless a value is an integer of at least ``least``.

    None is also valid if ``none`` is True.
    """
    if none and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        or_none = ", or None" if none else ""
        raise InputError(
            f"{name} must be an integer of at least {least}{or_none}, got {value!r}.{remedy}"
        )


def warn(message: str | Warning, category: type[Warning] = UserWarning) -> None:
    """Show a warning at the line of the user's code that called gputune."""
    # Frames of these packages are skipped: scikit-learn wraps the methods of estimators.
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
    """Import and return the module of an optional library.

    Args:
        module: name of the module.
        extra: the extra of gputune that installs it.
        used_by: name of the feature that needs it, for the error message.

    Raises:
        MissingExtraError: the module cannot be imported. The message says how to install it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{used_by} needs {module.partition('.')[0]}, which cannot be imported ({error}): "
            f'pip install "gputune[{extra}]".'
        ) from error
