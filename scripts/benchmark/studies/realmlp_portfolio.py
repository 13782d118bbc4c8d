"""A short list of good configurations of RealMLP, chosen greedily over tables.

It is tested on a table that is left out.
"""

import json
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmark.report import Clock, describe_machine, publish, published, table
from benchmark.studies.tables import FOLDS, NAMES, ROWS, Split, loader, split_of
from gputune.spaces.portfolios import PORTFOLIOS

TRIALS = 32
"""Configurations that are drawn from each of the two spaces."""
EPOCHS = 96
SIZE = 8
DRAWS = 2_000
AUTOGLUON = PORTFOLIOS["realmlp"][0]
"""The only network in AutoGluon's portfolio, with one network instead of eight and a constant label
smoothing."""

HOW = """\
The published default, the RealMLP of AutoGluon's portfolio, and {trials} configurations of each of
the spaces realmlp and realmlp-tabarena, each in {folds} folds of {epochs} epochs on {rows:,} rows of
each table (--data). An error is an RMSE (of kc_house that of the logarithm of the price), 1 - ROC AUC
of heart_2020, else 1 - accuracy. The error of several trials is the mean over the folds: the other
folds choose the trial and the epoch. The list has {size} configurations: the default, AutoGluon's,
and {chosen} that are chosen one after another. Each one makes the mean over the tables of the logarithm
of the list's error as small as possible. A row is a table, and the list is that which the other
tables choose. Random configurations are from the space realmlp, and one of each set is the default
(mean of {draws:,} draws). The last two columns are the error of the list relative to that of {size}
and of {trials} random configurations. One thread.
"""


@dataclass(frozen=True)
class Result:
    """All configurations on one table.

    ``fold_scores`` has for each configuration and fold the score at the epoch that the other folds
    choose, and ``other_scores`` the mean score of the other folds at this epoch: (configurations,
    folds). Larger is better.
    """

    table: str
    scoring: str
    fold_scores: list[list[float]]
    other_scores: list[list[float]]
    seconds: float
    cpu: float


def run(options: Namespace) -> int:
    load = loader(options.data)
    machine = describe_machine()
    results = published(options.out, "realmlp_portfolio", machine, "results", Result)
    configs = candidates()
    for name in options.rows or NAMES:
        if any(result.table == name for result in results):
            continue
        split = split_of(name, load, 0)
        clock = Clock()
        own, others = scores_of(split, configs, options.epochs or EPOCHS)
        results.append(Result(name, split.scoring, own.tolist(), others.tolist(), *clock()))
        print(name, f"{results[-1].cpu:.0f} CPU s, best {own.mean(axis=1).max():.4f}", flush=True)
        whole = {"machine": machine, "candidates": configs, "results": results}
        parts = words(results, configs) if len(results) > 1 else ["One table only."]
        publish(options.out, "realmlp_portfolio", "A short list for RealMLP", *parts, **whole)
    return 0


def candidates() -> list[dict[str, Any]]:
    """Return the default configuration, AutoGluon's, and draws of both spaces.

    Tables with numeric targets use them without label smoothing.
    """
    from gputune.spaces.named import SPACES
    from gputune.spaces.random import draw

    drawn = [draw(SPACES[name]("classes"), TRIALS, 0) for name in ("realmlp", "realmlp-tabarena")]
    return [{}, AUTOGLUON, *drawn[0], *drawn[1]]


def scores_of(
    split: Split, configs: list[dict[str, Any]], epochs: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return ``fold_scores`` and ``other_scores`` of Result as arrays."""
    if split.task == "regression":
        configs = [
            {key: value for key, value in config.items() if key != "loss__label_smoothing"}
            for config in configs
        ]
    study = split.search(
        "realmlp", include=configs[1:], include_default=True, n_trials=1, max_epochs=epochs
    )
    curves = np.nan_to_num(study.curves.astype(float), nan=-np.inf)  # (trials, epochs, folds)
    rows = np.arange(len(curves))
    own = np.empty((len(curves), curves.shape[2]))
    others = np.empty_like(own)
    for fold in range(curves.shape[2]):
        means = np.delete(curves, fold, axis=2).mean(axis=2)
        best = means.argmax(axis=1)
        own[:, fold] = curves[rows, best, fold]
        others[:, fold] = means[rows, best]
    worst = -1e6  # of a diverged trial
    return np.maximum(own, worst), np.maximum(others, worst)


def errors(result: Result) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return ``fold_scores`` and ``other_scores`` as errors: smaller is better."""
    offset = 0.0 if result.scoring.startswith("neg") else 1.0
    return offset - np.array(result.fold_scores), offset - np.array(result.other_scores)


def chosen_error(result: Result, places: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the error of each set of trials, the mean over the folds.

    For each fold, the other folds choose the trial. ``places`` has shape (..., trials).
    """
    own, others = errors(result)
    folds = range(own.shape[1])
    found = []
    for fold in folds:
        best = np.take_along_axis(
            places, others[places, fold].argmin(axis=-1, keepdims=True), axis=-1
        )[..., 0]
        found.append(own[best, fold])
    return np.mean(found, axis=0)


def greedy(results: list[Result]) -> list[int]:
    """Return SIZE configurations.

    The default and AutoGluon's configuration (0 and 1) come first. Each next configuration is the
    one with which the list has the smallest mean logarithm of the error over the tables.
    """
    chosen = [0, 1]
    while len(chosen) < SIZE:
        rest = [place for place in range(len(results[0].fold_scores)) if place not in chosen]
        lists = np.array([[*chosen, place] for place in rest])
        error = np.mean([np.log(chosen_error(result, lists)) for result in results], axis=0)
        chosen.append(rest[int(error.argmin())])
    return chosen


def words(results: list[Result], configs: list[dict[str, Any]]) -> list[str]:
    """Return the parts of the report: description, table, configurations of the list."""
    rng = np.random.default_rng(0)
    drawn = np.stack([rng.choice(TRIALS, SIZE - 1, replace=False) for _ in range(DRAWS)]) + 2
    few = np.column_stack([np.zeros(DRAWS, dtype=int), drawn])
    many = np.append(0, np.arange(2, 1 + TRIALS))
    rows = []
    gains = []
    for place, result in enumerate(results):
        others = results[:place] + results[place + 1 :]
        listed = chosen_error(result, np.array(greedy(others)))
        random_few = chosen_error(result, few).mean()
        random_many = chosen_error(result, many)
        default = errors(result)[0][0].mean()
        gains.append([listed / random_few - 1, listed / random_many - 1])
        shown = [f"{number:.4f}" for number in (default, listed, random_few, random_many)]
        rows.append("|".join([result.table, *shown, *(f"{gain:+.1%}" for gain in gains[-1])]))
    mean = [f"{gain:+.1%}" for gain in np.mean(gains, axis=0)]
    rows.append("|".join(["mean", "", "", "", "", *mean]))
    how = HOW.format(
        trials=TRIALS,
        folds=FOLDS,
        epochs=EPOCHS,
        rows=ROWS,
        size=SIZE,
        chosen=SIZE - 2,
        draws=DRAWS,
    )
    head = f"table|default|list|{SIZE} random|{TRIALS} random|list to {SIZE}|list to {TRIALS}"
    listed = "\n".join(f"- {json.dumps(configs[place])}" for place in greedy(results))
    return [how, table(head, rows), listed]
