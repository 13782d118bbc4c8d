"""Cost and loss of successive halving: its best score compared with the full search, over seeds.

The trials that halving keeps are computed from the curves of the full search, because halving sees
the same curves. On the first seed of every table halving is also run, and must give the same
result. Each seed draws its own trials, folds and starting weights.
"""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from sklearn.datasets import load_digits

import gputune
from benchmark.report import describe_machine, publish, table
from gputune.methods.halving import survivors

TRIALS = 243
EPOCHS = 54
SEEDS = 10
FOLDS = 3
ADULT_ROWS = 10_000
# Shares of the full search: of its best score, and of its trial-epochs.
LOSS = 0.005
SHARE = 0.2
AGREEMENT = 2e-3  # between halving as it is run and as it is read off: rounding may turn a tie
HEAD = "table|seed|full search|halving|loss|trial-epochs|run"


@dataclass(frozen=True)
class Seed:
    """Best mean validation scores of both searches, and their trial-epochs.

    ``run`` is the best score of halving, if it was run.
    """

    table: str
    seed: int
    full: float
    halving: float
    full_epochs: int
    halving_epochs: int
    run: float | None

    @property
    def loss(self) -> float:
        """The share of the full search's best score that halving loses; below 0 if halving is
        better.
        """
        return 1 - self.halving / self.full

    @property
    def share(self) -> float:
        """The share of the full search's trial-epochs that halving trains."""
        return self.halving_epochs / self.full_epochs

    def row(self) -> str:
        ran = "" if self.run is None else f"{self.run:.4f}"
        return f"{self.table}|{self.seed}|{self.full:.4f}|{self.halving:.4f}|{self.loss:.2%}|{self.share:.1%}|{ran}"


def run(options: Namespace) -> int:
    epochs = options.epochs or EPOCHS
    found = []
    for name, (X, y) in tables(options.adult).items():
        for seed in range(options.repeats or SEEDS):
            found.append(compare(name, X, y, epochs=epochs, seed=seed))
            cells = zip(HEAD.split("|"), found[-1].row().split("|"))
            print(", ".join(f"{word} {value or 'no'}" for word, value in cells), flush=True)
    if any(one.run is not None and not abs(one.run - one.halving) <= AGREEMENT for one in found):
        print(
            "NO COMPARISON: halving as it is run ends with another score than its decisions on "
            "the full curves."
        )
        return 1
    how = (
        f"{TRIALS} trials of the default space, {epochs} epochs, {FOLDS} folds; "
        "`gputune.Halving()`. Accuracy is the best fold mean. Halving's survivors are read off "
        "the curves of the full search; on seed 0 it was run as well. The aim is a loss of at "
        f"most {LOSS:.1%} for at most {SHARE:.0%} of the trial-epochs."
    )
    within = sum(one.loss <= LOSS and one.share <= SHARE for one in found)
    parts = (
        how,
        table(HEAD, (one.row() for one in found)),
        f"{within} of {len(found)} reach the aim.",
    )
    machine = describe_machine(with_card=True)
    numbers = {"trials": TRIALS, "epochs": epochs, "seeds": found}
    title = "What successive halving loses, and what it saves"
    return publish(options.out, "halving", title, *parts, machine=machine, **numbers)


def compare(table: str, X: Any, y: Any, *, epochs: int, seed: int) -> Seed:
    options = {
        "n_trials": TRIALS,
        "max_epochs": epochs,
        "cv": FOLDS,
        "random_state": seed,
        "verbose": 0,
    }
    full = gputune.tune("mlp", X, y, method="random", **options)
    halving = gputune.Halving()
    stays, spent = halved(full.curves, halving, epochs)
    score = float(np.nanmax(full.curves[stays].mean(2).max(1)))
    ran = gputune.tune("mlp", X, y, method=halving, **options).best_score if seed == 0 else None
    return Seed(table, seed, full.best_score, score, full.spent[1], spent, ran)


def halved(curves: np.ndarray, method: gputune.Halving, epochs: int) -> tuple[np.ndarray, int]:
    """Return the positions of the trials that survive to the end, and all trial-epochs.

    They are computed from curves (C, epochs, F).
    """
    alive = np.arange(len(curves))
    spent = 0
    before = 0
    (rungs,) = method.bracket_rungs(epochs)
    for rung in rungs:
        spent += len(alive) * (rung - before)
        means = curves[alive, rung - 1].mean(1)
        alive = alive[survivors(means, method.factor)]
        before = rung
    return alive, spent + len(alive) * (epochs - before)


def tables(adult: Path | None) -> dict[str, tuple[Any, Any]]:
    """Return X and y of digits, and of the census table if its file, UCI's adult.data, is given.

    The census table has 10,000 rows, or all if there are fewer. Its target is an income above 50K.
    """
    found: dict[str, tuple[Any, Any]] = {"digits": load_digits(return_X_y=True)}
    if adult is None:
        return found
    rows = pl.read_csv(adult, has_header=False, null_values=["?", " ?"], truncate_ragged_lines=True)
    rows = rows.sample(min(ADULT_ROWS, len(rows)), seed=0)
    # The file has a blank after each comma, and would otherwise be read as text.
    plain = [
        _plain(column.str.strip_chars(" .") if column.dtype == pl.String else column)
        for column in rows
    ]
    return {**found, "adult": (pl.DataFrame(plain[:-1]), plain[-1].to_numpy() == ">50K")}


def _plain(column: pl.Series) -> pl.Series:
    numbers = column.cast(pl.Int64, strict=False)
    return numbers if numbers.null_count() == column.null_count() else column
