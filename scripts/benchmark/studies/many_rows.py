"""Tables of at least 20,000 rows: gputune and boosted trees that train for equally many seconds."""

import math
import resource
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

import gputune
from benchmark.engines import trees
from benchmark.report import Clock, describe_machine, publish, published, table
from benchmark.studies.tables import FOLDS, LOGARITHMS, Split, loader

NAMES = ("california", "kc_house", "letter", "protein", "adult", "heart_2020")
IN_TIME = {"kc_house": "date"}
"""Tables whose last rows in time are held out."""
PER_ROW = 0.06
LONGEST = 3_600.0
HELD_OUT = 0.2

HOW = """\
A fifth of each table's rows is held out: of kc_house (logarithm of the price) the last fifth by date,
of the other tables a random fifth. Each side has {per_row:.0f} seconds of one thread for 1,000 training
rows, and at most {longest:,.0f}. LightGBM and CatBoost are tuned by Optuna's TPE, each trial in {folds}
folds with early stopping. Their last trial begins within the time, and the best trial is fitted
again on all rows afterwards. gputune searches with `preset="best"` and this time as its timeout, and
uses the ensemble of the trials that have a score. If only one trial has a score, it uses this trial.
An error is an RMSE, 1 - ROC AUC of heart_2020, else 1 - accuracy. Seconds are of the processor, with
everything counted. GiB is the peak memory of the process, if it measured only this side. The last
columns are gputune's error relative to the error of tuned trees: below zero, gputune is better.
"""


@dataclass(frozen=True)
class Result:
    """The held-out error of a side on a table, and what it cost.

    ``peak`` is the peak memory of the process in MiB. It is None if the process measured another
    side before.
    """

    table: str
    side: str
    rows: int
    error: float
    seconds: float
    cpu: float
    trials: int
    peak: float | None = None


Model = tuple[Any, int]
"""A fitted model, and the number of its trials."""


def run(options: Namespace) -> int:
    load = loader(options.data, "--many-rows")
    machine = describe_machine()
    machine["versions"] |= trees.versions()
    results = published(options.out, "many_rows", machine, "results", Result)
    done = {(one.table, one.side) for one in results}
    chosen = options.rows or (*NAMES, *SIDES)
    sides = [side for side in SIDES if side in chosen] or SIDES
    alone = True
    for name in [name for name in NAMES if name in chosen] or NAMES:
        split = split_of(name, load)
        for side in sides:
            if (name, side) in done:
                continue
            if side != "gputune" and side.lower() not in trees.versions():
                print(f"{side}: left out, pip install {side.lower()}")
                continue
            clock = Clock()
            model, trials = SIDES[side](split, seconds_of(split))
            costs = clock()
            error = error_of(split, model)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 if alone else None
            alone = False
            results.append(Result(name, side, len(split.X), error, *costs, trials, peak))
            print(results[-1], flush=True)
            publish(
                options.out,
                "many_rows",
                "Tables with many rows",
                *words(results),
                machine=machine,
                results=results,
            )
    return 0


def split_of(name: str, load: Callable[[str], tuple[pd.DataFrame, pd.Series, str]]) -> Split:
    """Return the rows for the search and the rows that are held out."""
    X, y, task = load(name)
    y = np.log(y) if name in LOGARITHMS else y
    if name in IN_TIME:
        # As text, the date would be a category for gputune. The trees read it as a date anyway.
        X = X.assign(**{IN_TIME[name]: pd.to_datetime(X[IN_TIME[name]])})
        order = X[IN_TIME[name]].argsort(kind="stable")
        searched, held_out = np.split(order, [round(len(X) * (1 - HELD_OUT))])
    else:
        searched, held_out = train_test_split(
            np.arange(len(X)),
            test_size=HELD_OUT,
            stratify=None if task == "regression" else y,
            random_state=0,
        )
    parts = [
        data.iloc[rows].reset_index(drop=True) for rows in (searched, held_out) for data in (X, y)
    ]
    return Split(*parts, task)


def seconds_of(split: Split) -> float:
    return min(PER_ROW * len(split.X), LONGEST)


def boosted(library: str, split: Split, seconds: float) -> Model:
    rows = split.X, split.y, split.task, split.scoring
    model, trials, _ = trees.tuned(library, *rows, folds=FOLDS, seconds=seconds)
    return model, trials


def network(split: Split, seconds: float) -> Model:
    return final_model(split.search("auto", preset="best", timeout=seconds))


def final_model(study: gputune.Study) -> Model:
    """Return the ensemble of the trials with a score, or the best trial if only one has a score."""
    trials = sum(math.isfinite(trial.score) for trial in study.trials)
    model = study.ensemble(verbose=0) if trials > 1 else study.best_model()
    return model, trials


SIDES: dict[str, Callable[[Split, float], Model]] = {
    "LightGBM": partial(boosted, "lightgbm"),
    "CatBoost": partial(boosted, "catboost"),
    "gputune": network,
}


def error_of(split: Split, model: Any) -> float:
    """Return the error on the held-out rows."""
    if split.scoring == "roc_auc":
        shares = model.predict_proba(split.X_test)[:, 1]
        return 1 - float(roc_auc_score(split.y_test.to_numpy(), shares))
    score = split.score(model)
    return score if split.task == "regression" else 1 - score


def cell(result: Result) -> str:
    memory = "" if result.peak is None else f", {result.peak / 1024:.1f} GiB"
    return f"{result.error:.4f} ({result.cpu:,.0f} s, {result.trials} trials{memory})"


def words(results: list[Result]) -> tuple[str, str]:
    """Return the description and the table of errors."""
    of = {(one.table, one.side): one for one in results}
    rows = []
    for name in NAMES:
        found = {side: of[name, side] for side in SIDES if (name, side) in of}
        if not found:
            continue
        cells = [cell(found[side]) if side in found else "" for side in SIDES]
        gaps = [
            f"{found['gputune'].error / found[side].error - 1:+.1%}"
            if {side, "gputune"} <= found.keys()
            else ""
            for side in list(SIDES)[:-1]
        ]
        rows.append("|".join([name, f"{next(iter(found.values())).rows:,}", *cells, *gaps]))
    how = HOW.format(per_row=PER_ROW * 1_000, longest=LONGEST, folds=FOLDS)
    head = "table|training rows|" + "|".join(SIDES) + "|to LightGBM|to CatBoost"
    return how, table(head, rows)
