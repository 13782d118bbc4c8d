"""HypergradientSearchCV: drawn candidates descend along the derivative of their validation loss,
all at once.

A slope is that of the same training once more, differentiated on the validation rows.
"""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn import model_selection
from sklearn.base import BaseEstimator, clone, is_regressor
from sklearn.metrics import log_loss
from sklearn.utils import indexable
from sklearn.utils._param_validation import Interval, StrOptions

from gputune.engine.stop import entry
from gputune.errors import DivergedError, InputError
from gputune.hypergradients.first_step import check_classes, check_coordinate, check_start
from gputune.methods.descent import Descent, Hypergradient, Slope, slope_at
from gputune.methods.distributions import range_of
from gputune.sklearn.base import constructor, last_step
from gputune.sklearn.dataset import Part
from gputune.sklearn.logistic import Penalty
from gputune.sklearn.recipe import Member, MemberSlope, Recipe, Training
from gputune.sklearn.record import Event, Fit, Recorder, Splits, fits_of, layouts
from gputune.sklearn.replay import Candidates, SearchRun, TrainedCandidates, workers
from gputune.sklearn.search import CONSTRAINTS, EXTRAS, FusedSearch
from gputune.tuning.descent import SlopeMode, run_descent
from gputune.types import Config


class TrialSlopes(NamedTuple):
    """Of one trial, by fold: ``losses`` (F,), ``slopes`` hyperparameter -> (F, 1, 1), ``ratios``
    (F,) of the guard."""

    losses: NDArray[np.float64]
    slopes: dict[str, NDArray[np.float64]]
    ratios: NDArray[np.float64]


@entry
def slopes_of(
    fits: Sequence[Fit], names: Sequence[str], mode: SlopeMode, training: Training
) -> dict[int, TrialSlopes]:
    """Return the slopes of each trial in some hyperparameters; all of its fits are made and hold
    validation rows out.

    The loss is the mean cross-entropy of the validation rows, or the mean squared error in the
    target's own unit. The slope is in the hyperparameter as the estimator has it: in alpha, where
    alpha is set. It is exact, or taken by wide differences. Trials that the deadline cuts short are
    missing.
    """
    by_fold: dict[int, dict[int, MemberSlope]] = defaultdict(dict)
    for folds, trials in layouts(fits, held_out=True):
        recipes = {}
        for trial, own in trials.items():
            fit = own[folds.numbers[0]]
            recipes[trial] = fit.estimator._recipe(lambda: 0)
            # which knows the seed: a RandomState has drawn another one
            if isinstance(fit.fitted, Member):
                recipes[trial] = replace(recipes[trial], seed=fit.fitted.seed, patience=None)
        for (fold, trial), slope in fit.estimator._slopes(recipes, folds, names, mode, training):
            by_fold[trial][fold] = slope
    whole = Counter(fit.trial for fit in fits)
    found = {}
    for trial, slopes in by_fold.items():
        if len(slopes) == whole[trial]:
            losses, of_names, ratios = zip(*(slopes[fold] for fold in sorted(slopes)))
            tables = {
                name: np.array([each[name] for each in of_names])[:, None, None]
                for name in of_names[0]
            }
            found[trial] = TrialSlopes(np.array(losses), tables, np.array(ratios))
    return found


def descended_parameters(
    hyperparameters: str | Sequence[str] | None, estimator: object
) -> dict[str, str]:
    """Return what is descended on, in the engine's words -> the parameter of the estimator that
    holds it.

    None is the usual one. Raises InputError for one that the estimator has not, and for one named
    twice.
    """
    prefix, last = last_step(estimator)
    own = last.get_params(deep=False)
    offered = {word: name for word, name in last._differentiable.items() if word in own}
    words = [hyperparameters] if isinstance(hyperparameters, str) else hyperparameters
    words = (
        list(offered)[:1] if words is None else [str(word).removeprefix(prefix) for word in words]
    )
    names = [offered.get(word) for word in words]
    if not names or None in names or len(set(names)) < len(names):
        several = [
            " or ".join(w for w in offered if offered[w] == n)
            for n in dict.fromkeys(offered.values())
        ]
        raise InputError(
            f"hyperparameters: a descent of {type(last).__name__} moves some of "
            f"{', '.join(several)}, each named once, got {hyperparameters!r}."
        )
    return {name: prefix + word for name, word in zip(names, words) if name is not None}


def start_value(recipe: Recipe | Penalty, name: str, parameter: str, start: str) -> float:
    """Return a start's value of a hyperparameter, in the unit of the parameter that holds it.

    Raises InputError where it cannot be descended from.
    """
    if isinstance(recipe, Penalty):
        if not recipe.fit_intercept:
            raise InputError(
                "the derivative in C is that of a logistic regression with intercepts, got "
                f"fit_intercept=False in {start}; leave it True, or search C with "
                "RandomizedSearchCV."
            )
        value = recipe.C
    else:
        check_start(
            recipe.config,
            name,
            start,
            argument="hyperparameters",
            remedy=", or use RandomizedSearchCV",
        )
        value = recipe.config[name]
        alpha = recipe.alpha
        if name == "weight_decay" and (alpha is not None) != parameter.endswith("alpha"):
            other = "weight_decay" if alpha is None else "alpha"
            raise InputError(
                f"hyperparameters: {start} decays by {other}, and not by {parameter}; name "
                f"{other!r}, or put {parameter!r} in param_distributions."
            )
        value = alpha if name == "weight_decay" and alpha is not None else float(value)
    check_coordinate(name, value, start, called=parameter, space="param_distributions")
    return value


def neg_log_loss(
    estimator: BaseEstimator, X: object, y: object, sample_weight: object = None
) -> float:
    """Return minus the log loss of a fitted classifier on rows X (m, D) with labels y (m,), in
    (-inf, 0].

    Unlike scikit-learn's score of this name it also holds for rows that lack some of the classes.
    scikit-learn keeps chances within [eps, 1 - eps], so that a loss beyond -log(eps), which the
    descended one may have, is cut there.
    ``sample_weight`` (m,) is what newer releases of scikit-learn weight scores by where ``fit`` was
    given it.
    """
    chances = estimator.predict_proba(X)
    return -float(log_loss(y, chances, labels=estimator.classes_, sample_weight=sample_weight))


@dataclass(eq=False)
class DescentRun(SearchRun):
    """A run whose candidates are the points of a descent on the validation loss of X and y.

    ``origins`` has the start and the outer step of each point, ``fits`` those of the point where
    each start stands.
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

    def descend(
        self, candidates: Candidates, space: Any, method: Hypergradient
    ) -> TrainedCandidates:
        """Train all candidates, then outer step by outer step the points to which those that can
        descend move.

        The folds are split once, and are the same at every step. A point that diverges steps down.
        One that is refused, cannot be evaluated, or that ``deadline`` cuts short is the last of its
        start.

        Raises InputError, before anything trains, for a candidate or a fold that cannot be
        descended on.
        """
        begin = time.monotonic()
        self.outer_steps = method.outer_steps
        dicts = space if isinstance(space, list) else [space]
        ranges = {
            name: range_of(dicts, (parameter,)) for name, parameter in self.parameters.items()
        }
        bounds = {name: ends for name, ends in ranges.items() if ends is not None}
        starts = {}
        for number, params in enumerate(candidates):
            _, last = last_step(clone(self.estimator).set_params(**clone(params, safe=False)))
            try:
                recipe = last._recipe(lambda: 0)
            except (TypeError, ValueError):  # the estimator refuses the candidate, as its fit will
                continue
            own = self.parameters.items()
            start = f"start {number}"
            values = {name: start_value(recipe, name, parameter, start) for name, parameter in own}
            starts[number] = Descent(method, tuple(self.parameters), values, bounds)
        self.X, self.y = indexable(self.X, self.y)
        self.splits = self.split(self.X, self.y, self.split_params)
        self._train(candidates, [(number, 0) for number in range(len(candidates))])
        run_descent(starts, self, method.outer_steps)
        share = (time.monotonic() - begin) / max(1, len(self.points) * len(self.splits))
        return TrainedCandidates(self.points, self.splits, self.events, share)

    def add(self, starts: Mapping[int, Descent], step: int) -> None:
        """Train the points to which starts have moved."""
        # the last of each
        params = {origin[0]: point for origin, point in zip(self.origins, self.points)}
        points = [
            {
                **params[number],
                **{self.parameters[name]: start.config[name] for name in start.names},
            }
            for number, start in starts.items()
        ]
        if points:
            self._train(points, [(number, step) for number in starts])

    def _train(self, points: Candidates, origins: Sequence[tuple[int, int]]) -> None:
        """Train points, which are numbered after those before."""
        events = self.record(points, self.X, self.y, self.splits)
        first = len(self.points)
        fits = fits_of(events)
        seen: set[tuple[int, int]] = set()
        # the loss on the validation rows of a fold must have a slope, whatever is trained
        for fit in fits:
            train = fit.train
            valid = fit.valid
            if (
                not (isinstance(train, Part) and isinstance(valid, Part))
                or (fit.fold, id(train)) in seen
            ):
                continue
            seen.add((fit.fold, id(train)))
            if len(valid.index) == 0:
                raise InputError(
                    f"cv: fold {fit.fold} has no validation rows to descend on; give it some."
                )
            weights = train.rows.weights
            weighing = (
                train
                if weights is None
                else replace(train, index=train.index[weights[train.index] > 0])
            )
            check_classes(fit.fold, valid.labels(), weighing.labels(), weighed=weights is not None)
        self.train(points, fits)
        self.fits = {number: [] for number, _ in origins}
        for fit in fits:
            self.fits[origins[fit.trial][0]].append(fit)
            fit.trial += first
        self.points += points
        self.origins += origins
        self.events += events

    def measure(self, starts: Mapping[int, Descent], step: int) -> dict[int, Slope]:
        """Return the slope where each start stands that can go on; those that the deadline cuts
        short are missing.

        A start can go on where its point was trained in all folds, or diverged, and has validation
        rows in all of them.
        """
        if step == self.outer_steps:
            return {}
        slopes = {}
        whole = {}
        for n, start in starts.items():
            errors = [fit.error for fit in self.fits[n] if isinstance(fit.valid, Part)]
            if len(errors) < len(self.splits) or not all(
                isinstance(each, DivergedError | None) for each in errors
            ):
                continue
            if any(errors):  # no slope, nor would differences find one: it steps down
                none = {name: np.full((1, 1), math.nan) for name in start.names}
                slopes[n] = Slope(
                    math.nan, none, none, usable=False, ratio=math.inf, mode="differences"
                )
            else:
                whole[n] = self.fits[n]
        modes: tuple[SlopeMode, ...] = ("exact", "differences")
        for mode in modes:
            fits = {n: own for n, own in whole.items() if starts[n].mode == mode}
            if not fits or (self.deadline is not None and time.monotonic() > self.deadline):
                continue
            training = Training(workers(), self.deadline)
            found = slopes_of(
                [fit for own in fits.values() for fit in own],
                tuple(self.parameters),
                mode,
                training,
            )
            points = {n: found[own[0].trial] for n, own in fits.items() if own[0].trial in found}
            slopes |= {n: slope_at(starts[n].config, *slope, mode) for n, slope in points.items()}
        return slopes


class HypergradientSearchCV(FusedSearch, model_selection.RandomizedSearchCV):  # type: ignore[misc]
    """A search whose candidates move: ``n_iter`` starts are drawn, and descend on their
    cross-validated loss.

    At each outer step all starts train in all folds at once, the mean over the folds of the loss on
    their validation rows is differentiated through the training, and every start moves against its
    slope, in the logarithm of its hyperparameters (momentum in the logit). What else a start was
    drawn with stays. Every point on the way is a candidate in ``cv_results_``, which has ``start``
    and ``outer_step`` (0 for the starts) beside scikit-learn's keys; the best of all of them is
    refitted. Attributes are those of RandomizedSearchCV.

    estimator        one of gputune's, or a Pipeline that ends in one
    hyperparameters  what is moved, in the estimator's words: "learning_rate_init", "alpha" or
                     "weight_decay" and "momentum" of an MLP, "lr", "optimizer__weight_decay" and
                     "optimizer__momentum" of a NeuralNet, "C" of a LogisticRegression, at its
                     minimum; None is the first. Where one is drawn from a distribution in
                     ``param_distributions``, it stays within its range; else a start has the
                     estimator's own value
    n_iter           starts
    outer_steps      points that follow a start at most; a start ends sooner where its steps are
                     short or lead nowhere
    step             "sign": every value moves by its own step, halved when the sign of its slope
                     flips; "normalized": all move along the slope, by a length divided by ten when
                     the loss rises
    first_step       length of the first step in the logarithm; None: 1.5 for one value, 1.0 for
                     several
    smallest_step    a start whose steps are all shorter has ended
    scoring          None is the loss that is descended: the negative log loss, also on folds whose
                     validation rows lack a class, for a regressor "neg_mean_squared_error"; the
                     method ``score`` is then the estimator's own, as in every search of
                     scikit-learn. Any other one ranks the points, and does not move them.
    device, study, timeout, n_jobs   as in gputune's RandomizedSearchCV; after ``timeout`` seconds
                                     no start moves on

    A point whose training diverges, or whose slope is noise, steps down with its learning rate;
    after the second time its slopes come from wide finite differences. ``mean_fit_time`` is a fit's
    share of all training, the differentiated one included. The descended loss is not weighted by
    ``sample_weight``; training is, and newer releases of scikit-learn weight the scores too. Folds
    are split once. A parameter of an estimator is one number: for schedules and rates of each layer
    use ``gputune.tune(method=gputune.Hypergradient(...))``.

    Raises InputError, before anything trains, for an estimator that is none of gputune's, a
    hyperparameter that it or its optimizer has not, a start that cannot move, and a fold whose
    validation rows have a class of their own.
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
            "n_iter": 4,
            "outer_steps": 10,
            "hyperparameters": None,
            "step": "sign",
            "first_step": None,
            "smallest_step": 0.05,
            **EXTRAS,
        },
    )

    def score(self, X: object, y: object = None, **params: object) -> float:
        """Return the score of the refitted estimator: by ``scoring`` where it was given, else its
        own ``score``."""
        by_estimator = self.scoring is None and hasattr(self, "best_estimator_")
        return float(
            (self.best_estimator_.score if by_estimator else super().score)(X, y, **params)
        )

    def _effective_scoring(self) -> object:
        if self.scoring is not None:
            return self.scoring
        return "neg_mean_squared_error" if is_regressor(self.estimator) else neg_log_loss

    def _leave_to_own_loop(self, reason: str) -> None:
        raise InputError(
            "HypergradientSearchCV differentiates the training of gputune's estimators, and "
            f"{reason}; use RandomizedSearchCV."
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
