"""The objective of a user's own loop: how one trial calls it, what it reports, and what came of it.

What trials have reported lies in a file each, in a folder that every worker reads: a rule that compares a trial with
the others needs no process that answers.
"""

import math
import random
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import cloudpickle
import numpy as np
import torch
from numpy.typing import NDArray

from gputune.engine.stop import Stop
from gputune.types import Config

Objective = Callable[[Config, "Report"], float]
State = Literal["complete", "pruned", "stopped", "failed"]


class Reported(NamedTuple):
    """What a trial has reported so far, (steps,) float64, and whether it has ended."""

    values: NDArray[np.float64]
    ended: bool


class Reports:
    """What all trials of a search have reported, greater being better: a file of each trial, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def write(self, number: int, values: Sequence[float] | NDArray[np.float64], *, ended: bool) -> None:
        """Replace what is there of a trial; a NaN says that it has ended."""
        (self.folder / str(number)).write_bytes(np.asarray([*values, *[math.nan] * ended], "<f8").tobytes())

    def add(self, number: int, value: float) -> None:
        """Add one value."""
        with (self.folder / str(number)).open("ab") as file:
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
        task, score = self._task, self._task.sign * _number(value, "report(value)")
        if math.isnan(score):
            self._state = "failed"
            raise TrialEnd
        self._values.append(score)
        task.reports.add(self.number, score)
        if task.stop.is_over():
            self._state = "stopped"
        elif task.rule is not None and task.rule(self.number, len(self._values), task.reports):
            self._state = "pruned"
        if self._state is not None:
            raise TrialEnd


@dataclass(frozen=True)
class Ending:
    """What came of a trial: its score (NaN where it failed), what it reported, seconds, and the error that ended it."""

    number: int
    state: State
    score: float
    values: Sequence[float]
    seconds: float
    error: str = ""


@dataclass(frozen=True)
class Trial:
    """A configuration by its number, which trains as one."""

    number: int
    params: Config

    @property
    def index(self) -> tuple[int]:
        """Its number."""
        return (self.number,)


@dataclass(frozen=True)
class Task:
    """An objective with what all its trials have in common; ``sign`` is -1 where lower is better."""

    objective: Objective
    sign: float
    seed: int
    reports: Reports
    rule: PruningRule | None
    stop: Stop

    def __call__(self, trial: Trial) -> Sequence[Ending]:
        """Train one trial. What the objective raises is its result, and the search goes on."""
        number, params = trial.number, trial.params
        begin, report, error, score = time.monotonic(), Report(self, number), "", math.nan
        self.reports.write(number, (), ended=False)
        try:
            with _seed_generators(self.seed):
                score = self.sign * _number(self.objective(dict(params), report), "what the objective returns")
        except TrialEnd:
            pass
        except Exception as failure:  # with the line of the objective, whose file a worker may not know
            frames = traceback.extract_tb(failure.__traceback__)[1:]
            places = [f" (line {f.lineno} of {f.name})" for f in frames if f.filename != __file__]
            error = f"{type(failure).__name__}: {failure}{''.join(places[:1])}"
        state: State = report._state or ("complete" if math.isfinite(score) else "failed")
        values = report._values
        if state in ("pruned", "stopped"):
            score = values[-1]
        self.reports.write(number, values, ended=True)
        return [Ending(number, state, score, values, time.monotonic() - begin, error)]


def _number(value: object, name: str) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None


@contextmanager
def _seed_generators(seed: int) -> Iterator[None]:
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


def call_in_worker(path: str, trial: Trial, _place: object) -> Sequence[Ending]:
    """Train one trial in a worker, whose environment has all that is its own."""
    return _task(path)(trial)


@lru_cache(maxsize=1)
def _task(path: str) -> Task:
    """Return the task of a search: one object for all its trials, so that data in it is read once."""
    task: Task = cloudpickle.loads(Path(path).read_bytes())
    return task
