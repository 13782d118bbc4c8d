"""How gputune's work with torch is entered: out of the modes that a program has set, and waited for when it ends."""

import atexit
import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import ParamSpec, TypeVar

import torch

from gputune.engine.stop import ask_all

Given = ParamSpec("Given")
Value = TypeVar("Value")

_changed = threading.Condition()
_working: set[threading.Thread] = set()
_ending = False


def entry(function: Callable[Given, Value]) -> Callable[Given, Value]:
    """Let a function compute gradients within ``torch.inference_mode``, and make its tensors on the CPU by default.

    What it makes elsewhere has its device by name, whatever ``torch.set_default_device`` was told ("meta" holds no
    numbers at all). A process that ends while it runs in a daemon thread asks for its end and waits for that.
    """

    @functools.wraps(function)
    def entered(*args: Given.args, **more: Given.kwargs) -> Value:
        default = torch.get_default_device()
        # A mode costs something in every call of torch, so only where there is another one to be left.
        on_cpu = nullcontext() if default.type == "cpu" else torch.device("cpu")
        with waited_for(), torch.inference_mode(False), on_cpu:
            return function(*args, **more)

    return entered


@contextmanager
def waited_for() -> Iterator[None]:
    """Count a daemon thread as one that works inside; where the process ends meanwhile, it never comes out.

    A decorator too. Python ends such a thread at the next line that it would run, and torch's code then aborts.
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


def _end() -> None:
    global _ending
    with _changed:
        _ending = True
        ask_all()
        _changed.wait_for(lambda: not _working)


atexit.register(_end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_working.clear)  # a child has none of these threads
