"""What an option may be: a check returns the value to go on with, of a name and a value, or raises
InputError.

What is heavy is imported when it is needed: ``gputune --help`` must not wait for torch.
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
    def check(name: str, value: object) -> object:
        if value not in allowed:
            words = f"{', '.join(map(repr, allowed))}, got {value!r}.{did_you_mean(value, allowed)}"
            raise InputError(f"{name} must be one of {words}")
        return value

    return check


def whole(name: str, value: object, *, none: bool = False) -> object:
    check_count(value, name, none=none)
    return value


def score(name: str, value: object) -> object:
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, Real) or value != value
    ):
        raise InputError(f"{name} must be a score, a number, or None, got {value!r}.")
    return value


def verbosity(name: str, value: object) -> object:
    if not isinstance(value, Integral) or value < 0:
        raise InputError(f"{name} must be 0 (silent) or 1, got {value!r}.")
    return int(value)


def seconds(name: str, value: object, *, none: bool = False) -> object:
    is_number = isinstance(value, Real) and not isinstance(value, bool) and float(value) > 0
    if not (is_number or (none and value is None)):
        raise InputError(
            f"{name} is a number of seconds above 0{', or None' if none else ''}, got {value!r}."
        )
    return value


def path(name: str, value: object) -> Path | None:
    if not (value is None or isinstance(value, str | os.PathLike)):
        got = f"got {value!r}; of a study that is open give its file."
        raise InputError(f"{name} is the path of a file, or None, {got}")
    if value is not None and Path(value).is_dir():
        file = str(Path(value) / "study.db")
        raise InputError(
            f"{name} must be a file, got the folder {str(value)!r}; give a file in it, such as "
            f"{file!r}."
        )
    # wherever a module of the user's goes meanwhile
    return None if value is None else Path(value).absolute()


def studies(name: str, value: object) -> "tuple[Study, ...]":
    """Return studies, those that are given by their files too, or by the folder that the command
    line wrote."""
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
    from gputune.tuning.choices import check_method

    return check_method(value)


def memory(name: str, value: object) -> object:
    from gputune.engine.plan import parse_memory

    parse_memory(value)
    return value


def workers(name: str, value: object) -> object:
    """Return a number, "auto" or a cluster."""
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
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(one, str) for one in names):
        raise InputError(f"{name} must be a list of columns, for example ['id'], got {value!r}.")
    return tuple(names)


def target_transform(name: str, value: object) -> "TargetTransform | None":
    from gputune.data.target_transform import check_transform

    return check_transform(name, value)


def kinds(name: str, value: object) -> "Mapping[str, Kind] | None":
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
    from gputune.callbacks import Callback

    if not isinstance(value, list | tuple) or not all(isinstance(one, Callback) for one in value):
        kind = "a list of objects of a gputune.callbacks.Callback class"
        example = "for example [gputune.callbacks.TensorBoard('runs')]"
        raise InputError(f"{name} must be {kind}, {example}, got {value!r}.")
    return tuple(value)


def seed(name: str, random_state: object) -> int:
    """Return an integer as it is; otherwise one draw from a RandomState or Generator, or from the
    system (None)."""
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
