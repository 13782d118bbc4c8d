"""Time to quality: seconds until a search's choice reaches a score on held-out rows.

A quarter of the rows is held out. At any time a search's choice is the candidate with the best mean
validation score known so far. After all searches have ended, the plain PyTorch loop trains each
choice on all other rows and scores it on the held-out rows. So the same scores judge every search,
and this part costs a search no time.
"""

import functools
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from statistics import median
from time import perf_counter
from typing import Any

import joblib
import numpy as np
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.preprocessing import StandardScaler

from benchmark.engines.torch import fit
from benchmark.report import counted, publish, table
from benchmark.studies.halving import tables
from benchmark.work import WIDTHS, Event, Work, draw_trials, stop_workers

TRIALS = 81
EPOCHS = 27
SEEDS = 5
FOLDS = 3
ROWS = 4_000  # of a table, drawn by the seed
LEVELS = {"digits": (0.95, 0.96, 0.97, 0.975, 0.98), "adult": (0.82, 0.83, 0.84, 0.845, 0.85)}

HOW = """\
Each search gets the same {trials} candidates (learning rate log-uniform, batch sizes 16 to 256, widths 16 to 256; two
hidden relu layers, Adam), {folds} folds and at most {epochs} epochs, in float32, and uses all cores: Optuna and
scikit-learn with one process a core and one thread each, gputune by its own plan. Halving keeps a third of the
candidates at epochs 1, 3, 9; scikit-learn trains the others from the start again, Optuna's pruner decides without
waiting. The time is the wall clock from the call, with starting and compiling. gputune tells of a candidate when it has
left or ended, the others earlier. Each seed has its own rows, folds and candidates. A cell is the median over the seeds
of the seconds until the choice's held-out accuracy was at least so high; a seed in which it never was counts as
infinite, and how many reached it stands in brackets where not all did.
"""


@dataclass(frozen=True)
class Point:
    """A new choice after ``seconds``, and its accuracy on the held-out rows."""

    seconds: float
    candidate: int
    held_out: float


@dataclass(frozen=True)
class Curve:
    """One search on one table and seed: its choices, and the time when it ended."""

    table: str
    seed: int
    search: str
    points: tuple[Point, ...]
    seconds: float

    def time_to(self, level: float) -> float:
        """Seconds until the choice was at least as good; infinite if it never was."""
        return next((p.seconds for p in self.points if p.held_out >= level), float("inf"))


SEARCHES = {
    "gputune, random": ("gputune", "random"),
    "gputune, halving": ("gputune", "halving"),
    "Optuna, random": ("optuna", "random"),
    "Optuna, successive halving pruner": ("optuna", "halving"),
    "scikit-learn, RandomizedSearchCV": ("sklearn", "random"),
    "scikit-learn, HalvingRandomSearchCV": ("sklearn", "halving"),
}
"""Name -> the engine, whose package it needs, and its method. Halving keeps a third at epochs 1, 3,
9, ..."""


def run(options: Namespace) -> int:
    epochs = options.epochs or EPOCHS
    found = list[Curve]()
    names = [name for name, (package, _) in SEARCHES.items() if find_spec(package)]
    for place, (X, y) in tables(options.adult).items():
        rows = (numbers(X), np.unique(y, return_inverse=True)[1])
        for seed in range(options.repeats or SEEDS):
            work, held_out = split(*rows, seed=seed, trials=TRIALS, epochs=epochs)
            if not found:
                for name in names:  # warm-up
                    search(name, replace(work, trials=work.trials[:3], epochs=1))
            first = seed % len(names)
            for name in names[first:] + names[:first]:
                events, seconds = search(name, work)
                found.append(curve := Curve(place, seed, name, choices(events, held_out), seconds))
                last = f"{seconds:.2f} s, held-out accuracy {curve.points[-1].held_out:.4f}"
                print(f"{place}, seed {seed}: {name}: {last}", flush=True)
    found.sort(
        key=lambda curve: (list(LEVELS).index(curve.table), names.index(curve.search), curve.seed)
    )
    parts = HOW.format(trials=TRIALS, folds=FOLDS, epochs=epochs), *_tables(found)
    whole = {"trials": TRIALS, "epochs": epochs, "curves": found}
    return publish(options.out, "quality", "Time to quality", *parts, **whole)


def numbers(X: Any) -> np.ndarray:
    """Return the columns as numbers, with one 0/1 column per value of a text column.

    The columns are the same for every search.
    """
    if isinstance(X, np.ndarray):
        return X.astype(np.float32)
    import polars.selectors as columns

    return X.to_dummies(columns.string()).fill_null(0).to_numpy().astype(np.float32)


Judge = Callable[[int], float]
"""A candidate -> its accuracy on the held-out rows, trained on all others."""


def split(
    X: np.ndarray, y: np.ndarray, *, seed: int, trials: int, epochs: int
) -> tuple[Work, Judge]:
    """Return the work of a search on three quarters of the rows, and the judge of its choices.

    The judge uses the other rows.
    """
    if len(X) > ROWS:
        X, _, y, _ = train_test_split(X, y, train_size=ROWS, stratify=y, random_state=seed)
    X, X_out, y, y_out = train_test_split(X, y, test_size=0.25, stratify=y, random_state=seed)
    folds = list(StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(X, y))
    work = Work("quality", X, y, folds, draw_trials(trials, WIDTHS["wide"], seed), epochs)
    scaler = StandardScaler().fit(X)
    rows = scaler.transform(X), y, scaler.transform(X_out), y_out
    return work, functools.cache(lambda candidate: fit(rows, work.trials[candidate], epochs))


def choices(events: Sequence[Event], held_out: Judge) -> tuple[Point, ...]:
    """Return the choices of a search with the times at which they became its best."""
    points = list[Point]()
    best = float("-inf")
    for event in sorted(events, key=lambda event: event.seconds):
        if event.score > best:
            best = event.score
            if not points or points[-1].candidate != event.candidate:
                points.append(Point(event.seconds, event.candidate, held_out(event.candidate)))
    return tuple(points)


def search(name: str, work: Work) -> tuple[list[Event], float]:
    """Return the scores of a search with their times, and its total seconds."""
    engine, method = SEARCHES[name]
    module = import_module(f"benchmark.engines.{engine}")
    stop_workers()
    begin = perf_counter()
    return module.search(method, work, joblib.cpu_count()), perf_counter() - begin


def _tables(found: Sequence[Curve]) -> list[str]:
    parts = []
    left_out = [
        f"{search}: not installed"
        for search in SEARCHES
        if search not in {curve.search for curve in found}
    ]
    for name in dict.fromkeys(curve.table for curve in found):
        curves = [curve for curve in found if curve.table == name]
        levels = LEVELS[name]
        rows = []
        for search in dict.fromkeys(curve.search for curve in curves):
            of = [curve for curve in curves if curve.search == search]
            end = median(c.seconds for c in of)
            last = median(c.points[-1].held_out for c in of)
            rows.append(
                "|".join([search, *(_time(level, of) for level in levels), f"{end:.2f}|{last:.4f}"])
            )
        head = "|".join(
            ["search", *(f"to {level}" for level in levels), "to its end|held-out accuracy"]
        )
        seeds = counted(len({curve.seed for curve in curves}), "seed")
        parts += [f"## {name}, {seeds}", table(head, rows + left_out)]
    return parts


def _time(level: float, curves: Sequence[Curve]) -> str:
    times = [curve.time_to(level) for curve in curves]
    reached = sum(np.isfinite(times))
    middle = median(times)
    shown = f"{middle:.2f}" if np.isfinite(middle) else "not reached"
    return shown if reached == len(times) else f"{shown} ({reached} of {len(times)})"
