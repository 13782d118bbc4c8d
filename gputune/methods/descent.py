"""The options of a hypergradient search, and the steps of one starting point.

Each starting point moves so that the mean validation loss over the folds falls. It moves in the
coordinates of its hyperparameters, which are logarithms or logits. Batch size, width and depth do
not move. They differ between starting points.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from gputune.errors import InputError, check_count
from gputune.hypergradients.inner import (
    CHAOTIC,
    HYPERPARAMETERS,
    as_table,
    from_coordinate,
    speed,
    to_coordinate,
)
from gputune.types import Config, Json

_DIVIDED = 10  # divides the length of a normalized step when the loss rises
# After this number of chaotic points, the slopes come from wide finite differences.
_HITS = 2

# Length of the first step in the coordinates, for one value and for several values.
FIRST_STEP = 1.5
FIRST_OF_SEVERAL = 1.0

SegmentTable: TypeAlias = NDArray[np.float64]  # (S, L): S segments of the training time, L layers
Bounds = Mapping[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Hypergradient:
    """Options of a hypergradient search, for ``tune(method=...)``.

    Each starting point follows the gradient of its mean validation loss over the folds. At every
    point the model trains for the whole of ``max_epochs``.

    Args:
        outer_steps: The number of steps of each starting point.
        hyperparameters: The hyperparameters to move: some of "lr", "momentum", "weight_decay",
            "beta1" and "beta2". The solved logistic regression moves "C" instead.
        segments: The number of values of each hyperparameter over the training time. Each value is
            used for an equal part of the training.
        per_layer: If True, each layer has its own value.
        step: The rule for a step. "sign" moves every value by its own step, which is halved when
            the sign of its slope flips (Riedmiller and Braun 1993; Micaelli and Storkey 2021).
            "normalized" moves all values along the slope, by a length that is divided by ten when
            the loss rises.
        first_step: The length of the first step, in the logarithm of a value (in the logit for
            momentum and betas). None means 1.5 for one value and 1.0 for several.
        smallest_step: A starting point ends when all its steps are shorter than this.

    Raises:
        InputError: An option is invalid.
    """

    outer_steps: int = 10
    hyperparameters: Sequence[str] = ("lr",)
    segments: int = 1
    per_layer: bool = False
    step: Literal["sign", "normalized"] = "sign"
    first_step: float | None = None
    smallest_step: float = 0.05

    def __post_init__(self) -> None:
        names = self.hyperparameters
        names = (names,) if isinstance(names, str) else tuple(names)
        object.__setattr__(self, "hyperparameters", names)
        known = (*HYPERPARAMETERS, "C")
        if not names or len(set(names)) < len(names) or not set(names) <= set(known):
            raise InputError(
                f"Hypergradient(hyperparameters=...) must be some of {', '.join(known)}, each "
                f"once, got {names!r}."
            )
        check_count(self.outer_steps, "Hypergradient(outer_steps=...)")
        check_count(self.segments, "Hypergradient(segments=...)")
        if not isinstance(self.per_layer, bool):
            raise InputError(
                f"Hypergradient(per_layer=...) must be True or False, got {self.per_layer!r}."
            )
        if self.step not in ("sign", "normalized"):
            raise InputError(
                f"Hypergradient(step=...) must be 'sign' or 'normalized', got {self.step!r}."
            )
        for name, value in (("first_step", self.first_step), ("smallest_step", self.smallest_step)):
            if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
                raise InputError(
                    f"Hypergradient({name}=...) must be a finite number > 0, got {value!r}."
                )
        several = len(names) > 1 or self.segments > 1 or self.per_layer
        first = self.first_step or (FIRST_OF_SEVERAL if several else FIRST_STEP)
        if self.smallest_step > first:
            raise InputError(
                "Hypergradient(smallest_step=...) must be at most the first step, or no start "
                f"moves twice, got smallest_step={self.smallest_step:g} and a first step of "
                f"{first:g}. For example smallest_step=0.05."
            )


@dataclass(frozen=True)
class Slope:
    """The result of the training at one point.

    Attributes:
        loss: The mean validation loss over the folds.
        slopes: The slope of the loss in the coordinates of each hyperparameter, (S, L).
        errors: The standard errors of the slopes over the folds, (S, L). NaN for one fold.
        usable: False if the slopes are chaotic, which ``ratio`` tells, or not finite.
        ratio: The largest measure of chaos over the folds.
        mode: "exact" for derivatives, "differences" for finite differences.
    """

    loss: float
    slopes: Mapping[str, SegmentTable]
    errors: Mapping[str, SegmentTable]
    usable: bool
    ratio: float
    mode: Literal["exact", "differences"]

    def to_detail(self) -> Json:
        """Return the slope as plain values for the study."""
        return {
            "loss": self.loss,
            "ratio": self.ratio,
            "usable": self.usable,
            "mode": self.mode,
            "slope": {name: table.tolist() for name, table in self.slopes.items()},
            "slope_error": {name: table.tolist() for name, table in self.errors.items()},
        }

    @classmethod
    def from_detail(cls, detail: Json) -> "Slope":
        """Return the slope that ``to_detail`` converted."""
        slopes, errors = (
            {name: np.asarray(table, dtype=float) for name, table in detail[key].items()}
            for key in ("slope", "slope_error")
        )
        return cls(
            detail["loss"], slopes, errors, detail["usable"], detail["ratio"], detail["mode"]
        )


def slope_at(
    config: Config,
    losses: np.ndarray,
    slopes: Mapping[str, np.ndarray],
    ratios: np.ndarray,
    mode: Literal["exact", "differences"],
) -> Slope:
    """Return the Slope of a point as the mean over the folds.

    Args:
        config: The configuration of the point.
        losses: The validation losses of the folds, (F,).
        slopes: The slopes in each hyperparameter, (F, S, L).
        ratios: The measures of chaos, (F,). They never make finite differences unusable, because
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


class Descent:
    """The state of one starting point of a hypergradient search.

    It holds the current values, the lengths of the next steps, and the number of chaotic points so
    far.
    """

    def __init__(
        self, method: Hypergradient, names: Sequence[str], config: Config, bounds: Bounds
    ) -> None:
        self.method = method
        self.names = tuple(names)
        self.config = dict(config)
        self.bounds = bounds
        self.steps: dict[str, SegmentTable] = {}
        self.signs: dict[str, SegmentTable] = {}
        self.length = 0.0
        self.last_loss = math.inf
        self.hits = 0
        self.ended = False
        self.visited: list[dict[str, SegmentTable]] = []

    @property
    def mode(self) -> Literal["exact", "differences"]:
        """The way in which the slope at the next point is computed."""
        return "differences" if self.hits >= _HITS and self.names != ("C",) else "exact"

    def move(self, slope: Slope) -> None:
        """Take a step from the current point with a given slope.

        Sets ``ended`` if the starting point cannot move any further.
        """
        if not self.steps:
            self._begin(slope)
        tables = {
            name: as_table(self.config[name], slope.slopes[name].shape) for name in self.names
        }
        before = {
            name: to_coordinate(name, torch.as_tensor(t)).numpy() for name, t in tables.items()
        }
        step = self._sign_step if self.method.step == "sign" else self._normalized_step
        moves = step(slope) if slope.usable else self._step_down(slope)
        unclear = not slope.usable or not any(move.any() for move in moves.values())
        after = self._move(before, moves)
        while not _alike(after, before) and any(_alike(after, place) for place in self.visited):
            # Steps of 1, 1/2 and 1/2 can lead back to a visited point, so the step is halved again.
            moves = {name: move / 2 for name, move in moves.items()}
            self.steps = {
                name: np.where(moves[name] != 0, s / 2, s) for name, s in self.steps.items()
            }
            self.length /= 2
            after = self._move(before, moves)
        self.visited.append(before)
        # For the solved model (C only), finite differences would see the same smooth loss.
        again = slope.mode == "exact" and self.names != ("C",)
        lengths = (
            [self.length]
            if self.method.step == "normalized"
            else [t.max() for t in self.steps.values()]
        )
        if _alike(after, before) and unclear and again:
            # Noise, or chaos without a lower learning rate: this point is tried again with finite
            # differences.
            self.hits = _HITS
        elif _alike(after, before) or max(lengths) < self.method.smallest_step:
            self.ended = True
        else:
            self.config |= {name: self._value(name, after[name]) for name in self.names}

    def _begin(self, slope: Slope) -> None:
        """Set the lengths of the first steps."""
        number = sum(table.size for table in slope.slopes.values())
        self.length = self.method.first_step or (FIRST_STEP if number == 1 else FIRST_OF_SEVERAL)
        self.steps = {
            name: np.full(table.shape, self.length) for name, table in slope.slopes.items()
        }
        self.signs = {name: np.zeros(table.shape) for name, table in slope.slopes.items()}

    def _sign_step(self, slope: Slope) -> dict[str, SegmentTable]:
        """Return the moves of all values, each by its own step against its slope.

        A value stays if its slope is smaller than the standard error over the folds.
        """
        clear = {name: ~(np.abs(slope.slopes[name]) < slope.errors[name]) for name in self.names}
        return {
            name: self._by_sign(name, np.sign(slope.slopes[name]) * clear[name])
            for name in self.names
        }

    def _by_sign(self, name: str, signs: SegmentTable) -> SegmentTable:
        """Return the moves of the values of one hyperparameter, from the signs of their slopes."""
        # The step of a value is halved when the sign of its slope flips.
        flipped = signs * self.signs[name] < 0
        self.steps[name] = np.where(flipped, self.steps[name] / 2, self.steps[name])
        self.signs[name] = np.where(signs != 0, signs, self.signs[name])
        return -signs * self.steps[name]

    def _normalized_step(self, slope: Slope) -> dict[str, SegmentTable]:
        """Return the moves of all values along the slope, with the current length."""
        if slope.loss > self.last_loss:
            self.length /= _DIVIDED
        self.last_loss = slope.loss
        norm = math.sqrt(sum(float((table**2).sum()) for table in slope.slopes.values()))
        scale = self.length / norm if norm > 0 else 0.0
        return {name: -scale * slope.slopes[name] for name in self.names}

    def _step_down(self, slope: Slope) -> dict[str, SegmentTable]:
        """Return a move to a lower learning rate, after a chaotic point.

        A learning rate that is too large causes chaos, so the other values stay.
        """
        self.hits += 1
        moves = {name: np.zeros(slope.slopes[name].shape) for name in self.names}
        if "lr" in self.names:
            moves["lr"] = self._by_sign("lr", np.ones(slope.slopes["lr"].shape))
        return moves

    def _move(
        self, before: dict[str, SegmentTable], moves: dict[str, SegmentTable]
    ) -> dict[str, SegmentTable]:
        """Return the coordinates after a move, clipped to the bounds."""
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
        """Return the value of a configuration at given coordinates.

        It is a number, a list over segments, or a list of lists over segments and layers.
        """
        # Clipped again: rounding may move a value slightly beyond its bound.
        low, high = self.bounds.get(name, (-math.inf, math.inf))
        table = np.clip(from_coordinate(name, torch.as_tensor(coordinate)).numpy(), low, high)
        value: list[float] | list[list[float]] = (
            table if table.shape[1] > 1 else table[:, 0]
        ).tolist()
        return value if table.size > 1 else float(table.item())


def _alike(one: Mapping[str, SegmentTable], other: Mapping[str, SegmentTable]) -> bool:
    """Return True if two points are equal except for rounding."""
    return all(np.allclose(one[name], other[name], rtol=1e-9, atol=1e-9) for name in one)
