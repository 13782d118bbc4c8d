"""Engines in turns on one work: a warm-up, then repeats, each of them with another engine first."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from benchmark_cores import stop_workers
from benchmark_work import Outcome, Work


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
    """Run each engine ``repeats`` times, in turns, after each one's warm-up on a small piece of the work."""
    piece = replace(work, trials=work.trials[:4], epochs=1)
    for run in runs:
        stop_workers()
        run.train(piece)
    seconds: list[list[float]] = [[] for _ in runs]
    outcomes: list[list[Outcome]] = [[] for _ in runs]
    for repeat in range(repeats):
        first = repeat % len(runs)
        for position in [*range(first, len(runs)), *range(first)]:
            run = runs[position]
            part = replace(work, trials=work.trials[: run.trials])
            stop_workers()
            begin = time.perf_counter()
            outcomes[position].append(run.train(part))
            seconds[position].append(time.perf_counter() - begin)
    stop_workers()
    return [_measured(run, times, found) for run, times, found in zip(runs, seconds, outcomes)]


def _measured(run: Run, seconds: list[float], outcomes: list[Outcome]) -> Measured:
    return Measured(
        run.engine,
        tuple(seconds),
        np.stack([outcome.scores for outcome in outcomes]),
        tuple(outcome.start for outcome in outcomes),
        tuple(outcome.compile for outcome in outcomes),
        run.rival,
    )
