"""Help for users at a Python prompt: suggestions for mistyped arguments, and the study of an
interrupted search."""

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from typing import ParamSpec, TypeVar, cast

from gputune.errors import SearchInterrupted, SearchTerminated
from gputune.spaces.config import key_of
from gputune.text import did_you_mean
from gputune.tuning.interrupt import is_interactive
from gputune.tuning.progress import Progress

Given = ParamSpec("Given")
Value = TypeVar("Value")

_OTHER_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("epochs", "n_epochs", "num_epochs", "max_iter"), "max_epochs"),
    **dict.fromkeys(("trials", "n_iter", "num_trials"), "n_trials"),
    **dict.fromkeys(("param_distributions", "param_grid", "search_space"), "space"),
    **dict.fromkeys(("metric", "score", "scorer"), "scoring"),
    "folds": "cv",
    "budget": "timeout",
    "seed": "random_state",
    "criterion": "loss",
    "n_jobs": "workers",
    "scheduler": "schedule",
}
"""Argument names of other libraries and gputune's names for them. A search for similar spellings
would not find these pairs."""


def public(function: Callable[Given, Value]) -> Callable[Given, Value]:
    """Decorate a public function so that its errors help a user at a Python prompt.

    An unknown keyword argument raises a TypeError that suggests the right name, like Python 3.13
    does. In a notebook or at a prompt, an interrupted search returns its study so far.
    """
    known = signature(function).parameters

    @wraps(function)
    def called(*args: Given.args, **kwargs: Given.kwargs) -> Value:
        for name in kwargs:
            if name not in known:
                key = key_of(name) if "space" in known else None
                advice = f' Hyperparameters belong in the space: space={{"{key}": [...]}}.'
                hint = advice if key else did_you_mean(name, known, others=_OTHER_NAMES)
                raise TypeError(
                    f"{function.__name__}() got an unexpected keyword argument {name!r}.{hint}"
                )
        try:
            return function(*args, **kwargs)
        except SearchInterrupted as stopped:
            # A person at a prompt gets the study. A script gets the exception.
            if not is_interactive():
                if isinstance(stopped, SearchTerminated):  # Python prints no message for it
                    Progress(cast(int, kwargs.get("verbose", 1))).say(str(stopped))
                raise
            Progress(cast(int, kwargs.get("verbose", 1))).say(str(stopped))
            so_far: Value = stopped.study
            return so_far

    return called
