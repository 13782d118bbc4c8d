"""Training loops of the user's own: an objective is called once a trial, here or in worker processes, and reports.

What trials have reported lies in a file each, in a folder that every worker reads: a rule that compares a trial with
the others needs no process that answers.
"""

import math
import os
import random
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import cloudpickle
import numpy as np
import torch
from joblib.externals.loky.process_executor import BrokenProcessPool, ProcessPoolExecutor
from numpy.typing import NDArray

from gputune.engine.plan import cores
from gputune.engine.stop import Stop
from gputune.errors import InputError
from gputune.executors.executor import LOSSES
from gputune.executors.processes import dumped, one_worker, submit, why_lost
from gputune.types import Config

_LOOK = 0.5
"""Seconds between two looks at the clock while workers train."""

Objective = Callable[[Config, "Report"], float]
State = Literal["complete", "pruned", "stopped", "failed"]


class Reported(NamedTuple):
    """What a trial has reported so far, (steps,) float64, and whether it has ended."""

    values: NDArray[np.float64]
    ended: bool


class Reports:
    """What all trials of a search have reported, greater being better."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def write(self, number: int, values: Sequence[float] | NDArray[np.float64], *, ended: bool) -> None:
        """Replace what is there of a trial; a NaN says that it has ended."""
        self._place(number).write_bytes(np.asarray([*values, *[math.nan] * ended], "<f8").tobytes())

    def add(self, number: int, value: float) -> None:
        """Add one value."""
        with self._place(number).open("ab") as file:
            file.write(np.float64(value).tobytes())

    def read(self) -> dict[int, Reported]:
        """Return what is there, by the number of the trial."""
        reported = {}
        for place in sorted(self.folder.iterdir(), key=lambda place: int(place.name)):
            raw = place.read_bytes()
            values = np.frombuffer(raw[: len(raw) // 8 * 8], "<f8")
            ended = bool(len(values)) and math.isnan(values[-1])
            reported[int(place.name)] = Reported(values[:-1] if ended else values, ended)
        return reported

    def _place(self, number: int) -> Path:
        return self.folder / str(number)


PruningRule = Callable[[int, int, Reports], bool]
"""A trial, the number of values that it has reported, and what all have reported -> whether it ends there."""


class TrialEnd(BaseException):
    """Ends a trial at a report. No Exception, which a loop may catch as a failure of its own."""


class Report:
    """What an objective reports to: ``report(value)`` after each epoch, or however often its training is scored.

    A call ends the trial, by an exception that ``finally`` and ``with`` see, where the search prunes it, where its time
    is over, or where the value is NaN. ``number`` is that of the trial.
    """

    def __init__(self, task: "Task", number: int) -> None:
        self.number = number
        self._task = task
        self._values: list[float] = []
        self._state: State | None = None

    def __call__(self, value: float) -> None:
        """Take the score after one more step of the training; higher or lower is better, as the search was told."""
        score = self._task.sign * _number(value, "report(value)")
        if math.isnan(score):
            self._end("failed")
        self._values.append(score)
        self._task.reports.add(self.number, score)
        if self._task.stop.is_over():
            self._end("stopped")
        if self._task.rule is not None and self._task.rule(
            self.number, len(self._values), self._task.reports
        ):
            self._end("pruned")

    def _end(self, state: State) -> None:
        self._state = state
        raise TrialEnd


@dataclass(frozen=True)
class Ending:
    """What came of a trial: its score (NaN where it failed), what it reported, seconds, and the error that ended it."""

    state: State
    score: float
    values: Sequence[float]
    seconds: float
    error: str = ""


@dataclass(frozen=True)
class Task:
    """An objective with what all its trials have in common; ``sign`` is -1 where lower is better."""

    objective: Objective
    sign: float
    seed: int
    reports: Reports
    rule: PruningRule | None
    stop: Stop

    def __call__(self, number: int, params: Config) -> Ending:
        """Train one trial. What the objective raises is its result, and the search goes on."""
        begin, report, error, score = time.monotonic(), Report(self, number), "", math.nan
        self.reports.write(number, (), ended=False)
        try:
            with _seeded(self.seed):
                score = self.sign * _number(
                    self.objective(dict(params), report), "what the objective returns"
                )
        except TrialEnd:
            pass
        except Exception as failure:
            error = _in_words(failure)
        state: State = report._state or ("complete" if math.isfinite(score) else "failed")
        values = report._values
        if state in ("pruned", "stopped"):
            score = values[-1]
        self.reports.write(number, values, ended=True)
        return Ending(state, score, values, time.monotonic() - begin, error)


def _number(value: object, name: str) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None


def _in_words(error: Exception) -> str:
    """Return an error with the line of the objective that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    place = [f" ({Path(f.filename).name}, line {f.lineno})" for f in frames[1:] if f.filename != __file__]
    return f"{type(error).__name__}: {error}{''.join(place[:1])}"


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Let the generators of Python, NumPy and torch begin alike in every trial, and put them back."""
    before = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


Claim = Callable[[int], bool]
Trials = Sequence[tuple[int, Config]]


class ThisProcess:
    """Calls the objective here, one trial after another."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def train(self, trials: Trials, claim: Claim) -> Iterator[tuple[int, Ending]]:
        """Yield what came of the trials that ``claim`` grants, by number, until time is over."""
        for number, params in trials:
            if self.task.stop.is_over():
                return
            if claim(number):
                yield number, self.task(number, params)

    def close(self) -> None:
        """There is nothing to end."""


class Workers:
    """Worker processes, each with environment variables of its own, that call the objective, a trial at a time each."""

    def __init__(self, task: Task, environments: Sequence[Mapping[str, str]], folder: Path) -> None:
        self.stop, self.path = task.stop, folder / "task.pkl"
        try:
            self.path.write_bytes(dumped(task, [task.objective]))
        except Exception as error:  # whatever pickling it raises
            raise InputError(
                f"objective cannot be sent to worker processes ({type(error).__name__}: {error}). Make what it uses "
                "inside of it, or choose workers=1, which calls it in this process."
            ) from error
        self.environments = {one_worker(environment): environment for environment in environments}
        self.free = list(self.environments)

    def train(self, trials: Trials, claim: Claim) -> Iterator[tuple[int, Ending]]:
        """Yield what came of the trials that ``claim`` grants, by number, until time is over."""
        waiting, losses = deque(trials), Counter[int]()
        running: dict[Future[Ending], tuple[ProcessPoolExecutor, int, Config]] = {}
        while True:
            while self.free and waiting and not self.stop.is_over():
                number, params = waiting.popleft()
                if losses[number] or claim(number):
                    pool = self.free.pop()
                    future = submit(pool, _call_in_worker, str(self.path), number, params)
                    running[future] = pool, number, params
            if not running:
                return
            for future in wait(running, _LOOK, FIRST_COMPLETED).done:
                pool, number, params = running.pop(future)
                error = future.exception()
                self.free.append(self._instead_of(pool) if isinstance(error, BrokenProcessPool) else pool)
                if error is None:
                    yield number, future.result()
                    continue
                if not isinstance(error, BrokenProcessPool):
                    raise error
                losses[number] += 1
                if losses[number] < LOSSES:
                    waiting.appendleft((number, params))
                else:
                    reason = f"it has lost {LOSSES} worker processes, the last because {why_lost(error)}"
                    yield number, Ending("failed", math.nan, (), math.nan, reason)

    def _instead_of(self, lost: ProcessPoolExecutor) -> ProcessPoolExecutor:
        pool = one_worker(environment := self.environments.pop(lost))
        self.environments[pool] = environment
        return pool

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        for pool in self.environments:
            pool.shutdown(wait=False, kill_workers=True)


def _call_in_worker(path: str, number: int, params: Config) -> Ending:
    return _task(path)(number, params)


@lru_cache(maxsize=1)
def _task(path: str) -> Task:
    """Return the task of a search: one object for all its trials, so that data in it is read once."""
    task: Task = cloudpickle.loads(Path(path).read_bytes())
    return task


def environments(workers: int | None, n_trials: int) -> list[dict[str, str]]:
    """Return the environment of each worker: one GPU each where there are some, else its part of the cores.

    ``workers`` None: one a GPU, or one a core. A GPU is chosen by CUDA_VISIBLE_DEVICES, so that "cuda" is it.
    """
    gpus = _gpus()
    number = workers or max(1, min(len(gpus) or cores(), n_trials))
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores() // number))}
    devices = [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {} for i in range(number)]
    return [{**threads, **device} for device in devices]


def _gpus() -> list[str]:
    """Return the names of the GPUs that this process may use."""
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (names or list(map(str, range(number))))[:number]
