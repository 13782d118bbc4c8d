"""Comparison of models for tables: networks and boosted trees.

They are scored on rows that were not used for fitting.
"""

import importlib.util
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

import gputune
from benchmark.engines import trees
from benchmark.report import Clock, counted, describe_machine, publish, published, table

NAMES = (
    "california",
    "adult",
    "churn",
    "kc_house",
    "phoneme",
    "letter",
    "pendigits",
    "wine_quality",
    "german_credit",
    "heart_2020",
    "protein",
)
LOGARITHMS = ("kc_house",)  # tables of prices; the logarithm of the price is predicted
RARE = 0.1  # if the rarer class has a smaller share than this, the score is ROC AUC
ROWS = 2_000
HELD_OUT = 5_000
SPLITS = 3
FOLDS = 3
LARGE = {"california": 10_000, "kc_house": 10_000, "wine_quality": 10_000, "protein": 10_000}
"""Rows of tables that networks are searched on once more, in one split."""
SECONDS = 60.0  # of tuning boosted trees
SEARCHES = {
    "mlp": (32, 64),
    "mlp portfolio": (32, 64),
    "realmlp default": (1, 256),
    "realmlp": (8, 256),
}
"""Trials and epochs."""

HOW = """\
Of each table {rows:,} rows (four fifths of a smaller one) are searched on and up to {held_out:,} others
scored, both drawn anew for each split{larger}. A cell is the median over {splits} splits (fewer where it says so) of
the score, and of the seconds of wall clock of searching, choosing and training. RMSE, less is better, of
{numbers} (of kc_house that of the logarithm of the price); ROC AUC of {rare}; else accuracy. "mlp" is a
search of {mlp[0]} trials of {mlp[1]} epochs in its default space, "mlp portfolio" the same of space="mlp",
"realmlp" of {realmlp[0]} trials of {realmlp[1]} epochs in its published one, each in {folds} folds; "realmlp
default" is its published configuration alone. "ensemble" is that of the trials of the search, and its seconds
count the search. "LightGBM tuned" and "CatBoost tuned" are Optuna's TPE with early stopping in as many folds
for {seconds:.0f} seconds. One thread each.
"""

Load = Callable[[str], tuple[pd.DataFrame, pd.Series, str]]


@dataclass(frozen=True)
class Result:
    """One method on one split of a table.

    It has the score, seconds of wall clock and of the processor, and the number of searched trials.
    """

    table: str
    split: int
    group: str
    way: str
    score: float
    scoring: str
    seconds: float
    cpu: float
    trials: int


@dataclass(frozen=True)
class Split:
    """Rows to search on and rows to score; ``task`` is binary, multiclass or regression."""

    X: pd.DataFrame
    y: pd.Series
    X_test: pd.DataFrame
    y_test: pd.Series
    task: str

    @property
    def scoring(self) -> str:
        if self.task == "regression":
            return "neg_root_mean_squared_error"
        rare = self.task == "binary" and self.y.value_counts(normalize=True).min() < RARE
        return "roc_auc" if rare else "accuracy"

    def search(self, model: str, **options: Any) -> gputune.Study:
        task = "regression" if self.task == "regression" else "classification"
        options = {"cv": FOLDS, "scoring": self.scoring, "task": task, "verbose": 0, **options}
        return gputune.tune(model, self.X, self.y, **options)

    def score(self, model: Any) -> float:
        """Return the score of a model on the held-out rows; an RMSE is positive."""
        truth = self.y_test.to_numpy()
        if self.scoring == "roc_auc":
            return float(roc_auc_score(truth, model.predict_proba(self.X_test)[:, 1]))
        predicted = np.asarray(model.predict(self.X_test)).ravel()
        gap = predicted - truth if self.task == "regression" else predicted == truth
        return float(np.sqrt(np.mean(gap**2)) if self.task == "regression" else np.mean(gap))


def run(options: Namespace) -> int:
    load = loader(options.data)
    machine = describe_machine()
    machine["versions"] |= trees.versions()
    results = published(options.out, "tables", machine, "results", Result)
    small = [
        (name, name, ROWS, number, WAYS)
        for number in range(options.repeats or SPLITS)
        for name in NAMES
    ]
    networks = {group: WAYS[group] for group in ("mlp", "realmlp")}
    large = [(f"{name}, {rows:,} rows", name, rows, 0, networks) for name, rows in LARGE.items()]
    for label, name, rows, number, ways in small + large:
        for group, measure in ways.items():
            known = any(
                (one.split, one.table, one.group) == (number, label, group) for one in results
            )
            if known or (options.rows and group not in options.rows):
                continue
            split = split_of(name, load, number, rows)
            for way, model, trials, *costs in measure(split):
                score = split.score(model)
                results.append(
                    Result(
                        label, number, group, f"{group}{way}", score, split.scoring, *costs, trials
                    )
                )
                print(results[-1], flush=True)
            whole = {"machine": machine, "results": results}
            publish(options.out, "tables", "Which model for a table", *words(results), **whole)
    return 0


def loader(path: Path | None, option: str = "--tables") -> Load:
    """Return the function ``load(name) -> X, y, task`` of a Python file.

    Raises SystemExit if there is no path. ``option`` is the option that needs it.
    """
    if path is None:
        raise SystemExit(
            f"{option} needs --data FILE.py, a file with load(name) -> X, y, task of the tables' "
            "names."
        )
    spec = importlib.util.spec_from_file_location("tables_data", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    load: Load = module.load
    return load


def split_of(name: str, load: Load, number: int, most: int = ROWS) -> Split:
    """Return the rows of a table for the search, up to a limit, and the rows for scoring."""
    X, y, task = load(name)
    y = np.log(y) if name in LOGARITHMS else y
    rows = min(most, len(X) * 4 // 5)
    classes = None if task == "regression" else y
    parts = train_test_split(X, y, train_size=rows, stratify=classes, random_state=number)
    X, X_test, y, y_test = (part.reset_index(drop=True) for part in parts)
    return Split(X, y, X_test[:HELD_OUT], y_test[:HELD_OUT], task)


Models = Iterator[tuple[str, Any, int, float, float]]
"""What the way is called beside its group's name, its model, its trials, the seconds of wall clock
and processor."""


def defaults(split: Split) -> Models:
    for name, model in trees.with_defaults(split.X, split.y, split.task):
        clock = Clock()
        yield f" {name}", model.fit(split.X, split.y), 1, *clock()


def tuned(library: str, split: Split) -> Models:
    """Yield a library's tuned trees, if the library is installed."""
    if library not in trees.versions():
        print(f"{library} tuned: left out, pip install {library}")
        return
    clock = Clock()
    rows = split.X, split.y, split.task, split.scoring
    model, trials, best = trees.tuned(library, *rows, folds=FOLDS, seconds=SECONDS)
    print(f"the best of {trials} trials was trial {best}")
    yield "", model, trials, *clock()


def network(way: str, split: Split) -> Models:
    """Yield the best trial of a search, and the ensemble of its trials if there are several."""
    n_trials, epochs = SEARCHES[way]
    clock = Clock()
    space = "mlp" if way == "mlp portfolio" else None
    study = split.search(way.split()[0], space=space, n_trials=n_trials, max_epochs=epochs)
    searched = clock()
    yield "", study.best_model(), n_trials, *clock()
    if n_trials > 1:
        clock = Clock(*searched)
        yield " ensemble", study.ensemble(verbose=0), n_trials, *clock()


WAYS: dict[str, Callable[[Split], Models]] = {
    "default": defaults,
    "LightGBM tuned": partial(tuned, "lightgbm"),
    "CatBoost tuned": partial(tuned, "catboost"),
    **{way: partial(network, way) for way in SEARCHES},
}


def words(results: list[Result]) -> tuple[str, str]:
    """Return the text of the page: the method, and the medians over the splits per table and
    method.
    """
    ways = list(dict.fromkeys(one.way for one in results))
    tables = {one.table: one.scoring for one in results}
    larger = f"; of {' and '.join(LARGE)} also one of more" if tables.keys() - set(NAMES) else ""
    few_rows = {name: scoring for name, scoring in tables.items() if name in NAMES}
    splits = max(one.split for one in results) + 1

    def cell(name: str, way: str) -> str:
        found = [one for one in results if (one.table, one.way) == (name, way)]
        if not found:
            return ""
        few = f", {counted(len(found), 'split')}" if len(found) < splits else ""
        return (
            f"{median(one.score for one in found):.4f} "
            f"({median(one.seconds for one in found):.0f} s{few})"
        )

    how = HOW.format(
        rows=ROWS,
        held_out=HELD_OUT,
        larger=larger,
        splits=splits,
        folds=FOLDS,
        seconds=SECONDS,
        numbers=" and ".join(
            name for name, scoring in few_rows.items() if scoring.startswith("neg")
        ),
        rare=" and ".join(name for name, scoring in few_rows.items() if scoring == "roc_auc")
        or "none",
        **SEARCHES,
    )
    rows = ("|".join([name, *(cell(name, way) for way in ways)]) for name in tables)
    return how, table("|".join(["table", *ways]), rows)
