"""The slopes of fits that a search has made: the same training once more, differentiated on the validation rows."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gputune.data.dataset import Dataset, Fold
from gputune.engine.backend import choose_device
from gputune.engine.entry import entry
from gputune.engine.memory import GivenUp
from gputune.hypergradients.chunk import HypergradientJob, Slopes
from gputune.hypergradients.implicit import implicit_gradients
from gputune.sklearn.dataset import (
    FoldGroup,
    Part,
    Rows,
    as_tensor,
    group_folds,
    lay_out,
    make_dataset,
    shared_x,
)
from gputune.sklearn.fit import Place, configs_for, groups_for, recipes_alike, trainer_of
from gputune.sklearn.logistic import LogisticRegression
from gputune.sklearn.replay import Fit, fits_alike
from gputune.sklearn.solve import Penalty, make_problem, penalties_alike
from gputune.sklearn.words import Recipe

MemberSlope = tuple[float, dict[str, float], float]
"""Of one member: its validation loss, the loss's slope in each hyperparameter, the ratio of the chaos guard."""


@dataclass(frozen=True, eq=False)
class Derivatives:
    """Of one trial, by fold: ``losses`` (F,), ``slopes`` hyperparameter -> (F, 1, 1), ``ratios`` (F,) of the guard."""

    losses: NDArray[np.float64]
    slopes: dict[str, NDArray[np.float64]]
    ratios: NDArray[np.float64]


@dataclass(frozen=True)
class How:
    """How slopes are taken: in which hyperparameters, exactly or by wide differences, on what, until when."""

    names: tuple[str, ...]
    mode: Any
    workers: int | None = 1
    deadline: float | None = None


@dataclass(frozen=True, eq=False)
class _Folds:
    """Folds laid out in one array: training and validation rows of each, as positions in ``rows``."""

    places: tuple[int, ...]
    rows: Rows
    trains: tuple[NDArray[np.int64], ...]
    valids: tuple[NDArray[np.int64], ...]

    def valid(self, group: FoldGroup, device: torch.device) -> list[torch.Tensor]:
        """Return the validation rows of a group of the folds."""
        return [as_tensor(self.valids[place]).to(device) for place in group.places]


@entry
def slopes_of(fits: Sequence[Fit], how: How) -> dict[int, Derivatives]:
    """Return the slopes of each trial, of which all fits are made and hold validation rows out.

    The loss is the mean cross-entropy of the validation rows, or the mean squared error in the target's own unit.
    The slope is in the hyperparameter as the estimator has it: in alpha, where alpha is set. Trials that ``deadline``
    cuts short are missing.
    """
    found: dict[int, dict[int, MemberSlope]] = defaultdict(dict)
    for trials in fits_alike(fits):
        solved = isinstance(trials[0][0].estimator, LogisticRegression)
        for folds in _lay_out(trials[0]):
            wanted = [[own[place] for place in folds.places] for own in trials]
            members = _solved(wanted, folds) if solved else _trained(wanted, folds, how)
            for (fold, trial), member in members.items():
                fit = wanted[trial][fold]
                found[fit.trial][fit.fold] = member
    number: dict[int, int] = defaultdict(int)
    for fit in fits:
        number[fit.trial] += 1
    return {trial: _stack(own) for trial, own in found.items() if len(own) == number[trial]}


def _stack(folds: dict[int, MemberSlope]) -> Derivatives:
    losses, slopes, ratios = zip(*(folds[fold] for fold in sorted(folds)))
    tables = {name: np.array([own[name] for own in slopes])[:, None, None] for name in slopes[0]}
    return Derivatives(np.array(losses), tables, np.array(ratios))


def _lay_out(fits: Sequence[Fit]) -> list[_Folds]:
    """Return the folds of one trial, whose validation rows have the form of the training rows, in few layouts."""
    trains, valids = [fit.asked for fit in fits], [fit.held_out for fit in fits]
    layouts = lay_out([part for part in (*trains, *valids) if isinstance(part, Part)])
    made = []
    for layout in layouts:
        half = len(layout.places) // 2
        made.append(_Folds(layout.places[:half], layout.rows, layout.folds[:half], layout.folds[half:]))
    return made


def _trained(wanted: Sequence[Sequence[Fit]], folds: _Folds, how: How) -> dict[Place, MemberSlope]:
    """Differentiate trials (C) that train in the folds."""
    recipes = [_recipe(own[0]) for own in wanted]
    found: dict[Place, MemberSlope] = {}
    for index in recipes_alike(recipes):
        alike = [recipes[i] for i in index]
        x = shared_x(folds.rows, choose_device(alike[0].device))
        groups, _ = groups_for(alike, folds.rows, folds.trains)
        for group in groups:
            valid = folds.valid(group, x.device)
            data = make_dataset(folds.rows, group, x)
            data = replace(data, folds=tuple(Fold(f.train, v) for f, v in zip(data.folds, valid)))
            configs = configs_for(alike, folds.rows, group.trains[0])
            for (f, c), member in _trained_group(alike, configs, data, how).items():
                found[group.places[f], index[c]] = member
    return found


def _recipe(fit: Fit) -> Recipe:
    """Return what the fit was trained with, with the seed that it was trained with."""
    seed: int = fit.member().seed
    recipe: Recipe = fit.estimator._recipe(lambda: seed)
    return replace(recipe, seed=seed)  # a RandomState has drawn another one


def _trained_group(
    recipes: Sequence[Recipe], configs: list[dict[str, Any]], data: Dataset, how: How
) -> dict[Place, MemberSlope]:
    """Differentiate configurations that have all else in common in the folds of one dataset."""
    recipe = recipes[0]
    trainer = trainer_of(recipe, data, how.workers, how.deadline)
    job = trainer.job(HypergradientJob, epochs=recipe.epochs, wanted=how.names, mode=how.mode)
    plan, job = trainer.plan_differentiated(configs, job)
    plan = replace(plan, threads=min(plan.threads, torch.get_num_threads()))
    found: dict[Place, MemberSlope] = {}
    for outcome in trainer.train(job, plan):
        if isinstance(outcome, GivenUp):
            raise outcome.error()
        assert isinstance(outcome, Slopes)
        if outcome.losses is None or outcome.slopes is None or outcome.ratios is None:
            continue
        for c, i in enumerate(outcome.index):
            for f in range(data.n_folds):
                slopes = {name: table[c, f].item() for name, table in outcome.slopes.items()}
                alpha = recipes[i].alpha
                if alpha is not None and "weight_decay" in slopes:
                    slopes["weight_decay"] *= configs[i]["weight_decay"] / alpha
                found[f, i] = (outcome.losses[c, f].item(), slopes, outcome.ratios[c, f].item())
    return found


def _solved(wanted: Sequence[Sequence[Fit]], folds: _Folds) -> dict[Place, MemberSlope]:
    """Differentiate trials (C) that are solved in the folds, at their minimum."""
    penalties: list[Penalty] = [own[0].estimator._recipe(lambda: 0) for own in wanted]
    groups, _ = group_folds(folds.rows, folds.trains, key=lambda train: None)
    found: dict[Place, MemberSlope] = {}
    for index in penalties_alike(penalties):
        x = shared_x(folds.rows, choose_device(penalties[index[0]].device), torch.float64)
        for group in groups:
            problem = make_problem([penalties[i] for i in index], folds.rows, group, x)
            implicit = implicit_gradients(
                problem.solve(),
                problem.x,
                problem.y,
                problem.weights,
                folds.valid(group, x.device),
                C=problem.C,
                l1_ratio=problem.l1_ratio,
            )
            losses, slopes = (t.view(len(group.trains), -1) for t in (implicit.value, implicit.gradient))
            slopes = slopes / problem.C
            for f, place in enumerate(group.places):
                for c, i in enumerate(index):
                    found[place, i] = (losses[f, c].item(), {"C": slopes[f, c].item()}, 0.0)
    return found
