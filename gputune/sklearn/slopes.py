"""What a descent moves, and the slopes of its fits: the same training once more, differentiated on validation rows."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import clone

from gputune.engine.job import Failure
from gputune.engine.stop import entry
from gputune.errors import InputError
from gputune.hypergradients.chunk import HypergradientJob, Slopes
from gputune.hypergradients.first_step import check_classes, check_coordinate, check_start
from gputune.hypergradients.implicit import implicit_gradients
from gputune.sklearn.base import last_step
from gputune.sklearn.dataset import FoldGroup, Part, Rows, as_tensor
from gputune.sklearn.logistic import LogisticRegression, Penalty, make_problem, solve_groups
from gputune.sklearn.member import Member, Place
from gputune.sklearn.networks import Batch, batches, in_skorchs_words
from gputune.sklearn.recipe import Recipe, Training
from gputune.sklearn.record import Fit, Trials, layouts
from gputune.solver.solve import solve
from gputune.tuning.descent import SlopeMode

MemberSlope = tuple[float, dict[str, float], float]
"""Of one member: its validation loss, the loss's slope in each hyperparameter, the ratio of the chaos guard."""


@dataclass(frozen=True, eq=False)
class TrialSlopes:
    """Of one trial, by fold: ``losses`` (F,), ``slopes`` hyperparameter -> (F, 1, 1), ``ratios`` (F,) of the guard."""

    losses: NDArray[np.float64]
    slopes: dict[str, NDArray[np.float64]]
    ratios: NDArray[np.float64]


@entry
def slopes_of(fits: Sequence[Fit], names: Sequence[str], mode: SlopeMode, training: Training) -> dict[int, TrialSlopes]:
    """Return the slopes of each trial in some hyperparameters; all of its fits are made and hold validation rows out.

    The loss is the mean cross-entropy of the validation rows, or the mean squared error in the target's own unit.
    The slope is in the hyperparameter as the estimator has it: in alpha, where alpha is set. It is exact, or taken by
    wide differences. Trials that the deadline cuts short are missing.
    """
    by_fold: dict[int, dict[int, MemberSlope]] = defaultdict(dict)
    for folds, trials in layouts(fits, held_out=True):
        first = next(iter(trials.values()))[folds.numbers[0]]
        if isinstance(first.estimator, LogisticRegression):
            slopes = _solver_slopes(trials, folds)
        else:
            slopes = _training_slopes(trials, folds, names, mode, training)
        for (fold, trial), slope in slopes:
            by_fold[trial][fold] = slope
    whole, found = Counter(fit.trial for fit in fits), {}
    for trial, own in by_fold.items():
        if len(own) == whole[trial]:
            losses, slopes_, ratios = zip(*(own[fold] for fold in sorted(own)))
            tables = {name: np.array([each[name] for each in slopes_])[:, None, None] for name in slopes_[0]}
            found[trial] = TrialSlopes(np.array(losses), tables, np.array(ratios))
    return found


def _training_slopes(
    trials: Trials, folds: FoldGroup, names: Sequence[str], mode: SlopeMode, training: Training
) -> Iterator[tuple[Place, MemberSlope]]:
    """Differentiate trials that train in the folds."""
    recipes = {trial: _recipe(own[folds.numbers[0]]) for trial, own in trials.items()}
    for batch in batches(recipes, folds):
        trainer = batch.trainer(training)
        job = trainer.job(HypergradientJob, epochs=batch.recipes[0].epochs, hyperparameters=tuple(names), mode=mode)
        try:
            plan, job = trainer.plan_differentiated(batch.configs, job)
        except InputError as error:
            raise in_skorchs_words(error) from error
        plan = replace(plan, threads=min(plan.threads, torch.get_num_threads()))
        for outcome in trainer.train(job, plan):
            if isinstance(outcome, Failure):
                raise outcome.error()
            assert isinstance(outcome, Slopes)
            yield from _member_slopes(outcome, batch)


def _recipe(fit: Fit) -> Recipe:
    """Return what the fit was trained with, with the seed that it was trained with."""
    assert isinstance(fit.fitted, Member)
    seed = fit.fitted.seed
    recipe: Recipe = fit.estimator._recipe(lambda: seed)
    return replace(recipe, seed=seed, patience=None)  # a RandomState has drawn another one


def _member_slopes(outcome: Slopes, batch: Batch) -> Iterator[tuple[Place, MemberSlope]]:
    """Yield the slopes of the members of a chunk; none where the deadline has cut it short."""
    if outcome.losses is None or outcome.slopes is None or outcome.ratios is None:
        return
    for c, i in enumerate(outcome.index):
        alpha = batch.recipes[i].alpha
        for f, fold in enumerate(batch.folds.numbers):
            slopes = {name: table[c, f].item() for name, table in outcome.slopes.items()}
            if alpha is not None and "weight_decay" in slopes:
                slopes["weight_decay"] *= batch.configs[i]["weight_decay"] / alpha
            yield (fold, batch.trials[i]), (outcome.losses[c, f].item(), slopes, outcome.ratios[c, f].item())


def _solver_slopes(trials: Trials, folds: FoldGroup) -> Iterator[tuple[Place, MemberSlope]]:
    """Differentiate trials that are solved in the folds, at their minimum."""
    penalties = {trial: own[folds.numbers[0]].estimator._recipe(lambda: 0) for trial, own in trials.items()}
    for numbers, group in solve_groups(penalties, folds):
        problem = make_problem([penalties[number] for number in numbers], group)
        valids = [as_tensor(valid).to(problem.y.device) for valid in group.valids]
        implicit = implicit_gradients(problem, solve(problem), valids)
        slopes = implicit.gradient / problem.C.repeat(len(valids))  # members are fold-major
        places = itertools.product(group.numbers, numbers)
        for place, loss, slope in zip(places, implicit.value.tolist(), slopes.tolist()):
            yield place, (loss, {"C": slope}, 0.0)


def check_held_out(fits: Sequence[Fit]) -> None:
    """Raise InputError where the loss on the validation rows of a fold has no slope, whatever is trained."""
    seen: set[tuple[int, int]] = set()
    for fit in fits:
        train, valid = fit.train, fit.valid
        if not (isinstance(train, Part) and isinstance(valid, Part)) or (fit.fold, id(train)) in seen:
            continue
        seen.add((fit.fold, id(train)))
        if len(valid.index) == 0:
            raise InputError(f"cv: fold {fit.fold} has no validation rows to descend on; give it some.")
        weights = train.rows.weights
        weighing = train.index if weights is None else train.index[weights[train.index] > 0]
        labels = (_labels(valid.rows, valid.index), _labels(train.rows, weighing))
        check_classes(fit.fold, *labels, weighed=weights is not None)


def _labels(rows: Rows, index: NDArray[np.int64]) -> list[str | float]:
    """Return the labels that some rows have; none for a regression."""
    return [] if rows.classes is None else rows.classes[np.unique(rows.y[index])].tolist()


def descended_parameters(hyperparameters: str | Sequence[str] | None, estimator: object) -> dict[str, str]:
    """Return what is descended on, in the engine's words -> the parameter of the estimator that holds it.

    None is the usual one. Raises InputError for one that the estimator has not, and for one named twice.
    """
    prefix, last = last_step(estimator)
    own = last.get_params(deep=False)
    offered = {word: name for word, name in last._differentiable.items() if word in own}
    words = [hyperparameters] if isinstance(hyperparameters, str) else hyperparameters
    words = list(offered)[:1] if words is None else [str(word).removeprefix(prefix) for word in words]
    names = [offered.get(word) for word in words]
    if not names or None in names or len(set(names)) < len(names):
        several = [" or ".join(w for w in offered if offered[w] == n) for n in dict.fromkeys(offered.values())]
        raise InputError(
            f"hyperparameters: a descent of {type(last).__name__} moves some of {', '.join(several)}, each named once, "
            f"got {hyperparameters!r}."
        )
    return {name: prefix + word for name, word in zip(names, words) if name is not None}


def start_values(
    estimator: object, params: Mapping[str, object], parameters: Mapping[str, str], number: int
) -> dict[str, float] | None:
    """Return where candidate ``number`` starts; None where the estimator refuses the candidate, as its fit will.

    ``parameters`` are what is descended on, as ``descended_parameters`` returns it. Raises InputError where a start
    cannot be descended from, and scikit-learn's ValueError for an unknown parameter.
    """
    _, last = last_step(clone(estimator).set_params(**clone(params, safe=False)))
    try:
        recipe = last._recipe(lambda: 0)
    except (TypeError, ValueError):
        return None
    values = {}
    for name, parameter in parameters.items():
        value = values[name] = _value(recipe, name, parameter, f"start {number}")
        check_coordinate(name, value, f"start {number}", called=parameter, space="param_distributions")
    return values


def _value(recipe: Recipe | Penalty, name: str, parameter: str, start: str) -> float:
    """Return a start's value of a hyperparameter, in the unit of the parameter that holds it."""
    if isinstance(recipe, Penalty):
        if not recipe.fit_intercept:
            raise InputError(
                "the derivative in C is that of a logistic regression with intercepts, got fit_intercept=False in "
                f"{start}; leave it True, or search C with RandomizedSearchCV."
            )
        return recipe.C
    check_start(recipe.config, name, start, argument="hyperparameters", remedy=", or use RandomizedSearchCV")
    alpha = recipe.alpha
    if name != "weight_decay" or (alpha is None and not parameter.endswith("alpha")):
        return float(recipe.config[name])
    if alpha is not None and parameter.endswith("alpha"):
        return alpha
    other = "weight_decay" if alpha is None else "alpha"
    raise InputError(
        f"hyperparameters: {start} decays by {other}, and not by {parameter}; name {other!r}, or put {parameter!r} in "
        "param_distributions."
    )
