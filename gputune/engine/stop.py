"""When training ends before its last epoch: at a deadline, or because someone asks for it."""

import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Stop:
    """Asked after every epoch, by this process and by its workers, whose copies hear what is asked here."""

    def __init__(self, deadline: float | None = None) -> None:
        """``deadline`` is a ``time.monotonic()``, a clock that the processes of a machine share."""
        self.deadline = deadline
        self._asked = False
        self.reason = ""
        """Why the search was good enough to end; "" where it was not."""
        self._sign: Path | None = None  # a file that says to the workers what ``_asked`` says here
        self._parent: int | None = None
        _stops.add(self)

    def ask(self) -> None:
        """End all training after the running epoch. May be called by a signal handler, and more than once."""
        self._asked = True
        if self._sign is not None:
            with suppress(OSError):  # the folder has just gone, and with it those who would look
                self._sign.touch()

    @property
    def asked(self) -> bool:
        """Whether someone has asked for the end; a deadline is not asked for."""
        return self._asked

    def is_over(self) -> bool:
        """Whether training ends now: it was asked to, the deadline has passed, or a worker has lost its parent."""
        if self._asked or (self.deadline is not None and time.monotonic() > self.deadline):
            return True
        if self._parent is None:
            return False
        return os.getppid() != self._parent or (self._sign is not None and self._sign.exists())

    @contextmanager
    def heard_by_workers(self, sign: Path) -> Iterator[None]:
        """Let copies that are pickled inside hear what is asked here, by a file that does not exist yet."""
        self._sign = sign
        if self._asked:  # before there was a file to make
            self.ask()
        try:
            yield
        finally:
            self._sign = None

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_parent": os.getpid()}


_stops: "weakref.WeakSet[Stop]" = weakref.WeakSet()


def ask_all() -> None:
    """End all training of this process after the running epochs."""
    for stop in list(_stops):
        stop.ask()
