"""What a descent moves, and the slopes of its fits: the same training once more, differentiated on validation rows."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import clone

from gputune.data.dataset import Fold
from gputune.engine.choice import device_for_solver
from gputune.engine.memory import Failure
from gputune.engine.stop import entry
from gputune.errors import InputError
from gputune.hypergradients.arguments import check_coordinate, check_start
from gputune.hypergradients.chunk import HypergradientJob, Slopes
from gputune.hypergradients.implicit import implicit_gradients
from gputune.hypergradients.inner import check_classes
from gputune.sklearn.base import last_step
from gputune.sklearn.dataset import FoldGroup, Layout, Part, as_tensor, lay_out, shared_x
from gputune.sklearn.fit import Batch, batches, in_skorchs_words
from gputune.sklearn.logistic import LogisticRegression, Penalty, make_problem, solve_groups
from gputune.sklearn.member import Member, Place
from gputune.sklearn.recipe import Recipe
from gputune.sklearn.record import Fit
from gputune.sklearn.replay import group_fits
from gputune.solver.solve import solve

MemberSlope = tuple[float, dict[str, float], float]
"""Of one member: its validation loss, the loss's slope in each hyperparameter, the ratio of the chaos guard."""


@dataclass(frozen=True, eq=False)
class TrialSlopes:
    """Of one trial, by fold: ``losses`` (F,), ``slopes`` hyperparameter -> (F, 1, 1), ``ratios`` (F,) of the guard."""

    losses: NDArray[np.float64]
    slopes: dict[str, NDArray[np.float64]]
    ratios: NDArray[np.float64]


@dataclass(frozen=True)
class SlopeRequest:
    """Which slopes are taken: in which hyperparameters, exactly or by wide differences, on what, until when."""

    names: tuple[str, ...]
    mode: Literal["exact", "differences"]
    workers: int | None = 1
    deadline: float | None = None


@entry
def slopes_of(fits: Sequence[Fit], request: SlopeRequest) -> dict[int, TrialSlopes]:
    """Return the slopes of each trial, of which all fits are made and hold validation rows out.

    The loss is the mean cross-entropy of the validation rows, or the mean squared error in the target's own unit.
    The slope is in the hyperparameter as the estimator has it: in alpha, where alpha is set. Trials that ``deadline``
    cuts short are missing.
    """
    by_fold: dict[int, dict[int, MemberSlope]] = defaultdict(dict)
    for trials in group_fits(fits):
        is_solved = isinstance(trials[0][0].estimator, LogisticRegression)
        parts = [part for fit in trials[0] for part in (fit.train, fit.valid) if isinstance(part, Part)]
        for layout in lay_out(parts):  # the validation rows of a fold have the form of its training rows
            members = [[trial[place // 2] for place in layout.places[::2]] for trial in trials]
            slopes = _solver_slopes(members, layout) if is_solved else _training_slopes(members, layout, request)
            for (fold, trial), slope in slopes:
                fit = members[trial][fold]
                by_fold[fit.trial][fit.fold] = slope
    number = Counter(fit.trial for fit in fits)
    return {trial: _stack(slopes) for trial, slopes in by_fold.items() if len(slopes) == number[trial]}


def _stack(folds: dict[int, MemberSlope]) -> TrialSlopes:
    losses, slopes, ratios = zip(*(folds[fold] for fold in sorted(folds)))
    tables = {name: np.array([fold[name] for fold in slopes])[:, None, None] for name in slopes[0]}
    return TrialSlopes(np.array(losses), tables, np.array(ratios))


def _valid_rows(layout: Layout, group: FoldGroup, device: torch.device) -> list[torch.Tensor]:
    """Return the validation rows of a group of folds, which are laid out each behind its training rows."""
    return [as_tensor(layout.folds[2 * place + 1]).to(device) for place in group.places]


def _training_slopes(
    members: Sequence[Sequence[Fit]], layout: Layout, request: SlopeRequest
) -> Iterator[tuple[Place, MemberSlope]]:
    """Differentiate trials (C) that train in the folds."""
    recipes = [_recipe(trial[0]) for trial in members]
    for batch in batches(recipes, layout.rows, dict(enumerate(layout.folds[::2]))):
        valid = _valid_rows(layout, batch.group, batch.data.device)
        data = replace(batch.data, folds=tuple(Fold(f.train, v) for f, v in zip(batch.data.folds, valid)))
        for (f, c), slope in _differentiate(replace(batch, data=data), request):
            yield (batch.group.places[f], batch.index[c]), slope


def _recipe(fit: Fit) -> Recipe:
    """Return what the fit was trained with, with the seed that it was trained with."""
    assert isinstance(fit.fitted, Member)
    seed = fit.fitted.seed
    recipe: Recipe = fit.estimator._recipe(lambda: seed)
    return replace(recipe, seed=seed, patience=None)  # a RandomState has drawn another one


def _differentiate(batch: Batch, request: SlopeRequest) -> Iterator[tuple[Place, MemberSlope]]:
    """Differentiate the configurations of a batch in its folds."""
    trainer = batch.trainer(request.workers, request.deadline)
    job = trainer.job(
        HypergradientJob, epochs=batch.recipes[0].epochs, hyperparameters=request.names, mode=request.mode
    )
    try:
        plan, job = trainer.plan_differentiated(batch.configs, job)
    except InputError as error:
        raise in_skorchs_words(error) from error
    plan = replace(plan, threads=min(plan.threads, torch.get_num_threads()))
    for outcome in trainer.train(job, plan):
        if isinstance(outcome, Failure):
            raise outcome.error()
        assert isinstance(outcome, Slopes)
        if outcome.losses is None or outcome.slopes is None or outcome.ratios is None:
            continue  # the deadline has cut it short
        for c, i in enumerate(outcome.index):
            alpha = batch.recipes[i].alpha
            for f in range(batch.data.n_folds):
                slopes = {name: table[c, f].item() for name, table in outcome.slopes.items()}
                if alpha is not None and "weight_decay" in slopes:
                    slopes["weight_decay"] *= batch.configs[i]["weight_decay"] / alpha
                yield (f, i), (outcome.losses[c, f].item(), slopes, outcome.ratios[c, f].item())


def _solver_slopes(members: Sequence[Sequence[Fit]], layout: Layout) -> Iterator[tuple[Place, MemberSlope]]:
    """Differentiate trials (C) that are solved in the folds, at their minimum."""
    penalties: list[Penalty] = [trial[0].estimator._recipe(lambda: 0) for trial in members]
    for index, group in solve_groups(penalties, layout.rows, dict(enumerate(layout.folds[::2]))):
        (x,) = shared_x(layout.rows, device_for_solver(penalties[index[0]].device).device, torch.float64)
        problem = make_problem([penalties[i] for i in index], layout.rows, group, x)
        implicit = implicit_gradients(problem, solve(problem), _valid_rows(layout, group, x.device))
        losses, slopes = (t.view(len(group.trains), -1) for t in (implicit.value, implicit.gradient))
        slopes = slopes / problem.C
        for f, place in enumerate(group.places):
            for c, i in enumerate(index):
                yield (place, i), (losses[f, c].item(), {"C": slopes[f, c].item()}, 0.0)


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
        check_classes(
            fit.fold,
            _classes(valid, weighing=False),
            _classes(train, weighing=True),
            weighed=train.rows.weights is not None,
        )


def _classes(part: Part, *, weighing: bool) -> set[object]:
    """Return the labels of all rows, or of those that weigh something; none for a regression."""
    rows, index = part.rows, part.index
    if rows.classes is None:
        return set()
    if weighing and rows.weights is not None:
        index = index[rows.weights[index] > 0]
    return set(rows.classes[np.unique(rows.y[index])].tolist())


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
        value = values[name] = _value(recipe, name, parameter, number)
        check_coordinate(name, value, f"start {number}", called=parameter, space="param_distributions")
    return values


def _value(recipe: Recipe | Penalty, name: str, parameter: str, number: int) -> float:
    """Return a start's value of a hyperparameter, in the unit of the parameter that holds it."""
    if isinstance(recipe, Penalty):
        if not recipe.fit_intercept:
            raise InputError(
                "the derivative in C is that of a logistic regression with intercepts, got fit_intercept=False in "
                f"start {number}; leave it True, or search C with RandomizedSearchCV."
            )
        return recipe.C
    remedy = ", or use RandomizedSearchCV"
    check_start(recipe.config, name, f"start {number}", argument="hyperparameters", remedy=remedy)
    if name != "weight_decay":
        return float(recipe.config[name])
    if (recipe.alpha is not None) != parameter.endswith("alpha"):
        other = "weight_decay" if recipe.alpha is None else "alpha"
        raise InputError(
            f"hyperparameters: start {number} decays by {other}, and not by {parameter}; name {other!r}, or put "
            f"{parameter!r} in param_distributions."
        )
    return float(recipe.config[name]) if recipe.alpha is None else recipe.alpha
