"""The hypergradient search.

The search changes each starting configuration step by step along hypergradients, the derivatives of
its validation loss. All starting points move at the same time, and every configuration on the path
is a trial. The steps are in the logarithms or logits of the hyperparameters, called coordinates.
Batch size, width and depth do not change. A chunk is a group of trials that train together.
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeAlias

import numpy as np
import torch

from gputune.engine.plan import Plan
from gputune.ground.annotations import FloatArray
from gputune.ground.errors import InputError, Verbatim, option
from gputune.ground.text import count
from gputune.ground.types import Config, Json
from gputune.hypergradients.chunk import HypergradientJob, Slopes
from gputune.hypergradients.first_step import check_classes, check_coordinate, check_start
from gputune.hypergradients.implicit import implicit_chunk
from gputune.hypergradients.inner import CHAOTIC, as_table, from_coordinate, speed, to_coordinate
from gputune.population.population import by_numbers
from gputune.solver.solve import score_solution
from gputune.spaces.distributions import CheckedSpace, range_of
from gputune.study.store import Candidate, Result
from gputune.tuning.choices import ModelChoice
from gputune.tuning.context import Context

_DIVIDED = 10  # divides the length of a normalized step when the loss rises
# After this number of chaotic points, the slopes come from wide finite differences.
_MOST_CHAOTIC = 2

SegmentTable: TypeAlias = FloatArray  # (S, L): S segments of the training time, L layers
Tables: TypeAlias = dict[str, SegmentTable]  # by hyperparameter
Bounds = Mapping[str, tuple[float, float]]
SlopeMode = Literal["exact", "differences"]
MODES: tuple[SlopeMode, ...] = "exact", "differences"


class DescentSettings(Protocol):
    """The options of ``Hypergradient``."""

    @property
    def step(self) -> Literal["sign", "normalized"]: ...

    @property
    def smallest_step(self) -> float: ...

    def first_length(self, *, several: bool) -> float: ...

    @property
    def hyperparameters(self) -> Sequence[str]: ...

    @property
    def segments(self) -> int: ...

    @property
    def per_layer(self) -> bool: ...

    @property
    def outer_steps(self) -> int: ...


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
    mode: SlopeMode

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
    mode: SlopeMode,
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
        self, method: DescentSettings, names: Sequence[str], config: Config, bounds: Bounds
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
    def mode(self) -> SlopeMode:
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


def searched_names(method: DescentSettings, choice: ModelChoice) -> tuple[str, ...]:
    """Return the names of the hyperparameters that a hypergradient search changes.

    For the solved logistic regression (no training steps) the only name is C.
    """
    names = tuple(method.hyperparameters)
    if not choice.solved:
        if "C" in names:
            raise InputError(
                "Hypergradient(hyperparameters=...)",
                "can have 'C' only for the logistic regression solved with "
                f"{option('optimizer', 'exact')}",
                got=names,
                remedy="Use 'weight_decay'.",
            )
        return names
    if names not in (("lr",), ("C",)) or method.segments > 1 or method.per_layer:
        settings = [option("hyperparameters", names), option("segments", method.segments)]
        if method.per_layer:
            settings.append(option("per_layer", True))
        raise InputError(
            "Hypergradient",
            "can search only C of the solved logistic regression, without segments and layers",
            got=Verbatim(", ".join(settings)),
            remedy=f"Leave them out, or train the model with {option('optimizer', 'adamw')}.",
        )
    return ("C",)


def check_descent(method: DescentSettings, trials: Sequence[Candidate], context: Context) -> None:
    """Raise InputError if a hypergradient search cannot move the starting points."""
    if (transform := context.options.rows.target_transform) is not None:
        raise InputError(
            "method='hypergradient'",
            "minimizes the squared error of the target without a transform",
            got=Verbatim(option("target_transform", transform)),
            remedy="Choose another method, or transform y yourself.",
        )
    names = searched_names(method, context.choice)
    data = context.data
    solved = context.choice.solved
    labels = context.problem.target.classes
    # Each fold must train on every class that it validates on.
    if labels is not None and data.present is not None:
        for number, fold in enumerate(data.folds):
            valid = labels[data.target[fold.valid].tolist()].tolist()
            trained = labels[data.present[number].nonzero().flatten().tolist()].tolist()
            check_classes(number, valid, trained)
    configs = [context.complete(candidate.params) for candidate in trials]
    for candidate, config in zip(trials, configs):
        trial = f"trial {candidate.number}"
        for name in names:
            if not solved:
                check_start(config, name, trial, argument="Hypergradient(hyperparameters=...)")
            check_coordinate(name, config[name], trial, called=name, space="the space")
    if not solved:
        plan_points(method, configs, "exact", context)


class DescentPoints(Protocol):
    """The interface to the configurations (points) of a hypergradient search and their slopes.

    The points are trials of a study, or candidates of a scikit-learn search.
    """

    measures_again: ClassVar[bool]
    """True if a starting point that did not move because of noise is measured again as the same
    point.

    If False, the repeated measurement is a new point.
    """

    def measure(self, starts: Mapping[int, StartingPoint], step: int) -> Mapping[int, Slope]:
        """Return the slope (derivative of the loss) at the current point of each starting point.

        The result is keyed by the number of the starting point. If a number is missing, that
        starting point does not move any further.
        """

    def add(self, starts: Mapping[int, StartingPoint], step: int) -> None:
        """Store the new points after a step of the search."""


def run_descent(
    starts: Mapping[int, StartingPoint], points: DescentPoints, outer_steps: int
) -> None:
    """Move each starting point of a hypergradient search for at most ``outer_steps`` steps.

    The search also measures the points after the last step.
    """
    for step in range(outer_steps + 1):
        slopes = points.measure(starts, step)
        # The points after the last step are only measured.
        if step == outer_steps:
            return
        going = set(slopes)
        stayed = {}
        for number, slope in slopes.items():
            start = starts[number]
            before = dict(start.config)
            start.move(slope)
            # The slope was noise, so the start stays. Its next slope comes from finite differences.
            if start.config == before and not start.ended:
                stayed[number] = start
        if points.measures_again:
            again = points.measure(stayed, step)
            for number, slope in again.items():
                starts[number].move(slope)
            going -= stayed.keys() - again.keys()
        starts = {
            number: start for number, start in starts.items() if number in going and not start.ended
        }
        points.add(starts, step + 1)
        if not starts:
            return


def descend(context: Context, space: CheckedSpace, method: DescentSettings) -> None:
    """Run a hypergradient search on the starting points of the study.

    Points that already have a result do not train again.
    """
    names = searched_names(method, context.choice)
    bounds = {}
    for name in names:
        ends = range_of(space, (name,))
        if ends is not None:
            bounds[name] = ends
    starts = {c.number: c for c in context.ledger.candidates if isinstance(c.origin, str)}
    paths = {}
    for number, candidate in starts.items():
        paths[number] = StartingPoint(method, names, context.complete(candidate.params), bounds)
    outer_steps = method.outer_steps
    # Each start has its first point, and one point after each step.
    max_trials = len(starts) * (outer_steps + 1)
    context.progress.say(
        f"hypergradient search: {count(len(starts), 'starting point')} x at most "
        f"{outer_steps + 1} points = at most {max_trials} trainings, each in all folds and with "
        f"derivatives; fewer with a smaller {option('n_trials')}"
    )
    with context.progress.bar_over(max_trials - len(context.ledger.results), context.epochs):
        run_descent(paths, _Trials(context, method, starts), outer_steps)


@dataclass(eq=False)
class _Trials:
    """The points of a hypergradient search, stored as trials of a study.

    ``points`` holds the current point of each starting point that still moves.
    """

    context: Context
    method: DescentSettings
    points: dict[int, Candidate]
    measures_again: ClassVar[bool] = False

    def measure(self, starts: Mapping[int, StartingPoint], step: int) -> dict[int, Slope]:
        """Train the current points that have no result yet, and return the slopes of all points.

        A point that was stopped or has failed has no slope.
        """
        context = self.context
        if step > 0 and context.is_over():
            return {}
        for mode in MODES:
            waiting = []
            for start, point in self.points.items():
                if starts[start].mode == mode and point.number not in context.ledger.results:
                    waiting.append(point)
            if waiting and context.choice.solved:
                for places in by_numbers([point.params for point in waiting]):
                    _solve([waiting[place] for place in places], context)
            elif waiting:
                _train(self.method, waiting, mode, step, context)
        slopes = {}
        for start in starts:
            result = context.ledger.results.get(self.points[start].number)
            if result is not None and "slope" in result.detail:
                slopes[start] = Slope.from_detail(result.detail)
        return slopes

    def add(self, starts: Mapping[int, StartingPoint], step: int) -> None:
        """Store each new point of the search as a trial of the study, unless the study already has
        the trial."""
        if self.context.stop.reason:  # a search that is good enough ends without further points
            self.points = {}
            return
        ledger = self.context.ledger
        points = dict[int, Candidate]()
        known = {candidate.origin: candidate for candidate in ledger.candidates}
        number = 1 + max(candidate.number for candidate in ledger.candidates)
        new = list[Candidate]()
        for start, path in starts.items():
            candidate = known.get((start, step))
            if candidate is None:
                moved = {name: path.config[name] for name in path.names}
                params = {**self.points[start].params, **moved}
                candidate = Candidate(number + len(new), params, (start, step))
                new.append(candidate)
            # A stored point replaces the computed one, so that a resumed search follows the same
            # path.
            path.config |= candidate.params
            points[start] = candidate
        ledger.add(new)
        ended = (len(self.points) - len(points)) * (self.method.outer_steps + 1 - step)
        self.context.progress.skip(ended * self.context.epochs, trials=ended)
        self.points = points


def _train(
    method: DescentSettings, points: list[Candidate], mode: SlopeMode, step: int, context: Context
) -> None:
    """Train the given points of a hypergradient search, and store their results."""
    jobs = []

    def make(configs: Sequence[Config]) -> Plan:
        plan, job = plan_points(method, configs, mode, context)
        jobs.append(job)
        return plan

    for recorded in context.recorded_plans(points, step, make):
        trials = recorded.trials
        context.progress.plan(recorded.plan, show=step == 0)
        numbers = [trial.number for trial in trials]
        may_begin = context.may_begin(recorded)
        training = context.train(jobs[-1], recorded.plan, numbers, may_begin=may_begin)
        with closing(training) as outcomes:
            for outcome in outcomes:
                assert isinstance(outcome, Slopes)
                results = []
                for c, i in enumerate(outcome.index):
                    results.append(_result(trials[i], recorded.configs[i], c, outcome, mode))
                context.finish(results)


def plan_points(
    method: DescentSettings, configs: Sequence[Config], mode: SlopeMode, context: Context
) -> tuple[Plan, HypergradientJob]:
    """Return the training plan and the job (shared settings) for points of a hypergradient search.

    Raises InputError if the training of the points cannot be differentiated.
    """
    trainer = context.trainer
    job = trainer.job(
        HypergradientJob,
        epochs=context.epochs,
        hyperparameters=searched_names(method, context.choice),
        segments=method.segments,
        per_layer=method.per_layer,
        mode=mode,
    )
    return trainer.plan_differentiated(configs, job)


def _result(point: Candidate, config: Config, c: int, outcome: Slopes, mode: SlopeMode) -> Result:
    """Return the result of one point, with its score after the last epoch.

    The last epoch counts because the search minimizes the loss after it.
    """
    detail: Json = {}
    if outcome.slopes is not None and outcome.losses is not None and outcome.ratios is not None:
        slopes = {name: table[c] for name, table in outcome.slopes.items()}
        detail = slope_at(config, outcome.losses[c], slopes, outcome.ratios[c], mode).to_detail()
    return Result.of_curve(
        point.number,
        outcome.curves[c],
        epochs=outcome.epochs,
        rule="last",
        seconds=outcome.seconds / len(outcome.index),
        detail=detail,
    )


def _solve(points: list[Candidate], context: Context) -> None:
    """Solve the logistic regressions of several points in all folds, and differentiate the
    solutions.

    All points must read the same data.
    """
    begin = time.monotonic()
    configs = [context.complete(point.params) for point in points]
    data = context.data.of(configs[0])
    solution, derivative = implicit_chunk(data, configs, memory=context.trainer.memory)
    curves = score_solution(data, len(points), solution, context.scoring)
    # Members are fold-major: (F * trials,) -> (trials, F)
    losses = derivative.value.view(data.n_folds, -1).T.cpu().numpy()
    log_slopes = derivative.gradient.view(data.n_folds, -1).T.cpu().numpy()
    C = np.array([config["C"] for config in configs])
    # (trials, F) -> (trials, F, S=1, L=1). The derivative is in log C, so it is divided by C.
    slopes = log_slopes[..., None, None] / C[:, None, None, None]
    index = tuple(range(len(points)))
    seconds = time.monotonic() - begin
    outcome = Slopes(index, curves, 1, seconds, losses, {"C": slopes}, np.zeros(losses.shape))
    context.progress.advance(len(points), curves)
    context.finish([_result(points[i], configs[i], i, outcome, "exact") for i in index])
