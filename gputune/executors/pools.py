"""Worker processes of one loky executor each: what is pickled for one, how it starts, is idle, and is lost.

A worker imports this file, and torch: nothing that a training loop of the user's own would wait for.
"""

import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TypeVar

import cloudpickle
from joblib.externals.loky.process_executor import BrokenProcessPool, ProcessPoolExecutor

Value = TypeVar("Value")


def pickled_with_code(value: object, parts: Iterable[object], *, here: bool = True) -> bytes:
    """Pickle a value for a worker; ``parts`` are the classes and functions in it that may have to go as code."""
    known = _importable if here else _is_installed
    modules = {sys.modules.get(getattr(getattr(part, "func", part), "__module__", None) or "") for part in parts}
    hidden = [m for m in modules if m is not None and m.__name__ != "__main__" and not known(m.__name__)]
    if not here:  # the whole package, which its files import from each other
        hidden = list({sys.modules.get(m.__name__.partition(".")[0], m) for m in hidden})
    for module in hidden:
        cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps(value))
    finally:
        for module in hidden:
            cloudpickle.unregister_pickle_by_value(module)


def _importable(name: str) -> bool:
    """Whether a fresh process with this one's ``sys.path`` would find the module."""
    path = None
    for end in (i for i, c in enumerate(f"{name}.") if c == "."):
        spec = PathFinder.find_spec(name[:end], path)
        if spec is None:
            return False
        path = spec.submodule_search_locations
    return True


def _is_installed(name: str) -> bool:
    """Whether a module belongs to Python, to gputune, or to a package that was installed."""
    top = name.partition(".")[0]
    if top == "gputune" or top in sys.stdlib_module_names or top in sys.builtin_module_names:
        return True
    parts = Path(getattr(sys.modules[name], "__file__", None) or "").parts
    return not {"site-packages", "dist-packages"}.isdisjoint(parts)


IDLE_SECONDS = 60  # before a worker that has nothing to do ends

idle: list[ProcessPoolExecutor] = []
"""Executors of one worker each, which the next search takes over. loky's own, of which there is one in a process, is
left to joblib: it resizes that, and expects one of its own making."""


_starting = threading.Lock()  # whoever starts a worker may change this process's streams for a moment


def one_worker(environment: Mapping[str, str] | None = None) -> ProcessPoolExecutor:
    """Return an executor of one worker: when it is lost, it alone is. With variables of its own it is a new one."""
    if environment is None:
        with suppress(IndexError):
            return idle.pop()
    return ProcessPoolExecutor(
        max_workers=1, timeout=IDLE_SECONDS, initializer=begin_worker, initargs=(os.getpid(),), env=environment
    )


def submit(executor: ProcessPoolExecutor, work: Callable[..., Value], *arguments: object) -> "Future[Value]":
    """Give a worker something to do; where it is not there any more, a new one is started."""
    with _starting, _signals_held_off(), _streams_that_flush():
        future: Future[Value] = executor.submit(work, *arguments)
        return future


@contextmanager
def _signals_held_off() -> Iterator[None]:
    """Let a worker that starts inside inherit that it hears neither Ctrl-C nor SIGTERM.

    Both may be sent to all processes of a terminal or a service. Workers are told by ``Stop``, and end by themselves
    where this process has died.
    """
    if sys.platform == "win32":  # which holds no signal off
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _streams_that_flush() -> Iterator[None]:
    """Stand in for a standard output or error that is missing, closed or full: loky flushes both as a worker starts."""
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    try:
        for name, stream in before.items():
            try:
                stream.flush()
            except (AttributeError, OSError, ValueError):
                setattr(sys, name, io.StringIO())
        yield
    finally:
        sys.stdout, sys.stderr = before.values()


training = threading.Lock()
"""Held while this worker trains. One that has lost its parent keeps the state of what it trains before it ends."""


def begin_worker(parent: int) -> None:
    """Let this worker end soon after its parent has, and find a standard error where it has inherited none."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        with training:
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if sys.stderr is None:  # loky's report of crashes wants one
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


_SIGNAL, _EXIT = re.compile(r"(SIG[A-Z]+)\(-\d+\)"), re.compile(r"EXIT\((\d+)\)")


def why_lost(error: BrokenProcessPool) -> str:
    """Return how a worker ended, in a sentence."""
    if match := _SIGNAL.search(str(error)):
        by_system = " (as the system does where memory has run out)" if match[1] == "SIGKILL" else ""
        return f"{match[1]} ended it{by_system}."
    if match := _EXIT.search(str(error)):
        return f"it ended itself with exit code {match[1]}, as os._exit does."
    return "it ended without a word."
