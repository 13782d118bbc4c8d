"""The exceptions and the warning that gputune raises for its users."""

import sys
import warnings
from copy import copy
from importlib import import_module
from numbers import Integral
from types import ModuleType
from typing import Any, Self

from gputune.wording import (
    MISSING,
    PYTHON,
    Interface,
    Reference,
    Verbatim,
    option,
    per_interface,
    shown_value,
)

TOO_BIG = "out of memory"
"""The first words of the failure reason if a trial does not fit into memory.

No other failure reason begins with this text.
"""


_TRUST = "If you trust it, " + per_interface("pass trust_code=True.", "add --trust-code.")


class InputError(ValueError):
    """Bad input: an argument, a file or a combination of options that gputune cannot use.

    Every public function raises this error, before anything trains if possible. Catch the error
    with ``except gputune.InputError`` or ``except ValueError``. ``UntrustedCodeError``,
    ``StudyCorruptError``, ``StudyVersionError`` and ``MissingExtraError`` are kinds of it. The
    command line prints the message and ends with exit code 2.

    The message is "ARGUMENT RULE, got GOT. REMEDY". Its parts may hold the references of
    ``gputune.wording``, which each interface renders in its own names.

    Args:
        argument: The argument that is wrong, as Python writes it: "cv", "space['lr']",
            "Halving(factor=...)". None if the rule is a whole sentence.
        rule: The rule that is broken, "must be at least 2", without a full stop.
        got: The value that broke it. The error keeps only its text.
        remedy: What to do, as one or two whole sentences.
    """

    def __init__(
        self, argument: str | None, rule: str, got: object = MISSING, remedy: str = ""
    ) -> None:
        if got is not MISSING:
            got = Verbatim(shown_value(got))
        super().__init__(argument, rule, got, remedy)
        self.argument = argument
        self.rule = rule
        self.got = None if got is MISSING else str(got)
        self.remedy = remedy
        self.interface = PYTHON

    @property
    def message(self) -> str:
        """The text of the error, in which the names of arguments are marked.

        An interface replaces each marked name by the name that its users know.
        """
        sentence = self.rule
        if self.argument is not None:
            is_reference = Reference.parse(self.argument) is not None
            argument = option(self.argument) if is_reference else self.argument
            sentence = f"{argument} {sentence}"
        if self.got is not None:
            sentence = f"{sentence}, got {self.got}"
        if not sentence.endswith((".", "?", "!")):
            sentence = f"{sentence}."
        return f"{sentence} {self.remedy}".rstrip()

    def text(self, interface: Interface) -> str:
        """Return the message with the argument names of an interface, such as ``--cv`` for the
        command line."""
        return interface.render(self.message)

    def shown_by(self, interface: Interface) -> Self:
        """Return a copy of the error that shows an interface's names of arguments in its text."""
        error = copy(self)
        error.interface = interface
        return error

    def __str__(self) -> str:
        return self.text(self.interface)


class InputWarning(UserWarning):
    """A warning that gputune has chosen one of two interpretations of ambiguous input.

    ``tune`` shows the warning, for example if a numeric target could also be classes. Pass the
    argument that the message names, or silence the warning with ``warnings.filterwarnings("ignore",
    category=gputune.InputWarning)``.
    """


class UntrustedCodeError(InputError):
    """A study or model names code that you have not trusted, so gputune has not run the code.

    ``load_model``, ``Study.best_model`` and other methods that train again raise this error. Pass
    ``trust_code=True`` (``--trust-code`` on the command line) if you trust the code. The error is
    an ``InputError``.

    Args:
        code: description of the code, without a remedy.
        remedy: the sentence that says how to trust the code. Each interface has its own.
    """

    def __init__(self, code: str, remedy: str = _TRUST) -> None:
        super().__init__(None, code, remedy=remedy)
        self.args = (code, remedy)


class _WithReferences(BaseException):
    """Base class of errors with a message that marks names of arguments.

    Each interface (Python, command line, scikit-learn) shows these names in its own form.
    """

    @property
    def message(self) -> str:
        """The text of the error, in which the names of arguments are marked."""
        return str(self.args[0]) if self.args else ""

    def __str__(self) -> str:
        return PYTHON.render(self.message)


class DivergedError(_WithReferences, ArithmeticError):
    """A training run that must return a finite result went to infinity or NaN.

    ``Study.best_model``, ``Study.ensemble``, the ``fit`` of an estimator of ``gputune.sklearn``,
    and ``hypergradient`` with optimizer="exact" raise this error. In a search, a trial that
    diverges is "failed" instead, and the search continues. The error is an ArithmeticError. Lower
    the learning rate, or scale the inputs.
    """


class ClusterError(_WithReferences, RuntimeError):
    """Workers or all nodes of a Ray cluster were lost during training.

    ``tune(workers="ray")`` raises this error. gputune keeps the finished results: if ``study=``
    names a file, the same call resumes the search. The error is a RuntimeError.
    """


class CheckFailedError(_WithReferences, RuntimeError):
    """``gputune check`` found a device on which a guarantee does not hold.

    Args:
        message: summary of the failure.
        report: the text that the command line prints about the check.
    """

    def __init__(self, message: str, *, report: str) -> None:
        super().__init__(message)
        self.report = report


class SearchFailedError(_WithReferences, RuntimeError):
    """No trial of the search has a finite score.

    ``tune``, ``search``, ``Study.best_trial`` and everything that needs the best trial raise this
    error. The message says why the trials failed. The error is a RuntimeError.
    """


class StudyCorruptError(InputError):
    """A study file is damaged, or the file is not a study.

    ``Study.open``, ``tune(study=...)`` and the commands on a study raise this error. gputune has
    not read from the file or changed it. ``gputune repair`` saves the undamaged rows. The error is
    an ``InputError``.
    """


class StudyVersionError(InputError):
    """A study file has a format that this version of gputune cannot read.

    ``Study.open``, ``tune(study=...)`` and the commands on a study raise this error. Upgrade
    gputune if a newer version wrote the file. The error is an ``InputError``.
    """


class MissingExtraError(InputError, ImportError):
    """An optional library is not installed. The message names the extra that installs it.

    Plots, loggers, ``OptunaSampler``, ``Study.to_optuna``, ``TunedModel.export`` and
    ``tune(workers="ray")`` raise this error. The error is an ``InputError`` and an ImportError.
    """


class SearchInterrupted(_WithReferences, KeyboardInterrupt):
    """A signal ended a search. The error holds the study with the finished results.

    ``tune`` and ``search`` raise this error. The error is a KeyboardInterrupt, so ``except
    Exception`` does not catch the error: use ``except gputune.SearchInterrupted as stopped`` and
    continue with ``stopped.study``. In a notebook or at a prompt, the call returns that study
    instead.

    The signals are Ctrl-C, SIGTERM and SIGUSR1. If a script does not catch the error after SIGTERM
    or SIGUSR1, the script ends without a traceback, with the exit code 143 or 138.

    Attributes:
        study: the Study so far.
        signal: number of the signal, 2 for Ctrl-C, 15 for SIGTERM and 10 for SIGUSR1 on Linux.
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


class SearchTerminated(SearchInterrupted, SystemExit):
    """The kind of ``SearchInterrupted`` that SIGTERM and SIGUSR1 raise.

    It is a SystemExit too, so that a script which does not catch it ends with a defined exit code,
    128 + number of the signal. A program that starts the script can then tell an interrupted search
    from a failed one.
    """

    def __init__(self, message: str, **results: Any) -> None:
        super().__init__(message, **results)
        self.code = 128 + self.signal


class Terminated(KeyboardInterrupt):
    """The exception for SIGTERM in a command that is not training. The command then ends."""


def check_count(
    value: object, name: str, *, least: int = 1, none: bool = False, remedy: str = ""
) -> None:
    """Raise InputError unless the value of an argument is an integer of at least ``least``.

    None is also valid if ``none`` is True.
    """
    if none and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        or_none = per_interface(", or None", "") if none else ""
        rule = f"must be an integer of at least {least}{or_none}"
        raise InputError(name, rule, got=value, remedy=remedy.strip())


def warn(message: str | Warning, category: type[Warning] = UserWarning) -> None:
    """Show a warning at the line of the user's code that called gputune.

    A message may mark names of arguments. The warning stores the marked message as ``marked``, so
    that other interfaces can show the names in their own form.
    """
    if isinstance(message, str):
        warning = category(PYTHON.render(message))
        vars(warning)["marked"] = message
    else:
        warning = message
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
    warnings.warn(warning, stacklevel=level)


def how_to_install(extra: str) -> str:
    """Return a sentence for error messages that says how to install an optional part of gputune."""
    # gputune is in no package index, so that pip finds the extra only in a clone.
    return f'Run pip install ".[{extra}]" in your clone of gputune.'


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
        library = module.partition(".")[0]
        raise MissingExtraError(
            used_by,
            f"needs {library}, which cannot be imported ({error})",
            remedy=how_to_install(extra),
        ) from error
