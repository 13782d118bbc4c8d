"""HypergradientSearchCV: drawn candidates descend along the derivative of their validation loss, all at once."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from sklearn import model_selection
from sklearn.base import BaseEstimator, is_regressor
from sklearn.metrics import log_loss
from sklearn.utils import indexable
from sklearn.utils._param_validation import Interval, StrOptions

from gputune.errors import DivergedError, InputError
from gputune.methods.descent import Descent, Hypergradient, Slope, slope_at
from gputune.methods.distributions import range_of
from gputune.sklearn.base import constructor
from gputune.sklearn.dataset import Part
from gputune.sklearn.recipe import Training
from gputune.sklearn.record import Event, Fit, Recorder, Splits, fits_of
from gputune.sklearn.replay import Candidates, SearchRun, TrainedCandidates, workers
from gputune.sklearn.search import CONSTRAINTS, EXTRAS, FusedSearch
from gputune.sklearn.slopes import check_held_out, descended_parameters, slopes_of, start_values
from gputune.tuning.descent import SlopeMode, run_descent
from gputune.types import Config


def neg_log_loss(estimator: BaseEstimator, X: object, y: object, sample_weight: object = None) -> float:
    """Return minus the log loss of a fitted classifier on rows X (m, D) with labels y (m,), in (-inf, 0].

    Unlike scikit-learn's score of this name it also holds for rows that lack some of the classes. scikit-learn keeps
    chances within [eps, 1 - eps], so that a loss beyond -log(eps), which the descended one may have, is cut there.
    ``sample_weight`` (m,) is what newer releases of scikit-learn weight scores by where ``fit`` was given it.
    """
    chances = estimator.predict_proba(X)
    return -float(log_loss(y, chances, labels=estimator.classes_, sample_weight=sample_weight))


@dataclass(eq=False)
class DescentRun(SearchRun):
    """A run whose candidates are the points of a descent on the validation loss of X and y.

    ``origins`` has the start and the outer step of each point, ``fits`` those of the point where each start stands.
    """

    X: object = None
    y: object = None
    parameters: Mapping[str, str] = field(default_factory=dict)
    outer_steps: int = 0
    recorder: Recorder = field(default_factory=lambda: Recorder(held_out=True))
    splits: Splits = ()
    points: list[Config] = field(default_factory=list)
    origins: list[tuple[int, int]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    fits: dict[int, list[Fit]] = field(default_factory=dict)
    patient: ClassVar[bool] = False  # trainings are differentiated over all epochs
    measures_again: ClassVar[bool] = True

    def descend(self, candidates: Candidates, space: object, method: Hypergradient) -> TrainedCandidates:
        """Train all candidates, then outer step by outer step the points to which those that can descend move.

        The folds are split once, and are the same at every step. A point that diverges steps down. One that is refused,
        cannot be evaluated, or that ``deadline`` cuts short is the last of its start.

        Raises InputError, before anything trains, for a candidate or a fold that cannot be descended on.
        """
        begin, self.outer_steps = time.monotonic(), method.outer_steps
        dicts: list[Any] = space if isinstance(space, list) else [space]
        ranges = {name: range_of(dicts, (parameter,)) for name, parameter in self.parameters.items()}
        bounds = {name: ends for name, ends in ranges.items() if ends is not None}
        starts = {}
        for number, params in enumerate(candidates):
            values = start_values(self.estimator, params, self.parameters, number)
            if values is not None:
                starts[number] = Descent(method, tuple(self.parameters), values, bounds)
        self.X, self.y = indexable(self.X, self.y)
        self.splits = self.split(self.X, self.y, self.split_params)
        self._train(candidates, [(number, 0) for number in range(len(candidates))])
        run_descent(starts, self, method.outer_steps)
        share = (time.monotonic() - begin) / max(1, len(self.points) * len(self.splits))
        return TrainedCandidates(self.points, self.splits, self.events, share)

    def add(self, starts: Mapping[int, Descent], step: int) -> None:
        """Train the points to which starts have moved."""
        params = {origin[0]: point for origin, point in zip(self.origins, self.points)}  # the last of each
        points = [
            {**params[number], **{self.parameters[name]: start.config[name] for name in start.names}}
            for number, start in starts.items()
        ]
        if points:
            self._train(points, [(number, step) for number in starts])

    def _train(self, points: Candidates, origins: Sequence[tuple[int, int]]) -> None:
        """Train points, which are numbered after those before."""
        events, first = self.record(points, self.X, self.y, self.splits), len(self.points)
        fits = fits_of(events)
        check_held_out(fits)
        self.train(points, fits)
        self.fits = {number: [] for number, _ in origins}
        for fit in fits:
            self.fits[origins[fit.trial][0]].append(fit)
            fit.trial += first
        self.points += points
        self.origins += origins
        self.events += events

    def measure(self, starts: Mapping[int, Descent], step: int) -> dict[int, Slope]:
        """Return the slope where each start stands that can go on; those that the deadline cuts short are missing."""
        if step == self.outer_steps:
            return {}
        whole = {n: self.fits[n] for n in starts if _can_go_on(self.fits[n], len(self.splits))}
        slopes = {n: _step_down(starts[n]) for n, fits in whole.items() if any(fit.error for fit in fits)}
        modes: tuple[SlopeMode, ...] = ("exact", "differences")
        for mode in modes:
            fits = {n: f for n, f in whole.items() if n not in slopes and starts[n].mode == mode}
            if not fits or (self.deadline is not None and time.monotonic() > self.deadline):
                continue
            training = Training(workers(), self.deadline)
            by_point = slopes_of([fit for own in fits.values() for fit in own], tuple(self.parameters), mode, training)
            for n, own in fits.items():
                if (slope := by_point.get(own[0].trial)) is not None:
                    slopes[n] = slope_at(starts[n].config, slope.losses, slope.slopes, slope.ratios, mode)
        return slopes


def _can_go_on(fits: Sequence[Fit], folds: int) -> bool:
    """Whether a point was trained in all folds, or diverged, and has validation rows in all of them."""
    return len(fits) == folds and all(
        isinstance(fit.valid, Part) and isinstance(fit.error, DivergedError | None) for fit in fits
    )


def _step_down(start: Descent) -> Slope:
    """Return what says that the training diverged, so that there is no slope: differences would find none either."""
    none = {name: np.full((1, 1), math.nan) for name in start.names}
    return Slope(math.nan, none, none, usable=False, ratio=math.inf, mode="differences")


class HypergradientSearchCV(FusedSearch, model_selection.RandomizedSearchCV):  # type: ignore[misc]
    """A search whose candidates move: ``n_iter`` starts are drawn, and descend on their cross-validated loss.

    At each outer step all starts train in all folds at once, the mean over the folds of the loss on their validation
    rows is differentiated through the training, and every start moves against its slope, in the logarithm of its
    hyperparameters (momentum in the logit). What else a start was drawn with stays. Every point on the way is a
    candidate in ``cv_results_``, which has ``start`` and ``outer_step`` (0 for the starts) beside scikit-learn's keys;
    the best of all of them is refitted. Attributes are those of RandomizedSearchCV.

    estimator        one of gputune's, or a Pipeline that ends in one
    hyperparameters  what is moved, in the estimator's words: "learning_rate_init", "alpha" or "weight_decay" and
                     "momentum" of an MLP, "lr", "optimizer__weight_decay" and "optimizer__momentum" of a NeuralNet, "C"
                     of a LogisticRegression, at its minimum; None is the first. Where one is drawn from a distribution
                     in ``param_distributions``, it stays within its range; else a start has the estimator's own value
    n_iter           starts
    outer_steps      points that follow a start at most; a start ends sooner where its steps are short or lead nowhere
    step             "sign": every value moves by its own step, halved when the sign of its slope flips; "normalized":
                     all move along the slope, by a length divided by ten when the loss rises
    first_step       length of the first step in the logarithm; None: 1.5 for one value, 1.0 for several
    smallest_step    a start whose steps are all shorter has ended
    scoring          None is the loss that is descended: the negative log loss, also on folds whose validation rows lack
                     a class, for a regressor "neg_mean_squared_error"; the method ``score`` is then the estimator's
                     own, as in every search of scikit-learn. Any other one ranks the points, and does not move them.
    device, study, timeout, n_jobs   as in gputune's RandomizedSearchCV; after ``timeout`` seconds no start moves on

    A point whose training diverges, or whose slope is noise, steps down with its learning rate; after the second time
    its slopes come from wide finite differences. ``mean_fit_time`` is a fit's share of all training, the differentiated
    one included. The descended loss is not weighted by ``sample_weight``; training is, and newer releases of
    scikit-learn weight the scores too. Folds are split once. A parameter of an estimator is one number: for schedules
    and rates of each layer use ``gputune.tune(method=gputune.Hypergradient(...))``.

    Raises InputError, before anything trains, for an estimator that is none of gputune's, a hyperparameter that it or
    its optimizer has not, a start that cannot move, and a fold whose validation rows have a class of their own.
    """

    _space_name = "param_distributions"
    _parameter_constraints: ClassVar[dict[str, list[object]]] = {
        **model_selection.RandomizedSearchCV._parameter_constraints,
        "outer_steps": [Interval(Integral, 1, None, closed="left")],
        "hyperparameters": [str, tuple, list, None],
        "step": [StrOptions({"sign", "normalized"})],
        "first_step": [Interval(Real, 0, None, closed="neither"), None],
        "smallest_step": [Interval(Real, 0, None, closed="neither")],
        **CONSTRAINTS,
    }

    __init__ = constructor(
        model_selection.RandomizedSearchCV,
        {
            "n_iter": 4, "outer_steps": 10, "hyperparameters": None, "step": "sign", "first_step": None,
            "smallest_step": 0.05, **EXTRAS,
        },
    )  # fmt: skip

    def score(self, X: object, y: object = None, **params: object) -> float:
        """Return the score of the refitted estimator: by ``scoring`` where it was given, else its own ``score``."""
        by_estimator = self.scoring is None and hasattr(self, "best_estimator_")
        return float((self.best_estimator_.score if by_estimator else super().score)(X, y, **params))

    def _effective_scoring(self) -> object:
        if self.scoring is not None:
            return self.scoring
        return "neg_mean_squared_error" if is_regressor(self.estimator) else neg_log_loss

    def _overrides(self, *, together: bool) -> dict[str, object]:
        return super()._overrides(together=together) | {"scoring": self._effective_scoring()}

    def _leave_to_own_loop(self, reason: str) -> None:
        raise InputError(
            f"HypergradientSearchCV differentiates the training of gputune's estimators, and {reason}; use "
            "RandomizedSearchCV."
        )

    def _make_run(self, X: object, y: object) -> SearchRun:
        run = super()._make_run(X, y)
        return DescentRun(run.estimator, run.cv, run.deadline, X=X, y=y)

    def _run_search(
        self, evaluate_candidates: Callable[..., dict[str, np.ndarray]], *, callback_ctx: Any = None
    ) -> None:
        run = self._run
        assert isinstance(run, DescentRun)
        run.parameters = descended_parameters(self.hyperparameters, self.estimator)
        method = Hypergradient(
            outer_steps=int(self.outer_steps),
            hyperparameters=tuple(run.parameters),
            step=self.step,
            first_step=None if self.first_step is None else float(self.first_step),
            smallest_step=float(self.smallest_step),
        )
        space = self.param_distributions
        drawn = model_selection.ParameterSampler(space, self.n_iter, random_state=self.random_state)
        run.trained = run.descend(list(drawn), space, method)
        starts, steps = zip(*run.origins)
        evaluate = {"more_results": {"start": list(starts), "outer_step": list(steps)}}
        if callback_ctx is None:  # before scikit-learn 1.9
            run.evaluate(evaluate_candidates, run.points, **evaluate)
            return
        searching = callback_ctx.subcontext(
            task_name="search", max_subtasks=len(starts) * self.n_splits_, sequential_subtasks=False
        ).call_on_fit_task_begin(estimator=self)
        run.evaluate(evaluate_candidates, run.points, callback_ctx=searching, **evaluate)
        searching.call_on_fit_task_end(estimator=self)
