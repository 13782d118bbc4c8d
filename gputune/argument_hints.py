"""Hints for mistyped keyword arguments of public functions."""

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from typing import ParamSpec, TypeVar

from gputune.text import did_you_mean

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
