"""Handling of Ctrl-C, SIGTERM and SIGUSR1 while a search trains.

After the first signal, the search completes the running epoch and then stops. A second signal stops
the search at once. Before and after the training, each signal ends the command with a message.

SLURM sends SIGTERM when a job must end, and SIGUSR1 some time before that if the job asks for it.
"""

import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from gputune.engine.stop import Stop
from gputune.ground.errors import Terminated, Verbatim, option, per_interface

if TYPE_CHECKING:
    from gputune.study.study import Study  # only for types: a command must not wait for numpy

CTRL_C = int(signal.SIGINT)
TERMINATED = int(signal.SIGTERM)
WARNED: int | None = getattr(signal, "SIGUSR1", None)
"""The number of SIGUSR1, or None on Windows, which lacks this signal."""

SIGNALS = (CTRL_C, TERMINATED) if WARNED is None else (CTRL_C, TERMINATED, int(WARNED))
"""The signals that end the training of a command or a script."""

GRACE_SECONDS = 2.5
"""The seconds from SIGTERM to the end of the training, even if the training is not finished.

The sender of SIGTERM usually sends SIGKILL some seconds later.
"""

Handler = Callable[[int, FrameType | None], object] | int | None

_USUAL: dict[int, Handler] = dict.fromkeys(SIGNALS, signal.SIG_DFL)
_USUAL[CTRL_C] = signal.default_int_handler


def take_signals(handle: Callable[[int, FrameType | None], None]) -> None:
    """Install a handler for Ctrl-C and SIGTERM in a process that runs one command.

    A signal that the process ignores stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (CTRL_C, TERMINATED):
        if signal.getsignal(number) in (_USUAL[number], end_command, end_process):
            signal.signal(number, handle)


def end_command(number: int, frame: FrameType | None) -> None:
    """Signal handler that raises KeyboardInterrupt for Ctrl-C, or Terminated for SIGTERM.

    During the import of a library, the handler ends the process instead, because some libraries
    turn an interrupt into a different error. At that time no results can be lost.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            end_process(number, frame)
        frame = frame.f_back
    raise Terminated if number == TERMINATED else KeyboardInterrupt


def end_process(number: int, _frame: FrameType | None) -> NoReturn:
    """Signal handler that ends the process at once, with the usual exit code for the signal."""
    with suppress(OSError):
        os.write(2, b"gputune: interrupted.\n")
    # Shells report a process that a signal has ended with the exit code 128 + number.
    os._exit(128 + number)


@contextmanager
def ended_by_signals(
    stop: Stop, signals: Sequence[int], say: Callable[[str], None]
) -> Iterator[list[int]]:
    """Let signals such as Ctrl-C end the training in the ``with`` block early.

    Handlers are set only in the main thread, and only for signals without a handler of the user's
    program. Afterwards, each signal has its former handler again. Yields a list, to which each
    signal adds its number.
    """
    numbers: list[int] = []
    timers: list[threading.Timer] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        numbers.append(number)
        if len(numbers) > 1:
            raise KeyboardInterrupt
        stop.ask()
        if number == TERMINATED:
            timers.append(_end_in_time())
        with suppress(RuntimeError):  # the signal came while the stream was being written to
            say(
                "stopping after the running epoch; finished results are kept (interrupt again to stop now)"
            )

    before: dict[int, Handler] = {}
    if threading.current_thread() is threading.main_thread():  # only this thread may set handlers
        # Handlers that the calling program has set stay in place.
        handlers = {number: signal.getsignal(number) for number in signals}
        for number, handler in handlers.items():
            if handler in (_USUAL[number], end_command):
                before[number] = handler
    try:
        for number in before:
            signal.signal(number, handle)
        yield numbers
    except KeyboardInterrupt:  # from the second signal, or from another handler
        numbers.append(CTRL_C)
    finally:
        for timer in timers:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def finishing_after_warning(say: Callable[[str], None]) -> Iterator[None]:
    """Let SIGUSR1 not end the work in the ``with`` block, which follows the search and is short.

    The signal only says that the job ends soon. A handler of the user's program stays in place.
    """

    def note(number: int, _frame: FrameType | None) -> None:
        with suppress(RuntimeError):  # as above
            say("note: SIGUSR1 came after the search. gputune still saves the model")

    is_main = threading.current_thread() is threading.main_thread()
    if WARNED is None or not is_main or signal.getsignal(WARNED) != signal.SIG_DFL:
        yield
        return
    signal.signal(WARNED, note)
    try:
        yield
    finally:
        signal.signal(WARNED, signal.SIG_DFL)


_LOOK_SECONDS = 0.2
"""The time between two looks for requests of ``gputune stop``."""


@contextmanager
def ended_by_requests(
    requests: Callable[[], tuple[bool, set[int]]], stop: Stop, say: Callable[[str], None]
) -> Iterator[None]:
    """Let ``gputune stop`` in another process end the training in the ``with`` block early.

    Args:
        requests: returns whether the search must end, and the numbers of the trials that must end.
        stop: the signal that ends the training.
        say: shows a message to the user.
    """
    is_left = threading.Event()

    def watch() -> None:
        known = set[int]()
        while not is_left.wait(_LOOK_SECONDS):
            ends_search, trials = requests()
            if trials - known:
                known = trials
                stop.end_trials(trials)
            if ends_search:
                say("note: gputune stop ends the search after the running epoch")
                stop.reason = "gputune stop has ended the search"
                stop.ask()
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_left.set()
        thread.join()


def script_signals() -> Sequence[int]:
    """Return the signals that end the training of a call in Python.

    In a notebook or at a prompt, only Ctrl-C ends the training. SIGTERM must end a kernel as usual.
    """
    return (CTRL_C,) if is_interactive() else SIGNALS


def is_interactive() -> bool:
    """Return True if the code runs in a notebook, in IPython or at Python's prompt."""
    return hasattr(sys, "ps1")  # all three set this attribute


def _end_in_time() -> threading.Timer:
    """Start a timer that sends SIGTERM to the main thread again after the grace period."""
    main = threading.main_thread().ident
    assert main is not None
    send: Callable[[int], object]
    if hasattr(signal, "pthread_kill"):
        send = partial(signal.pthread_kill, main)
    else:  # Windows
        send = signal.raise_signal
    timer = threading.Timer(GRACE_SECONDS, send, (signal.SIGTERM,))
    timer.daemon = True
    timer.start()
    return timer


def interruption(study: "Study", file: object) -> str:
    """Return the message of an interrupted search, with its progress and the way to resume the
    search."""
    states = Counter(trial.state for trial in study.trials)
    n_done = len(study.trials) - states["waiting"] - states["stopped"]
    cut_short = f", {states['stopped']} cut short" if states["stopped"] else ""
    progress = f"interrupted: {n_done} of {len(study.trials)} trials are finished{cut_short}"
    if file is None:
        study_file = option("study", Verbatim("FILE"))
        return f"{progress}. No file holds the results. Pass {study_file} to resume a later search."
    call = per_interface("call", "command")
    return f"{progress}. The results are kept in {str(file)!r}: repeat the {call} to resume."
