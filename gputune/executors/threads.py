"""Threads of this process train chunks (groups of trials) that leave cores idle.

The threads take turns with everything except compiled steps (``engine/turns.py``).
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from gputune.engine.job import Failure, Outcome
from gputune.engine.turns import Cancelled, Turns
from gputune.executors.executor import Ended, Executor, Outcomes
from gputune.population.population import Population
from gputune.threads import on_threads


class ChunkThreads(Executor[Population, Outcome | Failure]):
    """An executor that trains chunks in ``number`` threads, in addition to the thread that runs the
    queue.

    ``train`` trains a chunk. Torch uses ``threads`` threads in each of them.
    """

    worker = "a thread"

    def __init__(self, train: Callable[[Population], Outcomes], number: int, threads: int) -> None:
        self.train = train
        self.number = number
        self.threads = threads
        self.turns = Turns(threads)
        self.running: list[threading.Thread] = []
        self.news = threading.Event()

    @property
    def capacity(self) -> int:
        return self.number

    def submit(self, chunk: Population, ended: Ended[Population, Outcome | Failure]) -> bool:
        """Start a thread that trains a chunk."""
        thread = threading.Thread(target=self._run, args=(chunk, ended))
        self.running = [other for other in self.running if other.is_alive()]
        self.running.append(thread)
        thread.start()
        return True

    def _run(self, chunk: Population, ended: Ended[Population, Outcome | Failure]) -> None:
        """Train a chunk in its turns, and report its results or its error."""
        result: Outcomes | Exception = []
        try:
            with self.turns.taken(), on_threads(self.threads):
                result = self.train(chunk)
        except Cancelled:
            pass
        except Exception as error:
            result = error
        finally:
            ended(chunk, result)
            self.news.set()

    def turn(self) -> AbstractContextManager[object]:
        """Return a context in which the thread of the queue has its turn."""
        return self.turns.taken()

    def wait(self) -> None:
        """Block until a thread has ended a chunk, for at most one second."""
        self.news.wait(timeout=1.0)
        self.news.clear()

    def stop(self) -> None:
        """Cancel the training of all threads. They end after their running epoch."""
        self.turns.is_cancelled = True


@contextmanager
def chunk_threads(
    train: Callable[[Population], Outcomes], number: int, threads: int
) -> Iterator[ChunkThreads]:
    """Provide an executor with threads, and wait at the end until all its threads have ended."""
    executor = ChunkThreads(train, number, threads)
    try:
        yield executor
    finally:
        # Not in stop(), which holds the lock of the queue that a thread needs to report its end.
        for thread in executor.running:
            thread.join()
