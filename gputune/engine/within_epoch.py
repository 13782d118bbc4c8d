"""Report the progress of training within an epoch to the progress bar of this process.

Large tables have epochs of many seconds. A worker process reports only whole epochs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

StepsTaken = Callable[[float, int], object]
"""A function to call with the finished share of a running epoch, and the number of its trials."""

_listener: ContextVar[StepsTaken | None] = ContextVar("_listener", default=None)


@contextmanager
def reported_to(listener: StepsTaken) -> Iterator[None]:
    """Report the progress within epochs to ``listener`` during a ``with`` block."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def report_steps(taken: int, total: int, trials: int) -> None:
    """Report that trials which train together have taken ``taken`` of the ``total`` steps of their
    running epoch."""
    listener = _listener.get()
    if listener is not None and taken < total:
        listener(taken / total, trials)
