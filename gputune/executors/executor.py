"""Executors train chunks, and one queue hands the chunks out.

A chunk is a group of trials that train together. It trains in this process, in a worker process or
on a cluster.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from gputune.engine.job import Failure, Outcome, ProgressCallback
from gputune.engine.stop import Stop
from gputune.errors import warn
from gputune.text import count


class Unit(Protocol):
    """A chunk of trials, or one trial, that trains as one unit of work.

    It is identified by its trial numbers.
    """

    @property
    def index(self) -> tuple[int, ...]:
        """The trial numbers of the unit, by which the queue identifies it."""


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
    """A worker ended without an answer. The text of the error says how the worker ended."""


class Executor(Generic[AnyUnit, UnitResult]):
    """The base executor, which has no workers: every chunk trains in this process.

    Subclasses train chunks in workers, in addition to this process or instead of it.
    """

    worker = "this process"

    @property
    def capacity(self) -> int:
        """The number of chunks that the workers can train at the same time."""
        return 0

    def submit(self, chunk: AnyUnit, ended: Ended[AnyUnit, UnitResult]) -> bool:
        """Give a chunk to a free worker. The caller makes sure that a worker is free.

        Args:
            chunk: The chunk to train.
            ended: The function to call with the results or the error of the chunk, from any thread.

        Returns:
            False if no worker can be started any more, else True.
        """
        return False

    def wait(self) -> None:
        """Block until a chunk may have ended, or for a short time."""

    def give_up(self, chunk: AnyUnit, losses: int, reason: str) -> Sequence[UnitResult] | Exception:
        """Return the results of a chunk that has lost ``losses`` workers, or an error.

        The queue raises the error after all other chunks have ended.
        """
        return []

    def stop(self) -> None:
        """End the workers at once, also in the middle of a chunk."""


class Queue(Generic[AnyUnit, UnitResult]):
    """The queue of waiting chunks.

    A worker that ends a chunk is given the next chunk at once, by the thread that reports the end.
    """

    def __init__(
        self,
        chunks: Sequence[AnyUnit],
        executor: Executor[AnyUnit, UnitResult],
        stop: Stop,
        claim: Claim[AnyUnit],
        may_begin: Claim[AnyUnit] | None = None,
    ) -> None:
        """Make the queue.

        Args:
            chunks: The chunks to train, in order.
            executor: The executor with the workers.
            stop: The signal that ends the search.
            claim: Returns whether a chunk may be trained. A chunk that it refuses is dropped.
            may_begin: Returns whether a chunk may begin now. Until then the chunk waits for the
                results of other chunks. None lets every chunk begin.
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
    ) -> Iterator[UnitResult]:
        """Yield the results of the chunks as they end.

        Args:
            task: Trains a chunk in this process when no worker takes it. None leaves all chunks to
                the workers.
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
        """Return the next chunk that may begin and that can be claimed, or None."""
        with self.lock:
            while (chunk := self._next()) is not None:
                self.waiting.remove(chunk)
                if self.claim(chunk):
                    self.begun = True
                    return chunk
            return None

    def _next(self) -> AnyUnit | None:
        """Return the first waiting chunk that may begin, or None."""
        if self.may_begin is None:
            return self.waiting[0] if self.waiting else None
        return next(filter(self.may_begin, self.waiting), None)

    def _fill(self) -> None:
        """Give chunks to the free workers.

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
                if not self.executor.submit(chunk, self._end_chunk):
                    self.running.discard(chunk.index)
                    self.waiting.appendleft(chunk)
                    self.is_refused = True
                    return

    def _end_chunk(self, chunk: AnyUnit, result: Sequence[UnitResult] | Exception) -> None:
        """Store the results of a chunk, and give its worker the next chunk. Called from any
        thread."""
        with self.lock:
            self.running.discard(chunk.index)
            ending: Sequence[UnitResult] | Exception | str = result
            if isinstance(result, LostWorkerError):
                ending = self._lose(chunk, str(result))
            try:
                if not isinstance(ending, Exception):
                    # before the result is stored, so that no worker waits for the storing
                    self._fill()
            finally:
                self.done.append(ending)

    def _lose(self, chunk: AnyUnit, reason: str) -> Sequence[UnitResult] | str:
        """Put the chunk of a lost worker back into the queue, or give the chunk up.

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
        """Yield the results that the workers have delivered so far. An error of a worker is raised
        here."""
        while self.done:
            result = self.done.popleft()
            if isinstance(result, Exception):
                raise result
            if isinstance(result, str):
                warn(result)
                continue
            for outcome in result:
                if isinstance(outcome, Outcome):
                    n_epochs = outcome.epochs
                    progress(len(outcome.index) * n_epochs, outcome.curves[:, :n_epochs])
            yield from result
