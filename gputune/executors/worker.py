"""Start worker processes, and run trials in them.

A worker also calls the objective of a custom training loop. It imports this file and torch, but no
slow module that would delay the loop. Each trial has its own file with the values that it reports.
All files are in one folder that every worker reads. A rule that compares trials therefore needs no
server process.
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

from gputune.engine.stop import Stop
from gputune.ground.annotations import FloatArray
from gputune.ground.errors import InputError
from gputune.ground.seeding import seeded_generators
from gputune.ground.types import Config

Answer = TypeVar("Answer")


def pickled_with_code(
    value: object, parts: Iterable[object], *, same_machine: bool = True
) -> bytes:
    """Pickle a value for a worker process, together with the code that the worker cannot import.

    Args:
        value: The value to pickle.
        parts: The classes and functions in the value whose code may have to be included.
        same_machine: If True, the worker runs on this machine and can import modules from
            ``sys.path``. If False, it can import only installed packages.
    """
    can_import = _importable if same_machine else _is_installed
    modules = set()
    for part in parts:
        module = sys.modules.get(getattr(getattr(part, "func", part), "__module__", None) or "")
        if module is not None and module.__name__ != "__main__" and not can_import(module.__name__):
            if not same_machine:  # include the whole package: its modules import each other
                module = sys.modules.get(module.__name__.partition(".")[0], module)
            modules.add(module)
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps(value))
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def _importable(name: str) -> bool:
    """Return True if a new process with the same ``sys.path`` could import the module ``name``."""
    path = None
    for dot in re.finditer(r"\.|$", name):
        spec = PathFinder.find_spec(name[: dot.start()], path)
        if spec is None:
            return False
        path = spec.submodule_search_locations
    return True


def _is_installed(name: str) -> bool:
    """Return True if the module ``name`` belongs to Python, to gputune or to an installed
    package."""
    top = name.partition(".")[0]
    if top == "gputune" or top in sys.stdlib_module_names or top in sys.builtin_module_names:
        return True
    parts = Path(getattr(sys.modules[name], "__file__", None) or "").parts
    return not {"site-packages", "dist-packages"}.isdisjoint(parts)


IDLE_SECONDS = 60  # an idle worker ends after this time

# Executors of one worker each, which the next search reuses. loky's shared executor is not used:
# joblib resizes it and expects that it made it.
idle: list[ProcessPoolExecutor] = []

# Held while a worker starts: this process's streams and signals may change for a moment.
_starting = threading.Lock()
# Held while this worker trains: a worker that has lost its parent first stores its state.
training = threading.Lock()


def single_worker(environment: Mapping[str, str] | None = None) -> ProcessPoolExecutor:
    """Return a process pool with exactly one worker process.

    Each worker has its own pool, so that losing a worker never affects other workers. The function
    returns an idle pool of an earlier search if there is one. If ``environment`` is given, the pool
    is always new, and its worker has these environment variables.
    """
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
    executor: ProcessPoolExecutor, work: Callable[..., Answer], *arguments: object
) -> "Future[Answer]":
    """Submit a function call to a worker process. If the worker has ended, the pool starts it
    again."""
    with _starting, signals_held_off(), _streams_that_flush():
        return cast("Future[Answer]", executor.submit(work, *arguments))


@contextmanager
def signals_held_off() -> Iterator[None]:
    """Block Ctrl-C (SIGINT), SIGTERM and SIGUSR1 in a worker that starts inside the ``with`` block.

    The worker inherits the blocked signals. Otherwise a signal to the process group would end the
    workers. A ``Stop`` notifies the workers instead, and they end by themselves if this process has
    died.
    """
    if sys.platform == "win32":  # Windows cannot block signals
        yield
        return
    ending = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _streams_that_flush() -> Iterator[None]:
    """Inside the ``with`` block, replace standard output or standard error if the stream cannot be
    flushed.

    loky flushes both streams when it starts a worker, and fails if a stream is missing, closed or
    full.
    """
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
    """Prepare a new worker process.

    The worker ends soon after its parent has ended. The worker gets a standard error stream if it
    inherited none.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        with training:
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if sys.stderr is None:  # loky's crash reports need a standard error
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def loss_reason(error: BrokenProcessPool) -> str:
    """Return a sentence that says how a lost worker process ended, for example by a signal."""
    if match := re.search(r"(SIG[A-Z]+)\(-\d+\)", str(error)):
        if match[1] == "SIGKILL":
            return "SIGKILL ended it. The system sends this signal if memory has run out."
        return f"{match[1]} ended it."
    if match := re.search(r"EXIT\((\d+)\)", str(error)):
        return f"it ended itself with exit code {match[1]}, as os._exit does."
    return "it ended without an error message."


LoopObjective = Callable[[Config, "Report"], float]
EndState = Literal["complete", "pruned", "stopped", "failed"]


class TrialValues(NamedTuple):
    """The values that a trial has reported so far, (steps,) float64, and whether the trial has
    ended."""

    values: FloatArray
    ended: bool


class Reports:
    """Storage for the values that the trials of a search report, with one file for each trial in a
    folder.

    Greater values are better.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def write(self, number: int, values: Sequence[float] | FloatArray, *, ended: bool) -> None:
        """Replace the stored values of a trial. With ``ended=True``, a final NaN marks the trial as
        ended."""
        stored = np.append(values, math.nan) if ended else np.asarray(values)
        (self.folder / str(number)).write_bytes(stored.astype("<f8").tobytes())

    def add(self, number: int, value: float) -> None:
        """Append one reported value to the stored values of a trial."""
        with (self.folder / str(number)).open("ab") as file:
            file.write(np.float64(value).tobytes())

    def read(self, up_to: int) -> dict[int, TrialValues]:
        """Return the reported values of all trials up to the trial number ``up_to``, keyed by trial
        number in ascending order."""
        reported = {}
        for number in sorted(int(place.name) for place in self.folder.iterdir()):
            if number > up_to:
                break
            raw = (self.folder / str(number)).read_bytes()
            values = np.frombuffer(raw[: len(raw) // 8 * 8], "<f8")
            ended = bool(len(values)) and math.isnan(values[-1])
            reported[number] = TrialValues(values[:-1] if ended else values, ended)
        return reported


# (trial number, number of values that it has reported, reports of all trials) -> whether the trial
# ends here; None while other trials must report first.
PruningRule = Callable[[int, int, Reports], bool | None]

_LOOK = 0.01
"""Seconds between two checks of the reports that a trial waits for."""


class TrialEnd(BaseException):
    """The exception that ends a trial when its training loop reports a value.

    The class is not a subclass of Exception, because a training loop may catch every Exception.
    """


class SetupError(InputError):
    """A mistake in an objective that all of its trials repeat, such as the name of a metric that
    the trainer never logs.

    If no trial has succeeded yet, the error ends the search at the first trial. Otherwise only the
    trial is "failed".
    """


class Report:
    """The function with which an objective of ``gputune.search`` reports its progress.

    Call ``report(value)`` after each epoch, or after each validation of the model. A call ends the
    trial if the search prunes it, if the time is over, or if the value is NaN. The call then raises
    an exception, so ``finally`` and ``with`` blocks still run. The exception is not an
    ``Exception``, so ``except Exception`` does not catch it.

    ``gputune.search`` makes one report for each trial and passes it to the objective. With halving
    or the median rule, a call waits until the trials with lower numbers have reported as often.

    Attributes:
        number: The number of the trial, from 0.

    Raises:
        TypeError: The reported value is not a number. The trial is then "failed".

    Example:
        >>> import gputune
        >>> def objective(params, report: gputune.Report):
        ...     for epoch in range(3):
        ...         report(params["lr"] * epoch)  # the score after this epoch
        ...     return params["lr"] * epoch
        >>> options = {"direction": "maximize", "n_trials": 1, "workers": 1, "verbose": 0}
        >>> study = gputune.search(objective, {"lr": 0.5}, **options)
        >>> study.curves[0].ravel()  # the three reports of trial 0
        array([0. , 0.5, 1. ])
    """

    def __init__(self, task: "LoopTask", number: int) -> None:
        self.number = number
        self._task = task
        self._values: list[float] = []
        self._state: EndState | None = None

    def __call__(self, value: float) -> None:
        """Report the validation score after one more epoch or step of the training.

        Args:
            value: The score. The ``direction`` of the search says whether higher or lower is
                better.
        """
        if self._state is not None:  # the objective has caught the exception, and reports again
            raise TrialEnd
        task = self._task
        score = self._task.sign * _number(value, "report(value)")
        if math.isnan(score):
            self._state = "failed"
            raise TrialEnd
        self._values.append(score)
        task.reports.add(self.number, score)
        if task.stop.is_over():
            self._state = "stopped"
        elif self.number in task.stop.ended_trials():
            self._state = "pruned"
        elif task.rule is not None:
            self._state = self._judge(task.rule)
        if self._state is not None:
            raise TrialEnd

    def _judge(self, rule: PruningRule) -> EndState | None:
        """Return the final state of the trial if the trial ends at this report, or None if it
        continues.

        The call waits until the trials with lower numbers have reported.
        """
        while (ends := rule(self.number, len(self._values), self._task.reports)) is None:
            if self._task.stop.is_over():
                return "stopped"
            time.sleep(_LOOK)
        return "pruned" if ends else None


@dataclass(frozen=True)
class TrialEnding:
    """The result of a trial of a custom training loop: its final state, score and reported values.

    The score is NaN if the trial failed. ``values`` are the reported values, ``seconds`` is the
    duration, and ``error`` is the text of the error that ended the trial. ``setup_error`` is that
    error if all trials of the objective would raise it.
    """

    number: int
    state: EndState
    score: float
    values: Sequence[float]
    seconds: float
    error: str = ""
    setup_error: SetupError | None = None


@dataclass(frozen=True)
class LoopTrial:
    """A trial of a custom training loop: its configuration and its trial number."""

    number: int
    params: Config

    @property
    def index(self) -> tuple[int]:
        """The trial number as a tuple, by which the queue identifies the trial."""
        return (self.number,)


@dataclass(frozen=True)
class LoopTask:
    """The user's objective function, and the settings that all trials of the search share.

    ``sign`` is -1 if lower values are better, else 1.
    """

    objective: LoopObjective
    sign: float
    seed: int
    reports: Reports
    rule: PruningRule | None
    stop: Stop

    def __call__(self, trial: LoopTrial) -> Sequence[TrialEnding]:
        """Train one trial. If the objective raises an exception, the trial fails with this error,
        and the search continues."""
        number = trial.number
        params = trial.params
        begin = time.monotonic()
        report = Report(self, number)
        error = ""
        setup_error = None
        score = math.nan
        self.reports.write(number, (), ended=False)
        try:
            with seeded_generators(self.seed):
                value = self.objective(dict(params), report)
                score = self.sign * _number(value, "the value that the objective returns")
        except TrialEnd:
            pass
        except Exception as failure:
            # An objective that has caught the end of its trial may miss results of the training.
            if report._state is None:
                error = _error_text(failure)
                setup_error = failure if isinstance(failure, SetupError) else None
        state: EndState = report._state or ("complete" if math.isfinite(score) else "failed")
        values = report._values
        if state in ("pruned", "stopped"):
            score = values[-1]
        self.reports.write(number, values, ended=True)
        seconds = time.monotonic() - begin
        return [TrialEnding(number, state, score, values, seconds, error, setup_error)]


def _error_text(failure: Exception) -> str:
    """Return the error of an objective as text, with the first line of the objective in its
    traceback."""
    # The line number is part of the text: a worker may lack the file of the objective.
    frames = traceback.extract_tb(failure.__traceback__)[1:]
    places = [f" (line {f.lineno} of {f.name})" for f in frames if f.filename != __file__]
    return f"{type(failure).__name__}: {failure}{''.join(places[:1])}"


def _number(value: object, name: str) -> float:
    """Return ``value`` as a float. Raises TypeError if the value is not a number."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None


def call_in_worker(path: str, trial: LoopTrial, _place: object) -> Sequence[TrialEnding]:
    """Train one trial of a custom training loop in a worker process. The worker's environment
    variables set its GPU and threads."""
    return _task(path)(trial)


@lru_cache(maxsize=1)
def _task(path: str) -> LoopTask:
    """Unpickle the objective and settings of a search (the task) in a worker process.

    All trials of a search share one task object, so that the worker reads its data only once.
    """
    return cast(LoopTask, cloudpickle.loads(Path(path).read_bytes()))
