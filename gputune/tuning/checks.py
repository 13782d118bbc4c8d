"""Checks of option values.

A check takes the name and the value of an option. It returns the value to use, or raises
InputError. Slow modules are imported only when they are needed, because ``gputune --help`` must not
wait for torch.
"""

import os
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING

from gputune.errors import InputError, check_count
from gputune.text import did_you_mean

if TYPE_CHECKING:
    from gputune.callbacks import Callback
    from gputune.data.kinds import Kind
    from gputune.data.target_transform import TargetTransform
    from gputune.study.study import Study
    from gputune.tuning.choices import Method


def one_of(*allowed: str | bool) -> Callable[[str, object], object]:
    """Return a check that accepts only the allowed values."""

    def check(name: str, value: object) -> object:
        if value not in allowed:
            words = f"{', '.join(map(repr, allowed))}, got {value!r}.{did_you_mean(value, allowed)}"
            raise InputError(f"{name} must be one of {words}")
        return value

    return check


def whole(name: str, value: object, *, none: bool = False) -> object:
    """Return a whole number >= 1. None is valid only with ``none=True``."""
    check_count(value, name, none=none)
    return value


def score(name: str, value: object) -> object:
    """Return a score or None."""
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, Real) or value != value
    ):
        raise InputError(f"{name} must be a score, a number, or None, got {value!r}.")
    return value


def verbosity(name: str, value: object) -> object:
    """Return the verbosity as an int >= 0."""
    if not isinstance(value, Integral) or value < 0:
        raise InputError(f"{name} must be 0 (silent) or 1, got {value!r}.")
    return int(value)


def seconds(name: str, value: object, *, none: bool = False) -> object:
    """Return a number of seconds > 0. None is valid only with ``none=True``."""
    is_number = isinstance(value, Real) and not isinstance(value, bool) and float(value) > 0
    if not (is_number or (none and value is None)):
        raise InputError(
            f"{name} is a number of seconds above 0{', or None' if none else ''}, got {value!r}."
        )
    return value


def path(name: str, value: object) -> Path | None:
    """Return the absolute path of a file, or None."""
    if not (value is None or isinstance(value, str | os.PathLike)):
        got = f"got {value!r}; of a study that is open give its file."
        raise InputError(f"{name} is the path of a file, or None, {got}")
    if value is not None and Path(value).is_dir():
        file = str(Path(value) / "study.db")
        raise InputError(
            f"{name} must be a file, got the folder {str(value)!r}; give a file in it, such as "
            f"{file!r}."
        )
    # Absolute, because a module of the user may change the current folder later.
    return None if value is None else Path(value).absolute()


def studies(name: str, value: object) -> "tuple[Study, ...]":
    """Return the studies of a value: studies, paths of study files, or a mix in a list.

    A path may also be a folder that the command line wrote.
    """
    from gputune.study.study import Study

    def opened(path: Path) -> Study:
        return Study.open(path / "study.db" if path.is_dir() else path)

    one = (str, os.PathLike, Study)
    studies = [value] if isinstance(value, one) else value
    if not isinstance(studies, list | tuple) or not all(
        isinstance(study, one) for study in studies
    ):
        raise InputError(
            f"{name} must be a study, the path of one, or a list of them, got {value!r}."
        )
    return tuple(study if isinstance(study, Study) else opened(Path(study)) for study in studies)


def method(name: str, value: object) -> "Method":
    """Return the checked search method."""
    from gputune.tuning.choices import check_method

    return check_method(value)


def memory(name: str, value: object) -> object:
    """Return a valid memory limit."""
    from gputune.engine.plan import parse_memory

    parse_memory(value)
    return value


def workers(name: str, value: object) -> object:
    """Return a number of processes, "auto" or a Ray cluster."""
    from gputune.executors.ray_cluster import Ray

    if value == "ray":
        return Ray()
    if isinstance(value, str) and value != "auto":
        raise InputError(
            f"{name} must be a number of processes, 'auto', 'ray' or gputune.Ray(...), got "
            f"{value!r}."
        )
    return value if isinstance(value, Ray) or value == "auto" else whole(name, value)


def names(name: str, value: object) -> tuple[str, ...]:
    """Return a tuple of column names."""
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(one, str) for one in names):
        raise InputError(f"{name} must be a list of columns, for example ['id'], got {value!r}.")
    return tuple(names)


def target_transform(name: str, value: object) -> "TargetTransform | None":
    """Return the checked target transform, or None."""
    from gputune.data.target_transform import check_transform

    return check_transform(name, value)


def kinds(name: str, value: object) -> "Mapping[str, Kind] | None":
    """Return a dict from column name to column kind, or None."""
    from gputune.data.kinds import KINDS

    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise InputError(f"{name} must be a dict such as {{'zip': 'category'}}, got {value!r}.")
    for column, kind in value.items():
        if kind not in KINDS:
            got = f"got {kind!r} for {column!r}.{did_you_mean(kind, KINDS)}"
            raise InputError(f"{name} must be one of {', '.join(KINDS)} for each column, {got}")
    return dict(value)


def callbacks(name: str, value: object) -> "tuple[Callback, ...]":
    """Return a tuple of callbacks."""
    from gputune.callbacks import Callback

    if not isinstance(value, list | tuple) or not all(isinstance(one, Callback) for one in value):
        kind = "a list of objects of a gputune.callbacks.Callback class"
        example = "for example [gputune.callbacks.TensorBoard('runs')]"
        raise InputError(f"{name} must be {kind}, {example}, got {value!r}.")
    return tuple(value)


def seed(name: str, random_state: object) -> int:
    """Return a random seed as an int.

    An integer is returned unchanged. A RandomState or Generator gives one draw, and None gives a
    draw from the system.
    """
    import numpy as np

    if isinstance(random_state, int | np.integer) and not isinstance(random_state, bool):
        if not 0 <= random_state < 2**32:
            raise InputError(
                f"random_state must be in [0, 2**32), as scikit-learn has it, got {random_state}."
            )
        return int(random_state)
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31))
    if random_state is None or isinstance(random_state, np.random.Generator):
        return int(np.random.default_rng(random_state).integers(2**31))
    raise InputError(
        "random_state is an integer, a numpy RandomState or Generator, or None, got "
        f"{random_state!r}."
    )
