"""gputune beside scikit-learn and the PyTorch loop over trials x widths x batch sizes, and what grows with the work.

Every trial of a cell has the cell's width and batch size. The cells in which gputune is slower are in the table too.
"""

import functools
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmark_engines import Chosen, split_by_lack
from benchmark_growth import Growth, measure_growth
from benchmark_growth import table as growth_table
from benchmark_machine import write_both
from benchmark_measure import Measured, measure
from benchmark_report import AGREEMENT, compiled_ratio, counted, machine_line, ratio
from benchmark_training import runs
from benchmark_work import Work, digits_work

TRIALS = (1, 16)  # and the command's --trials
WIDTHS, BATCH_SIZES = (16, 64, 256, 512), (16, 64, 256)
EPOCHS = 10  # with fewer, other laws of the start show in the accuracies
GROWTH = 8  # times the least number of trials, of folds, of epochs

HOW = """\
As in the table of all engines: the same trials, folds, epochs and float32; all that a user waits for is counted. Times
are the medians of {repeats}. Each cell says how many times as fast gputune is, and then the same with the compiling
of its C code left out, which a machine needs once. Below 1, in bold, gputune is the slower one. The mean accuracy of
each engine over the cells must be the same, to {agreement}, before a time is shown.
"""

Cell = dict[str, Any]


def run_grid(
    out: Path,
    machine: dict[str, Any],
    chosen: list[Chosen],
    *,
    trials: Sequence[int],
    widths: Sequence[int] = WIDTHS,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    epochs: int,
    repeats: int,
    growth: int = GROWTH,
) -> int:
    """Measure, print and write; return 1 where the engines' scores differ."""
    able, lacks = split_by_lack(chosen)
    for name, lack in lacks.items():
        print(f"{name} is left out: {lack}")
    cells = []
    for width, batch_size, count in product(widths, batch_sizes, trials):
        work = cell_work(count, width, batch_size, epochs)
        cells.append(_cell(work, measure(runs(able, work), work, repeats)))
        print(_said(cells[-1]), flush=True)
    means = {name: _mean(cells, name) for name in cells[0]["accuracy"]}
    if not max(means.values()) - min(means.values()) <= AGREEMENT:  # a NaN is not
        print(f"NO SPEED: the mean accuracies over the cells differ by more than {AGREEMENT}: {means}")
        return 1
    grown = measure_growth(trials=max(trials), epochs=epochs, factor=growth)
    text = markdown(machine, cells, means, grown, epochs=epochs, repeats=repeats)
    whole = {"machine": machine, "epochs": epochs, "cells": cells, "accuracy": means, "left_out": lacks}
    paths = write_both(out, machine, "grid", text, {**whole, "growth": [vars(one) for one in grown]})
    print(f"\n{text}\nwritten: {', '.join(map(str, paths))}")
    return 0


def cell_work(trials: int, width: int, batch_size: int, epochs: int) -> Work:
    """Return the work of a cell: on digits, with the learning rates of the shared list."""
    work = digits_work("narrow", n_trials=trials, epochs=epochs)
    same = [{**trial, "width": width, "batch_size": batch_size} for trial in work.trials]
    return Work(f"{counted(trials, 'trial')}, width {width}, batch size {batch_size}", work.X, work.y, work.folds,
                same, epochs)  # fmt: skip


def _cell(work: Work, measured: Sequence[Measured]) -> Cell:
    own = next(m for m in measured if not m.rival)
    rivals = [m for m in measured if m.rival]
    return {
        "trials": len(work.trials),
        "width": work.trials[0]["width"],
        "batch_size": work.trials[0]["batch_size"],
        "accuracy": {m.engine: m.accuracy() for m in measured},
        "seconds": {m.engine: list(m.seconds) for m in measured},
        "compile": {m.engine: list(m.compile) for m in measured},
        "ratio": {m.engine: ratio(m, own) for m in rivals},
        "ratio_compiled": {m.engine: compiled_ratio(m, own) for m in rivals},
    }


def _mean(cells: Sequence[Cell], engine: str) -> float:
    return sum(cell["accuracy"][engine] for cell in cells) / len(cells)


def _name(cell: Cell) -> str:
    return f"{counted(cell['trials'], 'trial')} of width {cell['width']}, batch size {cell['batch_size']}"


def _said(cell: Cell) -> str:
    seconds = ", ".join(f"{name} {min(each):.2f} s" for name, each in cell["seconds"].items())
    return f"{_name(cell)}: {seconds}"


def markdown(
    machine: dict[str, Any],
    cells: Sequence[Cell],
    means: dict[str, float],
    grown: Sequence[Growth],
    *,
    epochs: int,
    repeats: int,
) -> str:
    """Return the report as a page."""
    counts = sorted({cell["trials"] for cell in cells})
    lines = [
        "# gputune over trials, widths and batch sizes",
        "",
        machine_line(machine),
        "",
        HOW.format(repeats=counted(repeats, "run"), agreement=AGREEMENT),
        f"Digits, 5 folds, {epochs} epochs. Mean accuracies: "
        + ", ".join(f"{name} {mean:.4f}" for name, mean in means.items())
        + ".",
        "",
    ]
    for rival in cells[0]["ratio"]:
        lines += [f"## Against {rival}", ""]
        lines += ["| width | batch size | " + " | ".join(counted(n, "trial") for n in counts) + " |"]
        lines += ["|---|---|" + "---|" * len(counts)]
        find = functools.partial(_ratios, cells, rival)
        shapes = dict.fromkeys((cell["width"], cell["batch_size"]) for cell in cells)
        lines += [f"| {w} | {b} | " + " | ".join(find(w, b, n) for n in counts) + " |" for w, b in shapes]
        lines += ["", _lost(cells, rival), ""]
    return "\n".join([*lines, *growth_table(grown)]) + "\n"


def _ratios(cells: Sequence[Cell], rival: str, width: int, batch_size: int, trials: int) -> str:
    shape = (width, batch_size, trials)
    cell = next(c for c in cells if (c["width"], c["batch_size"], c["trials"]) == shape)
    return ", ".join(_shown(cell[kind][rival]) for kind in ("ratio", "ratio_compiled"))


def _shown(ratio: float) -> str:
    return f"**{ratio:.2f}x**" if ratio < 1 else f"{ratio:.2f}x"


def _lost(cells: Sequence[Cell], rival: str) -> str:
    lost = [_name(cell) for cell in cells if cell["ratio"][rival] < 1]
    which = f": {'; '.join(lost)}" if lost else ""
    return f"gputune is slower in {len(lost)} of {len(cells)} cells{which}."
