"""Distributions of hyperparameter values in a search space: lists, scipy.stats distributions, and
gputune's own.

This module converts distributions and spaces to three notations: text for a hash, plain values for
a study file, and Optuna's notation. Optuna's notation has a "kind" (float, int or choices) and its
arguments.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from inspect import isroutine
from operator import index
from typing import Any, ClassVar, Protocol, TypeAlias, TypeGuard

import numpy as np
from scipy import stats
from sklearn.utils import check_random_state

from gputune.ground.entry_points import import_extra
from gputune.ground.errors import InputError, Verbatim
from gputune.ground.types import Config, Json
from gputune.study.values import to_json


class Distribution(Protocol):
    """Any object with the sampling method ``rvs`` of scipy.stats, as scikit-learn's
    ParameterSampler expects."""

    def rvs(self, *args: Any, **kwargs: Any) -> Any: ...


Choices = list[Any] | Distribution
"""The possible values of one key of a space."""

CheckedSpace = list[dict[str, Choices]]
"""A checked space, as a list of dicts.

Several dicts are alternatives: to sample a configuration, gputune takes one dict, then a value for
each key.
"""

ScipyFamily: TypeAlias = stats.rv_continuous | stats.rv_discrete

Label = bool | int | float | str | None
"""The types of values that Optuna's storages accept as choices of a categorical parameter."""


def is_distribution(value: object) -> TypeGuard[Distribution]:
    """Return True if ``value`` is a distribution: an object, not a class, with a method ``rvs``."""
    return callable(getattr(value, "rvs", None)) and not isinstance(value, type)


def is_real(value: object) -> TypeGuard[float]:
    """Return whether a value is an int or a float, but not a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def range_of(
    space: Iterable[Mapping[str, object]], names: Collection[str]
) -> tuple[float, float] | None:
    """Return the range (low, high) that the distributions of the hyperparameters ``names`` span in
    a space.

    The range covers all dicts of the space. Returns None without distributions, because the values
    of a list have no range.
    """
    lows = []
    highs = []
    for part in space:
        for name in names:
            support = getattr(part.get(name), "support", None)
            if support is not None:
                low, high = support()
                lows.append(float(low))
                highs.append(float(high))
    return (min(lows), max(highs)) if lows else None


@dataclass(frozen=True)
class OwnDistribution:
    """Base class of distributions that scipy lacks, with values from ``low`` to ``high``.

    Subclasses sample integers on a log scale, or values in equal steps.
    """

    word: ClassVar[str]

    low: float
    high: float

    def support(self) -> tuple[float, float]:
        """Return the smallest and the largest value that the distribution can sample."""
        return self.low, self.high

    @property
    def description(self) -> Json:
        """The distribution in Optuna's notation, a dict with its kind and arguments."""
        return {"kind": "int", "low": self.low, "high": self.high, "log": True}


@dataclass(frozen=True, repr=False)
class LogInt(OwnDistribution):
    """The log-uniform distribution of integers that ``log_int`` returns, after a check of its
    bounds."""

    word = "log_int"

    def __repr__(self) -> str:
        return f"log_int({self.low}, {self.high})"

    def rvs(
        self, size: int | tuple[int, ...] | None = None, random_state: object = None
    ) -> int | np.ndarray:
        """Sample one integer, or an int64 array of shape ``size``.

        ``random_state`` is as in scipy.stats.
        """
        rng: Any = random_state
        if not isinstance(rng, np.random.Generator):
            rng = check_random_state(rng)
        real = np.exp(rng.uniform(math.log(self.low), math.log(self.high + 1), size))
        # exp(log(low)) may be an ulp below low, and the uniform draw may round up to its open end.
        draws = np.clip(np.floor(real), self.low, self.high).astype(np.int64)
        return int(draws) if size is None else draws


def log_int(low: int, high: int) -> LogInt:
    """Return a log-uniform distribution of the integers from ``low`` to ``high``, both included.

    A sample is a log-uniform real number from [low, high + 1), rounded down. The integer k
    therefore has the probability log((k + 1) / k) / log((high + 1) / low). Rounding real numbers
    from [low, high] to the nearest integer would give the two ends only half of their share.

    Args:
        low: The smallest integer, > 0.
        high: The largest integer, > low and < 2**53.

    Returns:
        A distribution with the ``rvs`` of scipy.stats.

    Raises:
        InputError: A bound is not an integer or not in its range.

    Example:
        >>> import gputune
        >>> width = gputune.log_int(16, 256)
        >>> width
        log_int(16, 256)
        >>> all(16 <= sample <= 256 for sample in width.rvs(size=1000, random_state=0))
        True
    """
    ends = (0, 0)
    if not isinstance(low, bool) and not isinstance(high, bool):
        with suppress(TypeError):
            ends = (index(low), index(high))
    if not 0 < ends[0] < ends[1] < 2**53:
        raise InputError(
            "log_int",
            "needs integers 0 < low < high < 2**53",
            got=Verbatim(f"low={low!r}, high={high!r}"),
            remedy="For example log_int(16, 512).",
        )
    return LogInt(*ends)


@dataclass(frozen=True)
class LogIntegers(OwnDistribution):
    """The log-uniform distribution of integers, as Optuna defines it.

    A sample is a log-uniform real number from [low - 1/2, high + 1/2], rounded to an integer.
    """

    word = "log_integers"

    def rvs(self, random_state: object = None) -> int:
        low = math.log(self.low - 0.5)
        high = math.log(self.high + 0.5)
        drawn = round(math.exp(check_random_state(random_state).uniform(low, high)))
        return int(np.clip(drawn, self.low, self.high))


@dataclass(frozen=True, repr=False)
class EvenSteps(OwnDistribution):
    """The distribution of the values low, low + step, ..., high with equal probability.

    All values are integers if the three arguments are integers.
    """

    word = "steps"

    step: float

    def __repr__(self) -> str:
        # Studies store a hash of this text, so it must not change with the name of the class.
        return f"Steps(low={self.low!r}, high={self.high!r}, step={self.step!r})"

    @property
    def is_integer(self) -> bool:
        """True if all samples of the distribution are integers."""
        return all(isinstance(value, int) for value in astuple(self))

    @property
    def description(self) -> Json:
        kind = "int" if self.is_integer else "float"
        return {"kind": kind, "low": self.low, "high": self.high, "step": self.step}

    def rvs(self, random_state: object = None) -> float:
        # 1e-9 keeps the last step in spite of rounding errors
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        drawn = self.low + int(check_random_state(random_state).randint(count)) * self.step
        return min(drawn, self.high)


def _scipy_form(value: object) -> tuple[ScipyFamily, Config] | None:
    """Return the scipy.stats distribution that a value uses, and its parameters by name.

    Returns None for a custom class, even if the class has the name of a scipy distribution.
    """
    family: Any = getattr(value, "dist", value)
    if type(family) is not type(getattr(stats, str(getattr(family, "name", "")), stats)):
        return None
    names = [*(family.shapes.split(", ") if family.shapes else ()), "loc", "scale"]
    return family, dict(zip(names, getattr(value, "args", ()))) | getattr(value, "kwds", {})


def distribution_text(value: Any) -> str:
    """Convert a distribution to a text that is the same in every process.

    The text is the repr for gputune's own distributions, and the name and parameters for scipy's.
    For any other distribution, the text has its type and its first samples.
    """
    if isinstance(value, OwnDistribution):
        return repr(value)
    if scipy_form := _scipy_form(value):
        family, parameters = scipy_form
        # 1 and 1.0 must give the same text for a continuous distribution.
        dtype = float if isinstance(family, stats.rv_continuous) else None
        values = _plain_values(parameters, dtype).items()
        return f"{family.name}({', '.join(f'{key}={value!r}' for key, value in values)})"
    # The repr contains an address, and a pickle of scipy's distribution contains the state of the
    # global generator.
    rng = np.random.RandomState(0)
    draws = [np.asarray(value.rvs(random_state=rng)).tolist() for _ in range(8)]
    return f"{type(value).__module__}.{type(value).__qualname__}(draws={draws!r})"


def _plain_values(parameters: Config, dtype: type | None = None) -> Config:
    return {key: np.asarray(value, dtype).tolist() for key, value in parameters.items()}


def choices_to_json(choices: Choices) -> Json:
    """Convert a list or distribution to plain values for a study file. Raises InputError for a
    custom class."""
    if isinstance(choices, list):
        return {"list": choices}
    if isinstance(choices, OwnDistribution):
        return {choices.word: list(astuple(choices))}
    if (scipy_form := _scipy_form(choices)) is None:
        raise InputError(None, f"{choices!r} is not a distribution of scipy.stats")
    family, parameters = scipy_form
    return {"scipy": family.name, "with": _plain_values(parameters)}


def choices_from_json(values: Json) -> Choices:
    """Restore the list or distribution that ``choices_to_json`` converted to plain values.

    Raises InputError for a name that scipy.stats lacks.
    """
    if "list" in values:
        return list(values["list"])
    makers: dict[str, Callable[..., Choices]] = {
        "log_int": log_int,
        "steps": EvenSteps,
        "log_integers": LogIntegers,
    }
    for word in makers.keys() & values.keys():
        return makers[word](*values[word])
    name = values["scipy"]
    family = vars(stats).get(str(name))
    if not isinstance(family, stats.rv_continuous | stats.rv_discrete):
        raise InputError(
            None,
            f"scipy.stats has no distribution {name!r}",
            remedy="Use the version of scipy that made the study.",
        )
    distribution: Distribution = family(**values["with"])
    return distribution


def from_optuna(value: Any) -> object:
    """Convert an Optuna distribution to a list, or to a distribution for scikit-learn's sampler.

    The function returns any other value unchanged.
    """
    kind = type(value).__name__ if type(value).__module__.partition(".")[0] == "optuna" else ""
    if kind == "CategoricalDistribution":
        return list(value.choices)
    if kind not in ("FloatDistribution", "IntDistribution"):
        return value
    low = value.low
    high = value.high
    if low == high:
        return [low]
    if kind == "IntDistribution":
        return LogIntegers(low, high) if value.log else EvenSteps(low, high, value.step)
    if value.log:
        return stats.loguniform(low, high)
    return (
        stats.uniform(low, high - low) if value.step is None else EvenSteps(low, high, value.step)
    )


def as_optuna(description: Json) -> object:
    """Return the ``optuna.distributions`` object for a distribution in Optuna's notation, a
    dict."""
    distributions = import_extra(
        "optuna.distributions", extra="optuna", used_by="An Optuna distribution"
    )
    names = {
        "float": "FloatDistribution",
        "int": "IntDistribution",
        "choices": "CategoricalDistribution",
    }
    arguments = dict(description)
    return getattr(distributions, names[arguments.pop("kind")])(**arguments)


def describe(choices: Choices) -> Json | None:
    """Convert the list or distribution of a hyperparameter to Optuna's notation, a dict.

    Returns None for a distribution that Optuna lacks.
    """
    if isinstance(choices, list):
        return {"kind": "choices", "choices": labels(choices)}
    if isinstance(choices, OwnDistribution):
        return choices.description
    if (scipy_form := _scipy_form(choices)) is None:
        return None
    value: Any = choices
    low, high = value.support()
    match scipy_form[0].name:
        case "randint":
            return {"kind": "int", "low": int(low), "high": int(high)}
        case "uniform":
            return {"kind": "float", "low": float(low), "high": float(high)}
        # A loguniform with a loc is no longer log-uniform. Its median shows this: without a loc it
        # is sqrt(low * high).
        case "loguniform" | "reciprocal" if math.isclose(value.median() ** 2, low * high):
            return {"kind": "float", "low": float(low), "high": float(high), "log": True}
    return None


def label(choice: object) -> Label:
    """Return the value by which Optuna's storage represents a choice of a list.

    Optuna's storages accept numbers, strings and None. Any other choice becomes a string.
    """
    if choice is None or isinstance(choice, bool | int | float | str):
        return choice
    if hasattr(choice, "__qualname__"):
        return f"{choice.__module__}.{choice.__qualname__}"
    return repr(choice)


def labels(choices: Iterable[object]) -> list[Label]:
    """Return the values by which Optuna represents the choices of a list, without duplicates."""
    # True and 1 are equal, but they are different labels.
    return list({(type(text), text): text for text in map(label, choices)}.values())


def choice_of_label(text: object, choices: Sequence[object]) -> object:
    """Return the choice of a list that Optuna represents by the label ``text``."""
    return next(c for c in choices if type(label(c)) is type(text) and label(c) == text)


def is_fixed(choices: Choices) -> bool:
    """Return True if a hyperparameter has a single possible value."""
    return isinstance(choices, list) and len(choices) == 1


def is_inside(config: Config, space: CheckedSpace) -> bool:
    """Return True if a configuration lies in a search space, so that sampling could return it."""
    for part in space:
        if config.keys() == part.keys() and all(
            can_draw(part[key], value) for key, value in config.items()
        ):
            return True
    return False


def can_draw(choices: Choices, value: object) -> bool:
    """Return True if a value is an entry of a list, or lies in the range of a distribution."""
    if isinstance(choices, list):
        return value in choices
    if not hasattr(choices, "support") or not isinstance(value, int | float):
        return True  # a custom distribution does not tell its range
    low, high = choices.support()
    return bool(low <= value <= high)


def space_text(space: CheckedSpace) -> str:
    """Convert a checked search space to a text that is the same in every process, with sorted keys.

    gputune uses the text for the study file and its hash. Raises InputError for a ``module__*``
    value that is identified only by its address in memory.
    """
    texts = []
    for part in space:
        texts.append(", ".join(f"{key}={_text(part[key], key)}" for key in sorted(part)))
    return " | ".join(texts)


def _text(value: Any, key: str) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_text(choice, key) for choice in value)}]"
    if is_distribution(value):
        return distribution_text(value)
    if isinstance(value, type) or isroutine(value):
        text = f"{value.__module__}.{value.__qualname__}"
    elif getattr(value, "ndim", 0):  # the repr of a large array leaves out most values
        text = f"{type(value).__name__}({value.tolist()!r}, {value.dtype})"
    else:
        text = repr(value)
    if "<lambda>" in text or " at 0x" in text:
        raise InputError(
            f"space[{key!r}]",
            "must have values with the same text in every process",
            got=value,
            remedy="Use a number, a string, a class or a named function, or define __repr__ in the "
            "class of the value.",
        )
    return text


def space_to_json(space: CheckedSpace) -> Sequence[Json] | None:
    """Convert a checked search space to plain values for a study file.

    Returns None if the space has a custom object.
    """
    values = []
    try:
        for part in space:
            values.append({key: choices_to_json(choices) for key, choices in part.items()})
        to_json(values)
    except InputError:
        return None
    return values


def space_from_json(values: Sequence[Json]) -> CheckedSpace:
    """Restore the search space that ``space_to_json`` converted to plain values.

    Raises InputError for a name that scipy.stats lacks.
    """
    space = []
    for part in values:
        space.append({key: choices_from_json(value) for key, value in part.items()})
    return space


def to_scipy(space: object) -> object:
    """Convert Optuna's distributions in a search space to distributions for scikit-learn's sampler.

    The space is a dict or a list of dicts.
    """
    if isinstance(space, list | tuple):
        return type(space)(map(to_scipy, space))
    if not isinstance(space, Mapping):
        return space
    return {name: from_optuna(value) for name, value in space.items()}
