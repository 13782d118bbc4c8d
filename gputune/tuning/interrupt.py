"""Ctrl-C and SIGTERM while a search trains: the first lets the running epoch end, the second ends
it at once.

Before and after the training of a command either ends it, in words too.
"""

import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from gputune.engine.stop import Stop
from gputune.errors import Terminated

if TYPE_CHECKING:
    from gputune.study.study import Study  # a command that has just begun must not wait for numpy

CTRL_C = int(signal.SIGINT)
TERMINATED = int(signal.SIGTERM)

GRACE_SECONDS = 2.5
"""From SIGTERM to the end of training, finished or not: whoever sends it sends SIGKILL some seconds
later."""

Handler = Callable[[int, FrameType | None], object] | int | None

_USUAL: dict[int, Handler] = {CTRL_C: signal.default_int_handler, TERMINATED: signal.SIG_DFL}


def take_signals(handle: Callable[[int, FrameType | None], None]) -> None:
    """Let a function handle both signals in a process that runs one command; one that is ignored
    stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number, usual in _USUAL.items():
        if signal.getsignal(number) in (usual, end_command, end_process):
            signal.signal(number, handle)


def end_command(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, or Terminated; but end the process where a library is being
    imported.

    Some make another error of an interrupt there, and none of them holds anything yet that would be
    lost.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            end_process(number, frame)
        frame = frame.f_back
    raise Terminated if number == TERMINATED else KeyboardInterrupt


def end_process(number: int, _frame: FrameType | None) -> NoReturn:
    with suppress(OSError):
        os.write(2, b"gputune: interrupted.\n")
    os._exit(128 + number)


def run_until_signal(
    run: Callable[[], object], stop: Stop, signals: Sequence[int], say: Callable[[str], None]
) -> list[int]:
    """Run a training; return the numbers of the signals that ended it early, none where none
    came."""
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
            say("stopping after the running epoch; what is finished is kept (once more: stop now)")

    before: dict[int, Handler] = {}
    if threading.current_thread() is threading.main_thread():  # which alone may set handlers
        # A handler of the program's own stays.
        handlers = {number: signal.getsignal(number) for number in signals}
        before = {
            n: handler for n, handler in handlers.items() if handler in (_USUAL[n], end_command)
        }
    try:
        for number in before:
            signal.signal(number, handle)
        run()
    except KeyboardInterrupt:  # the second signal, or one that another handler made of it
        numbers.append(CTRL_C)
    finally:
        for timer in timers:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
    return numbers


def is_interactive() -> bool:
    """Whether a person types the calls: in a notebook, in IPython, at Python's own prompt."""
    return hasattr(sys, "ps1")  # all three set it, "so that scripts can decide"


def _end_in_time() -> threading.Timer:
    """Send the main thread SIGTERM once more when the grace is over."""
    main = threading.main_thread().ident
    assert main is not None
    send = (
        partial(signal.pthread_kill, main)
        if hasattr(signal, "pthread_kill")
        else signal.raise_signal
    )
    timer = threading.Timer(GRACE_SECONDS, send, (signal.SIGTERM,))
    timer.daemon = True
    timer.start()
    return timer


def interrupted_words(study: "Study", file: object) -> str:
    """Return what a search that was ended early says: how far it is, and how it goes on."""
    states = Counter(trial.state for trial in study.trials)
    done = len(study.trials) - states["waiting"] - states["stopped"]
    cut_short = f", {states['stopped']} cut short" if states["stopped"] else ""
    text = f"interrupted: {done} of {len(study.trials)} trials are finished{cut_short}"
    if file is None:
        return f"{text}; they are in no file: with study=FILE a later call goes on."
    return f"{text}; all is kept in {str(file)!r}: repeat the call to go on."
