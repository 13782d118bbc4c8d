"""Optuna's distributions as what scikit-learn samples from: a list, a scipy distribution, or an object with ``rvs``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from sklearn.utils import check_random_state


@dataclass(frozen=True)
class Steps:
    """The numbers low, low + step, ..., high with equal probability: integers where all three are."""

    low: float
    high: float
    step: float

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

    def rvs(self, random_state: Any = None) -> int:
        """Draw one."""
        ends = math.log(self.low - 0.5), math.log(self.high + 0.5)
        drawn = round(math.exp(check_random_state(random_state).uniform(*ends)))
        return int(np.clip(drawn, self.low, self.high))


def translated(space: Any) -> Any:
    """Return a space, a dict or a list of dicts, with Optuna's distributions in scikit-learn's terms."""
    if isinstance(space, list):
        return [translated(part) for part in space]
    if not isinstance(space, Mapping):
        return space
    return {name: _translated(value) for name, value in space.items()}


def _translated(value: Any) -> Any:
    kind = type(value)
    if kind.__module__.partition(".")[0] != "optuna":
        return value
    if kind.__name__ == "CategoricalDistribution":
        return list(value.choices)
    if kind.__name__ == "FloatDistribution":
        return _floats(value)
    return _integers(value) if kind.__name__ == "IntDistribution" else value


def _floats(value: Any) -> Any:
    if value.low == value.high:
        return [value.low]
    if value.log:
        return stats.loguniform(value.low, value.high)
    if value.step is not None:
        return Steps(value.low, value.high, value.step)
    return stats.uniform(value.low, value.high - value.low)


def _integers(value: Any) -> Any:
    return LogIntegers(value.low, value.high) if value.log else Steps(value.low, value.high, value.step)
