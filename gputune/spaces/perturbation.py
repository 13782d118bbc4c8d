"""Perturb the hyperparameters of a trial between two epochs of its training.

Population based training moves only hyperparameters that leave the shapes of all tensors unchanged.
A moved value stays within the bounds of the search space.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gputune.ground.types import DECAY_FACTOR, LR_FACTOR, ONLINE, Config
from gputune.spaces.config import RANGES, check_value
from gputune.spaces.distributions import (
    CheckedSpace,
    Choices,
    Distribution,
    can_draw,
    describe,
    is_fixed,
    is_real,
)

MOVABLE = ("lr", "weight_decay", "momentum", "dropout", "loss__label_smoothing")
"""The hyperparameters that can change during training, in addition to the rate factors.

The batch size of a built-in model can change too. The minibatches of a module keep their size.
"""


@dataclass(frozen=True)
class Perturbation:
    """The way in which a value is perturbed.

    Attributes:
        factors: a number is multiplied by one of these factors, which is drawn.
        resample: the probability that a value is drawn again from the space instead.
        batch_size: True if the batch size moves too, as for built-in models.
    """

    factors: Sequence[float]
    resample: float
    batch_size: bool = False
    # by the identity of a distribution, which the entry keeps alive
    _known_ranges: "dict[int, _Range]" = field(default_factory=dict, compare=False, repr=False)

    def move(self, params: Config, space: CheckedSpace, rng: np.random.RandomState) -> Config:
        """Return a configuration in which all movable hyperparameters of the space are perturbed.

        A zero stays zero, and a positive number stays positive, because the optimizer keeps other
        tensors for zero momentum and for zero averaging than for positive values.

        Args:
            params: The configuration.
            space: The search space. Its fixed values and its lists with one value do not move.
            rng: The random generator. Each value takes its random numbers in the order of the keys.
        """
        moved = dict(params)
        part = part_of(params, space)
        for key in sorted(_movable_keys(params, part, batch_size=self.batch_size)):
            value = self._moved(params[key], part[key], rng)
            if is_legal(key, value) and bool(value) == bool(params[key]):
                moved[key] = check_value(key, value, key)
        return moved

    def _moved(self, value: Any, choices: Choices, rng: np.random.RandomState) -> Any:
        """Return a perturbed or newly drawn value of one hyperparameter."""
        is_drawn = rng.random_sample() < self.resample
        factor = self.factors[int(rng.random_sample() * len(self.factors))]
        if isinstance(choices, list):
            # A neighbor needs an order, so values of unsorted lists are drawn again.
            if is_drawn or value not in choices or not _is_sorted(choices):
                return choices[rng.randint(len(choices))]
            place = choices.index(value) + (1 if factor > 1 else -1)
            return choices[min(max(place, 0), len(choices) - 1)]
        if id(choices) not in self._known_ranges:
            self._known_ranges[id(choices)] = _Range.of(choices)
        limits = self._known_ranges[id(choices)]
        if is_drawn or not is_real(value):
            return limits.draw(rng)
        moved = limits.clip(value * factor)
        return round(moved) if isinstance(value, int) else moved


@dataclass(frozen=True)
class _Range:
    """The range of a distribution. scipy takes longer to compute it than a member to train a step.

    Attributes:
        choices: the distribution.
        low: its smallest value.
        high: its largest value.
        scale: "log" or "linear" for a log-uniform or uniform distribution of floats, else "".
    """

    choices: Distribution
    low: float = -math.inf
    high: float = math.inf
    scale: str = ""

    @classmethod
    def of(cls, choices: Distribution) -> "_Range":
        """Return the range of a distribution."""
        if not hasattr(choices, "support"):
            return cls(choices)
        low, high = map(float, choices.support())
        description = describe(choices)
        if description is None or description["kind"] != "float" or "step" in description:
            return cls(choices, low, high)
        return cls(choices, low, high, "log" if description.get("log") else "linear")

    def clip(self, value: float) -> float:
        """Return the nearest value within the range."""
        return min(max(value, self.low), self.high)

    def draw(self, rng: np.random.RandomState) -> Any:
        """Return a random value of the distribution."""
        if not self.scale:
            return self.choices.rvs(random_state=rng)
        share = rng.random_sample()
        if self.scale == "log":
            return self.clip(self.low * (self.high / self.low) ** share)
        return self.clip(self.low + (self.high - self.low) * share)


def movable_keys(params: Config, space: CheckedSpace, *, batch_size: bool = False) -> list[str]:
    """Return the hyperparameters of a configuration that population based training may change.

    They have several possible values in the space. The optimizers that adapt their learning rate
    use ``lr`` only at the start, so their ``lr`` does not move.
    """
    return _movable_keys(params, part_of(params, space), batch_size=batch_size)


def _movable_keys(params: Config, part: Mapping[str, Choices], *, batch_size: bool) -> list[str]:
    """Return the hyperparameters of a configuration that may change. ``part`` is its part of the
    space."""
    keys = []
    for key in params:
        is_movable = key in MOVABLE or key.startswith((LR_FACTOR, DECAY_FACTOR))
        is_movable = is_movable or (batch_size and key == "batch_size")
        is_initial = key == "lr" and params.get("optimizer") in ONLINE
        is_searched = key in part and not is_fixed(part[key])
        if is_movable and not is_initial and is_searched and not _has_tuples(part[key]):
            keys.append(key)
    return keys


def _has_tuples(choices: Choices) -> bool:
    """Return whether a value of a list is a tuple with one number for each hidden layer."""
    return isinstance(choices, list) and any(isinstance(value, tuple) for value in choices)


def part_of(params: Config, space: CheckedSpace) -> dict[str, Choices]:
    """Return the part of a space that can draw a configuration.

    A configuration of the user may lie outside the space. Then the result is the first part with
    the same keys, or else the first part.
    """
    parts = [part for part in space if part.keys() == params.keys()] or space
    if len(parts) == 1:
        return parts[0]
    for part in parts:
        if all(can_draw(part[key], value) for key, value in params.items() if key in part):
            return part
    return parts[0]


def is_legal(key: str, value: Any) -> bool:
    """Return whether a hyperparameter may have a value: an open end of its range is not a value."""
    legal = RANGES.get(key)
    return legal is None or legal.includes(float(value))


def _is_sorted(choices: Sequence[Any]) -> bool:
    """Return whether a list has numbers in rising order."""
    if not all(map(is_real, choices)):
        return False
    return all(low < high for low, high in zip(choices, choices[1:]))
