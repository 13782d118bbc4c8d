"""Checks of option values.

A check is a function of the name and the value of an option. The check returns the value to use, or
raises InputError. Slow modules are imported only when they are needed, because ``gputune --help``
must not wait for torch.
"""

import math
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING

from gputune.engine.backends.table import backend_words, is_backend_word
from gputune.ground.errors import InputError, Verbatim, check_count, option, per_interface
from gputune.ground.text import did_you_mean

if TYPE_CHECKING:
    from gputune.data.kinds import Kind
    from gputune.data.target_transform import TargetTransform
    from gputune.study.study import Study
    from gputune.tuning.callbacks import Callback
    from gputune.tuning.method import Method


_OR_NONE = per_interface(", or None", "")


def one_of(*allowed: str | bool) -> Callable[[str, object], object]:
    """Return a check function that raises InputError for a value that is not in ``allowed``."""

    def check(name: str, value: object) -> object:
        if value not in allowed:
            rule = f"must be one of {', '.join(map(repr, allowed))}"
            raise InputError(name, rule, got=value, remedy=did_you_mean(value, allowed).strip())
        return value

    return check


def backend(name: str, value: object) -> object:
    """Raise InputError for a value that is not in the table of backends."""
    if not is_backend_word(value):
        one_of(*backend_words())(name, value)
    return value


def count(name: str, value: object, *, none: bool = False, auto: bool = False) -> object:
    """Raise InputError unless an option's value is an integer >= 1.

    None is valid only with ``none=True``, and "auto" only with ``auto=True``. Returns the unchanged
    value.
    """
    if not (auto and isinstance(value, str) and value == "auto"):
        check_count(value, name, none=none)
    return value


def score(name: str, value: object) -> object:
    """Raise InputError unless an option's value is a score: a number that is not NaN, or None.

    Returns the unchanged value.
    """
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, Real) or value != value
    ):
        raise InputError(name, f"must be a number such as 0.95{_OR_NONE}", got=value)
    return value


def verbosity(name: str, value: object) -> object:
    """Return the value of the option ``verbose`` as an int.

    Raises InputError for a negative value.
    """
    if not isinstance(value, Integral) or value < 0:
        raise InputError(name, "must be 0 (silent) or 1", got=value)
    return int(value)


def seconds(name: str, value: object) -> object:
    """Raise InputError unless an option's value is a number of seconds above 0.

    Returns the unchanged value.
    """
    if not (isinstance(value, Real) and not isinstance(value, bool) and float(value) > 0):
        raise InputError(name, "must be a number of seconds above 0", got=value)
    return value


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
"""The units of a duration, in seconds."""

_DURATION = re.compile(r"(?:\d+(?:\.\d+)?[smhd])+")
_JOB_END = "SLURM_JOB_END_TIME"
# The part of a SLURM job's remaining time that is left for the refit and for saving.
_REFIT_SHARE = 0.05
_REFIT_SECONDS = 60


def duration(name: str, value: object) -> object:
    """Return the seconds of an option's duration, or None.

    The value is a number of seconds, text such as "90", "60s", "5m" or "1h30m", or "auto" for the
    time until the SLURM job ends. Raises InputError for other values, and for a job without a time
    limit.
    """
    if value is None:
        return None
    if value == "auto":
        return _until_job_ends(name)
    total = math.nan
    if isinstance(value, Real) and not isinstance(value, bool):
        total = float(value)
    elif isinstance(value, str) and _DURATION.fullmatch(value):
        parts = re.findall(r"([\d.]+)([smhd])", value)
        total = sum(float(number) * _UNITS[unit] for number, unit in parts)
    elif isinstance(value, str):
        with suppress(ValueError):
            total = float(value)
    if not total > 0:
        raise InputError(
            name,
            "must be a number of seconds above 0, or a time such as '60s', '5m' or "
            f"'1h30m'{_OR_NONE}",
            got=value,
        )
    return total


def _until_job_ends(name: str) -> float:
    """Return the seconds until the SLURM job of this process ends, less the time for the refit.

    Raises InputError outside a job with a time limit, and shortly before its end.
    """
    text = os.environ.get(_JOB_END, "")
    if not text.isdecimal():
        raise InputError(
            option(name, "auto"),
            f"reads the environment variable {_JOB_END}, which SLURM sets in a job with a time "
            "limit",
            got=Verbatim("no such variable" if not text else f"{text!r}"),
            remedy="Pass a time, such as '30m'.",
        )
    left = int(text) - time.time()
    usable = left - max(_REFIT_SECONDS, _REFIT_SHARE * left)
    if usable <= 0:
        raise InputError(
            option(name, "auto"),
            f"needs more than {_REFIT_SECONDS} s until the SLURM job ends",
            got=Verbatim(f"{max(0.0, left):.0f} s"),
            remedy="Submit the job with a longer --time.",
        )
    return usable


def path(name: str, value: object) -> Path | None:
    """Return the value of a file option as an absolute path, or None if the option is not set.

    Raises InputError for a folder.
    """
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
            remedy=f"Pass a file in this folder, such as {file!r}.",
        )
    # Absolute, because a module of the user may change the current folder later.
    return None if value is None else Path(value).absolute()


def studies(name: str, value: object) -> "tuple[Study, ...]":
    """Return the opened studies that an option names.

    The value is a study, the path of a study file, or a list of both. A path may also be a folder
    that the command line wrote.
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
        raise InputError(
            name, "must be a study, the path of a study, or a list of studies", got=value
        )
    return tuple(map(opened, studies))


def method(name: str, value: object) -> "Method":
    """Return the search method that the option ``method`` names.

    Raises InputError for an unknown method.
    """
    from gputune.tuning.method import check_method

    return check_method(value)


def memory(name: str, value: object) -> object:
    """Raise InputError unless an option's value is a memory limit such as "8GB".

    Returns the unchanged value.
    """
    from gputune.engine.plan import parse_memory

    parse_memory(value)
    return value


def workers(name: str, value: object) -> object:
    """Return the checked value of the option ``workers``: a number of processes, "auto" or a
    cluster."""
    from gputune.executors.cluster import Cluster, named_cluster
    from gputune.ground.entry_points import integrations

    if value == "auto" or isinstance(value, Cluster):
        return value
    if not isinstance(value, str):
        return count(name, value)
    clusters = integrations("clusters")
    if value in clusters:
        return named_cluster(value)
    words = ", ".join(map(repr, ["auto", *clusters]))
    raise InputError(name, f"must be a number of processes, {words} or gputune.Ray(...)", got=value)


def names(name: str, value: object) -> tuple[str, ...]:
    """Return the column names of an option as a tuple. One name may be passed as a string."""
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(text, str) for text in names):
        raise InputError(name, "must be a list of column names, for example ['id']", got=value)
    return tuple(names)


def target_transform(name: str, value: object) -> "TargetTransform | None":
    """Return the checked transform of the target, such as "log", or None.

    Raises InputError for an unknown transform.
    """
    from gputune.data.target_transform import check_transform

    return check_transform(name, value)


def kinds(name: str, value: object) -> "Mapping[str, Kind] | None":
    """Return the column kinds that the user sets, as a dict from column name to kind, or None.

    Raises InputError for an unknown kind.
    """
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
    """Return the callbacks of a search as a tuple.

    Raises InputError if an element is not a ``Callback``.
    """
    from gputune.tuning.callbacks import Callback

    if not isinstance(value, list | tuple) or not all(isinstance(item, Callback) for item in value):
        raise InputError(
            name,
            "must be a list of gputune.callbacks.Callback objects, for example "
            "[gputune.callbacks.TensorBoard('runs')]",
            got=value,
            remedy=_remedy_for_callbacks(value),
        )
    return tuple(value)


_TRAINER_PACKAGES = {"lightning", "pytorch_lightning", "transformers"}


def _remedy_for_callbacks(value: object) -> str:
    """Return advice for callbacks of a trainer of another library, or ""."""
    items = value if isinstance(value, list | tuple) else [value]
    packages = {base.__module__.partition(".")[0] for item in items for base in type(item).__mro__}
    if packages.isdisjoint(_TRAINER_PACKAGES):
        return ""
    return (
        f"gputune trains without a trainer. Pass {option('patience', 5)} to stop trials early. To "
        "keep the trainer and its callbacks, call the trainer in the objective of gputune.search."
    )


def seed(name: str, random_state: object) -> int:
    """Return the random seed of a search as an int.

    An integer stays unchanged. For a RandomState or Generator, the seed is its next random integer.
    For None, the seed is random.
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
