"""The work that every engine gets, and the functions that share it between cores.

It also has the functions by which processes record the time of a score.

Workers import this file. Therefore scikit-learn is imported only inside the functions that the
parent calls: an engine's workers pay only for the start of the library that they use.
"""

import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import joblib
import numpy as np
from threadpoolctl import threadpool_limits

TRIALS = 64  # of the shared list
WIDTHS = {"narrow": (16, 32, 64), "wide": (16, 32, 64, 128, 256)}
BATCH_SIZES = (16, 32, 64, 128, 256)
LEARNING_RATES = (1e-3, 3e-2)  # log-uniform between
# With fewer steps than this, training in this process is faster than starting worker processes.
START_REPAYS = 5_000

compile_seconds = 0.0  # that this process has compiled

Trial = dict[str, Any]
Fold = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""X and y of the training rows, X and y of the validation rows."""

Fit = Callable[[Fold, Trial, int], float]
"""Rows of one fold, one trial, epochs -> accuracy on the validation rows after the last epoch."""

Job = TypeVar("Job")


@dataclass(frozen=True)
class Work:
    """An MLP with two hidden relu layers, Adam without decay, float32, for C trials on F folds.

    ``X`` (n, D) is float32 and not yet scaled; ``y`` (n,) has the classes. ``folds`` are (train,
    valid) positions. ``trials`` have lr, batch_size and width.
    """

    name: str
    X: np.ndarray
    y: np.ndarray
    folds: Sequence[tuple[np.ndarray, np.ndarray]]
    trials: Sequence[Trial]
    epochs: int

    def steps(self, trials: Sequence[Trial]) -> int:
        return sum(
            self.epochs * -(-len(train) // t["batch_size"])
            for t in trials
            for train, _ in self.folds
        )

    def no_scores(self) -> np.ndarray:
        """NaN for every trial and fold, (C, F)."""
        return np.full((len(self.trials), len(self.folds)), np.nan)


@dataclass(frozen=True)
class Outcome:
    """The results of an engine.

    ``scores`` (C, F) are last-epoch accuracies. ``start`` is the number of seconds until the last
    worker process began to train: start, imports, scaling and writing of the data. ``compile`` is
    the number of seconds of compiling, in the process that compiled longest. ``cpu`` is the number
    of CPU seconds of the jobs in all processes, without the start of these processes.
    """

    scores: np.ndarray
    start: float = 0.0
    compile: float = 0.0
    cpu: float = 0.0


def add_compile_seconds(seconds: float) -> None:
    global compile_seconds
    compile_seconds += seconds


def last_began(jobs: Iterable[tuple[int, float]]) -> float:
    """Return the time when the last process began its first job.

    The input is the process and the start time of every job.
    """
    # a process' earliest job comes last
    return max(dict(sorted(jobs, key=lambda job: -job[1])).values())


def draw_trials(n_trials: int, widths: Sequence[int], seed: int = 0) -> list[Trial]:
    """Return the shared list of trials; a longer list begins with the trials of a shorter one."""
    rng = np.random.RandomState(seed)

    def draw() -> Trial:
        lr = float(np.exp(rng.uniform(*np.log(LEARNING_RATES))))
        size = int(rng.choice(BATCH_SIZES))
        return {"lr": lr, "batch_size": size, "width": int(rng.choice(widths))}

    return [draw() for _ in range(n_trials)]


def digits_work(name: str, *, n_trials: int, epochs: int, folds: int = 5) -> Work:
    """Return the work "narrow" or "wide" on digits, 1,797 rows in stratified folds."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import StratifiedKFold

    X, y = load_digits(return_X_y=True)
    parts = list(StratifiedKFold(folds, shuffle=True, random_state=0).split(X, y))
    return Work(name, X.astype(np.float32), y, parts, draw_trials(n_trials, WIDTHS[name]), epochs)


def standardised(work: Work) -> list[Fold]:
    """Return each fold's rows, scaled by the mean and deviation of its training rows."""
    from sklearn.preprocessing import StandardScaler

    def scaled(train: np.ndarray, valid: np.ndarray) -> Fold:
        scaler = StandardScaler().fit(work.X[train])
        return (
            scaler.transform(work.X[train]),
            work.y[train],
            scaler.transform(work.X[valid]),
            work.y[valid],
        )

    return [scaled(*fold) for fold in work.folds]


def longest_first(trials: Sequence[Trial]) -> list[int]:
    """Return the positions of the trials, first those with the most steps, wide networks first."""
    return sorted(range(len(trials)), key=lambda c: (trials[c]["batch_size"], -trials[c]["width"]))


def processes(work: Work, cores: int) -> int:
    """Return the number of processes that a loop uses.

    It is 1 (this process) if more processes would cost more time to start than they save.
    """
    return 1 if work.steps(work.trials) < START_REPAYS else cores


def over_cores(fit: Fit, work: Work, cores: int) -> Outcome:
    """Train each trial on each fold, one at a time on every core."""
    # Longest first, so that no worker begins a long training when the others have ended.
    jobs = list(product(longest_first(work.trials), range(len(work.folds))))
    scores = work.no_scores()
    results, *seconds = run_jobs(
        functools.partial(_fit_one, fit, work.trials, work.epochs), jobs, work, cores
    )
    for job, result in zip(jobs, results):
        scores[job] = result
    return Outcome(scores, *seconds)


def run_jobs(
    call: Callable[[list[Fold], Job], Any], jobs: Sequence[Job], work: Work, cores: int
) -> tuple[list[Any], float, float, float]:
    """Call a function for each job in worker processes, in the given order.

    The rows are scaled and written once, then mapped into memory. Returns the results, the seconds
    until the last worker began its first job, the seconds of compiling in the worker that compiled
    longest, and the CPU seconds of all jobs.
    """
    global compile_seconds
    # one worker is this process, which other calls may have used
    begin = time.monotonic()
    compile_seconds = 0.0
    with tempfile.TemporaryDirectory() as folder, one_thread_each(processes(work, cores)):
        one = functools.partial(joblib.delayed(_run_one), call, write_folds(work, folder))
        done = joblib.Parallel(batch_size=1, pre_dispatch="all")(map(one, jobs))
    start = last_began((process, at) for _, process, at, *_ in done) - begin
    compiling = max(spent for *_, spent, _ in done)
    return [result for result, *_ in done], start, compiling, sum(cpu for *_, cpu in done)


@contextmanager
def one_thread_each(cores: int) -> Iterator[None]:
    """Let joblib use ``workers`` processes in the block.

    Each of them, and this process, uses one thread.
    """
    # A second thread slows such small products down, and this process has no worker's setting.
    with (
        threadpool_limits(1),
        joblib.parallel_config("loky", n_jobs=cores, inner_max_num_threads=1),
    ):
        yield


def write_folds(work: Work, folder: str) -> str:
    """Write the scaled rows of all folds into a folder; return the path for ``read_folds``."""
    path = str(Path(folder) / "folds.joblib")
    joblib.dump(standardised(work), path)
    return path


@functools.lru_cache(maxsize=1)
def read_folds(path: str) -> list[Fold]:
    """Return the rows of all folds, mapped into memory.

    The mapping is copy-on-write, because torch needs writable arrays.
    """
    folds: list[Fold] = joblib.load(path, mmap_mode="c")
    return folds


def _run_one(
    call: Callable[[list[Fold], Job], Any], path: str, job: Job
) -> tuple[Any, int, float, float, float]:
    begin = time.monotonic()  # the same clock in every process of the machine
    cpu = time.process_time()
    result = call(read_folds(path), job)
    return result, os.getpid(), begin, compile_seconds, time.process_time() - cpu


def _fit_one(
    fit: Fit, trials: Sequence[Trial], epochs: int, folds: list[Fold], job: tuple[int, int]
) -> float:
    return fit(folds[job[1]], trials[job[0]], epochs)


def stop_workers() -> None:
    """Stop the processes that joblib and gputune keep for the next call."""
    from joblib.externals.loky import get_reusable_executor

    # here: the workers of other engines do not import gputune
    from gputune.executors.processes import idle

    for executor in (get_reusable_executor(), *idle):
        executor.shutdown(wait=True, kill_workers=True)
    idle.clear()


@dataclass(frozen=True)
class Event:
    """The time, in seconds, at which a search knew the mean validation score of a candidate.

    The candidate is given by its position in the list.
    """

    seconds: float
    candidate: int
    score: float


Line = tuple[float, int, int, float]
"""What a process records: the time, a candidate, its epochs and a score."""


@contextmanager
def recorded() -> Iterator[tuple[float, str]]:
    """Yield the present time, and the path of a file to which processes ``record`` scores."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores"
        path.touch()
        yield time.monotonic(), str(path)


def record(path: str, candidate: int, epochs: int, score: float) -> None:
    line = json.dumps([time.monotonic(), candidate, epochs, score]) + "\n"
    with open(path, "ab", buffering=0) as file:
        file.write(line.encode())  # one write: lines of several processes do not mix


def read(path: str) -> list[Line]:
    return sorted(tuple(json.loads(line)) for line in Path(path).read_text().splitlines())
