"""gputune, scikit-learn and the PyTorch loop over trials x widths x batch sizes, and gputune's
growth.

Every trial of a cell has the cell's width and batch size. The table includes the cells in which
gputune is slower. Growth of time and memory is measured in fresh processes: python -m
benchmark.studies.grid TRIALS FOLDS EPOCHS ROWS prints one measurement as JSON.
"""

import json
import re
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import KFold

from benchmark.engines import choose, split_by_lack
from benchmark.engines.gputune import train
from benchmark.report import counted, publish, table
from benchmark.studies.training import AGREEMENT, measure, runs
from benchmark.work import TRIALS, digits_work

SHORT = (1, 4)  # lengths of the list of trials, besides the command's --trials
WIDTHS = (16, 64, 256, 512)
BATCH_SIZES = (16, 64, 256)
# With fewer epochs, the engines' different starting weights show in the accuracies.
EPOCHS = 10
FOLDS = 5  # of the least work that grows
GROWTH = 8  # times the least number of trials, of folds, of epochs

HOW = """\
As in the table of all engines: the same trials, folds, epochs and float32; all that a user waits for is counted. Times
are the medians of {repeats}. Each cell says how many times as fast gputune is. Below 1, in bold, gputune is the slower
one. The mean accuracy of each engine over the cells must be the same, to {agreement}, before a time is shown.

Digits, 5 folds, {epochs} epochs. Mean accuracies: {means}.
"""

GROWN = """\
Digits, widths 16 to 64, each search in a fresh process. Linear growth shows as a time for each trial, fold and epoch
that does not rise; memory is the peak of the process, and how far it is above what the imports and the data took.
"""
GROWN_ROWS = """\
A table of {columns} columns in float32, one trial of width {width}, batch size {batch_size}, 5 folds, one epoch.
"""
ROWS = (62_500, 250_000, 1_000_000)
COLUMNS = 50
LARGE = {"width": 16, "batch_size": 256}

Cell = dict[str, Any]


@dataclass(frozen=True)
class Growth:
    """One search: its seconds, and the memory of its process (MiB) before and at most.

    The data are digits if ``rows`` is 0.
    """

    trials: int
    folds: int
    epochs: int
    rows: int
    seconds: float
    before: float
    peak: float

    @property
    def work(self) -> int:
        return self.trials * self.folds * self.epochs


def run(options: Namespace) -> int:
    epochs = options.epochs or EPOCHS
    repeats = options.repeats or 1
    lengths = sorted({*SHORT, options.trials or TRIALS})
    able, lacks = split_by_lack(options.engines or choose("sklearn,torch"))
    cells: list[Cell] = []
    for width, batch_size, count in product(WIDTHS, BATCH_SIZES, lengths):
        shape = {"width": width, "batch_size": batch_size}
        work = digits_work("narrow", n_trials=count, epochs=epochs)
        work = replace(work, trials=[trial | shape for trial in work.trials])
        measured = measure(runs(able, work), work, repeats)
        own = next(m for m in measured if not m.rival)
        numbers = {
            "accuracy": {m.engine: m.accuracy() for m in measured},
            "seconds": {m.engine: list(m.seconds) for m in measured},
            "ratio": {m.engine: m.median / own.median for m in measured if m.rival},
        }
        cells.append({"trials": count, **shape, **numbers})
        seconds = ", ".join(
            f"{name} {min(each):.2f} s" for name, each in cells[-1]["seconds"].items()
        )
        print(f"{_name(cells[-1])}: {seconds}", flush=True)
    means = {
        name: sum(c["accuracy"][name] for c in cells) / len(cells) for name in cells[0]["accuracy"]
    }
    if not max(means.values()) - min(means.values()) <= AGREEMENT:  # a NaN is not
        print(
            f"NO SPEED: the mean accuracies over the cells differ by more than {AGREEMENT}: {means}"
        )
        return 1
    grown = measure_growth(trials=lengths[-1], epochs=epochs, factor=GROWTH)
    each = ", ".join(f"{name} {mean:.4f}" for name, mean in means.items())
    how = HOW.format(
        repeats=counted(repeats, "run"), agreement=AGREEMENT, epochs=epochs, means=each
    )
    numbers = {
        "epochs": epochs,
        "cells": cells,
        "accuracy": means,
        "left_out": lacks,
        "growth": grown,
    }
    title = "gputune over trials, widths and batch sizes"
    return publish(options.out, "grid", title, how, *_sections(cells, grown), **numbers)


def _name(cell: Cell) -> str:
    return (
        f"{counted(cell['trials'], 'trial')} of width {cell['width']}, batch size "
        f"{cell['batch_size']}"
    )


def _sections(cells: Sequence[Cell], grown: Sequence[Growth]) -> list[str]:
    parts = []
    head = "|".join(
        [
            "width|batch size",
            *(counted(n, "trial") for n in sorted({cell["trials"] for cell in cells})),
        ]
    )
    for rival in cells[0]["ratio"]:
        rows: dict[str, str] = {}  # in a row the cells' trials grow
        for cell in cells:
            shape = f"{cell['width']}|{cell['batch_size']}"
            ratio = cell["ratio"][rival]
            rows[shape] = rows.get(shape, shape) + (
                f"|**{ratio:.2f}x**" if ratio < 1 else f"|{ratio:.2f}x"
            )
        lost = [_name(cell) for cell in cells if cell["ratio"][rival] < 1]
        which = f": {'; '.join(lost)}" if lost else ""
        verdict = f"gputune is slower in {len(lost)} of {len(cells)} cells{which}."
        parts += [f"## Against {rival}", table(head, rows.values()), verdict]
    by_work = [
        f"{g.trials}|{g.folds}|{g.epochs}|{g.work:,}|{g.seconds:.2f}|{g.seconds / g.work * 1e6:.0f}|{g.peak:.0f}|"
        f"{g.peak - g.before:.0f}"
        for g in grown
        if not g.rows
    ]
    by_rows = [
        f"{g.rows:,}|{g.seconds:.1f}|{g.seconds / g.rows * 1e6:.1f}|{g.peak:.0f}|{g.peak - g.before:.0f}"
        for g in grown
        if g.rows
    ]
    costs = "seconds|µs for each|peak MiB|above the start"
    return [
        *parts,
        "## What grows with trials x folds x epochs",
        GROWN,
        table(f"trials|folds|epochs|trials x folds x epochs|{costs}", by_work),
        "## What grows with rows",
        GROWN_ROWS.format(columns=COLUMNS, **LARGE),
        table(f"rows|{costs}", by_rows),
    ]


def measure_growth(*, trials: int, epochs: int, factor: int) -> list[Growth]:
    """Measure the smallest work, then up to ``factor`` times its trials, its folds and its epochs.

    The number of trials, folds or epochs doubles each time. ``ROWS`` are measured too.
    """
    times = [2**k for k in range(factor.bit_length())]
    cases = [
        *((trials * n, FOLDS, epochs, 0) for n in times),
        *((trials, FOLDS * n, epochs, 0) for n in times[1:]),
        *((trials, FOLDS, epochs * n, 0) for n in times[1:]),
        *((1, FOLDS, 1, rows) for rows in ROWS),
    ]
    return [in_fresh_process(*case) for case in cases]


def in_fresh_process(trials: int, folds: int, epochs: int, rows: int) -> Growth:
    """Measure one search in a process that has done nothing else."""
    command = [
        sys.executable,
        "-m",
        "benchmark.studies.grid",
        *map(str, (trials, folds, epochs, rows)),
    ]
    said = subprocess.run(
        command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    return Growth(**json.loads(said))


def measure_here(trials: int, folds: int, epochs: int, rows: int) -> Growth:
    """Measure one search in this process, on digits or on a table with ``rows`` rows."""
    work = digits_work("narrow", n_trials=trials, epochs=epochs, folds=folds)
    if rows:
        X = np.random.default_rng(0).standard_normal((rows, COLUMNS), dtype=np.float32)
        parts = list(KFold(folds).split(X))
        same = [trial | LARGE for trial in work.trials]
        work = replace(work, X=X, y=(X[:, 0] > X[:, 1]).astype(int), folds=parts, trials=same)
    before = peak_mib()
    begin = time.perf_counter()
    train(work)
    return Growth(trials, folds, epochs, rows, time.perf_counter() - begin, before, peak_mib())


def peak_mib() -> float:
    """Return the largest resident memory of this process so far."""
    # In getrusage, Linux starts a child process with its parent's peak. This file has no such
    # error.
    return (
        int(re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.M)[1])
        / 1024
    )


if __name__ == "__main__":
    print(json.dumps(asdict(measure_here(*map(int, sys.argv[1:5])))))
