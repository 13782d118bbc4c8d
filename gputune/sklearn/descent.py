"""What a descent moves: hyperparameters in gputune's words, held in an estimator's parameters of other names.

The run of a descent: all starts train and move together, and every point on the way is a candidate of the search.
"""

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sklearn.base import clone
from sklearn.utils import indexable

from gputune.errors import DivergedError, InputError
from gputune.hypergradients.arguments import hyperparameters_of
from gputune.hypergradients.coordinates import has_coordinate
from gputune.search.descent import Descent, Hypergradient, Slope, slope_at
from gputune.search.distributions import range_of
from gputune.sklearn.dataset import Part
from gputune.sklearn.held_out import check_held_out
from gputune.sklearn.pipelines import last_step
from gputune.sklearn.record import Hearing, Splits
from gputune.sklearn.replay import Event, Fit
from gputune.sklearn.running import Run, Trained, workers
from gputune.sklearn.slopes import How, slopes_of
from gputune.sklearn.solve import Penalty
from gputune.sklearn.words import Recipe
from gputune.types import ONLINE

_WORDS = {
    "lr": ("lr", "learning_rate_init"),
    "weight_decay": ("weight_decay", "alpha", "optimizer__weight_decay"),
    "momentum": ("momentum", "optimizer__momentum"),
    "C": ("C",),
}
"""What estimators call each hyperparameter; alpha is a weight decay in another unit."""


@dataclass(frozen=True)
class Start:
    """Where a descent starts: the value of each hyperparameter, in the unit of the parameters that hold it."""

    values: dict[str, float]
    words: dict[str, tuple[str, ...]]

    def moved(self, params: Mapping[str, Any], values: Mapping[str, float]) -> dict[str, Any]:
        """Return a candidate's parameters with other values of the hyperparameters."""
        return {**params, **{word: values[name] for name, words in self.words.items() for word in words}}


def moved_names(hyperparameters: Any, estimator: Any) -> tuple[str, ...]:
    """Return the hyperparameters that are descended on, given in any word of the estimator.

    Raises InputError for one that the estimator has not, and for one named twice.
    """
    prefix, last = last_step(estimator)
    own = last.get_params(deep=False)
    offered = {name: [word for word in words if word in own] for name, words in _WORDS.items()}
    given = (hyperparameters,) if isinstance(hyperparameters, str) else tuple(hyperparameters)
    if given == ("lr",) and offered["C"] and not offered["lr"]:
        given = ("C",)  # the default, for the estimator that has C alone
    meant = {word: name for name, words in offered.items() if words for word in (name, *words)}
    names = tuple(meant.get(str(word).removeprefix(prefix), "") for word in given)
    if not names or "" in names or len(set(names)) < len(names):
        words = ", ".join(" or ".join(words) for words in offered.values() if words)
        raise InputError(
            f"hyperparameters: a descent of {type(last).__name__} moves some of {words}, each named once, got "
            f"{hyperparameters!r}."
        )
    return names


def start_of(estimator: Any, params: Mapping[str, Any], names: tuple[str, ...], number: int) -> Start | None:
    """Return where candidate ``number`` starts; None where the estimator refuses the candidate, as its fit will.

    Raises InputError where it cannot be descended from, and scikit-learn's ValueError for an unknown parameter.
    """
    candidate = clone(estimator).set_params(**clone(params, safe=False))
    prefix, last = last_step(candidate)
    try:
        recipe = last._recipe(lambda: 0)
    except (TypeError, ValueError):
        return None
    own = last.get_params(deep=False)
    words = {name: tuple(prefix + word for word in _words(name, own)) for name in names}
    values = {name: _value(recipe, name, number) for name in names}
    for name, value in values.items():
        if not has_coordinate(name, value):
            raise InputError(
                f"a descent cannot start from {words[name][0]}={value:g}, as start {number} does, because it moves "
                f"{'in the logit' if name == 'momentum' else 'in the logarithm'}; put {words[name][0]!r} in "
                f"param_distributions with values above 0{' and finite' if name == 'C' else ''}, or leave it out of "
                "hyperparameters."
            )
    return Start(values, words)


def _words(name: str, own: Mapping[str, Any]) -> list[str]:
    """Return the parameters that hold a hyperparameter: those that are set, or the first that could be."""
    has = [word for word in _WORDS[name] if word in own]
    return [word for word in has if own[word] is not None] or has[:1]


def _value(recipe: Recipe | Penalty, name: str, number: int) -> float:
    if isinstance(recipe, Penalty):
        if not recipe.fit_intercept:
            raise InputError(
                "the derivative in C is that of a logistic regression with intercepts, got fit_intercept=False in "
                f"start {number}; leave it True, or search C with RandomizedSearchCV."
            )
        return recipe.C
    optimizer = recipe.config["optimizer"]
    if optimizer in ONLINE:
        raise InputError(
            f"a descent differentiates sgd, nesterov, adam and adamw, got optimizer={optimizer!r} in start {number}, "
            "which adapts its rate itself; choose one of those, or use RandomizedSearchCV."
        )
    if name not in hyperparameters_of(optimizer):
        raise InputError(
            f"hyperparameters: {optimizer} has no {name!r}, and start {number} uses it; leave {name!r} out, or choose "
            "an optimizer that has it."
        )
    if name == "weight_decay" and recipe.alpha is not None:
        return recipe.alpha
    return float(recipe.config[name])


@dataclass(frozen=True, eq=False)
class Descended:
    """All points of a descent, trained: from which start each came, and at which outer step."""

    trained: Trained
    starts: list[int]
    outer_steps: list[int]


@dataclass(eq=False)
class _Path:
    """One start that descends: where it began, how it moves, and the parameters of its present point."""

    start: Start
    descent: Descent
    params: Mapping[str, Any]

    def move(self, slope: Slope) -> bool:
        """Move from the present point, whose slope is given, and say whether it is another one now."""
        before = dict(self.descent.config)
        self.descent.move(slope)
        self.params = self.start.moved(self.params, self.descent.config)
        return self.descent.config != before


@dataclass(eq=False)
class DescentRun(Run):
    """A run whose candidates are the points of a descent on the validation loss of X and y."""

    X: Any = None
    y: Any = None
    hearing: Hearing = field(default_factory=lambda: Hearing(held_out=True))

    def descend(
        self,
        candidates: Sequence[Mapping[str, Any]],
        space: Any,
        names: tuple[str, ...],
        method: Hypergradient,
    ) -> Descended:
        """Train all candidates, then outer step by outer step the points to which those that can descend move.

        The folds are split once, and are the same at every step. A point that diverges steps down. One that is refused,
        cannot be evaluated, or that ``deadline`` cuts short is the last of its start.

        Raises InputError, before anything trains, for a candidate or a fold that cannot be descended on.
        """
        begin = time.monotonic()
        paths = self._paths(candidates, space, names, method)
        X, y = indexable(self.X, self.y)
        splits = self.split(X, y, self.split_params)
        points, origins, events = list(candidates), [(i, 0) for i in range(len(candidates))], list[Event]()
        present = {number: number for number in paths}  # of each start that descends: its point
        first = 0
        for step in range(method.outer_steps + 1):
            fits = self._train(points[first:], first, X, y, splits, events)
            first = len(points)
            if step < method.outer_steps:
                moved = self._move(present, paths, fits, len(splits))
                points += [paths[number].params for number in moved]
                origins += [(number, step + 1) for number in moved]
                present = {number: first + i for i, number in enumerate(moved)}
            if len(points) == first:
                break
        share = (time.monotonic() - begin) / max(1, len(points) * len(splits))
        starts, steps = zip(*origins)
        return Descended(Trained(points, splits, events, share), list(starts), list(steps))

    def _paths(
        self,
        candidates: Sequence[Mapping[str, Any]],
        space: Any,
        names: tuple[str, ...],
        method: Hypergradient,
    ) -> dict[int, _Path]:
        """Return the path of every candidate that its estimator takes."""
        dicts = space if isinstance(space, list) else [space]
        paths = {}
        for number, params in enumerate(candidates):
            start = start_of(self.estimator, params, names, number)
            if start is not None:
                ranges = {name: range_of(dicts, words) for name, words in start.words.items()}
                bounds = {name: ends for name, ends in ranges.items() if ends is not None}
                paths[number] = _Path(start, Descent(method, names, start.values, bounds), params)
        return paths

    def _train(
        self,
        points: Sequence[Mapping[str, Any]],
        first: int,
        X: Any,
        y: Any,
        splits: Splits,
        events: list[Event],
    ) -> dict[int, list[Fit]]:
        """Train points, of which ``first`` is the number of the first; return the fits of each, and note all events."""
        heard = self.ask(points, X, y, splits)
        fits = [event for event in heard if isinstance(event, Fit)]
        check_held_out(fits)
        for fit in fits:
            fit.trial += first
        self.train(points, fits)
        events += heard
        by_point: dict[int, list[Fit]] = defaultdict(list)
        for fit in fits:
            by_point[fit.trial].append(fit)
        return by_point

    def _move(
        self,
        present: Mapping[int, int],
        paths: Mapping[int, _Path],
        fits: Mapping[int, list[Fit]],
        folds: int,
    ) -> list[int]:
        """Move every start that can go on from its present point, and return them."""
        whole = {n: fits[point] for n, point in present.items() if _can_go_on(fits.get(point, ()), folds)}
        slopes = {n: _step_down(paths[n].descent) for n, own in whole.items() if any(f.error() for f in own)}
        for mode in ("exact", "differences"):
            own = {n: f for n, f in whole.items() if n not in slopes and paths[n].descent.mode == mode}
            slopes |= self._slopes(own, paths, mode)
        stayed = [number for number, slope in slopes.items() if not paths[number].move(slope)]
        # A slope that is noise leaves its start where it is, to be measured there by differences.
        own = {n: whole[n] for n in stayed if not paths[n].descent.ended}
        again = self._slopes(own, paths, "differences")
        for number, slope in again.items():
            paths[number].move(slope)
        moved = (slopes.keys() - own.keys()) | again.keys()
        return [number for number in present if number in moved and not paths[number].descent.ended]

    def _slopes(
        self, fits: Mapping[int, list[Fit]], paths: Mapping[int, _Path], mode: Any
    ) -> dict[int, Slope]:
        """Differentiate the present points of some starts; those that the deadline cuts short are missing."""
        if not fits or (self.deadline is not None and time.monotonic() > self.deadline):
            return {}
        names = next(iter(paths.values())).descent.names
        found = slopes_of(
            [fit for own in fits.values() for fit in own], How(names, mode, workers(), self.deadline)
        )
        starts = {own[0].trial: number for number, own in fits.items()}
        return {
            starts[point]: slope_at(
                paths[starts[point]].descent.config, own.losses, own.slopes, own.ratios, mode
            )
            for point, own in found.items()
        }


def _can_go_on(fits: Sequence[Fit], folds: int) -> bool:
    """Whether a point was trained in all folds, or diverged, and has validation rows in all of them."""
    return len(fits) == folds and all(
        isinstance(fit.held_out, Part) and isinstance(fit.error(), DivergedError | None) for fit in fits
    )


def _step_down(descent: Descent) -> Slope:
    """Return what says that the training diverged, so that there is no slope: differences would find none either."""
    none = {name: np.full((1, 1), math.nan) for name in descent.names}
    return Slope(math.nan, none, none, usable=False, ratio=math.inf, mode="differences")
