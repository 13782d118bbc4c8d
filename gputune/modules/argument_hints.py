"""Help for mistyped arguments of the functions that return a builder of a pretrained module."""

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from types import MappingProxyType
from typing import ParamSpec, TypeVar

from gputune.text import did_you_mean

Given = ParamSpec("Given")
Value = TypeVar("Value")


def with_argument_hints(
    others: Mapping[str, str], *, keys: Mapping[str, str] = MappingProxyType({})
) -> Callable[[Callable[Given, Value]], Callable[Given, Value]]:
    """Return a decorator of a function, which raises a TypeError for an unknown keyword argument.

    The message suggests the right name, or says that the argument is a key of the space.

    Args:
        others: Argument names of other libraries, and the function's names for them.
        keys: Names of hyperparameters, and the keys of the space for them.
    """

    def decorate(function: Callable[Given, Value]) -> Callable[Given, Value]:
        known = signature(function).parameters

        @wraps(function)
        def called(*args: Given.args, **kwargs: Given.kwargs) -> Value:
            for name in kwargs:
                if name in known:
                    continue
                if name in keys:
                    key = keys[name]
                    hint = (
                        f' It is a key of the space: gputune.tune(..., space={{"{key}": [...]}}).'
                    )
                else:
                    hint = did_you_mean(name, known, others=others)
                raise TypeError(
                    f"{function.__name__}() got an unexpected keyword argument {name!r}.{hint}"
                )
            return function(*args, **kwargs)

        return called

    return decorate
