"""Where chunks train, and the one loop that hands them out: to this process, to worker processes,
to a cluster."""

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from gputune.engine.job import Failure, Outcome, Progress
from gputune.engine.stop import Stop
from gputune.errors import warn
from gputune.text import count


class Unit(Protocol):
    """What trains as one, a chunk of trials or a trial, known by the places of its trials."""

    @property
    def index(self) -> tuple[int, ...]:
        """The places."""


Chunk = TypeVar("Chunk", bound=Unit)
Result = TypeVar("Result")

Outcomes = Sequence[Outcome | Failure]  # what came of a chunk of a population, part by part
Task = Callable[[Chunk], Sequence[Result]]  # trains a chunk in this process
# From any thread: told what came of a chunk that a worker has trained, or its error; asked whether
# one may begin here.
Ended = Callable[[Chunk, Sequence[Result] | Exception], None]
Claim = Callable[[Chunk], bool]

LOSSES = 3  # workers that one chunk may lose before it is given up


class LostWorkerError(Exception):
    """A worker has ended without an answer; the text says how."""


class Executor(Generic[Chunk, Result]):
    """This process alone. Those that follow have workers, beside this process or instead of it."""

    worker = "this process"

    @property
    def capacity(self) -> int:
        """Chunks that the workers train at once."""
        return 0

    def submit(self, chunk: Chunk, ended: Ended[Chunk, Result]) -> bool:
        """Give a chunk to a worker, of which one is free; False where no worker starts any more."""
        return False

    def wait(self) -> None:
        """Return when a chunk may have ended, or after a moment."""

    def give_up(self, chunk: Chunk, losses: int, reason: str) -> Sequence[Result] | Exception:
        """Return what becomes of a chunk that has lost so many workers; an error is raised when all
        else is done."""
        return []

    def stop(self) -> None:
        """End the workers, whatever they are doing."""


class Queue(Generic[Chunk, Result]):
    """The chunks that wait. A worker that ends one is given the next at once, from whatever thread
    says so."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        executor: Executor[Chunk, Result],
        stop: Stop,
        claim: Claim[Chunk],
        may_begin: Claim[Chunk] | None = None,
    ) -> None:
        """Make the queue. A chunk waits for the results of others until ``may_begin`` allows it."""
        self.executor = executor
        self.stopping = stop
        self.claim = claim
        self.may_begin = may_begin
        # A chunk whose worker is lost goes to another worker, never to this process, which it might
        # end as well.
        self.waiting = deque(chunks)
        self.lost = deque[Chunk]()
        self.losses: Counter[tuple[int, ...]] = Counter()
        self.running: set[tuple[int, ...]] = set()
        self.done: deque[Sequence[Result] | Exception | str] = deque()  # a text is a warning
        self.begun = False
        self.is_refused = False  # whether a worker was wanted and none starts any more
        self.error: Exception | None = None  # raised when all else is done
        # Reentrant: a worker may have ended a chunk before it is noted that it was given it.
        self.lock = threading.RLock()

    def run(self, task: Task[Chunk, Result] | None, progress: Progress) -> Iterator[Result]:
        """Yield what came of the chunks, as they end; by ``task``, if any, this process trains what
        no worker takes."""
        try:
            self._fill()
            if task is None and self.is_refused and not self.running:
                self.stopping.ask()  # the process ends, and nobody is left to train what waits
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
                # whoever took the results may have let more chunks begin
                if self.may_begin is not None:
                    self._fill()
            if self.error is not None and not self.stopping.asked:
                raise self.error
        except BaseException:  # GeneratorExit among them: whoever iterates has failed
            with self.lock:
                self.waiting.clear()
                self.lost.clear()
                self.executor.stop()
            raise

    def _take(self) -> Chunk | None:
        with self.lock:
            while (chunk := self._next()) is not None:
                self.waiting.remove(chunk)
                if self.claim(chunk):
                    self.begun = True
                    return chunk
            return None

    def _next(self) -> Chunk | None:
        """Return the first of the waiting chunks that may begin."""
        if self.may_begin is None:
            return self.waiting[0] if self.waiting else None
        return next(filter(self.may_begin, self.waiting), None)

    def _fill(self) -> None:
        """Give chunks to the workers that are free; one chunk at least begins, however little time
        there is."""
        with self.lock:
            while len(self.running) < self.executor.capacity and not (
                self.begun and self.stopping.is_over()
            ):
                if (chunk := self.lost.popleft() if self.lost else self._take()) is None:
                    return
                self.running.add(chunk.index)
                if not self.executor.submit(chunk, self._end_chunk):
                    self.running.discard(chunk.index)
                    self.waiting.appendleft(chunk)
                    self.is_refused = True
                    return

    def _end_chunk(self, chunk: Chunk, result: Sequence[Result] | Exception) -> None:
        with self.lock:
            self.running.discard(chunk.index)
            content = (
                self._lose(chunk, str(result)) if isinstance(result, LostWorkerError) else result
            )
            try:
                if not isinstance(content, Exception):
                    self._fill()  # first, so that no worker waits while a result is written
            finally:
                self.done.append(content)

    def _lose(self, chunk: Chunk, reason: str) -> Sequence[Result] | str:
        """Let the chunk of a lost worker wait again, or give it up; return what is to be said of
        it."""
        self.losses[chunk.index] += 1
        if self.losses[chunk.index] < LOSSES:
            self.lost.append(chunk)
            trials = count(len(chunk.index), "trial")
            return (
                f"{self.executor.worker} was lost while it trained {trials}, now handed out "
                f"again: {reason}"
            )
        outcomes = self.executor.give_up(chunk, LOSSES, reason)
        if isinstance(outcomes, Exception):
            self.error = self.error or outcomes
            return []
        return outcomes

    def _collect_results(self, progress: Progress) -> Iterator[Result]:
        """Yield what the workers have done by now. An error of theirs is raised here."""
        while self.done:
            result = self.done.popleft()
            if isinstance(result, Exception):
                raise result
            if isinstance(result, str):
                warn(result)
                continue
            for one in result:
                if isinstance(one, Outcome):
                    progress(len(one.index) * one.epochs, one.curves[:, : one.epochs])
            yield from result
