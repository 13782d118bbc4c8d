"""Which model for a table: scores of a tuned MLP, RealMLP and boosted trees on rows that nothing was fitted on."""

import importlib.util
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.model_selection import train_test_split

import gputune
from benchmark.report import describe_machine, page, publish, table

NAMES = ("california", "adult", "churn", "wine_quality")
TRIALS, EPOCHS, FOLDS = 8, 32, 3
LONG = 256  # epochs of RealMLP's recipe
ROWS, HELD_OUT = 1_150, 4_000
MOST = 512  # trials of an MLP that are to take as long

HOW = """\
Of each table {rows:,} rows are searched on and up to {held_out:,} held out, both drawn by seed 0. A search has
{trials} trials, {folds} folds and at most {epochs} epochs, and its best trial is trained again on all {rows:,} rows:
"mlp" is the default space of the plain MLP, "mlp, as long" as many of its trials as take about the time of RealMLP's
search, "realmlp" its published space, "realmlp, default" its recipe alone, with the {long} epochs of its authors.
"boosting" is scikit-learn's HistGradientBoosting at its defaults. A cell is the score on the held-out rows (RMSE, less
is better, of {numbers}; else accuracy), and the seconds of search and training. One seed: differences below about
{noise} of the accuracy are noise.
"""

Load = Callable[[str], tuple[pd.DataFrame, pd.Series, str]]


@dataclass(frozen=True)
class Result:
    """One way on one table."""

    table: str
    way: str
    score: float
    seconds: float
    trials: int


def run(options: Namespace) -> int:
    """Measure, print and write; return 0."""
    load, found = loader(options.data), list[Result]()
    words = {"trials": options.trials if options.trials != 64 else TRIALS, "epochs": options.epochs or EPOCHS}
    for name in NAMES:
        found += one_table(name, load, **words)
    machine = describe_machine(with_card=False)
    numbers = " and ".join(name for name in NAMES if load(name)[2] == "regression")
    how = HOW.format(
        long=LONG, rows=ROWS, held_out=HELD_OUT, folds=FOLDS, noise="0.006", numbers=numbers, **words
    )
    ways = list(dict.fromkeys(one.way for one in found))
    cells = {(one.table, one.way): f"{one.score:.4f} ({one.seconds:.0f} s)" for one in found}
    rows = [[name, *(cells[name, way] for way in ways)] for name in NAMES]
    text = page("Which model for a table", machine, how, table(["table", *ways], rows))
    return publish(options.out, "tables", machine, text, **words, results=[asdict(one) for one in found])


def loader(path: Path | None) -> Load:
    """Return ``load(name) -> X, y, task`` of a Python file. Raises SystemExit where there is none."""
    if path is None:
        raise SystemExit(
            "--tables needs --data FILE.py, a file with load(name) -> X, y, task of the tables' names."
        )
    spec = importlib.util.spec_from_file_location("tables_data", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    load: Load = module.load
    return load


def one_table(name: str, load: Load, *, trials: int, epochs: int) -> list[Result]:
    """Return what each way gives on one table."""
    X, y, task = load(name)
    kept = np.random.default_rng(0).permutation(len(X))[: ROWS + HELD_OUT]
    parts = train_test_split(X.iloc[kept], y.iloc[kept], train_size=ROWS, random_state=0)
    X, X_test, y, y_test = (part.reset_index(drop=True) for part in parts)
    numbers = task == "regression"
    found: list[Result] = []

    def judge(way: str, predict: Callable[[pd.DataFrame], np.ndarray], begin: float, trials: int = 1) -> None:
        seconds = perf_counter() - begin
        gap = predict(X_test) - y_test.to_numpy() if numbers else predict(X_test) == y_test.to_numpy()
        score = float(np.sqrt(np.mean(gap**2)) if numbers else np.mean(gap))
        found.append(Result(name, way, score, seconds, trials))
        print(f"{name}: {way}: {score:.4f}, {trials} trials, {seconds:.1f} s", flush=True)

    def search(way: str, model: str, n_trials: int, epochs: int = epochs) -> None:
        begin = perf_counter()
        scoring = "neg_root_mean_squared_error" if numbers else "accuracy"
        task = "regression" if numbers else "classification"
        backend = "auto" if model == "mlp" else "stacked"  # not timed beside members one by one
        study = gputune.tune(
            model,
            X,
            y,
            n_trials=n_trials,
            cv=FOLDS,
            max_epochs=epochs,
            scoring=scoring,
            task=task,
            backend=backend,
            verbose=0,
        )
        judge(way, study.best_model().predict, begin, n_trials)

    begin = perf_counter()
    boosting = HistGradientBoostingRegressor if numbers else HistGradientBoostingClassifier
    text = [column for column in X.columns if X[column].dtype.kind not in "ifb"]
    kinds = {column: pd.CategoricalDtype(sorted(X[column].dropna().unique())) for column in text}
    trees = boosting(categorical_features="from_dtype", random_state=0).fit(X.astype(kinds), y)
    judge("boosting", lambda rows: trees.predict(rows.astype(kinds)), begin)
    search("mlp", "mlp", trials)
    search("realmlp, default", "realmlp", 1, LONG)
    search("realmlp", "realmlp", trials)
    times = {one.way: one.seconds for one in found}
    search("mlp, as long", "mlp", min(MOST, max(trials, round(trials * times["realmlp"] / times["mlp"]))))
    return found
