"""HypergradientSearchCV: sampled candidates move along the derivative of their validation loss.

All candidates move at once. A slope is the derivative of the validation loss with respect to a
hyperparameter. To compute a slope, gputune repeats the training and differentiates it.

A start is a starting point with the points that follow it. An outer step moves each start to its
next point. F counts folds.
"""

import itertools
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple

import numpy as np
from sklearn import model_selection
from sklearn.base import BaseEstimator, clone, is_regressor
from sklearn.metrics import log_loss
from sklearn.utils import indexable
from sklearn.utils._param_validation import Interval, StrOptions

from gputune.engine.stop import entry
from gputune.ground.annotations import FloatArray
from gputune.ground.errors import DivergedError, InputError, Verbatim
from gputune.ground.types import Config
from gputune.hypergradients.first_step import check_classes, check_coordinate, check_start
from gputune.methods.descent import Slope, SlopeMode, StartingPoint, run_descent, slope_at
from gputune.methods.hypergradient import Hypergradient
from gputune.sklearn.base import constructor, last_step
from gputune.sklearn.dataset import FoldRows
from gputune.sklearn.logistic import Penalty
from gputune.sklearn.recipe import FitOptions, MemberSlope, Recipe, TrainedMember
from gputune.sklearn.record import Event, FitRecorder, RecordedFit, Splits, fits_of, layouts
from gputune.sklearn.replay import Candidates, SearchRun, TrainedCandidates, workers
from gputune.sklearn.search import CONSTRAINTS, EXTRAS, FusedSearch
from gputune.spaces.distributions import range_of


class TrialSlopes(NamedTuple):
    """The validation losses of one trial in each fold, and their derivatives (slopes).

    Attributes:
        losses: (F,) validation loss of each fold.
        slopes: hyperparameter -> (F, 1, 1) slope of the loss.
        ratios: (F,) value that separates usable slopes from noise.
    """

    losses: FloatArray
    slopes: dict[str, FloatArray]
    ratios: FloatArray


@entry
def slopes_of(
    fits: Sequence[RecordedFit], names: Sequence[str], mode: SlopeMode, training: FitOptions
) -> dict[int, TrialSlopes]:
    """Return the slope of each trial's validation loss with respect to some hyperparameters.

    The trials must be trained, and each fold must have validation rows. The loss is the mean
    cross-entropy of the validation rows, or the mean squared error in the target's own unit. The
    slope refers to the estimator's own hyperparameter, for example alpha if alpha is set. ``mode``
    says whether a slope is exact or computed from wide finite differences. Trials that the deadline
    cuts short are missing.
    """
    # trial -> fold -> slope
    by_fold: dict[int, dict[int, MemberSlope]] = defaultdict(dict)
    for folds, trials in layouts(fits, held_out=True):
        recipes = {}
        for trial, by_number in trials.items():
            fit = by_number[folds.numbers[0]]
            recipes[trial] = fit.estimator._recipe(lambda: 0)
            # Only a fitted member knows the seed, because a RandomState has moved on since.
            if isinstance(fit.fitted, TrainedMember):
                recipes[trial] = replace(recipes[trial], seed=fit.fitted.seed, patience=None)
        slopes_by_member = fit.estimator._slopes(recipes, folds, names, mode, training)
        for (fold, trial), slope in slopes_by_member.items():
            by_fold[trial][fold] = slope
    n_folds = Counter(fit.trial for fit in fits)
    by_trial = {}
    for trial, slopes in by_fold.items():
        # A trial has a slope only if all of its folds have one.
        if len(slopes) == n_folds[trial]:
            members = np.array([slopes[fold] for fold in sorted(slopes)])
            losses, *columns, ratios = members.T.copy()  # each (F,)
            tables = {name: column[:, None, None] for name, column in zip(names, columns)}
            by_trial[trial] = TrialSlopes(losses, tables, ratios)
    return by_trial


def descended_parameters(
    hyperparameters: str | Sequence[str] | None, estimator: object
) -> dict[str, str]:
    """Return a dict from gputune's name of each hyperparameter to the estimator's parameter.

    Args:
        hyperparameters: names of parameters. None: the first that the estimator offers.
        estimator: the estimator or pipeline.

    Raises:
        InputError: the estimator does not have a parameter, or a parameter is named twice.
    """
    prefix, last = last_step(estimator)
    params = last.get_params(deep=False)
    offered = {key: name for key, name in last._differentiable.items() if key in params}
    if hyperparameters is None:
        keys = list(offered)[:1]
    elif isinstance(hyperparameters, str):
        keys = [hyperparameters.removeprefix(prefix)]
    else:
        keys = [str(key).removeprefix(prefix) for key in hyperparameters]
    parameters = {offered[key]: prefix + key for key in keys if key in offered}
    # An unknown key or a second spelling of one hyperparameter leaves fewer entries than keys.
    if not keys or len(parameters) < len(keys):
        spellings = defaultdict(list)
        for key, name in offered.items():
            spellings[name].append(key)
        choices = ", ".join(map(" or ".join, spellings.values()))
        raise InputError(
            "hyperparameters",
            f"must be some of {choices} for {type(last).__name__}, each named once",
            got=hyperparameters,
        )
    return parameters


def start_value(recipe: Recipe | Penalty, name: str, parameter: str, start: str) -> float:
    """Return the start value of a hyperparameter, in the unit of the estimator's parameter.

    Raises InputError if a hypergradient search cannot move the value.
    """
    if isinstance(recipe, Penalty):
        if not recipe.fit_intercept:
            raise InputError(
                "fit_intercept",
                "must be True, because the derivative with respect to C is that of a logistic "
                "regression with intercepts",
                got=Verbatim(f"False in {start}"),
                remedy="Leave it True, or search C with RandomizedSearchCV.",
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
                "hyperparameters",
                f"names {parameter!r}, but {start} sets its weight decay by {other!r}",
                remedy=f"Name {other!r}, or put {parameter!r} into param_distributions.",
            )
        value = alpha if name == "weight_decay" and alpha is not None else float(value)
    check_coordinate(name, value, start, called=parameter, space="param_distributions")
    return value


def neg_log_loss(
    estimator: BaseEstimator, X: object, y: object, sample_weight: object = None
) -> float:
    """Return the negative log loss of a fitted classifier, in (-inf, 0].

    Unlike scikit-learn's score of this name, the function also works for rows that lack some
    classes. scikit-learn clips probabilities to [eps, 1 - eps]. A loss beyond -log(eps) is clipped
    there, although the loss that the search minimizes can be larger.

    Args:
        estimator: the fitted classifier.
        X: rows (m, D).
        y: labels (m,).
        sample_weight: (m,) weights. Newer releases of scikit-learn pass them if ``fit`` received
            weights.
    """
    chances = estimator.predict_proba(X)
    return -float(log_loss(y, chances, labels=estimator.classes_, sample_weight=sample_weight))


@dataclass(eq=False)
class DescentRun(SearchRun):
    """One run of HypergradientSearchCV: it trains the points of all starting points and moves them.

    ``origins`` holds the starting point and the outer step of each point. ``fits`` holds the fits
    of the current point of each start.
    """

    X: object = None
    y: object = None
    parameters: Mapping[str, str] = field(default_factory=dict)
    outer_steps: int = 0
    recorder: FitRecorder = field(default_factory=lambda: FitRecorder(held_out=True))
    splits: Splits = ()
    points: list[Config] = field(default_factory=list)
    origins: list[tuple[int, int]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    fits: dict[int, list[RecordedFit]] = field(default_factory=dict)
    patient: ClassVar[bool] = False  # the derivative goes through all epochs of a training
    measures_again: ClassVar[bool] = True

    def descend(
        self, candidates: Candidates, space: Any, method: Hypergradient
    ) -> TrainedCandidates:
        """Train all candidates, then move each candidate along its slope for several steps.

        All steps use the same folds. A point that diverges reduces its learning rate. A start ends
        at a point that is invalid, cannot be evaluated or is cut short by ``deadline``.

        Raises:
            InputError: a candidate or a fold cannot be used. The error comes before anything
                trains.
        """
        begin = time.monotonic()
        self.outer_steps = method.outer_steps
        dicts = space if isinstance(space, list) else [space]
        bounds = {}
        for name, parameter in self.parameters.items():
            ends = range_of(dicts, (parameter,))
            if ends is not None:
                bounds[name] = ends
        starts = {}
        for number, params in enumerate(candidates):
            _, last = last_step(clone(self.estimator).set_params(**clone(params, safe=False)))
            try:
                recipe = last._recipe(lambda: 0)
            except (TypeError, ValueError):  # the estimator refuses the candidate, as its fit will
                continue
            values = {}
            for name, parameter in self.parameters.items():
                values[name] = start_value(recipe, name, parameter, f"start {number}")
            starts[number] = StartingPoint(method, tuple(values), values, bounds)
        self.X, self.y = indexable(self.X, self.y)
        self.splits = self.split(self.X, self.y, self.split_params)
        self._train(candidates, [(number, 0) for number in range(len(candidates))])
        run_descent(starts, self, method.outer_steps)
        # Fits train together, so each gets an equal share of the time.
        share = (time.monotonic() - begin) / max(1, len(self.points) * len(self.splits))
        return TrainedCandidates(self.points, self.splits, self.events, share)

    def add(self, starts: Mapping[int, StartingPoint], step: int) -> None:
        """Train the new points after a step of the search."""
        # A later point of a start overwrites an earlier one, so the last point remains.
        last_points = {start: point for (start, _), point in zip(self.origins, self.points)}
        points = []
        for number, start in starts.items():
            moved = {self.parameters[name]: start.config[name] for name in start.names}
            points.append(last_points[number] | moved)
        if points:
            self._train(points, [(number, step) for number in starts])

    def _train(self, points: Candidates, origins: Sequence[tuple[int, int]]) -> None:
        """Train new points of the search. Their trial numbers continue after the earlier points."""
        events = self.record(points, self.X, self.y, self.splits)
        first = len(self.points)
        fits = fits_of(events)
        # Each pair of a fold and its training rows is checked once.
        checked: dict[tuple[int, int], RecordedFit] = {}
        for fit in fits:
            checked.setdefault((fit.fold, id(fit.train)), fit)
        for fit in checked.values():
            _check_validation_rows(fit)
        self.train(points, fits)
        self.fits = {number: [] for number, _ in origins}
        for fit in fits:
            self.fits[origins[fit.trial][0]].append(fit)
            # These trials are numbered after all earlier points.
            fit.trial += first
        self.points += points
        self.origins += origins
        self.events += events

    def measure(self, starts: Mapping[int, StartingPoint], step: int) -> dict[int, Slope]:
        """Return the slope at the current point of each start that can move further.

        A start can move if its point has trained in all folds or has diverged, and if all folds
        have validation rows. The result does not contain starts that the deadline cuts short.
        """
        if step == self.outer_steps:
            return {}
        slopes = {}
        trained: dict[SlopeMode, dict[int, list[RecordedFit]]] = {"exact": {}, "differences": {}}
        for number, start in starts.items():
            fits = self.fits[number]
            errors = [fit.error for fit in fits if isinstance(fit.valid, FoldRows)]
            if len(errors) < len(self.splits):
                continue
            if not all(isinstance(error, DivergedError | None) for error in errors):
                continue
            if any(errors):  # no slope exists, so the start reduces its learning rate
                none = {name: np.full((1, 1), math.nan) for name in start.names}
                slopes[number] = Slope(
                    math.nan, none, none, usable=False, ratio=math.inf, mode="differences"
                )
            else:
                trained[start.mode][number] = fits
        options = FitOptions(workers(), self.deadline)
        for mode, by_start in trained.items():
            late = self.deadline is not None and time.monotonic() > self.deadline
            if late or not by_start:
                continue
            fits = list(itertools.chain.from_iterable(by_start.values()))
            by_trial = slopes_of(fits, tuple(self.parameters), mode, options)
            for number, (fit, *_) in by_start.items():
                if fit.trial in by_trial:
                    slope = by_trial[fit.trial]
                    slopes[number] = slope_at(starts[number].config, *slope, mode)
        return slopes


def _check_validation_rows(fit: RecordedFit) -> None:
    """Raise InputError if the validation loss of a fit has no derivative, for example without
    rows."""
    train = fit.train
    valid = fit.valid
    if not (isinstance(train, FoldRows) and isinstance(valid, FoldRows)):
        return
    if len(valid.index) == 0:
        raise InputError(
            None,
            f"Fold {fit.fold} of cv has no validation rows, but a hypergradient search minimizes "
            "the loss on them",
            remedy="Choose folds with validation rows.",
        )
    weights = train.rows.weights
    if weights is not None:
        train = replace(train, index=train.index[weights[train.index] > 0])
    check_classes(fit.fold, valid.labels(), train.labels(), weighed=weights is not None)


class HypergradientSearchCV(FusedSearch, model_selection.RandomizedSearchCV):  # type: ignore[misc]
    """A search that moves its candidates by gradient descent on their cross-validated loss.

    ``n_iter`` starting points are sampled. At each outer step all starting points train in all
    folds at once. The mean validation loss over the folds is differentiated through the training.
    Every start then moves against its slope, in the logarithm of its hyperparameters (the logit for
    momentum). The other parameters of a start stay unchanged.

    Every point on the way is a candidate in ``cv_results_``. In addition to scikit-learn's keys it
    has ``start`` and ``outer_step`` (0 for the starting points). The best of all points is
    refitted. The attributes are those of RandomizedSearchCV.

    A point whose training diverges, or whose slope is noise, reduces its learning rate. After the
    second time its slopes come from wide finite differences. ``mean_fit_time`` is the share of one
    fit in all training, including the differentiated training. ``sample_weight`` weights the
    training, but not the validation loss. Newer releases of scikit-learn weight the scores too.
    Folds are split once. A parameter of an estimator is a single value. For schedules and rates of
    each layer use ``gputune.tune(method=gputune.Hypergradient(...))``.

    Further parameters are those of scikit-learn's RandomizedSearchCV.

    Args:
        estimator: an estimator of gputune, or a Pipeline that ends in one.
        param_distributions: the distributions from which starting points are drawn.
        hyperparameters: the parameters to move, by the estimator's names. None: the first one in
            this list.

            - MLP: "learning_rate_init", "alpha" or "weight_decay", and "momentum".
            - NeuralNet: "lr", "optimizer__weight_decay" and "optimizer__momentum".
            - LogisticRegression: "C", at the minimum of the objective.

            A parameter with a distribution in ``param_distributions`` stays within its range.
            Otherwise every start has the estimator's own value.
        n_iter: number of starting points [default: 4].
        outer_steps: number of points that follow a start at most, at least 1 [default: 10]. A start
            ends earlier if its steps are short, or if it does not move any more.
        step: "sign" [default] moves every value by its own step, which is halved when the sign of
            its slope flips. "normalized" moves all values along the slope, by a length that is
            divided by ten when the loss rises.
        first_step: length of the first step in the logarithm, above 0. None: 1.5 for one value, 1.0
            for several.
        smallest_step: a start ends when all its steps are shorter than this, above 0 [default:
            0.05].
        scoring: metric that ranks the points. None is the loss that the search minimizes: the
            negative log loss (also for folds whose validation rows lack a class), or
            "neg_mean_squared_error" for a regressor. The method ``score`` is then the estimator's
            own, as in every search of scikit-learn. Another metric does not affect how points move.
        device: as in gputune's RandomizedSearchCV.
        study: as in gputune's RandomizedSearchCV.
        timeout: seconds after which no start moves any further. Otherwise as in gputune's
            RandomizedSearchCV.
        n_jobs: as in gputune's RandomizedSearchCV.

    Raises:
        InputError: the estimator is not from gputune, it or its optimizer lacks a hyperparameter, a
            start cannot move, or the validation rows of a fold have a class that its training rows
            lack. It is raised by ``fit`` before anything trains.

    Sources: Maclaurin et al. (2015), arXiv:1502.03492; Franceschi et al. (2017), arXiv:1703.01785.

    Example:
        >>> from gputune.sklearn import HypergradientSearchCV, LogisticRegression
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> search = HypergradientSearchCV(
        ...     LogisticRegression(), {"C": [0.01]}, n_iter=1, outer_steps=3, cv=3, random_state=0
        ... )
        >>> search.fit(X, y).best_params_["C"] > 0.01  # less penalty lowers the log loss
        True
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
        """Return the score of the refitted estimator on rows X with targets y.

        The score is ``scoring`` if you set it, otherwise the ``score`` of the estimator.
        """
        if self.scoring is None and hasattr(self, "best_estimator_"):
            return float(self.best_estimator_.score(X, y, **params))
        return float(super().score(X, y, **params))

    def _effective_scoring(self) -> object:
        if self.scoring is not None:
            return self.scoring
        return "neg_mean_squared_error" if is_regressor(self.estimator) else neg_log_loss

    def _leave_to_own_loop(self, reason: str) -> None:
        raise InputError(
            None,
            "HypergradientSearchCV differentiates the training of gputune's estimators, but "
            f"{reason}",
            remedy="Use RandomizedSearchCV.",
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
