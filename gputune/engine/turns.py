"""Train several chunks at the same time in threads of one process.

A chunk is a group of trials that train together, and a member is one trial on one fold. gputune
traces steps with generators and modes of torch that are not safe in several threads. The threads
therefore take turns with everything except compiled steps. While the steps of one chunk run,
another chunk has its turn. So a chunk with fewer members than cores leaves no core idle.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

from gputune.threads import on_threads

_current = threading.local()


class Cancelled(BaseException):
    """Raised in a thread that trains a chunk, after another thread has failed."""


class Turns:
    """Turns of the threads that train chunks at the same time.

    At most ``threads`` members train in compiled code at the same time.
    """

    def __init__(self, threads: int) -> None:
        self.turn = threading.Lock()
        self.cores = threading.Semaphore(threads)
        self.is_cancelled = False

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Wait until it is the turn of the current thread. The turn ends with the block."""
        with self.turn:
            _current.turns = self
            try:
                yield
            finally:
                _current.turns = None


@contextmanager
def turn_given_up() -> Iterator[Callable[[], AbstractContextManager[object]]]:
    """Let other threads have their turns inside the block, in which only compiled code runs.

    Yields a function that returns a context, in which a thread uses a core. Raises Cancelled after
    the block if another thread has failed.
    """
    turns = cast(Turns | None, getattr(_current, "turns", None))
    if turns is None:
        yield nullcontext
        return
    turns.turn.release()
    try:
        yield lambda: turns.cores
    finally:
        turns.turn.acquire()
    if turns.is_cancelled:
        raise Cancelled


def run_together(tasks: Sequence[Callable[[], object]], *, at_once: int, threads: int) -> None:
    """Run functions that each train a chunk, ``at_once`` of them at the same time.

    All of them together use ``threads`` threads. Raises the first error of a function, after the
    other running functions have been cancelled.
    """
    if at_once == 1:
        for task in tasks:
            task()
        return
    turns = Turns(threads)
    waiting = deque(tasks)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while waiting and not turns.is_cancelled:
                with turns.taken(), on_threads(threads):
                    if waiting:
                        waiting.popleft()()
        except BaseException as error:
            turns.is_cancelled = True
            errors.append(error)

    others = [threading.Thread(target=work) for _ in range(min(at_once, len(tasks)) - 1)]
    for thread in others:
        thread.start()
    work()  # in this thread, which receives the signals
    for thread in others:
        thread.join()
    for error in errors:
        if not isinstance(error, Cancelled):
            raise error
