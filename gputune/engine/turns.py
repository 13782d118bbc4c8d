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

from gputune.engine.backend import torch_threads

_current = threading.local()


class Cancelled(BaseException):
    """Raised in a thread that trains a chunk, after another thread has failed."""


class Turns:
    """Turns of the threads that train chunks at the same time.

    At most ``threads`` members train in compiled code at the same time.
    """

    def __init__(self, threads: int) -> None:
        self.turn = threading.Lock()
        self.owner: int | None = None  # the thread that has its turn
        self.cores = threading.Semaphore(threads)
        self.is_cancelled = False

    def begin(self) -> None:
        """Wait until it is the turn of the current thread."""
        self.turn.acquire()
        self.owner = threading.get_ident()

    def end(self) -> None:
        """End the turn of the current thread, unless it has none.

        It has none if Ctrl-C has ended the wait for its turn.
        """
        if self.owner == threading.get_ident():
            self.owner = None
            self.turn.release()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Wait until it is the turn of the current thread. The turn ends with the block."""
        self.begin()
        _current.turns = self
        try:
            yield
        finally:
            _current.turns = None
            self.end()


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
    turns.end()
    try:
        yield lambda: turns.cores
    finally:
        turns.begin()
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
                with turns.taken(), torch_threads(threads):
                    if waiting:
                        waiting.popleft()()
        except BaseException as error:
            turns.is_cancelled = True
            errors.append(error)

    ended: list[threading.Event] = []  # of the other threads

    def work_apart(end: threading.Event) -> None:
        try:
            work()
        finally:
            end.set()

    try:
        for _ in range(min(at_once, len(tasks)) - 1):
            end = threading.Event()
            threading.Thread(target=work_apart, args=(end,)).start()
            ended.append(end)
        work()  # in this thread, which receives the signals
        for end in ended:
            end.wait()
    except BaseException:  # such as Ctrl-C while this thread waits
        turns.is_cancelled = True
        for end in ended:  # the threads end after their running epoch
            end.wait()
        raise
    for error in errors:
        if not isinstance(error, Cancelled):
            raise error
