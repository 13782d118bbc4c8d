"""What a value of a space is drawn from: a list, a distribution of scipy.stats, or one that scipy lacks.

Beside the object itself a distribution has three notations: text (for a hash), plain values (for a study file), and
Optuna's, ``Description``. Also which best values of a study lie at the edge of what they were drawn from.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from operator import index
from typing import Any, ClassVar, Protocol, TypeAlias, TypeGuard

import numpy as np
from scipy import stats
from sklearn.utils import check_random_state

from gputune.errors import InputError, import_extra
from gputune.methods.config import RANGES
from gputune.study.study import Study
from gputune.text import short
from gputune.types import Config, Json

Description = Json
"""One of Optuna's distributions as plain JSON: "kind" float, int or choices, and its arguments."""


class Distribution(Protocol):
    """What scikit-learn's ParameterSampler draws from: any object with scipy's ``rvs``."""

    def rvs(self, *args: Any, **kwargs: Any) -> Any: ...


Choices = list[Any] | Distribution
"""What a space has for one key."""

ScipyLaw: TypeAlias = stats.rv_continuous | stats.rv_discrete

Label = bool | int | float | str | None
"""What Optuna's storages hold."""


def is_distribution(value: object) -> TypeGuard[Distribution]:
    """Say whether ``value`` draws: an object (not a class) with ``rvs``."""
    return callable(getattr(value, "rvs", None)) and not isinstance(value, type)


def range_of(space: Iterable[Mapping[str, object]], names: Collection[str]) -> tuple[float, float] | None:
    """Return the range that the distributions of some parameters span over all dicts of a space.

    None where there are no distributions: values in lists have no range.
    """
    supports = [getattr(each[name], "support", None) for each in space for name in names if name in each]
    ends = [tuple(map(float, support())) for support in supports if support is not None]
    return (min(low for low, _ in ends), max(high for _, high in ends)) if ends else None


@dataclass(frozen=True)
class OwnDistribution:
    """A distribution that scipy lacks: integers between ``low`` and ``high`` on a log scale, or numbers in steps."""

    word: ClassVar[str]

    low: float
    high: float

    def support(self) -> tuple[float, float]:
        """Return the smallest and the largest number, both of which are drawn."""
        return self.low, self.high

    @property
    def description(self) -> Description:
        return {"kind": "int", "low": self.low, "high": self.high, "log": True}


@dataclass(frozen=True, repr=False)
class LogInt(OwnDistribution):
    """Log-uniform integers; made by ``log_int``, which checks the ends."""

    word = "log_int"

    def __repr__(self) -> str:
        return f"log_int({self.low}, {self.high})"

    def rvs(self, size: int | tuple[int, ...] | None = None, random_state: object = None) -> int | np.ndarray:
        """Draw one integer, or an int64 array of shape ``size``; ``random_state`` is as in scipy.stats."""
        given = random_state
        rng = given if isinstance(given, np.random.Generator) else check_random_state(given)
        real = np.exp(rng.uniform(math.log(self.low), math.log(self.high + 1), size))
        # exp(log(low)) may be an ulp below low, and the uniform draw may round up to its open end.
        draws = np.clip(np.floor(real), self.low, self.high).astype(np.int64)
        return int(draws) if size is None else draws


def log_int(low: int, high: int) -> LogInt:
    """Return a distribution of the integers ``low`` to ``high``, both included, uniform on a log scale.

    A draw is a log-uniform real number of [low, high + 1), rounded down, so that k has the probability
    log((k + 1) / k) / log((high + 1) / low). Rounding [low, high] to the nearest would give the two ends half
    of their share. Raises InputError unless both are integers with 0 < low < high < 2**53.
    """
    ends = (0, 0)
    with suppress(TypeError):
        ends = (0, 0) if isinstance(low, bool) or isinstance(high, bool) else (index(low), index(high))
    if not 0 < ends[0] < ends[1] < 2**53:
        raise InputError(
            f"log_int needs integers 0 < low < high < 2**53, got low={low!r}, high={high!r}. "
            "For example log_int(16, 512)."
        )
    return LogInt(*ends)


@dataclass(frozen=True)
class LogIntegers(OwnDistribution):
    """Log-uniform integers as Optuna draws them: the logarithm of [low - 1/2, high + 1/2], rounded."""

    word = "log_integers"

    def rvs(self, random_state: object = None) -> int:
        ends = math.log(self.low - 0.5), math.log(self.high + 0.5)
        drawn = round(math.exp(check_random_state(random_state).uniform(*ends)))
        return int(np.clip(drawn, self.low, self.high))


@dataclass(frozen=True)
class Steps(OwnDistribution):
    """The numbers low, low + step, ..., high with equal probability: integers where all three are."""

    word = "steps"

    step: float

    @property
    def whole(self) -> bool:
        return all(isinstance(value, int) for value in astuple(self))

    @property
    def description(self) -> Description:
        kind = "int" if self.whole else "float"
        return {"kind": kind, "low": self.low, "high": self.high, "step": self.step}

    def rvs(self, random_state: object = None) -> float:
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        drawn = self.low + int(check_random_state(random_state).randint(count)) * self.step
        return min(drawn, self.high)


def _scipy_law(value: object) -> tuple[ScipyLaw, Config] | None:
    """Return scipy's law and its parameters by name; None for a class of the user's own, whatever its name is."""
    law: Any = getattr(value, "dist", value)
    if type(law) is not type(getattr(stats, str(getattr(law, "name", "")), stats)):
        return None
    names = [*(law.shapes.split(", ") if law.shapes else ()), "loc", "scale"]
    return law, dict(zip(names, getattr(value, "args", ()))) | getattr(value, "kwds", {})


def distribution_text(value: Any) -> str:
    """Return a distribution as text that is the same in every process.

    Our own by their repr, scipy's by name and parameters, any other by its type and first draws.
    """
    if isinstance(value, OwnDistribution):
        return repr(value)
    if scipy_law := _scipy_law(value):
        law, parameters = scipy_law
        number = float if isinstance(law, stats.rv_continuous) else None  # 1 and 1.0 are one text
        words = (f"{key}={np.asarray(end, number).tolist()!r}" for key, end in parameters.items())
        return f"{law.name}({', '.join(words)})"
    # repr shows an address, and a pickle of scipy's holds the state of the global generator.
    rng = np.random.RandomState(0)
    draws = [np.asarray(value.rvs(random_state=rng)).tolist() for _ in range(8)]
    return f"{type(value).__module__}.{type(value).__qualname__}(draws={draws!r})"


def choices_to_json(choices: Choices) -> Json:
    """Return a list or distribution as plain values. Raises InputError for a class of the user's own."""
    if isinstance(choices, list):
        return {"list": choices}
    if isinstance(choices, OwnDistribution):
        return {choices.word: list(astuple(choices))}
    if (scipy_law := _scipy_law(choices)) is None:
        raise InputError(f"{choices!r} is no distribution of scipy.stats.")
    law, parameters = scipy_law
    return {"scipy": law.name, "with": {key: np.asarray(end).tolist() for key, end in parameters.items()}}


def choices_from_json(values: Json) -> Choices:
    """Return what ``choices_to_json`` described. Raises InputError for a name that scipy.stats lacks."""
    if "list" in values:
        return list(values["list"])
    makers: dict[str, Callable[..., Choices]] = {"log_int": log_int, "steps": Steps, "log_integers": LogIntegers}
    for word in makers.keys() & values.keys():
        return makers[word](*values[word])
    law = getattr(stats, str(values["scipy"]), None)
    if not isinstance(law, stats.rv_continuous | stats.rv_discrete):
        raise InputError(f"scipy.stats has no distribution {values['scipy']!r}; use the scipy that made the study.")
    distribution: Distribution = law(**values["with"])
    return distribution


def from_optuna(value: Any) -> object:
    """Return one of Optuna's distributions in scikit-learn's terms, and what is none as it is."""
    kind = type(value).__name__ if type(value).__module__.partition(".")[0] == "optuna" else ""
    if kind == "CategoricalDistribution":
        return list(value.choices)
    if kind not in ("FloatDistribution", "IntDistribution"):
        return value
    low, high = value.low, value.high
    if low == high:
        return [low]
    if kind == "IntDistribution":
        return LogIntegers(low, high) if value.log else Steps(low, high, value.step)
    if value.log:
        return stats.loguniform(low, high)
    return stats.uniform(low, high - low) if value.step is None else Steps(low, high, value.step)


def as_optuna(description: Description) -> object:
    """Return the ``optuna.distributions`` object."""
    distributions = import_extra("optuna.distributions", extra="optuna", used_by="An Optuna distribution")
    arguments = {key: value for key, value in description.items() if key != "kind"}
    names = {"float": "FloatDistribution", "int": "IntDistribution", "choices": "CategoricalDistribution"}
    return getattr(distributions, names[description["kind"]])(**arguments)


def describe(choices: Choices) -> Description | None:
    """Return the list or distribution of one key as one of Optuna's; None for a law that Optuna does not have."""
    if isinstance(choices, list):
        return {"kind": "choices", "choices": labels(choices)}
    if isinstance(choices, OwnDistribution):
        return choices.description
    if (scipy_law := _scipy_law(choices)) is None:
        return None
    value: Any = choices
    low, high = (end.item() if hasattr(end, "item") else end for end in value.support())
    match scipy_law[0].name:
        case "randint":
            return {"kind": "int", "low": int(low), "high": int(high)}
        case "uniform":
            return {"kind": "float", "low": float(low), "high": float(high)}
        # A loguniform that is moved by its loc is none any more: its median tells.
        case "loguniform" | "reciprocal" if math.isclose(value.median() ** 2, low * high):
            return {"kind": "float", "low": float(low), "high": float(high), "log": True}
    return None


def label(choice: object) -> Label:
    """Return what stands for a choice in Optuna, whose storages hold numbers, words and None: others as text."""
    if choice is None or isinstance(choice, bool | int | float | str):
        return choice
    return f"{choice.__module__}.{choice.__qualname__}" if hasattr(choice, "__qualname__") else repr(choice)


def labels(choices: Iterable[object]) -> list[Label]:
    """Return the labels of choices, each once."""
    return list({(type(text), text): text for text in map(label, choices)}.values())


def of_label(text: object, choices: Sequence[object]) -> object:
    """Return the choice that a label stands for."""
    return next(c for c in choices if type(label(c)) is type(text) and label(c) == text)


_TRIED = 3  # values of a hyperparameter from which on the best one says something
_NEAR = 0.05  # share of a range, on its own scale, that counts as its end


def edge_remarks(study: Study) -> tuple[str, ...]:
    """Return a sentence for each hyperparameter whose best value is the first or last one in the space.

    Nothing is said of words, of values that no law of one range was drawn from, of what a descent moves, and of the end
    that no value may lie beyond, as dropout=0; nor where an included trial went further, or another scored the same.
    """
    finite = np.flatnonzero(np.isfinite(study.scores)).tolist()
    if not finite:
        return ()
    sentences, best = [], study.order[0]
    scored = [study.rows[row][0].params for row in finite]
    equal = [study.rows[row][0].params for row in np.flatnonzero(study.scores == study.scores[best]).tolist()]
    for key, law in study.record.distributions.items():
        value, ends = study.rows[best][0].params.get(key), _ends(law)
        if ends is None or not _is_number(value) or key in study.record.descended:
            continue
        values = [params.get(key) for params in scored]
        plain = {int, float}.issuperset(map(type, values))  # as those of 100,000 trials are, and have few values
        tried = set(filter(_is_number, set(values) if plain else values))
        if len(tried) < _TRIED:
            continue
        (low, high), rule = ends, RANGES.get(key)
        places = [_place(params[key], low, high, law) for params in equal if _is_number(params.get(key))]
        # Beyond a bound of the key no value may lie.
        bounded = (low <= rule.low, high >= rule.high) if rule else (low == 0, False)
        lower = max(places) <= _NEAR and low <= min(tried) and not bounded[0]
        upper = min(places) >= 1 - _NEAR and max(tried) <= high and not bounded[1]
        for at_end, end, beyond in ((lower, "lower", "smaller"), (upper, "upper", "larger")):
            if at_end:
                where = f"at the {end} end of the space, {short(low)} to {short(high)}"
                sentences.append(f"The best {key}, {short(value)}, lies {where}: no {beyond} one was tried.")
    return tuple(sentences)


def _ends(law: Mapping[str, object]) -> tuple[float, float] | None:
    """Return the smallest and the largest value; None of words, and of less than three numbers."""
    if law["kind"] != "choices":
        low, high = law.get("low"), law.get("high")
        return (low, high) if _is_number(low) and _is_number(high) else None
    choices = law.get("choices")
    if not isinstance(choices, list | tuple) or not all(map(_is_number, choices)) or len({*choices}) < _TRIED:
        return None
    return min(choices), max(choices)


def _place(value: float, low: float, high: float, law: Mapping[str, object]) -> float:
    """Return where a value lies from 0, the low end, to 1; of choices the ends alone are 0 and 1."""
    if law["kind"] == "choices":
        return 0.0 if value == low else 1.0 if value == high else 0.5
    if law.get("log") and low > 0 and value > 0:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low) if high > low else 0.5


def _is_number(value: object) -> TypeGuard[float]:
    # An integer may be too large for a float, but not to be compared with one.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
