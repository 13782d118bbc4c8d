"""One training at a time on every core: jobs through joblib, one process a core, one thread each."""

import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import joblib
import numpy as np
from benchmark_work import Fold, Outcome, Trial, Work, standardised
from joblib.externals.loky import get_reusable_executor
from threadpoolctl import threadpool_limits

from gputune.executors.processes import idle

Fit = Callable[[Fold, Trial, int], float]
"""Rows of one fold, one trial, epochs -> accuracy on the validation rows after the last epoch."""

START_REPAYS = 5_000  # steps; the start of worker processes takes longer than so few in this process

Job = TypeVar("Job")


def over_cores(
    fit: Fit, work: Work, cores: int, compiled: Callable[[], float] = lambda: 0.0, few: int = START_REPAYS
) -> Outcome:
    """Train each trial on each fold, longest first; work of fewer steps than ``few`` in this process.

    ``compiled`` says how many seconds the process that calls it has compiled.
    """
    # Longest first, so that no worker begins a long training when the others have ended.
    jobs = [(c, f) for c, f in product(longest_first(work.trials), range(len(work.folds)))]
    fit_one = functools.partial(_fit_one, fit, work.trials, work.epochs)
    results, start, spent = run_jobs(fit_one, jobs, work, processes(work, cores, few), compiled)
    scores = np.full((len(work.trials), len(work.folds)), np.nan)
    for job, result in zip(jobs, results):
        scores[job] = result
    return Outcome(scores, start, spent)


def processes(work: Work, cores: int, few: int = START_REPAYS) -> int:
    """Return on how many processes a loop trains: one, this one, where others would not repay their start."""
    return 1 if work.steps(work.trials) < few else cores


def longest_first(trials: Sequence[Trial]) -> list[int]:
    """Return positions, those with the most steps before the others, wide networks first."""
    return sorted(range(len(trials)), key=lambda c: (trials[c]["batch_size"], -trials[c]["width"]))


def run_jobs(
    call: Callable[[list[Fold], Job], Any],
    jobs: Sequence[Job],
    work: Work,
    cores: int,
    compiled: Callable[[], float] = lambda: 0.0,
) -> tuple[list[Any], float, float]:
    """Call for each job in worker processes, in the given order; the rows are scaled and written once, then mapped.

    Returns the results, the seconds until the last worker began its first job, and those of the worker that compiled
    longest.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = write_folds(work, folder)
        with one_thread_each(cores):
            done = joblib.Parallel(batch_size=1, pre_dispatch="all")(
                joblib.delayed(_run_one)(call, path, job, compiled) for job in jobs
            )
    began: dict[int, float] = {}
    for _, process, at, _ in done:
        began[process] = min(at, began.get(process, at))
    return [result for result, *_ in done], max(began.values()) - begin, max(spent for *_, spent in done)


@contextmanager
def one_thread_each(cores: int) -> Iterator[None]:
    """Let joblib use so many processes in the block, one thread in each of them and in this one."""
    # A second thread slows such small products down, and this process has no worker's setting.
    with threadpool_limits(1), joblib.parallel_config("loky", n_jobs=cores, inner_max_num_threads=1):
        yield


def write_folds(work: Work, folder: str) -> str:
    """Write the rows of all folds, scaled, into a folder; return the path that ``read_folds`` takes."""
    path = str(Path(folder) / "folds.joblib")
    joblib.dump(standardised(work), path)
    return path


@functools.lru_cache(maxsize=1)
def read_folds(path: str) -> list[Fold]:
    """Return the rows of all folds, mapped; copy-on-write, because torch wants arrays that could be written."""
    folds: list[Fold] = joblib.load(path, mmap_mode="c")
    return folds


def _run_one(
    call: Callable[[list[Fold], Job], Any], path: str, job: Job, compiled: Callable[[], float]
) -> tuple[Any, int, float, float]:
    begin = time.monotonic()  # the same clock in every process of the machine
    return call(read_folds(path), job), os.getpid(), begin, compiled()


def _fit_one(
    fit: Fit, trials: Sequence[Trial], epochs: int, folds: list[Fold], job: tuple[int, int]
) -> float:
    trial, fold = job
    return fit(folds[fold], trials[trial], epochs)


def stop_workers() -> None:
    """End the processes that joblib and gputune keep for the next call."""
    for executor in (get_reusable_executor(), *idle):
        executor.shutdown(wait=True, kill_workers=True)
    idle.clear()
