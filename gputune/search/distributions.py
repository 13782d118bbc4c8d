"""What a value of a space is drawn from: scipy.stats distributions, and those that scipy lacks.

The command line's KEY=SPEC: one key of a space written as text.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from operator import index
from typing import Any, Protocol, TypeGuard

import numpy as np
from scipy import stats
from sklearn.utils import check_random_state

from gputune.errors import InputError
from gputune.search.config import RANGES, WORDS


class Distribution(Protocol):
    """What scikit-learn's ParameterSampler draws from: any object with scipy's ``rvs``."""

    def rvs(self, *args: Any, **kwargs: Any) -> Any: ...


def is_distribution(value: object) -> TypeGuard[Distribution]:
    """Say whether ``value`` draws: an object (not a class) with ``rvs``."""
    return callable(getattr(value, "rvs", None)) and not isinstance(value, type)


def range_of(space: Iterable[Mapping[str, Any]], names: Collection[str]) -> tuple[float, float] | None:
    """Return the range that the distributions of some parameters span over all dicts of a space.

    None where there are no distributions: values in lists have no range.
    """
    supports = [getattr(each[name], "support", None) for each in space for name in names if name in each]
    ends = [tuple(map(float, support())) for support in supports if support is not None]
    return (min(low for low, _ in ends), max(high for _, high in ends)) if ends else None


@dataclass(frozen=True)
class LogInt:
    """Log-uniform integers; made by ``log_int``, which checks the ends."""

    low: int
    high: int

    def __repr__(self) -> str:
        return f"log_int({self.low}, {self.high})"

    def support(self) -> tuple[int, int]:
        """Return the smallest and the largest integer, both of which are drawn."""
        return self.low, self.high

    def rvs(self, size: int | tuple[int, ...] | None = None, random_state: Any = None) -> Any:
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
    try:
        ends = (0, 0) if isinstance(low, bool) or isinstance(high, bool) else (index(low), index(high))
    except TypeError:
        ends = (0, 0)
    if not 0 < ends[0] < ends[1] < 2**53:
        raise InputError(
            f"log_int needs integers 0 < low < high < 2**53, got low={low!r}, high={high!r}. "
            "For example log_int(16, 512)."
        )
    return LogInt(*ends)


@dataclass(frozen=True)
class Steps:
    """The numbers low, low + step, ..., high with equal probability: integers where all three are."""

    low: float
    high: float
    step: float

    @property
    def whole(self) -> bool:
        """Whether it draws integers."""
        return all(isinstance(value, int) for value in (self.low, self.high, self.step))

    def support(self) -> tuple[float, float]:
        """Return the smallest and the largest number, both of which are drawn."""
        return self.low, self.high

    def rvs(self, random_state: Any = None) -> Any:
        """Draw one."""
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        drawn = self.low + int(check_random_state(random_state).randint(count)) * self.step
        return min(drawn, self.high)


@dataclass(frozen=True)
class LogIntegers:
    """Log-uniform integers as Optuna draws them: the logarithm of [low - 1/2, high + 1/2], rounded."""

    low: int
    high: int

    def support(self) -> tuple[int, int]:
        """Return the smallest and the largest integer, both of which are drawn."""
        return self.low, self.high

    def rvs(self, random_state: Any = None) -> int:
        """Draw one."""
        ends = math.log(self.low - 0.5), math.log(self.high + 0.5)
        drawn = round(math.exp(check_random_state(random_state).uniform(*ends)))
        return int(np.clip(drawn, self.low, self.high))


def distribution_text(value: Any) -> str:
    """Return a distribution as text that is the same in every process.

    Our own by their repr, scipy's by name and parameters, any other by its type and first draws.
    """
    if isinstance(value, LogInt | Steps | LogIntegers):
        return repr(value)
    unfrozen = isinstance(value, stats.rv_continuous | stats.rv_discrete)
    law: Any = value if unfrozen else getattr(value, "dist", value)
    # A law of the user's own may have any name, so the type decides.
    namesake: Any = getattr(stats, str(getattr(law, "name", "")), None)
    if type(law) is type(namesake):
        names = [*(law.shapes.split(", ") if law.shapes else ()), "loc", "scale"]
        given = dict(zip(names, getattr(value, "args", ()))) | getattr(value, "kwds", {})
        number = float if isinstance(law, stats.rv_continuous) else None  # 1 and 1.0 are one text
        return f"{law.name}({', '.join(f'{k}={np.asarray(v, number).tolist()!r}' for k, v in given.items())})"
    # repr shows an address, and a pickle of scipy's holds the state of the global generator.
    rng = np.random.RandomState(0)
    draws = [np.asarray(value.rvs(random_state=rng)).tolist() for _ in range(8)]
    return f"{type(value).__module__}.{type(value).__qualname__}(draws={draws!r})"


_EXAMPLES = (
    "Examples: width=32,64,128 (a list), width=16..256 (all integers between), width=16..256:log, "
    "lr=1e-4..1e-1:log, dropout=0..0.5, activation=relu,tanh."
)


def parse_specs(texts: Iterable[str]) -> dict[str, Any]:
    """Return the space of several ``KEY=SPEC``, for ``check_space``; a key given twice is an InputError."""
    space: dict[str, Any] = {}
    for text in texts:
        key, value = parse_spec(text)
        if key in space:
            raise InputError(f"--space must name a key once, got {key!r} twice. Join them: {key}=A,B.")
        space[key] = value
    return space


def parse_spec(text: str) -> tuple[str, Any]:
    """Return the key and the value of one ``KEY=SPEC``, as ``check_space`` takes it.

    ``a,b,c`` is a list, ``a..b`` uniform between (all integers, both ends included, for an integer key),
    ``a..b:log`` log-uniform, anything else one fixed value. A ``module__*`` value is read as a number, as
    true or false, else as a word; its range is of integers when both ends are written so. Raises InputError.
    """
    key, equals, spec = (part.strip() for part in text.partition("="))
    if not equals or not key or not spec:
        raise InputError(f"A space is written KEY=SPEC, got {text!r}. {_EXAMPLES}")
    ends = re.fullmatch(r"([^,]*?)\.\.([^:,]*)(:.*)?", spec)
    if ends and (key in RANGES or None not in (_number(ends[1]), _number(ends[2]))):
        return key, _parse_range(key, ends[1], ends[2], (ends[3] or "").strip(), text)
    values = [_parse_value(key, part.strip(), text) for part in spec.split(",")]
    return key, values if len(values) > 1 else values[0]


def _parse_range(key: str, low_text: str, high_text: str, scale: str, text: str) -> Any:
    low, high = _number(low_text), _number(high_text)
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(f"A range is LOW..HIGH with two finite numbers, got {text!r}. {_EXAMPLES}")
    if scale not in ("", ":log"):
        raise InputError(f"A range may end in ':log', not in {scale!r}, got {text!r}. {_EXAMPLES}")
    if low >= high:
        raise InputError(
            f"A range needs LOW < HIGH, got {text!r}. "
            f"Swap the ends, or write {key}={low_text.strip()} for one value."
        )
    if scale and low <= 0:
        example = f"{high / 1000:g}..{high:g}" if high > 0 else "1e-4..1e-1"
        raise InputError(f"A log range needs LOW > 0, got {text!r}. For example {key}={example}:log.")
    written_as_integers = isinstance(low, int) and isinstance(high, int)
    if RANGES[key].integer if key in RANGES else written_as_integers:
        if low != int(low) or high != int(high):
            raise InputError(f"A range of {key} needs integer ends, got {text!r}. {_EXAMPLES}")
        low, high = int(low), int(high)
        return log_int(low, high) if scale else stats.randint(low, high + 1)
    return stats.loguniform(low, high) if scale else stats.uniform(low, high - low)


def _parse_value(key: str, text: str, spec: str) -> Any:
    if not text:
        raise InputError(f"A list needs a value at each place, got {spec!r}. {_EXAMPLES}")
    if key in WORDS:
        return text
    number = _number(text)
    if number is not None:
        return number
    if key in RANGES:
        raise InputError(f"{key} must be {RANGES[key].rule}, got the text {text!r} in {spec!r}. {_EXAMPLES}")
    return {"true": True, "false": False}.get(text.lower(), text)


def _number(text: str) -> int | float | None:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            pass
    return None
