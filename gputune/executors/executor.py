"""Base class of executors, which train the trials of a search, and the queue that distributes the
trials.

A chunk is a group of trials that train together. An executor trains a chunk in this process, in a
worker process or on a cluster.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np

from gputune.engine.job import Failure, Outcome, ProgressCallback
from gputune.engine.stop import Stop
from gputune.ground.errors import warn
from gputune.ground.text import count
from gputune.ground.within_epoch import Running, report_waiting, reported_to


class Unit(Protocol):
    """One unit of work for an executor: a group of trials that train together, or a single trial.

    The trial numbers identify the unit.
    """

    @property
    def index(self) -> tuple[int, ...]:
        """The trial numbers of the unit of work, by which the queue identifies the unit."""


AnyUnit = TypeVar("AnyUnit", bound=Unit)
UnitResult = TypeVar("UnitResult")

Outcomes = Sequence[Outcome | Failure]  # the results of a chunk of a population, part by part
LocalTraining = Callable[[AnyUnit], Sequence[UnitResult]]  # trains a chunk in this process
# Ended is called from any thread, with the results or the error of a chunk that a worker trained.
# Claim returns whether a chunk may begin.
Ended = Callable[[AnyUnit, Sequence[UnitResult] | Exception], None]
Claim = Callable[[AnyUnit], bool]

MAX_LOST_WORKERS = 3  # a chunk that has lost this number of workers is given up


class LostWorkerError(Exception):
    """Error for a worker that ended without returning results. The text of the error says how the
    worker ended."""


class Executor(Generic[AnyUnit, UnitResult]):
    """Executor without workers: every chunk (group of trials) trains in this process.

    Subclasses train chunks in workers, in addition to this process or instead of this process.
    """

    worker = "this process"

    @property
    def capacity(self) -> int:
        """The number of chunks (groups of trials) that the workers can train at the same time."""
        return 0

    def submit(self, chunk: AnyUnit, ended: Ended[AnyUnit, UnitResult]) -> bool:
        """Start the training of a chunk (group of trials) in a free worker. The caller ensures that
        a worker is free.

        Args:
            chunk: The chunk to train.
            ended: The function that receives the results or the error of the chunk, called from any
                thread.

        Returns:
            False if the executor can start no worker any more, else True.
        """
        return False

    def wait(self) -> None:
        """Block until a worker may have ended a chunk (group of trials), but only for a short
        time."""

    def count(self, index: Sequence[int]) -> None:
        """Forget the progress that workers have reported for the trials at the positions ``index``,
        because their results are counted now."""

    def give_up(self, chunk: AnyUnit, losses: int, reason: str) -> Sequence[UnitResult] | Exception:
        """Return the failed results, or an error, for a chunk (group of trials) that has lost
        ``losses`` workers.

        The queue raises the error after all other chunks have ended.
        """
        return []

    def turn(self) -> AbstractContextManager[object]:
        """Return a context in which this process trains a chunk itself."""
        return nullcontext()

    def stop(self) -> None:
        """End all workers at once, also while they train."""


class Queue(Generic[AnyUnit, UnitResult]):
    """The queue of chunks (groups of trials) that wait for a free worker or for this process.

    When a worker ends a chunk, the thread that reports the end submits the next chunk to this
    worker at once.
    """

    def __init__(
        self,
        chunks: Sequence[AnyUnit],
        executor: Executor[AnyUnit, UnitResult],
        stop: Stop,
        claim: Claim[AnyUnit],
        may_begin: Claim[AnyUnit] | None = None,
    ) -> None:
        """Create the queue of chunks (groups of trials that train together).

        Args:
            chunks: The chunks to train, in order.
            executor: The executor with the workers.
            stop: The signal that ends the search.
            claim: A function that returns whether a chunk may train. The queue drops a chunk if the
                result is False.
            may_begin: A function that returns whether a chunk may begin now. Until then the chunk
                waits for the results of other chunks. None lets every chunk begin.
        """
        self.executor = executor
        self.stopping = stop
        self.claim = claim
        self.may_begin = may_begin
        # The chunk of a lost worker goes to another worker, never to this process, which it
        # might end as well.
        self.waiting = deque(chunks)
        self.lost = deque[AnyUnit]()
        self.losses: Counter[tuple[int, ...]] = Counter()
        self.running: set[tuple[int, ...]] = set()
        self.done: deque[Sequence[UnitResult] | Exception | str] = deque()  # a text is a warning
        self.begun = False
        self.is_refused = False  # whether no worker could be started for a chunk any more
        self.error: Exception | None = None  # raised after all other chunks have ended
        # Reentrant: a worker may end a chunk while submit() still runs in the same thread.
        self.lock = threading.RLock()

    def run(
        self, task: LocalTraining[AnyUnit, UnitResult] | None, progress: ProgressCallback
    ) -> Generator[UnitResult, None, None]:
        """Train all chunks (groups of trials), and yield the results of each chunk when it ends.

        Args:
            task: A function that trains a chunk in this process when no worker is free. None leaves
                all chunks to the workers.
            progress: The function to call with the progress of the chunks that workers have
                trained.
        """
        try:
            self._fill()
            if task is None and self.is_refused and not self.running:
                # the process is ending: nothing is left to train the waiting chunks
                self.stopping.ask()
            trains_here = task is not None
            while True:
                if trains_here and task is not None and (chunk := self._take()) is not None:
                    yield from task(chunk)
                    yield from self._collect_results(progress)
                    trains_here = not self.stopping.is_over()
                elif self.running or self.done:
                    self.executor.wait()
                    report_waiting()
                    yield from self._collect_results(progress)
                else:
                    break
                # The caller has used the results by now, so more chunks may be allowed to begin.
                if self.may_begin is not None:
                    self._fill()
            if self.error is not None and not self.stopping.requested:
                raise self.error
        except BaseException:  # also GeneratorExit, when the caller that iterates has failed
            with self.lock:
                self.waiting.clear()
                self.lost.clear()
                self.executor.stop()
            raise

    def _take(self) -> AnyUnit | None:
        """Remove and return the next chunk that this search may train now, or return None."""
        with self.lock:
            while (chunk := self._next()) is not None:
                self.waiting.remove(chunk)
                if self.claim(chunk):
                    self.begun = True
                    return chunk
            return None

    def _next(self) -> AnyUnit | None:
        """Return the first waiting chunk (group of trials) that may begin now, or None."""
        if self.may_begin is None:
            return self.waiting[0] if self.waiting else None
        return next(filter(self.may_begin, self.waiting), None)

    def _fill(self) -> None:
        """Submit waiting chunks (groups of trials) to all free workers.

        At least one chunk begins, even if the time of the search is already over.
        """
        with self.lock:
            while len(self.running) < self.executor.capacity and not (
                self.begun and self.stopping.is_over()
            ):
                chunk = self.lost.popleft() if self.lost else self._take()
                if chunk is None:
                    return
                self.running.add(chunk.index)
                is_started = False
                try:
                    is_started = self.executor.submit(chunk, self._end_chunk)
                finally:
                    if not is_started:
                        self.running.discard(chunk.index)
                if not is_started:
                    self.waiting.appendleft(chunk)
                    self.is_refused = True
                    return

    def _end_chunk(self, chunk: AnyUnit, result: Sequence[UnitResult] | Exception) -> None:
        """Store the results of a chunk (group of trials), and submit the next chunk to its worker.
        Any thread may call this method."""
        with self.lock:
            self.running.discard(chunk.index)
            ending: Sequence[UnitResult] | Exception | str = result
            if isinstance(result, LostWorkerError):
                ending = self._lose(chunk, str(result))
            failure: Exception | None = None
            try:
                if not isinstance(ending, Exception):
                    # before the result is stored, so that no worker waits for the storing
                    self._fill()
            except Exception as error:  # run() raises it: this thread may be any thread
                failure = error
            finally:
                self.done.append(ending)
            if failure is not None:
                self.done.append(failure)

    def _lose(self, chunk: AnyUnit, reason: str) -> Sequence[UnitResult] | str:
        """Queue the chunk (group of trials) of a lost worker again, or give the chunk up after
        several losses.

        Returns:
            The text of a warning, or the results of a chunk that was given up.
        """
        self.losses[chunk.index] += 1
        if self.losses[chunk.index] < MAX_LOST_WORKERS:
            self.lost.append(chunk)
            trials = count(len(chunk.index), "trial")
            return (
                f"{self.executor.worker} was lost while it trained {trials}, which another worker "
                f"trains again: {reason}"
            )
        outcomes = self.executor.give_up(chunk, MAX_LOST_WORKERS, reason)
        if isinstance(outcomes, Exception):
            self.error = self.error or outcomes
            return []
        return outcomes

    def _collect_results(self, progress: ProgressCallback) -> Iterator[UnitResult]:
        """Yield the results that workers have returned so far. Raises the error of a worker, if an
        error has occurred."""
        while self.done:
            result = self.done.popleft()
            if isinstance(result, Exception):
                raise result
            if isinstance(result, str):
                warn(result)
                continue
            for outcome in result:
                if isinstance(outcome, Outcome | Failure):
                    self.executor.count(outcome.index)
                if isinstance(outcome, Outcome):
                    curves = outcome.curves[:, outcome.begun : outcome.epochs]
                    progress(len(outcome.index) * curves.shape[1], curves)
            yield from result


_FIELDS = 3  # those of Running, as float64


class WorkerProgress:
    """An array with one row for each trial of a search, which all workers write.

    The row of a chunk's first trial has the progress of the chunk. Worker processes map the array
    from a file.
    """

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    @classmethod
    def of(cls, n_trials: int) -> "WorkerProgress":
        """Return empty rows for ``n_trials`` trials, for threads of this process."""
        return cls(np.zeros((n_trials, _FIELDS)))

    @classmethod
    def open(cls, path: Path) -> "WorkerProgress":
        """Map the rows from a file."""
        return cls(np.memmap(path, dtype=np.float64, mode="r+").reshape(-1, _FIELDS))

    @classmethod
    def create(cls, path: Path, n_trials: int) -> "WorkerProgress":
        """Create a file with empty rows for ``n_trials`` trials."""
        path.write_bytes(np.zeros((n_trials, _FIELDS)).tobytes())
        return cls.open(path)

    def running(self) -> Running:
        """Return the training of all workers that the search has not counted yet."""
        return Running(*self.rows.sum(0).tolist())

    def count(self, index: Sequence[int]) -> None:
        """Clear the rows of trials whose results the search has received.

        ``index`` has the positions of the trials.
        """
        self.rows[list(index)] = 0.0

    @contextmanager
    def written(self, index: Sequence[int]) -> Iterator[ProgressCallback]:
        """Write the progress of a chunk during a ``with`` block, in a worker.

        ``index`` has the positions of its trials. The block receives the function to call after each
        epoch.
        """
        row = self.rows[index[0]]
        row[:] = 0.0

        def after_epoch(trial_epochs: int, _curves: np.ndarray) -> None:
            row[:] = (row[0] + trial_epochs, 0.0, 0.0)

        def within_epoch(share: float, trials: int) -> None:
            row[1:] = (share * trials, trials)

        with reported_to(within_epoch):
            yield after_epoch
