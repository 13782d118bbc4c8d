"""When training ends before its last epoch, at a deadline or because someone asks for it; and how
it is entered.

Work with torch is entered out of the modes that a program has set, and waited for when the process
ends.
"""

import atexit
import functools
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import ParamSpec, TypeVar


class Stop:
    """Asked after every epoch, by this process and by its workers, whose copies hear what is asked
    here."""

    def __init__(self, deadline: float | None = None) -> None:
        """``deadline`` is a ``time.monotonic()``, a clock that the processes of a machine share."""
        self.deadline = deadline
        self.asked = False  # whether someone has asked for the end; a deadline is not asked for
        self.reason = ""  # why the search was good enough to end; "" where it was not
        self._sign: Path | None = None  # a file that says to the workers what ``asked`` says here
        self._parent: int | None = None
        _stops.add(self)

    def ask(self) -> None:
        """End all training after the running epoch. May be called by a signal handler, and more
        than once."""
        self.asked = True
        if self._sign is not None:
            with suppress(OSError):  # the folder has just gone, and with it those who would look
                self._sign.touch()

    def is_over(self) -> bool:
        """Whether training ends now: it was asked to, the deadline has passed, or a worker has lost
        its parent."""
        if self.asked or (self.deadline is not None and time.monotonic() > self.deadline):
            return True
        if self._parent is None:
            return False
        return os.getppid() != self._parent or (self._sign is not None and self._sign.exists())

    @contextmanager
    def heard_by_workers(self, sign: Path) -> Iterator[None]:
        """Let copies that are pickled inside hear what is asked here, by a file that does not exist
        yet."""
        self._sign = sign
        if self.asked:  # before there was a file to make
            self.ask()
        try:
            yield
        finally:
            self._sign = None

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_parent": os.getpid()}


_stops: "weakref.WeakSet[Stop]" = weakref.WeakSet()

Given = ParamSpec("Given")
Value = TypeVar("Value")

_changed = threading.Condition()
_working: set[threading.Thread] = set()
_ending = False


def entry(function: Callable[Given, Value]) -> Callable[Given, Value]:
    """Let a function compute gradients within ``torch.inference_mode``, and make its tensors on the
    CPU by default.

    What it makes elsewhere has its device by name, whatever ``torch.set_default_device`` was told
    ("meta" holds no numbers at all). A process that ends while it runs in a daemon thread asks for
    its end and waits for that.
    """

    @functools.wraps(function)
    def entered(*args: Given.args, **more: Given.kwargs) -> Value:
        import torch  # here: ``gputune --help`` needs a ``Stop`` and must not wait for it

        default = torch.get_default_device()
        # A mode costs something in every call of torch, so only where there is another one to be
        # left.
        on_cpu = nullcontext() if default.type == "cpu" else torch.device("cpu")
        with waited_for(), torch.inference_mode(False), on_cpu:
            return function(*args, **more)

    return entered


@contextmanager
def waited_for() -> Iterator[None]:
    """Count a daemon thread as one that works inside; where the process ends meanwhile, it never
    comes out.

    A decorator too. Python ends such a thread at the next line that it would run, and torch's code
    then aborts.
    """
    thread = threading.current_thread()
    if not thread.daemon or thread in _working:
        yield
        return
    with _changed:
        if not _ending:
            _working.add(thread)
    _wait_for_the_end()
    try:
        yield
    finally:
        with _changed:
            _working.discard(thread)
            _changed.notify_all()
        _wait_for_the_end()


def _wait_for_the_end() -> None:
    if _ending and threading.current_thread() not in _working:
        threading.Event().wait()


@atexit.register
def _end() -> None:
    global _ending
    with _changed:
        _ending = True
        for stop in list(_stops):
            stop.ask()
        _changed.wait_for(lambda: not _working)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_working.clear)  # a child has none of these threads
