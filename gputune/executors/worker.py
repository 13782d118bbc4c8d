"""What runs in a worker process, and how one starts, is idle and is lost: among it the objective of
a user's own loop.

A worker imports this file, and torch: nothing that such a loop would wait for. What trials have
reported lies in a file each, in a folder that every worker reads: a rule that compares a trial with
the others needs no process that answers.
"""

import io
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar, cast

import cloudpickle
import numpy as np
from joblib.externals.loky.process_executor import BrokenProcessPool, ProcessPoolExecutor
from numpy.typing import NDArray

from gputune.engine.stop import Stop
from gputune.seeding import seeded_generators
from gputune.types import Config

Value = TypeVar("Value")


def pickled_with_code(value: object, parts: Iterable[object], *, here: bool = True) -> bytes:
    """Pickle a value for a worker; ``parts`` are the classes and functions in it that may have to
    go as code."""
    known = _importable if here else _is_installed
    modules = {
        sys.modules.get(getattr(getattr(part, "func", part), "__module__", None) or "")
        for part in parts
    }
    hidden = [
        m for m in modules if m is not None and m.__name__ != "__main__" and not known(m.__name__)
    ]
    if not here:  # the whole package, which its files import from each other
        hidden = list({sys.modules.get(m.__name__.partition(".")[0], m) for m in hidden})
    for module in hidden:
        cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps(value))
    finally:
        for module in hidden:
            cloudpickle.unregister_pickle_by_value(module)


def _importable(name: str) -> bool:
    """Whether a fresh process with this one's ``sys.path`` would find the module."""
    path = None
    for end in (i for i, c in enumerate(f"{name}.") if c == "."):
        if (spec := PathFinder.find_spec(name[:end], path)) is None:
            return False
        path = spec.submodule_search_locations
    return True


def _is_installed(name: str) -> bool:
    """Whether a module belongs to Python, to gputune, or to a package that was installed."""
    top = name.partition(".")[0]
    if top == "gputune" or top in sys.stdlib_module_names or top in sys.builtin_module_names:
        return True
    parts = Path(getattr(sys.modules[name], "__file__", None) or "").parts
    return not {"site-packages", "dist-packages"}.isdisjoint(parts)


IDLE_SECONDS = 60  # before a worker that has nothing to do ends

# Executors of one worker each, which the next search takes over. loky's own, of which there is one
# in a process, is left to joblib: it resizes that, and expects one of its own making.
idle: list[ProcessPoolExecutor] = []

# whoever starts a worker may change this process's streams for a moment
_starting = threading.Lock()
training = (
    threading.Lock()
)  # held while this worker trains: one that has lost its parent keeps its state before it ends


def one_worker(environment: Mapping[str, str] | None = None) -> ProcessPoolExecutor:
    """Return an executor of one worker: when it is lost, it alone is. With variables of its own it
    is a new one."""
    if environment is None:
        with suppress(IndexError):
            return idle.pop()
    return ProcessPoolExecutor(
        max_workers=1,
        timeout=IDLE_SECONDS,
        initializer=begin_worker,
        initargs=(os.getpid(),),
        env=environment,
    )


def submit(
    executor: ProcessPoolExecutor, work: Callable[..., Value], *arguments: object
) -> "Future[Value]":
    """Give a worker something to do; where it is not there any more, a new one is started."""
    with _starting, _signals_held_off(), _streams_that_flush():
        return cast("Future[Value]", executor.submit(work, *arguments))


@contextmanager
def _signals_held_off() -> Iterator[None]:
    """Let a worker that starts inside inherit that it hears neither Ctrl-C nor SIGTERM, which a
    group may be sent.

    Workers are told by ``Stop``, and end by themselves where this process has died.
    """
    if sys.platform == "win32":  # which holds no signal off
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _streams_that_flush() -> Iterator[None]:
    """Stand in for a standard output or error that is missing, closed or full: loky flushes both as
    a worker starts."""
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    try:
        for name, stream in before.items():
            try:
                stream.flush()
            except (AttributeError, OSError, ValueError):
                setattr(sys, name, io.StringIO())
        yield
    finally:
        sys.stdout, sys.stderr = before.values()


def begin_worker(parent: int) -> None:
    """Let this worker end soon after its parent has, and find a standard error where it has
    inherited none."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        with training:
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if sys.stderr is None:  # loky's report of crashes wants one
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def why_lost(error: BrokenProcessPool) -> str:
    """Return how a worker ended, in a sentence."""
    if match := re.search(r"(SIG[A-Z]+)\(-\d+\)", str(error)):
        by_system = (
            " (as the system does where memory has run out)" if match[1] == "SIGKILL" else ""
        )
        return f"{match[1]} ended it{by_system}."
    if match := re.search(r"EXIT\((\d+)\)", str(error)):
        return f"it ended itself with exit code {match[1]}, as os._exit does."
    return "it ended without a word."


Objective = Callable[[Config, "Report"], float]
State = Literal["complete", "pruned", "stopped", "failed"]


class Reported(NamedTuple):
    """What a trial has reported so far, (steps,) float64, and whether it has ended."""

    values: NDArray[np.float64]
    ended: bool


class Reports:
    """What all trials of a search have reported, greater being better: a file of each trial, in one
    folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def write(
        self, number: int, values: Sequence[float] | NDArray[np.float64], *, ended: bool
    ) -> None:
        """Replace what is there of a trial; a NaN says that it has ended."""
        (self.folder / str(number)).write_bytes(
            np.asarray([*values, *[math.nan] * ended], "<f8").tobytes()
        )

    def add(self, number: int, value: float) -> None:
        """Add one value."""
        with (self.folder / str(number)).open("ab") as file:
            file.write(np.float64(value).tobytes())

    def read(self, up_to: int) -> dict[int, Reported]:
        """Return what is there, by the number of the trial, in order, ``up_to`` a number."""
        reported = {}
        for number in sorted(int(place.name) for place in self.folder.iterdir()):
            if number > up_to:
                break
            raw = (self.folder / str(number)).read_bytes()
            values = np.frombuffer(raw[: len(raw) // 8 * 8], "<f8")
            ended = bool(len(values)) and math.isnan(values[-1])
            reported[number] = Reported(values[:-1] if ended else values, ended)
        return reported


# A trial, the number of values that it has reported, and what all have reported -> whether it ends
# there; None as long as others must report first.
PruningRule = Callable[[int, int, Reports], bool | None]

_LOOK = 0.01
"""Seconds between two looks at what the trials have reported that another one waits for."""


class TrialEnd(BaseException):
    """Ends a trial at a report. No Exception, which a loop may catch as a failure of its own."""


class Report:
    """What an objective reports to: ``report(value)`` after each epoch, or however often its
    training is scored.

    A call ends the trial, by an exception that ``finally`` and ``with`` see, where the search
    prunes it, where its time is over, or where the value is NaN. ``number`` is that of the trial.
    """

    def __init__(self, task: "Task", number: int) -> None:
        self.number = number
        self._task = task
        self._values: list[float] = []
        self._state: State | None = None

    def __call__(self, value: float) -> None:
        """Take the score after one more step of the training; higher or lower is better, as the
        search was told."""
        task = self._task
        score = self._task.sign * _number(value, "report(value)")
        if math.isnan(score):
            self._state = "failed"
            raise TrialEnd
        self._values.append(score)
        task.reports.add(self.number, score)
        if task.stop.is_over():
            self._state = "stopped"
        elif task.rule is not None:
            self._state = self._judge(task.rule)
        if self._state is not None:
            raise TrialEnd

    def _judge(self, rule: PruningRule) -> State | None:
        """Return the state in which the trial ends here, None if it goes on. Waits for trials with
        lower numbers."""
        while (ends := rule(self.number, len(self._values), self._task.reports)) is None:
            if self._task.stop.is_over():
                return "stopped"
            time.sleep(_LOOK)
        return "pruned" if ends else None


@dataclass(frozen=True)
class Ending:
    """What came of a trial: its score (NaN where it failed), what it reported, seconds, and the
    error that ended it."""

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
    """An objective with what all its trials have in common; ``sign`` is -1 where lower is
    better."""

    objective: Objective
    sign: float
    seed: int
    reports: Reports
    rule: PruningRule | None
    stop: Stop

    def __call__(self, trial: Trial) -> Sequence[Ending]:
        """Train one trial. What the objective raises is its result, and the search goes on."""
        number = trial.number
        params = trial.params
        begin = time.monotonic()
        report = Report(self, number)
        error = ""
        score = math.nan
        self.reports.write(number, (), ended=False)
        try:
            with seeded_generators(self.seed):
                score = self.sign * _number(
                    self.objective(dict(params), report), "what the objective returns"
                )
        except TrialEnd:
            pass
        except Exception as failure:
            # with the line of the objective, whose file a worker may not know
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


def call_in_worker(path: str, trial: Trial, _place: object) -> Sequence[Ending]:
    """Train one trial in a worker, whose environment has all that is its own."""
    return _task(path)(trial)


@lru_cache(maxsize=1)
def _task(path: str) -> Task:
    """Return the task of a search: one object for all its trials, so that data in it is read
    once."""
    return cast(Task, cloudpickle.loads(Path(path).read_bytes()))
