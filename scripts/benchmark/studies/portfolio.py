"""A short list of good MLP configurations, chosen greedily over tables.

It is tested on a table that is left out.
"""

import json
from argparse import Namespace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import loguniform

import gputune
from benchmark.report import publish, table
from benchmark.studies.tables import FOLDS, NAMES, ROWS, loader, split_of

WIDE_TRIALS = 96
TRIALS = 48
EPOCHS = 32
SIZE = 7
DRAWS = 2_000
WIDE = {
    "lr": loguniform(1e-4, 3e-2),
    "batch_size": [32, 64, 128, 256],
    "weight_decay": loguniform(1e-5, 0.3),
    "width": [32, 64, 128, 256],
    "depth": [1, 2, 3, 4],
    "dropout": [0.0, 0.1, 0.2, 0.4],
    "activation": ["relu", "silu", "gelu"],
    "schedule": ["constant", "cosine"],
    "ema": [0.0, 0.99],
    "numbers": ["standard", "quantile", "piecewise"],
}
"""What the list is chosen from."""

HOW = """\
{wide_trials} configurations of the wide space ({wide}) and {trials} of the MLP's default space, each in
{folds} folds of {epochs} epochs on {rows:,} rows of each table (--data); a fold is scored at the epoch that
the others choose. A configuration's regret on a table is how far its score is from the best of all, in units
of the distance between the best and the median. The list has {size} configurations, chosen greedily to make
the mean over the tables of the smallest regret small, beside the default configuration. A row is a table: the
regret of the default configuration with the list that the other tables choose, and with {size} drawn from the
default space (mean of {draws:,} draws).
"""


def run(options: Namespace) -> int:
    load = loader(options.data)
    scores = []
    configs = []
    for name in NAMES:
        split = split_of(name, load, 0)
        wide = split.search(
            "mlp", space=WIDE, n_trials=WIDE_TRIALS, include_default=False, max_epochs=EPOCHS
        )
        # the default configuration first
        plain = split.search("mlp", n_trials=TRIALS + 1, max_epochs=EPOCHS)
        scores.append(np.concatenate([honest(wide), honest(plain)[1:], honest(plain)[:1]]))
        configs = [trial.params for trial in wide.trials]
        print(name, np.nanmax(scores[-1]), wide.best_params, flush=True)
    regrets = np.stack([regret(one) for one in scores])
    outside = [left_out(regrets, place) for place in range(len(NAMES))]
    chosen = greedy(regrets[:, :WIDE_TRIALS], regrets[:, -1])
    configs = [configs[place] for place in chosen]
    found = np.column_stack([regrets[:, -1], outside])
    rows = [
        [name, *(f"{number:.3f}" for number in numbers)]
        for name, numbers in zip([*NAMES, "mean"], [*found, found.mean(0)])
    ]
    how = HOW.format(
        wide_trials=WIDE_TRIALS,
        trials=TRIALS,
        folds=FOLDS,
        epochs=EPOCHS,
        rows=ROWS,
        size=SIZE,
        draws=DRAWS,
        wide=", ".join(WIDE),
    )
    listed = "\n".join(f"- {json.dumps(one)}" for one in configs)
    parts = how, table("table|default|with the list|with draws", map("|".join, rows)), listed
    results = [dict(zip(("table", "default", "list", "draws"), row)) for row in rows]
    numbers = {"results": results, "configurations": configs}
    return publish(options.out, "portfolio", "A short list for the MLP", *parts, **numbers)


def honest(study: gputune.Study) -> NDArray[np.float64]:
    """Return the score of each trial: the mean over folds at an epoch that the other folds choose.

    The best epoch of the mean flatters trials with rough curves, because a refit does not have the
    same luck.
    """
    curves = np.nan_to_num(study.curves, nan=-np.inf)  # (trials, epochs, folds)
    folds = range(curves.shape[2])
    chosen = [np.delete(curves, fold, axis=2).mean(axis=2).argmax(axis=1) for fold in folds]
    rows = np.arange(len(curves))
    return np.mean([curves[rows, epoch, fold] for fold, epoch in zip(folds, chosen)], axis=0)


def regret(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return each score's distance from the best, in units in which the median is 1.

    A diverged trial gets 10.
    """
    scores = np.where(np.isfinite(scores), scores, np.nan)
    best = np.nanmax(scores)
    middle = np.nanmedian(scores)
    return np.nan_to_num((best - scores) / max(best - middle, 1e-12), nan=10.0, posinf=10.0).clip(
        0, 10
    )


def greedy(regrets: NDArray[np.float64], start: NDArray[np.float64]) -> list[int]:
    """Return the positions of SIZE configurations that complement ``start``.

    They are chosen from regrets (tables, configurations).
    """
    chosen = list[int]()
    least = start
    for _ in range(SIZE):
        chosen.append(int(np.minimum(regrets, least[:, None]).mean(axis=0).argmin()))
        least = np.minimum(least, regrets[:, chosen[-1]])
    return chosen


def left_out(regrets: NDArray[np.float64], place: int) -> tuple[float, float]:
    """Return the regret on one table of the list that the other tables choose, and of random draws.

    There are as many random draws as configurations in the list.
    """
    others = np.delete(regrets, place, axis=0)
    chosen = greedy(others[:, :WIDE_TRIALS], others[:, -1])
    own = regrets[place]
    start = regrets[place, -1]
    rng = np.random.default_rng(0)
    drawn = own[WIDE_TRIALS + rng.integers(0, TRIALS, size=(DRAWS, SIZE))].min(axis=1)
    return float(min(start, own[chosen].min())), float(np.minimum(start, drawn).mean())
