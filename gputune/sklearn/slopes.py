"""The slopes of fits that a search has made: the same training once more, differentiated on the validation rows."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gputune.data.dataset import Fold
from gputune.engine.backend import choose_device
from gputune.engine.entry import entry
from gputune.engine.memory import GivenUp
from gputune.errors import InputError
from gputune.hypergradients.chunk import HypergradientJob, Slopes
from gputune.hypergradients.implicit import implicit_gradients
from gputune.hypergradients.result import check_classes
from gputune.sklearn.dataset import FoldGroup, Part, Rows, as_tensor, lay_out, shared_x
from gputune.sklearn.fit import Batch, Place, batches
from gputune.sklearn.logistic import LogisticRegression, Penalty, make_problem, solve_groups
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


@dataclass(frozen=True, eq=False)
class _Folds:
    """Folds laid out in one array: training and validation rows of each, as positions in ``rows``."""

    places: tuple[int, ...]
    rows: Rows
    trains: Mapping[int, NDArray[np.int64]]
    valids: tuple[NDArray[np.int64], ...]

    def valid(self, group: FoldGroup, device: torch.device) -> list[torch.Tensor]:
        """Return the validation rows of a group of the folds."""
        return [as_tensor(self.valids[place]).to(device) for place in group.places]


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
        for folds in _lay_out(trials[0]):
            members = [[trial[place] for place in folds.places] for trial in trials]
            slopes = _solved(members, folds) if is_solved else _trained(members, folds, request)
            for (fold, trial), slope in slopes:
                fit = members[trial][fold]
                by_fold[fit.trial][fit.fold] = slope
    number = Counter(fit.trial for fit in fits)
    return {trial: _stack(slopes) for trial, slopes in by_fold.items() if len(slopes) == number[trial]}


def _stack(folds: dict[int, MemberSlope]) -> TrialSlopes:
    losses, slopes, ratios = zip(*(folds[fold] for fold in sorted(folds)))
    tables = {name: np.array([fold[name] for fold in slopes])[:, None, None] for name in slopes[0]}
    return TrialSlopes(np.array(losses), tables, np.array(ratios))


def _lay_out(fits: Sequence[Fit]) -> list[_Folds]:
    """Return the folds of one trial, whose validation rows have the form of the training rows, in few layouts."""
    trains, valids = [fit.train for fit in fits], [fit.valid for fit in fits]
    layouts = lay_out([part for part in (*trains, *valids) if isinstance(part, Part)])
    folds = []
    for layout in layouts:
        half = len(layout.places) // 2
        folds.append(
            _Folds(
                layout.places[:half], layout.rows, dict(enumerate(layout.folds[:half])), layout.folds[half:]
            )
        )
    return folds


def _trained(
    members: Sequence[Sequence[Fit]], folds: _Folds, request: SlopeRequest
) -> Iterator[tuple[Place, MemberSlope]]:
    """Differentiate trials (C) that train in the folds."""
    recipes = [_recipe(trial[0]) for trial in members]
    for batch in batches(recipes, folds.rows, folds.trains):
        valid = folds.valid(batch.group, batch.data.device)
        data = replace(batch.data, folds=tuple(Fold(f.train, v) for f, v in zip(batch.data.folds, valid)))
        for (f, c), slope in _differentiate(replace(batch, data=data), request):
            yield (batch.group.places[f], batch.index[c]), slope


def _recipe(fit: Fit) -> Recipe:
    """Return what the fit was trained with, with the seed that it was trained with."""
    seed: int = fit.fitted.seed
    recipe: Recipe = fit.estimator._recipe(lambda: seed)
    return replace(recipe, seed=seed)  # a RandomState has drawn another one


def _differentiate(batch: Batch, request: SlopeRequest) -> Iterator[tuple[Place, MemberSlope]]:
    """Differentiate the configurations of a batch in its folds."""
    trainer = batch.trainer(request.workers, request.deadline)
    job = trainer.job(
        HypergradientJob, epochs=batch.recipes[0].epochs, hyperparameters=request.names, mode=request.mode
    )
    plan, job = trainer.plan_differentiated(batch.configs, job)
    plan = replace(plan, threads=min(plan.threads, torch.get_num_threads()))
    for outcome in trainer.train(job, plan):
        if isinstance(outcome, GivenUp):
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


def _solved(members: Sequence[Sequence[Fit]], folds: _Folds) -> Iterator[tuple[Place, MemberSlope]]:
    """Differentiate trials (C) that are solved in the folds, at their minimum."""
    penalties: list[Penalty] = [trial[0].estimator._recipe(lambda: 0) for trial in members]
    for index, group in solve_groups(penalties, folds.rows, folds.trains):
        x = shared_x(folds.rows, choose_device(penalties[index[0]].device), torch.float64)
        problem = make_problem([penalties[i] for i in index], folds.rows, group, x)
        implicit = implicit_gradients(problem, solve(problem), folds.valid(group, x.device))
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
