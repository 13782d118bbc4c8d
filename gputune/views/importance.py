"""How much each hyperparameter mattered: a random forest learns the trials' ranks, then loses one column at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gputune.errors import InputError
from gputune.study.study import Study
from gputune.views.parameters import Parameter, varied_parameters

FEWEST, MOST = 10, 2000
"""Trials that a forest needs, and those it is given at most, drawn from all."""

_TREES, _SHUFFLES = 32, 5


@dataclass(frozen=True, eq=False)
class Importance:
    """``names`` of the hyperparameters, most important first.

    drops    (n,) fall of the forest's R2, on trials that it was not fitted on, when one hyperparameter is shuffled
             among them: 0 for one that does not matter, up to 2 for one that alone decides
    errors   (n,) standard deviation of the fall over the shuffles and the two halves
    fit      R2 of the forest on trials that it was not fitted on: near 0 or below, the falls mean nothing
    trials   how many trials it learned from
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    drops: NDArray[np.float64]
    errors: NDArray[np.float64]
    fit: float
    trials: int


def importance(study: Study, *, seed: int = 0) -> Importance:
    """Return the permutation importance of the hyperparameters that varied (Breiman 2001).

    Every finished trial counts, with the rank of its score; a diverged one has the lowest rank. Each half of the trials
    is predicted by a forest of the other half. Raises InputError where fewer than ten trials are finished, or no
    hyperparameter varied.
    """
    columns = varied_parameters(study)
    done = np.flatnonzero([trial.state != "waiting" for trial in study.trials])
    if len(done) < FEWEST or not columns:
        raise InputError(
            f"importance needs {FEWEST} finished trials and a hyperparameter that varies, got {len(done)} trials and "
            f"{len(columns)} hyperparameters; search further."
        )
    drawn = np.random.default_rng(seed).permutation(len(done))[:MOST]
    ranks = _ranks(np.array([study.trials[row].score for row in done]))[drawn]
    table = _table(columns)[done[drawn]]
    one, other = np.array_split(np.arange(len(drawn)), 2)
    fits, drops = zip(*(_half(table, ranks, *halves, seed) for halves in ((one, other), (other, one))))
    every = np.concatenate(drops, axis=1)
    order = np.argsort(-every.mean(1), kind="stable")
    return Importance(
        names=tuple(columns[i].name for i in order),
        labels=tuple(columns[i].label for i in order),
        drops=every.mean(1)[order],
        errors=every.std(1)[order],
        fit=float(np.mean(fits)),
        trials=len(drawn),
    )


def _half(
    table: NDArray[np.float64],
    ranks: NDArray[np.float64],
    fitted: NDArray[np.intp],
    judged: NDArray[np.intp],
    seed: int,
) -> tuple[float, NDArray[np.float64]]:
    """Return R2 of a forest on the judged trials, and its falls (n, shuffles)."""
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    forest = RandomForestRegressor(_TREES, min_samples_leaf=2, max_features=0.5, random_state=seed)
    forest.fit(table[fitted], ranks[fitted])
    held_out = table[judged], ranks[judged]
    falls = permutation_importance(forest, *held_out, n_repeats=_SHUFFLES, random_state=seed, scoring="r2")
    return float(forest.score(*held_out)), falls.importances


def _ranks(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ranks in [0, 1], the best 1, equal scores alike; no score counts as the lowest."""
    from scipy.stats import rankdata

    ranks: NDArray[np.float64] = rankdata(np.where(np.isfinite(scores), scores, -np.inf))
    return (ranks - 1) / max(1, len(scores) - 1)


def _table(columns: Sequence[Parameter]) -> NDArray[np.float64]:
    """Return (C, n) columns a tree can cut: a hyperparameter that a trial lacks lies below all values."""
    table = np.stack([column.values for column in columns], axis=1)
    return np.where(np.isnan(table), np.nanmin(table, axis=0) - 1.0, table)
