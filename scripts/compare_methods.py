"""Compare search methods by training: halving with random trials, TPE in slots, and i-Epoch.

    python scripts/compare_methods.py FOLDER [--seeds 5] [--json FILE]

FOLDER holds the tables and ``load.py``, whose function ``load(name)`` returns X, y and the task.
From each table, every seed draws ``--rows`` rows for the search, and up to 5,000 other rows for the
held-out score of the tuned model: accuracy or R2. All methods search the default space of the MLP.

- "random" samples ``--trials`` trials and prunes them by halving.
- "tpe" proposes ``--tpe-trials`` trials, which refill the slots of pruned trials.
- "i-Epoch" samples ``--trials`` trials, trains them up to the first rung of halving, and trains the
  best ninth to the end.

The script counts member-steps (one optimizer step of one trial on one fold) of each search, relative
to "random". The runs of a seed are paired, and a gain has the standard error of its pairs.

Needs Optuna (``pip install ".[optuna]"``) and pandas.
"""

import argparse
import importlib.util
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import train_test_split

import gputune
from gputune.tuning.method import Method

HELD_OUT = 5_000
EPOCHS = 27
FIRST_RUNG = 3
FOLDS = 3
SLOTS = 16
HALVING = gputune.Halving(min_epochs=FIRST_RUNG)
DEFAULT_BATCH = 32
BASELINE = "random"


@dataclass(frozen=True)
class Run:
    """One search: its held-out score, its member-steps and its wall-clock time."""

    table: str
    seed: int
    method: str
    score: float
    member_steps: int
    seconds: float


def methods(n_trials: int, n_proposed: int) -> dict[str, tuple[Method, int]]:
    """Return each method with its number of trials."""
    keep = max(1, n_trials // 9)
    return {
        BASELINE: (HALVING, n_trials),
        "tpe": (gputune.OptunaSampler("tpe", batch=SLOTS, halving=HALVING), n_proposed),
        "i-Epoch": (gputune.Halving(rungs=[FIRST_RUNG], keep=keep), n_trials),
    }


def member_steps(study: gputune.Study, n_rows: int) -> int:
    """Return the optimizer steps of all members of a study."""
    rows_of_fold = n_rows - n_rows // FOLDS
    steps = 0
    for trial, curve in zip(study.trials, study.curves):
        n_epochs = int(np.isfinite(curve).all(1).sum())
        batch_size = trial.params.get("batch_size", DEFAULT_BATCH)
        steps += FOLDS * n_epochs * math.ceil(rows_of_fold / batch_size)
    return steps


def run_table(
    name: str, data: tuple[Any, Any, str], seed: int, n_rows: int, n_trials: int, n_proposed: int
) -> list[Run]:
    """Search one table with every method, on the same rows."""
    X, y, task = data
    n_rows = min(n_rows, len(y) * 4 // 5)
    X, X_test, y, y_test = train_test_split(
        X,
        y,
        train_size=n_rows,
        test_size=min(HELD_OUT, len(y) - n_rows),
        stratify=None if task == "regression" else y,
        random_state=seed,
    )
    measure = r2_score if task == "regression" else accuracy_score
    runs = []
    for method_name, (method, trials) in methods(n_trials, n_proposed).items():
        begin = time.perf_counter()
        study = gputune.tune(
            "mlp",
            X,
            y,
            task="regression" if task == "regression" else "classification",
            method=method,
            n_trials=trials,
            max_epochs=EPOCHS,
            cv=FOLDS,
            random_state=seed,
            verbose=0,
        )
        seconds = time.perf_counter() - begin
        score = float(measure(y_test, study.best_model().predict(X_test)))
        steps = member_steps(study, n_rows)
        runs.append(Run(name, seed, method_name, score, steps, seconds))
        print(runs[-1], flush=True)
    return runs


def summary(runs: Sequence[Run]) -> list[str]:
    """Return a Markdown table with one row for each table of data and method."""
    lines = ["| table | method | score | gain | member-steps |", "|---|---|---|---|---|"]
    by_key: dict[tuple[str, str], dict[int, Run]] = {}
    for run in runs:
        by_key.setdefault((run.table, run.method), {})[run.seed] = run
    for (table, method), by_seed in by_key.items():
        base: Mapping[int, Run] = by_key[table, BASELINE]
        gains = [run.score - base[seed].score for seed, run in by_seed.items()]
        shares = [run.member_steps / base[seed].member_steps for seed, run in by_seed.items()]
        score = np.mean([run.score for run in by_seed.values()])
        error = np.std(gains, ddof=1) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
        gain = f"{np.mean(gains):+.4f} ± {error:.4f}"
        lines.append(f"| {table} | {method} | {score:.4f} | {gain} | {np.mean(shares):.0%} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison, print a table, and write the figures to a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the folder with load.py and the tables")
    parser.add_argument("--tables", nargs="+", help="the names of the tables; all by default")
    parser.add_argument("--seeds", type=int, default=5, help="the number of seeds")
    parser.add_argument("--rows", type=int, default=2_000, help="rows of a search")
    parser.add_argument("--trials", type=int, default=128, help="trials of random search")
    parser.add_argument("--tpe-trials", type=int, default=56, help="trials of TPE")
    parser.add_argument("--json", type=Path, help="the file for the figures")
    given = parser.parse_args(arguments)
    spec = importlib.util.spec_from_file_location("tables", given.folder / "load.py")
    assert spec is not None and spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    runs = []
    for name in given.tables or tables.NAMES:
        data = tables.load(name)
        for seed in range(given.seeds):
            runs += run_table(name, data, seed, given.rows, given.trials, given.tpe_trials)
    print("\n".join(summary(runs)))
    if given.json is not None:
        facts = {"trials": given.trials, "tpe_trials": given.tpe_trials, "rows": given.rows}
        facts |= {"epochs": EPOCHS, "folds": FOLDS, "slots": SLOTS}
        given.json.write_text(json.dumps(facts | {"runs": list(map(asdict, runs))}, indent=1))


if __name__ == "__main__":
    main()
