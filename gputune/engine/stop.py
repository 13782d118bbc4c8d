"""Stop training before its last epoch, and protect public functions from torch's global settings.

Training ends early at a deadline or on request. An entry point is a function with the decorator
``entry``, which computes with torch for the user's program. Inside it, torch's inference mode and
default device that the program has set have no effect. A process waits for entry points in daemon
threads before it ends.
"""

import functools
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import ParamSpec, TypeVar


class Stop:
    """A request to end training. This process and its workers check it after every epoch.

    Copies of the object in workers receive the request through a file.
    """

    def __init__(self, deadline: float | None = None) -> None:
        """Set the deadline for training, as a value of ``time.monotonic()``. All processes of a
        machine share this clock."""
        self.deadline = deadline
        self.requested = False  # whether the end was requested; a deadline does not count
        self.reason = ""  # why the search was good enough to end, or ""
        # A file whose existence passes ``requested`` on to the workers.
        self._request_file: Path | None = None
        self._parent: int | None = None
        self._ended_trials: set[int] = set()  # trial numbers
        _stops.add(self)

    def ask(self) -> None:
        """Request that all training ends after the running epoch. A signal handler may call this
        method, also repeatedly."""
        self.requested = True
        if self._request_file is not None:
            # the folder has just been removed, and the workers that would look with it
            with suppress(OSError):
                self._request_file.touch()

    def is_over(self) -> bool:
        """Return whether training ends now.

        Training ends after a request, after the deadline, and in a worker that has lost its parent
        process.
        """
        if self.requested or (self.deadline is not None and time.monotonic() > self.deadline):
            return True
        if self._parent is None:
            return False
        is_requested = self._request_file is not None and self._request_file.exists()
        return is_requested or os.getppid() != self._parent

    def end_trials(self, numbers: Set[int]) -> None:
        """Request that the trials with these numbers end after their running epoch."""
        self._ended_trials |= numbers
        if self._request_file is not None and self._ended_trials:
            text = " ".join(map(str, sorted(self._ended_trials)))
            file = self._trials_file
            draft = file.with_suffix(".draft")
            with suppress(OSError):  # as in ``ask``
                draft.write_text(text)
                os.replace(draft, file)  # workers never see a partial file

    def ended_trials(self) -> Set[int]:
        """Return the numbers of the trials that were requested to end."""
        if self._parent is None or self._request_file is None:
            return self._ended_trials
        try:
            return set(map(int, self._trials_file.read_text().split()))
        except OSError:  # no trial was requested to end
            return set()

    @property
    def _trials_file(self) -> Path:
        """The file that passes the numbers of ended trials on to the workers."""
        assert self._request_file is not None
        return self._request_file.with_suffix(".trials")

    @contextmanager
    def shared_with_workers(self, file: Path) -> Iterator[None]:
        """Pass stop requests on, through the file ``file``, to copies that are pickled inside the
        ``with`` block.

        The file must not exist yet.
        """
        self._request_file = file
        if self.requested:  # the request came before the file could be made
            self.ask()
        self.end_trials(set())
        try:
            yield
        finally:
            self._request_file = None

    def __getstate__(self) -> dict[str, object]:
        # A copy in a worker remembers the process that sent it.
        return {**vars(self), "_parent": os.getpid()}


def stop_after(seconds: float | None) -> Stop:
    """Return a ``Stop`` that ends training after ``seconds``, or that sets no time limit if
    ``seconds`` is None."""
    return Stop(None if seconds is None else time.monotonic() + seconds)


_stops: "weakref.WeakSet[Stop]" = weakref.WeakSet()

_LOOK_SECONDS = 0.05  # between two looks at the main thread

EntryParams = ParamSpec("EntryParams")
EntryResult = TypeVar("EntryResult")


def entry(function: Callable[EntryParams, EntryResult]) -> Callable[EntryParams, EntryResult]:
    """Decorate a function so that it computes gradients inside ``torch.inference_mode`` and makes
    its tensors on the CPU.

    ``torch.set_default_device`` has no effect on the function, because its tensors on other devices
    name their device. ("meta" tensors hold no values at all.) If the process ends while the
    function runs in a daemon thread, training is requested to end, and the process waits for it.
    """

    @functools.wraps(function)
    def wrapper(*args: EntryParams.args, **kwargs: EntryParams.kwargs) -> EntryResult:
        # here, because ``gputune --help`` needs a ``Stop`` and must not wait for torch
        import torch

        default = torch.get_default_device()
        # A mode slows down every call of torch, so it is set only if there is another default
        # device.
        on_cpu = nullcontext() if default.type == "cpu" else torch.device("cpu")
        with waited_for(), torch.inference_mode(False), on_cpu:
            return function(*args, **kwargs)

    return wrapper


@contextmanager
def waited_for() -> Iterator[None]:
    """Make the process wait for a daemon thread inside the ``with`` block before the process ends.

    The context manager is also a decorator. If the process ends meanwhile, all training is requested
    to end. Python would end the thread at the next line that it runs, and torch's code would then
    abort.
    """
    done = threading.Event()
    if threading.current_thread().daemon:
        # Python waits for this thread, which is no daemon.
        threading.Thread(target=_wait_for, args=(done,), daemon=False).start()
    try:
        yield
    finally:
        done.set()
        if threading.current_thread().daemon and not threading.main_thread().is_alive():
            threading.Event().wait()


def _wait_for(done: threading.Event) -> None:
    """Wait for an event, and request the end of all training when the main thread has ended."""
    while not done.wait(_LOOK_SECONDS):
        if not threading.main_thread().is_alive():
            for stop in list(_stops):
                stop.ask()
