"""Ctrl-C and SIGTERM while a search trains: the first lets the running epoch end, the second ends it at once."""

import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from gputune.engine.stopping import Stop
from gputune.study.study import Study

CTRL_C, TERMINATED = int(signal.SIGINT), int(signal.SIGTERM)

GRACE_SECONDS = 2.5
"""From SIGTERM to the end of training, finished or not: whoever sends it sends SIGKILL some seconds later."""

_USUAL: dict[int, Any] = {CTRL_C: signal.default_int_handler, TERMINATED: signal.SIG_DFL}


def run_until_told(
    run: Callable[[], None], stop: Stop, signals: Sequence[int], say: Callable[[str], None]
) -> int | None:
    """Run a training; return the number of the signal that ended it early, None where none came."""
    came: list[int] = []
    with _listening(stop, signals, say, came):
        try:
            run()
        except KeyboardInterrupt:  # the second signal, or one that another handler made of it
            came.append(CTRL_C)
    return came[0] if came else None


def is_interactive() -> bool:
    """Whether a person types the calls: in a notebook, in IPython, at Python's own prompt."""
    return hasattr(sys, "ps1")  # all three set it, "so that scripts can decide"


@contextmanager
def _listening(
    stop: Stop, signals: Sequence[int], say: Callable[[str], None], came: list[int]
) -> Iterator[None]:
    """Take the signals inside, where they would do what is usual; a program's own handler stays.

    Python lets the main thread alone set handlers; in another one nothing is changed.
    """
    timers: list[threading.Timer] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt
        stop.ask()
        if number == TERMINATED:
            timers.append(_end_in_time())
        with suppress(RuntimeError):  # the signal came while the stream was being written to
            say("stopping after the running epoch; what is finished is kept (once more: stop now)")

    mine = threading.current_thread() is threading.main_thread()
    taken = [number for number in signals if mine and signal.getsignal(number) == _USUAL[number]]
    try:
        for number in taken:
            signal.signal(number, handle)
        yield
    finally:
        for timer in timers:
            timer.cancel()
        for number in taken:
            signal.signal(number, _USUAL[number])


def _end_in_time() -> threading.Timer:
    """Send the main thread SIGTERM once more when the grace is over."""
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(GRACE_SECONDS, signal.pthread_kill, (main, signal.SIGTERM))
    timer.daemon = True
    timer.start()
    return timer


def interrupted_words(study: Study, file: Any) -> str:
    """Return what a search that was ended early says: how far it is, and how it goes on."""
    states = Counter(trial.state for trial in study.trials)
    done = len(study.trials) - states["waiting"] - states["stopped"]
    text = f"interrupted: {done} of {len(study.trials)} trials are finished"
    if states["stopped"]:
        text += f", {states['stopped']} cut short"
    if file is None:
        return f"{text}; they are in no file: with study=FILE a later call goes on."
    return f"{text}; all is kept in {str(file)!r}: repeat this to go on."
