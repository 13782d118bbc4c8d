"""The steps of a hypergradient search from one starting configuration.

A starting point is a configuration from which the search begins. The search changes its
hyperparameters so that the mean validation loss over the folds falls. The steps are in the
logarithms or logits of the hyperparameters, called coordinates. Batch size, width and depth do not
change. These three hyperparameters differ between starting points.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
import torch

from gputune.ground.annotations import FloatArray
from gputune.ground.types import Config, Json
from gputune.hypergradients.inner import CHAOTIC, as_table, from_coordinate, speed, to_coordinate

_DIVIDED = 10  # divides the length of a normalized step when the loss rises
# After this number of chaotic points, the slopes come from wide finite differences.
_MOST_CHAOTIC = 2

SegmentTable: TypeAlias = FloatArray  # (S, L): S segments of the training time, L layers
Tables: TypeAlias = dict[str, SegmentTable]  # by hyperparameter
Bounds = Mapping[str, tuple[float, float]]


class DescentOptions(Protocol):
    """The options of ``Hypergradient`` that decide the steps."""

    @property
    def step(self) -> Literal["sign", "normalized"]: ...

    @property
    def smallest_step(self) -> float: ...

    def first_length(self, *, several: bool) -> float: ...


@dataclass(frozen=True)
class Slope:
    """The mean validation loss of one configuration and its derivatives in the hyperparameters.

    Attributes:
        loss: The mean validation loss over the folds.
        slopes: The derivative of the loss in the coordinates of each hyperparameter, (S, L) for S
            segments of the training time and L layers.
        errors: The standard errors of the slopes over the folds, (S, L). NaN for one fold.
        usable: False if the slopes are chaotic, which ``ratio`` tells, or not finite.
        ratio: The largest measure of chaos over the folds.
        mode: "exact" for derivatives, "differences" for finite differences.
    """

    loss: float
    slopes: Tables
    errors: Tables
    usable: bool
    ratio: float
    mode: Literal["exact", "differences"]

    def to_detail(self) -> Json:
        """Convert this result to plain Python values, to store it in the study."""
        return {
            "loss": self.loss,
            "ratio": self.ratio,
            "usable": self.usable,
            "mode": self.mode,
            "slope": _as_lists(self.slopes),
            "slope_error": _as_lists(self.errors),
        }

    @classmethod
    def from_detail(cls, detail: Json) -> "Slope":
        """Restore a result from the plain values that ``to_detail`` made."""
        return cls(
            detail["loss"],
            _as_arrays(detail["slope"]),
            _as_arrays(detail["slope_error"]),
            detail["usable"],
            detail["ratio"],
            detail["mode"],
        )


def _as_lists(tables: Tables) -> Json:
    return {name: table.tolist() for name, table in tables.items()}


def _as_arrays(tables: Json) -> Tables:
    return {name: np.asarray(table, dtype=float) for name, table in tables.items()}


def slope_at(
    config: Config,
    losses: np.ndarray,
    slopes: Mapping[str, np.ndarray],
    ratios: np.ndarray,
    mode: Literal["exact", "differences"],
) -> Slope:
    """Return the mean validation loss and the mean derivatives of a configuration over its F folds.

    Args:
        config: The configuration of the point.
        losses: The validation losses of the folds, (F,).
        slopes: The slopes in each hyperparameter, (F, S, L).
        ratios: The measures of chaos, (F,). Chaos never makes finite differences unusable, because
            finite differences look across the chaos.
        mode: The way in which the slopes were computed.
    """
    means = {}
    errors = {}
    finite = bool(np.isfinite(losses).all())
    for name, table in slopes.items():
        value = torch.as_tensor(as_table(config[name], table.shape[1:]))
        # Chain rule: the slope in the coordinate is the slope in the value times d value / d
        # coordinate.
        moved = table * speed(name, value).numpy()
        finite &= bool(np.isfinite(moved).all())
        means[name] = moved.mean(0)
        # Over the folds, (F, S, L) -> (S, L); one fold gives no standard error.
        spread = moved.std(0, ddof=1) if len(moved) > 1 else np.full(moved.shape[1:], np.nan)
        errors[name] = spread / math.sqrt(len(moved))
    calm = mode == "differences" or bool((ratios <= CHAOTIC).all())
    return Slope(float(losses.mean()), means, errors, finite and calm, float(ratios.max()), mode)


class StartingPoint:
    """A starting point of a hypergradient search, and its progress through the steps of the search.

    The object has the current hyperparameter values, the lengths of the next steps, and the number
    of chaotic points so far.
    """

    def __init__(
        self, method: DescentOptions, names: Sequence[str], config: Config, bounds: Bounds
    ) -> None:
        self.method = method
        self.names = tuple(names)
        self.config = dict(config)
        self.bounds = bounds
        self.steps: Tables = {}
        self.signs: Tables = {}
        self.length = 0.0
        self.last_loss = math.inf
        self.n_chaotic = 0
        self.ended = False
        self.visited: list[Tables] = []

    @property
    def mode(self) -> Literal["exact", "differences"]:
        """The method for the derivatives at the next point: exact derivatives or finite
        differences."""
        return (
            "differences" if self.n_chaotic >= _MOST_CHAOTIC and self.names != ("C",) else "exact"
        )

    def move(self, slope: Slope) -> None:
        """Take a step from the current configuration in the direction that lowers the validation
        loss.

        Sets ``ended`` if the starting point cannot move any further.
        """
        if not self.steps:
            self._begin(slope)
        before = {}
        for name in self.names:
            table = as_table(self.config[name], slope.slopes[name].shape)
            before[name] = to_coordinate(name, torch.as_tensor(table)).numpy()
        if not slope.usable:
            moves = self._step_down(slope)
        elif self.method.step == "sign":
            moves = self._sign_step(slope)
        else:
            moves = self._normalized_step(slope)
        is_unclear = not slope.usable or not any(move.any() for move in moves.values())
        after = self._move(before, moves)
        while not _are_close(after, before) and any(
            _are_close(after, place) for place in self.visited
        ):
            # Steps of 1, 1/2 and 1/2 can lead back to a visited point, so the step is halved again.
            for name in self.names:
                moves[name] = moves[name] / 2
                step = self.steps[name]
                self.steps[name] = np.where(moves[name] != 0, step / 2, step)
            self.length /= 2
            after = self._move(before, moves)
        self.visited.append(before)
        stays = _are_close(after, before)
        longest = self.length
        if self.method.step == "sign":
            longest = max(step.max() for step in self.steps.values())
        # For the solved model (C only), finite differences would see the same smooth loss.
        if stays and is_unclear and slope.mode == "exact" and self.names != ("C",):
            # Noise, or chaos without a lower learning rate: this point is tried again with finite
            # differences.
            self.n_chaotic = _MOST_CHAOTIC
        elif stays or longest < self.method.smallest_step:
            self.ended = True
        else:
            self.config |= {name: self._value(name, after[name]) for name in self.names}

    def _begin(self, slope: Slope) -> None:
        """Set the lengths of the first steps of all hyperparameter values."""
        n_values = sum(table.size for table in slope.slopes.values())
        self.length = self.method.first_length(several=n_values > 1)
        for name, table in slope.slopes.items():
            self.steps[name] = np.full(table.shape, self.length)
            self.signs[name] = np.zeros(table.shape)

    def _sign_step(self, slope: Slope) -> Tables:
        """Return the changes of all hyperparameter values, each by its own step length against its
        slope.

        A value does not change if its slope is smaller than the standard error over the folds.
        """
        moves = {}
        for name in self.names:
            table = slope.slopes[name]
            is_clear = ~(np.abs(table) < slope.errors[name])  # also with an error of NaN
            moves[name] = self._by_sign(name, np.sign(table) * is_clear)
        return moves

    def _by_sign(self, name: str, signs: SegmentTable) -> SegmentTable:
        """Return the changes of one hyperparameter's values, from the signs of their slopes."""
        # The step of a value is halved when the sign of its slope flips.
        flipped = signs * self.signs[name] < 0
        self.steps[name] = np.where(flipped, self.steps[name] / 2, self.steps[name])
        self.signs[name] = np.where(signs != 0, signs, self.signs[name])
        return -signs * self.steps[name]

    def _normalized_step(self, slope: Slope) -> Tables:
        """Return the changes of all hyperparameter values along the slope, with the current total
        length."""
        if slope.loss > self.last_loss:
            self.length /= _DIVIDED
        self.last_loss = slope.loss
        norm = math.sqrt(sum(float((table**2).sum()) for table in slope.slopes.values()))
        scale = self.length / norm if norm > 0 else 0.0
        return {name: -scale * slope.slopes[name] for name in self.names}

    def _step_down(self, slope: Slope) -> Tables:
        """Return a change to a lower learning rate, after training at the current point was
        chaotic.

        A learning rate that is too large causes chaos, so the other values do not change.
        """
        self.n_chaotic += 1
        moves = {name: np.zeros(slope.slopes[name].shape) for name in self.names}
        if "lr" in self.names:
            moves["lr"] = self._by_sign("lr", np.ones(slope.slopes["lr"].shape))
        return moves

    def _move(self, before: Tables, moves: Tables) -> Tables:
        """Return the coordinates (logarithms or logits) after a step, clipped to the bounds of the
        space."""
        after = {}
        for name in self.names:
            low, high = self.bounds.get(name, (-math.inf, math.inf))
            ends = torch.tensor([max(low, 0.0), high], dtype=torch.float64)
            least, most = to_coordinate(name, ends).tolist()
            most = math.inf if math.isnan(most) else most  # the logit of infinity is undefined
            after[name] = np.clip(before[name] + moves[name], least, most)
        return after

    def _value(
        self, name: str, coordinate: SegmentTable
    ) -> float | list[float] | list[list[float]]:
        """Return a hyperparameter's value for the configuration, from its coordinates (logarithms
        or logits).

        The value is a number, a list over segments, or a list of lists over segments and layers.
        """
        # Clipped again: rounding may move a value slightly beyond its bound.
        low, high = self.bounds.get(name, (-math.inf, math.inf))
        table = np.clip(from_coordinate(name, torch.as_tensor(coordinate)).numpy(), low, high)
        if table.size == 1:
            return float(table.item())
        value: list[float] | list[list[float]] = (
            table if table.shape[1] > 1 else table[:, 0]
        ).tolist()
        return value


def _are_close(point: Tables, other: Tables) -> bool:
    """Return True if the hyperparameters of two points are equal except for rounding."""
    return all(np.allclose(point[name], other[name], rtol=1e-9, atol=1e-9) for name in point)
