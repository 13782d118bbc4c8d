"""Threads of this process train chunks (groups of trials) that leave cores idle.

The threads take turns with everything except compiled steps (``engine/turns.py``).
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from gputune.engine.backend import torch_threads
from gputune.engine.job import Failure, Outcome, ProgressCallback
from gputune.engine.turns import Cancelled, Turns
from gputune.executors.executor import Ended, Executor, Outcomes, WorkerProgress
from gputune.ground.within_epoch import workers_read_by
from gputune.population.population import Population

Training = Callable[[Population, ProgressCallback], Outcomes]
"""A function that trains a chunk, and reports each epoch to a function."""


class ChunkThreads(Executor[Population, Outcome | Failure]):
    """An executor that trains chunks in ``number`` threads, in addition to the thread that runs the
    queue.

    ``train`` trains a chunk. Torch uses ``threads`` threads in each of them. ``progress`` has the
    progress of the chunks that train.
    """

    worker = "a thread"

    def __init__(
        self, train: Training, number: int, threads: int, progress: WorkerProgress
    ) -> None:
        self.train = train
        self.number = number
        self.threads = threads
        self.progress = progress
        self.turns = Turns(threads)
        self.running: list[threading.Thread] = []
        self.news = threading.Event()

    @property
    def capacity(self) -> int:
        return self.number

    def submit(self, chunk: Population, ended: Ended[Population, Outcome | Failure]) -> bool:
        """Start a thread that trains a chunk. Returns False if the system allows no more threads."""
        thread = threading.Thread(target=self._run, args=(chunk, ended))
        try:
            thread.start()
        except RuntimeError:  # the system allows no more threads
            return False
        self.running = [other for other in self.running if other.is_alive()]
        self.running.append(thread)
        return True

    def _run(self, chunk: Population, ended: Ended[Population, Outcome | Failure]) -> None:
        """Train a chunk in its turns, and report its results or its error."""
        result: Outcomes | Exception = []
        try:
            written = self.progress.written(chunk.index)
            with self.turns.taken(), torch_threads(self.threads), written as after_epoch:
                result = self.train(chunk, after_epoch)
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

    def count(self, index: Sequence[int]) -> None:
        self.progress.count(index)

    def stop(self) -> None:
        """Cancel the training of all threads. They end after their running epoch."""
        self.turns.is_cancelled = True


@contextmanager
def chunk_threads(
    train: Training, number: int, threads: int, n_trials: int
) -> Iterator[ChunkThreads]:
    """Provide an executor with threads, and wait at the end until all its threads have ended.

    ``n_trials`` is larger than every position of a trial in the search.
    """
    progress = WorkerProgress.of(n_trials)
    executor = ChunkThreads(train, number, threads, progress)
    try:
        with workers_read_by(progress.running):
            yield executor
    finally:
        # Not in stop(), which holds the lock of the queue that a thread needs to report its end.
        for thread in executor.running:
            thread.join()
