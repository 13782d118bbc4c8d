"""Engines in turns on one work, and searches by the moments at which a score became known."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmark.work import Outcome, Work


@dataclass(frozen=True)
class Run:
    """An engine on the first ``trials`` of the list.

    rival   False for gputune itself, which the others are compared to
    """

    engine: str
    train: Callable[[Work], Outcome]
    trials: int
    rival: bool = True


@dataclass(frozen=True)
class Measured:
    """One engine on the first C trials of one work.

    seconds, start, compile   of each of the R repeats; the last two are parts of the first
    scores                    (R, C, F) last-epoch accuracies
    """

    engine: str
    seconds: tuple[float, ...]
    scores: np.ndarray
    start: tuple[float, ...]
    compile: tuple[float, ...]
    rival: bool = True

    @property
    def trials(self) -> int:
        """How many trials of the list it trained."""
        return self.scores.shape[1]

    def accuracy(self, trials: int | None = None) -> float:
        """Mean over repeats, the first ``trials`` (None: all) and folds; NaN where one of them diverged."""
        return float(self.scores[:, :trials].mean())

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.seconds))


def measure(runs: Sequence[Run], work: Work, repeats: int) -> list[Measured]:
    """Run each engine ``repeats`` times, in turns, after each one's warm-up on a small piece of the work.

    In each repeat another engine begins.
    """
    for run in runs:
        _timed(run, replace(work, trials=work.trials[:4], epochs=1))
    found: list[list[tuple[float, Outcome]]] = [[] for _ in runs]
    for repeat in range(repeats):
        for turn in range(len(runs)):
            run = runs[position := (repeat + turn) % len(runs)]
            found[position].append(_timed(run, replace(work, trials=work.trials[: run.trials])))
    stop_workers()
    return [_measured(run, *zip(*each)) for run, each in zip(runs, found)]


def _timed(run: Run, work: Work) -> tuple[float, Outcome]:
    stop_workers()
    begin = time.perf_counter()
    outcome = run.train(work)
    return time.perf_counter() - begin, outcome


def _measured(run: Run, seconds: tuple[float, ...], outcomes: tuple[Outcome, ...]) -> Measured:
    start, compiling = zip(*((outcome.start, outcome.compile) for outcome in outcomes))
    scores = np.stack([outcome.scores for outcome in outcomes])
    return Measured(run.engine, seconds, scores, start, compiling, run.rival)


def ratio(measured: Measured, own: Measured) -> float:
    """Return how many times as fast gputune is as another engine, by medians."""
    return measured.median / own.median


def compiled_ratio(measured: Measured, own: Measured) -> float:
    """Return the same where both find everything compiled."""
    seconds, own_seconds = (np.median(np.subtract(m.seconds, m.compile)) for m in (measured, own))
    return float(seconds / own_seconds)


def stop_workers() -> None:
    """End the processes that joblib and gputune keep for the next call."""
    from joblib.externals.loky import get_reusable_executor

    from gputune.executors.processes import idle  # here: the workers of other engines do not import gputune

    for executor in (get_reusable_executor(), *idle):
        executor.shutdown(wait=True, kill_workers=True)
    idle.clear()


@dataclass(frozen=True)
class Event:
    """After so many seconds of a search the fold mean of a candidate (its position in the list) was known."""

    seconds: float
    candidate: int
    score: float


Line = tuple[float, int, int, float]
"""What a process records: the time, a candidate, its epochs and a score."""


@contextmanager
def recorded() -> Iterator[tuple[float, str]]:
    """Yield the time now, and the path of a file in which processes ``record`` scores."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores"
        path.touch()
        yield time.monotonic(), str(path)


def record(path: str, candidate: int, epochs: int, score: float) -> None:
    """Append a line, with the time."""
    line = json.dumps([time.monotonic(), candidate, epochs, score]) + "\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(file, line.encode())  # one write: lines of several processes do not mix
    finally:
        os.close(file)


def read(path: str) -> list[Line]:
    """Return all lines, in the order of time."""
    return sorted(tuple(json.loads(line)) for line in Path(path).read_text().splitlines())
