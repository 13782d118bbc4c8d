"""What a value of a space is drawn from: scipy.stats distributions, and those that scipy lacks."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from operator import index
from typing import Any, Protocol, TypeGuard

import numpy as np
from scipy import stats
from sklearn.utils import check_random_state

from gputune.errors import InputError


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
