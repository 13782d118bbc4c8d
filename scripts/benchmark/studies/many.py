"""A study file of 100,000 trials: the time to open it, to inspect it and to resume it."""

from argparse import Namespace
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from sklearn.datasets import load_digits

import gputune
from benchmark.report import Clock, publish, table
from gputune.cli.main import main
from gputune.study.store import Result, Store

TRIALS = 100_000
EPOCHS = 20
FOLDS = 5
REPEATS = 3

HOW = """\
{trials:,} trials of the MLP on digits as a search draws and plans them, with curves of {epochs} epochs x
{folds} folds that are random numbers: a file of {megabytes:.0f} MB. Each step is done {repeats} times, one
after the other in a process that has imported gputune; the least seconds of each.
"""


def run(options: Namespace) -> int:
    repeats = options.repeats or REPEATS
    with TemporaryDirectory() as folder:
        file = Path(folder, "study.db")
        make(file)
        size = file.stat().st_size
        steps: dict[str, Callable[[int], object]] = {
            "`Study.open`": lambda _: gputune.Study.open(file),
            "`Study.open` and `print`": lambda _: print(gputune.Study.open(file)),
            "`gputune status`": lambda _: main(["status", str(file)]),
            "`gputune report`": lambda _: main(
                ["report", str(file), "--out", f"{folder}/page.html"]
            ),
            "the same call again": lambda _: search(file, TRIALS),
            "the same call with one trial more": lambda n: search(file, TRIALS + n),
        }
        times = {name: [timed(step, 1 + n) for n in range(repeats)] for name, step in steps.items()}
    how = HOW.format(
        trials=TRIALS, epochs=EPOCHS, folds=FOLDS, repeats=repeats, megabytes=size / 1e6
    )
    rows = (
        f"{name}|{min(cpu for cpu, _ in each):.2f}|{min(s for _, s in each):.2f}"
        for name, each in times.items()
    )
    numbers = {"trials": TRIALS, "bytes": size, "times": times}
    title = "A study of many trials"
    found = table("step|CPU seconds|seconds", rows)
    return publish(options.out, "many", title, how, found, **numbers)


def search(file: Path, n_trials: int, **more: object) -> gputune.Study:
    X, y = load_digits(return_X_y=True)
    more |= {"max_epochs": EPOCHS, "cv": FOLDS, "study": file, "verbose": 0}
    return gputune.tune("mlp", X, y, n_trials=n_trials, **more)  # type: ignore[arg-type]


def make(file: Path) -> None:
    """Let a search draw and plan its trials, and complete the untrained ones with random curves."""
    search(file, TRIALS, timeout=1e-3)
    rng = np.random.default_rng(0)
    with Store.open(file) as store:
        numbers = [
            trial.number
            for trial, result in store.trials()
            if result is None or result.state == "stopped"
        ]
        how = {"epochs": EPOCHS, "rule": "best", "seconds": 0.01}
        store.finish(
            Result.of_curve(number, rng.random((EPOCHS, FOLDS)), **how) for number in numbers
        )


def timed(step: Callable[[int], object], number: int) -> tuple[float, float]:
    """Return the CPU seconds and wall-clock seconds of a step; its printed output is dropped."""
    clock = Clock()
    with redirect_stdout(StringIO()):
        step(number)
    return clock()[::-1]
