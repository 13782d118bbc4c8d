"""A job and its data on their way to another process: code that it could not import, datasets as arrays.

Worker processes on this machine: how one is started, how it hears that its parent has ended, how it was lost.
"""

import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import fields
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, TypeVar

import cloudpickle
import numpy as np
import torch
from joblib.externals.loky.process_executor import ProcessPoolExecutor, TerminatedWorkerError

from gputune.data.dataset import Dataset, Fold
from gputune.engine.job import Job


def packed(job: Job, *, here: bool = True) -> bytes:
    """Pickle a job for a worker. A class or function that it could not import (of a file, a test) goes as code.

    A worker on another machine (``here`` false) could import what is installed, and nothing else.
    """
    known = _importable if here else _installed
    scorer = None if job.scoring is None else job.scoring.scorer
    modules = {
        sys.modules.get(getattr(value, "__module__", None) or "") for value in (job.module_class, scorer)
    }
    hidden = [m for m in modules if m is not None and m.__name__ != "__main__" and not known(m.__name__)]
    if not here:  # the whole package, which its files import from each other
        hidden = list({sys.modules.get(m.__name__.partition(".")[0], m) for m in hidden})
    for module in hidden:
        cloudpickle.register_pickle_by_value(module)
    try:
        packed: bytes = cloudpickle.dumps(job)
    finally:
        for module in hidden:
            cloudpickle.unregister_pickle_by_value(module)
    return packed


def _importable(name: str) -> bool:
    """Whether a fresh process with this one's ``sys.path`` would find the module."""
    path = None
    for end in (i for i, c in enumerate(f"{name}.") if c == "."):
        found = PathFinder.find_spec(name[:end], path)
        if found is None:
            return False
        path = found.submodule_search_locations
    return True


def _installed(name: str) -> bool:
    """Whether a module belongs to Python, to gputune, or to a package that was installed."""
    top = name.partition(".")[0]
    if top == "gputune" or top in sys.stdlib_module_names or top in sys.builtin_module_names:
        return True
    parts = Path(getattr(sys.modules[name], "__file__", None) or "").parts
    return not {"site-packages", "dist-packages"}.isdisjoint(parts)


def to_arrays(value: Any) -> Any:
    """Datasets and folds as dicts, tensors as arrays, so that joblib can map them."""
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, tuple):
        return tuple(to_arrays(item) for item in value)
    if isinstance(value, Dataset | Fold):
        content = {field.name: to_arrays(getattr(value, field.name)) for field in fields(value)}
        return type(value).__name__, content
    return value


def to_tensors(value: Any) -> Any:
    kinds = {kind.__name__: kind for kind in (Dataset, Fold)}
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    # Two folds are a tuple of two as well, of tuples.
    if isinstance(value, tuple) and isinstance(value[0], str) and value[0] in kinds:
        return kinds[value[0]](**{name: to_tensors(item) for name, item in value[1].items()})
    if isinstance(value, tuple):
        return tuple(to_tensors(item) for item in value)
    return value


Value = TypeVar("Value")

IDLE_SECONDS = 60  # before a worker that has nothing to do ends

idle: list[ProcessPoolExecutor] = []
"""Executors of one worker each, which the next search takes over. loky's own, of which there is one in a process, is
left to joblib: it resizes that, and expects one of its own making."""


_starting = threading.Lock()  # whoever starts a worker may change this process's streams for a moment


def one_worker() -> ProcessPoolExecutor:
    """Return an executor of one worker: when it is lost, it alone is."""
    try:
        return idle.pop()
    except IndexError:
        return ProcessPoolExecutor(
            max_workers=1, timeout=IDLE_SECONDS, initializer=_begin_worker, initargs=(os.getpid(),)
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
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _streams_that_flush() -> Iterator[None]:
    """Stand in for a standard output or error that is missing, closed or full: loky flushes both as a worker starts."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_that_flushes, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _that_flushes(stream: Any) -> Any:
    try:
        stream.flush()
    except (AttributeError, OSError, ValueError):
        return io.StringIO()
    return stream


training = threading.Lock()
"""Held while this worker trains. One that has lost its parent keeps the state of what it trains before it ends."""


def _begin_worker(parent: int) -> None:
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


def why_lost(error: TerminatedWorkerError) -> str:
    """Return how a worker ended, in a sentence."""
    if found := _SIGNAL.search(str(error)):
        by_system = " (as the system does where memory has run out)" if found[1] == "SIGKILL" else ""
        return f"{found[1]} ended it{by_system}."
    if found := _EXIT.search(str(error)):
        return f"it ended itself with exit code {found[1]}, as os._exit in a module or scorer does."
    return "it ended without a word."
