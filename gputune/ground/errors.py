"""Messages that name arguments, and the exceptions and the warning that show them to users.

A message is written once for all interfaces. To name an argument, a message contains a reference:
``option("cv", 5)`` marks the argument ``cv`` with the value 5. Each interface shows references in
its own form: Python shows ``cv=5``, the command line shows ``--cv 5``.
"""

import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from enum import Enum
from functools import wraps
from inspect import signature
from numbers import Integral
from typing import Any, ParamSpec, Self, TypeVar

from gputune.ground.text import did_you_mean


class _Missing(Enum):
    MISSING = 0


MISSING = _Missing.MISSING
"""Marks an argument that was not passed, because None can be a passed value."""

_BEGIN = "⟦"
_END = "⟧"
_OR = "‖"
_MARK = re.compile(f"{_BEGIN}([^{_BEGIN}{_END}]*){_END}")
_REFERENCE = re.compile(
    r"(?:(?P<call>\w+)\()?(?P<name>\w+)(?P<keys>(?:\[[^\]]*\])*)(?:=(?P<value>.*?))?(?(call)\))",
    re.DOTALL,
)
_INTERFACES = ("python", "command", "sklearn")
_LONGEST_VALUE = 200  # characters of a value in a message


@dataclass(frozen=True)
class Reference:
    """A reference to an argument in a message, such as ``cv=5``.

    Args:
        name: Name of the argument in Python, such as "cv".
        keys: Keys and positions in the argument, as Python code: ("'lr'",) for ``space['lr']``.
        value: Value as Python code, "..." for any value, None to show no value.
        call: Function or class that takes the argument; "" for a search.
    """

    name: str
    keys: tuple[str, ...] = ()
    value: str | None = None
    call: str = ""

    @classmethod
    def parse(cls, text: str) -> "Reference | None":
        """Return the reference for a text such as "cv=5", or None if the text is no reference."""
        match = _REFERENCE.fullmatch(text)
        if match is None:
            return None
        keys = tuple(re.findall(r"\[([^\]]*)\]", match["keys"]))
        return cls(match["name"], keys, match["value"], match["call"] or "")

    def __str__(self) -> str:
        keys = "".join(f"[{key}]" for key in self.keys)
        value = "" if self.value is None else f"={self.value}"
        argument = f"{self.name}{keys}{value}"
        return f"{self.call}({argument})" if self.call else argument


class Interface:
    """The names of arguments as messages show them to users of the Python functions. Other
    interfaces override these names.

    Attributes:
        name: "python", "command" or "sklearn".
    """

    name = "python"

    def argument(self, reference: Reference) -> str:
        """Return the name of an argument as users of this interface write it."""
        return str(reference)

    def render(self, message: str) -> str:
        """Replace the marked names in a message by the names that users of this interface know.

        Args:
            message: Text with the marks of ``option`` and ``per_interface``. Marks can be nested.
        """
        rendered = _MARK.sub(self._replacement, message)
        # Inner marks are replaced first. A user's text may hold brackets that mark nothing.
        while rendered != message:
            message = rendered
            rendered = _MARK.sub(self._replacement, message)
        return rendered

    def _replacement(self, mark: re.Match[str]) -> str:
        variants = mark[1].split(_OR)
        if len(variants) == len(_INTERFACES):
            return variants[_INTERFACES.index(self.name)]
        reference = Reference.parse(mark[1])
        return mark[0] if reference is None else self.argument(reference)


PYTHON = Interface()


class Verbatim(str):
    """A text that a message shows without quotation marks, such as "3 columns"."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def option(reference: str, value: object = MISSING) -> str:
    """Return a marked name of an argument for use in a message, which each interface shows in its
    own form.

    Args:
        reference: The argument as Python writes it: "cv", "space['lr']", "Halving(factor=...)".
        value: A value to show after the argument.

    Example:
        >>> message = f"Pass {option('cv', 5)}."
        >>> PYTHON.render(message)
        'Pass cv=5.'
    """
    shown = "" if value is MISSING else f"={value!r}"
    return f"{_BEGIN}{reference}{shown}{_END}"


def per_interface(python: str, command: str, sklearn: str | None = None) -> str:
    """Return a part of a message that has a different text for each interface.

    Args:
        python: The text for functions of Python.
        command: The text for the command line.
        sklearn: The text for scikit-learn estimators; None for the text of ``python``.
    """
    variants = (python, command, python if sklearn is None else sklearn)
    return f"{_BEGIN}{_OR.join(variants)}{_END}"


def shown_value(value: object) -> str:
    """Return the text of a value for a message, on one line and with at most 200 characters."""
    text = repr(value)
    if not isinstance(value, Verbatim):
        text = " ".join(text.split())
    if len(text) > _LONGEST_VALUE:
        text = f"{text[: _LONGEST_VALUE - 3]}..."
    return text


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
    this module, which each interface renders in its own names.

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


Given = ParamSpec("Given")
Value = TypeVar("Value")


def with_argument_hints(
    others: Mapping[str, str], advice: Callable[[str], str | None] | None = None
) -> Callable[[Callable[Given, Value]], Callable[Given, Value]]:
    """Return a decorator of a function, which raises a TypeError for an unknown keyword argument.

    The message gives advice for this argument, or suggests the right name, as Python 3.13 does.

    Args:
        others: Argument names of other libraries, and the function's names for them. A search for
            similar spellings would not find these pairs.
        advice: A function that returns a sentence on an argument that the function lacks. The
            result is None or "" for a name without advice.
    """

    def decorate(function: Callable[Given, Value]) -> Callable[Given, Value]:
        known = signature(function).parameters

        @wraps(function)
        def called(*args: Given.args, **kwargs: Given.kwargs) -> Value:
            for name in kwargs:
                if name in known:
                    continue
                sentence = None if advice is None else advice(name)
                hint = f" {sentence}" if sentence else did_you_mean(name, known, others=others)
                raise TypeError(
                    f"{function.__name__}() got an unexpected keyword argument {name!r}.{hint}"
                )
            return function(*args, **kwargs)

        return called

    return decorate


def advice_on_keys(keys: Mapping[str, str]) -> Callable[[str], str]:
    """Return a function that says of an argument name which key of the space it is.

    ``keys`` maps names of hyperparameters to keys of the space. For other names, the function
    returns "".
    """

    def advice(name: str) -> str:
        if name not in keys:
            return ""
        return f'It is a key of the space: gputune.tune(..., space={{"{keys[name]}": [...]}}).'

    return advice


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
