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
from gputune.wording import Verbatim, per_interface

if TYPE_CHECKING:
    from gputune.callbacks import Callback
    from gputune.data.kinds import Kind
    from gputune.data.target_transform import TargetTransform
    from gputune.study.study import Study
    from gputune.tuning.choices import Method


_OR_NONE = per_interface(", or None", "")


def one_of(*allowed: str | bool) -> Callable[[str, object], object]:
    """Return a check that accepts only the allowed values."""

    def check(name: str, value: object) -> object:
        if value not in allowed:
            rule = f"must be one of {', '.join(map(repr, allowed))}"
            raise InputError(name, rule, got=value, remedy=did_you_mean(value, allowed).strip())
        return value

    return check


def count(name: str, value: object, *, none: bool = False) -> object:
    """Return the value, an integer >= 1. None is valid only with ``none=True``."""
    check_count(value, name, none=none)
    return value


def score(name: str, value: object) -> object:
    """Return the value, a score that is not NaN, or None."""
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, Real) or value != value
    ):
        raise InputError(name, f"must be a score, which is a number{_OR_NONE}", got=value)
    return value


def verbosity(name: str, value: object) -> object:
    """Return the verbosity as an int >= 0."""
    if not isinstance(value, Integral) or value < 0:
        raise InputError(name, "must be 0 (silent) or 1", got=value)
    return int(value)


def seconds(name: str, value: object, *, none: bool = False) -> object:
    """Return the value, a duration in seconds > 0. None is valid only with ``none=True``."""
    is_number = isinstance(value, Real) and not isinstance(value, bool) and float(value) > 0
    if not (is_number or (none and value is None)):
        or_none = _OR_NONE if none else ""
        raise InputError(name, f"must be a number of seconds above 0{or_none}", got=value)
    return value


def path(name: str, value: object) -> Path | None:
    """Return the absolute path of a file, or None."""
    if not (value is None or isinstance(value, str | os.PathLike)):
        raise InputError(
            name,
            f"must be the path of a file{_OR_NONE}",
            got=value,
            remedy="If you have an open study, pass its file.",
        )
    if value is not None and Path(value).is_dir():
        file = str(Path(value) / "study.db")
        raise InputError(
            name,
            "must be a file",
            got=Verbatim(f"the folder {str(value)!r}"),
            remedy=f"Pass a file in it, such as {file!r}.",
        )
    # Absolute, because a module of the user may change the current folder later.
    return None if value is None else Path(value).absolute()


def studies(name: str, value: object) -> "tuple[Study, ...]":
    """Return the studies of a value: studies, paths of study files, or a mix in a list.

    A path may also be a folder that the command line wrote.
    """
    from gputune.study.study import Study

    def opened(study: "Study | str | os.PathLike[str]") -> Study:
        if isinstance(study, Study):
            return study
        path = Path(study)
        return Study.open(path / "study.db" if path.is_dir() else path)

    valid = (str, os.PathLike, Study)
    studies = [value] if isinstance(value, valid) else value
    if not isinstance(studies, list | tuple) or not all(
        isinstance(study, valid) for study in studies
    ):
        raise InputError(name, "must be a study, its path, or a list of these", got=value)
    return tuple(map(opened, studies))


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
            name, "must be a number of processes, 'auto', 'ray' or gputune.Ray(...)", got=value
        )
    return value if isinstance(value, Ray) or value == "auto" else count(name, value)


def names(name: str, value: object) -> tuple[str, ...]:
    """Return a tuple of column names."""
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(text, str) for text in names):
        raise InputError(name, "must be a list of column names, for example ['id']", got=value)
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
        raise InputError(name, "must be a dict such as {'zip': 'category'}", got=value)
    for column, kind in value.items():
        if kind not in KINDS:
            raise InputError(
                name,
                f"must be one of {', '.join(KINDS)} for each column",
                got=Verbatim(f"{kind!r} for {column!r}"),
                remedy=did_you_mean(kind, KINDS).strip(),
            )
    return dict(value)


def callbacks(name: str, value: object) -> "tuple[Callback, ...]":
    """Return a tuple of callbacks."""
    from gputune.callbacks import Callback

    if not isinstance(value, list | tuple) or not all(isinstance(item, Callback) for item in value):
        raise InputError(
            name,
            "must be a list of gputune.callbacks.Callback objects, for example "
            "[gputune.callbacks.TensorBoard('runs')]",
            got=value,
        )
    return tuple(value)


def seed(name: str, random_state: object) -> int:
    """Return a random seed as an int.

    An integer is returned unchanged. For a RandomState or Generator, the seed is its next random
    integer. For None, the seed is random.
    """
    import numpy as np

    if isinstance(random_state, int | np.integer) and not isinstance(random_state, bool):
        if not 0 <= random_state < 2**32:
            raise InputError(name, "must be in [0, 2**32), as in scikit-learn", got=random_state)
        return int(random_state)
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31))
    if random_state is None or isinstance(random_state, np.random.Generator):
        return int(np.random.default_rng(random_state).integers(2**31))
    raise InputError(
        name, "must be an integer, a numpy RandomState or Generator, or None", got=random_state
    )
