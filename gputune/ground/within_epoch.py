"""Report the progress of training within an epoch to the progress bar of a search.

Large tables have epochs of many seconds. Code that trains calls ``report_steps`` every few hundred
milliseconds. Workers write their progress to an array, which ``running_in_workers`` reads.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

StepsTaken = Callable[[float, int], object]
"""A function to call with the finished share of a running epoch, and the number of its trials."""

REPORT_SECONDS = 0.5
"""Seconds between two reports of a thread that waits for the threads that train."""


@dataclass(frozen=True)
class Running:
    """The training that has not been reported as a result yet.

    A trial-epoch is one epoch of one trial.

    Args:
        epochs: Number of finished trial-epochs.
        part: Finished part of the running epochs, in trial-epochs: at most ``trials``.
        trials: Number of trials whose epoch is running.
    """

    epochs: float = 0.0
    part: float = 0.0
    trials: float = 0.0

    def __add__(self, other: "Running") -> "Running":
        return Running(
            self.epochs + other.epochs, self.part + other.part, self.trials + other.trials
        )

    @property
    def share(self) -> float:
        """The finished share of the running epochs, between 0 and 1."""
        return self.part / self.trials if self.trials else 0.0


_T = TypeVar("_T")
_listener: ContextVar[StepsTaken | None] = ContextVar("_listener", default=None)
_workers: ContextVar[Callable[[], Running] | None] = ContextVar("_workers", default=None)


@contextmanager
def _set_during(variable: ContextVar[_T], value: _T) -> Iterator[None]:
    """Give a context variable a value during a ``with`` block."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def reported_to(listener: StepsTaken) -> AbstractContextManager[None]:
    """Report the progress within epochs to ``listener`` during a ``with`` block."""
    return _set_during(_listener, listener)


def workers_read_by(read: Callable[[], Running]) -> AbstractContextManager[None]:
    """Read the progress of workers with the function ``read`` during a ``with`` block."""
    return _set_during(_workers, read)


def report_steps(taken: float, total: float, trials: int) -> None:
    """Report that trials which train together have taken ``taken`` of the ``total`` steps of their
    running epoch."""
    listener = _listener.get()
    if listener is not None and taken < total:
        listener(taken / total, trials)


def report_waiting() -> None:
    """Report that this thread trains nothing, because it waits for workers."""
    listener = _listener.get()
    if listener is not None:
        listener(0.0, 0)


def running_in_workers() -> Running:
    """Return the training of all workers that has not been reported as a result yet."""
    read = _workers.get()
    return Running() if read is None else read()
