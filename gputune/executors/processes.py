"""Worker processes on this machine: how a job and its data come to one, how it starts, trains, ends and is lost."""

import functools
import io
import os
import pickle
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from importlib.machinery import PathFinder
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, TypeVar, cast

import cloudpickle
import joblib
import torch
from joblib.externals.loky.process_executor import (
    BrokenProcessPool,
    ProcessPoolExecutor,
    TerminatedWorkerError,
)

from gputune.data.dataset import Dataset
from gputune.engine.backend import computing
from gputune.engine.job import Job
from gputune.engine.memory import GivenUp, run_in_parts
from gputune.executors.executor import Ended, Executor, LostWorkerError, Outcomes
from gputune.executors.sharing import moved, to_arrays, to_tensors
from gputune.population.population import Population
from gputune.scratch import scratch_folder
from gputune.text import count

Value = TypeVar("Value")


def packed(job: Job, *, here: bool = True) -> bytes:
    """Pickle a job for a worker. A class or function that it could not import (of a file, a test) goes as code.

    A worker on another machine (``here`` false) could import what is installed, and nothing else.
    """
    scorers = () if job.scoring is None else (job.scoring.scorer, job.scoring.of_outputs)
    functions = (
        () if job.objective is None else (job.objective.loss, job.objective.step, job.objective.augment)
    )
    return dumped(job, (job.module_class, *scorers, *functions), here=here)


def dumped(value: object, parts: Iterable[object], *, here: bool = True) -> bytes:
    """Pickle a value for a worker; ``parts`` are the classes and functions in it that may have to go as code."""
    known = _importable if here else _installed
    modules = {
        sys.modules.get(getattr(getattr(part, "func", part), "__module__", None) or "") for part in parts
    }
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


def _installed(name: str) -> bool:
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
        max_workers=1,
        timeout=IDLE_SECONDS,
        initializer=begin_worker,
        initargs=(os.getpid(),),
        env=environment,
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


def _that_flushes(stream: Any) -> object:
    try:
        stream.flush()
    except (AttributeError, OSError, ValueError):
        return io.StringIO()
    return stream


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
        return f"it ended itself with exit code {match[1]}, as os._exit in a module or scorer does."
    return "it ended without a word."


class Processes(Executor):
    """Worker processes of one thread each, each for a device, beside this process, which trains too.

    The data is written once and mapped into every worker, so that it is held in memory once. A worker starts up while
    this process is already training.
    """

    worker = "a worker process"

    def __init__(self, job: Job, path: Path, devices: Sequence[torch.device]) -> None:
        self.packed, self.path, self.workers = packed(job), str(path), len(devices)
        # A start of its own, as it would let the signals through that are held off from a worker's.
        resource_tracker.ensure_running()
        self.idle = [one_worker() for _ in devices]
        self.devices = dict(zip(self.idle, devices))
        self.busy: dict[Future[Outcomes], ProcessPoolExecutor] = {}
        self.news = threading.Event()

    @property
    def capacity(self) -> int:
        """Chunks that the workers train at once."""
        return self.workers

    def submit(self, chunk: Population, ended: Ended) -> bool:
        """Give a chunk to an idle worker; False where the interpreter ends, and starts no worker any more."""
        while True:
            pool = self.idle.pop()
            try:
                future = submit(pool, _run_in_worker, self.packed, self.path, chunk, self.devices[pool])
            except BrokenProcessPool:  # its worker was killed while it was idle
                self.idle.append(self._instead_of(pool))
            except RuntimeError:
                self.idle.append(pool)
                return False
            else:
                self.busy[future] = pool
                future.add_done_callback(partial(self._collect, chunk, ended))
                return True

    def _collect(self, chunk: Population, ended: Ended, future: "Future[Outcomes]") -> None:
        error = future.exception()
        # Idle before it is busy no more: whoever stops all workers meanwhile finds it.
        pool = self.busy[future]
        self.idle.append(self._instead_of(pool) if isinstance(error, BrokenProcessPool) else pool)
        del self.busy[future]
        if isinstance(error, TerminatedWorkerError):
            error = LostWorkerError(why_lost(error))
        try:
            ended(chunk, future.result() if error is None else cast(Exception, error))
        finally:
            self.news.set()

    def _instead_of(self, lost: ProcessPoolExecutor) -> ProcessPoolExecutor:
        """Return a new worker for the device of one that is lost."""
        pool = one_worker()
        self.devices[pool] = self.devices.pop(lost)
        return pool

    def wait(self) -> None:
        """Return when a worker has ended a chunk, or after a second."""
        self.news.wait(timeout=1.0)
        self.news.clear()

    def give_up(self, chunk: Population, losses: int, reason: str) -> Outcomes:
        """Return the trials of a chunk that has ended so many workers as those that cannot be trained."""
        n = len(chunk.index)
        smaller = "a smaller memory= makes chunks of fewer trials" if n > 1 else "a smaller one takes less"
        words = (
            f"its chunk of {count(n, 'trial')} has lost {losses} worker processes one after the other, the last "
            f"because {reason} Where memory has run out, fewer workers= leave more to each, and {smaller}."
        )
        return [GivenUp((place,), words) for place in chunk.index]

    def stop(self) -> None:
        """End the workers, whatever they are doing."""
        for pool in [*self.idle, *self.busy.values()]:
            pool.shutdown(wait=False, kill_workers=True)
        self.idle.clear()


@contextmanager
def worker_processes(job: Job, data: Dataset, devices: Sequence[torch.device]) -> Iterator[Processes]:
    """Have a worker for each device inside, with the data at hand; those idle at the end wait for the next search."""
    with scratch_folder() as folder:
        path = folder / "data.joblib"
        joblib.dump(to_arrays(moved(data, torch.device("cpu")), here=True), path)
        with job.stop.heard_by_workers(folder / "stop"):
            processes = Processes(job, path, devices)
            yield processes
            if job.is_over():
                processes.stop()  # idle workers, for whose end this process would wait when it ends
            else:
                idle.extend(processes.idle)


def _run_in_worker(packed: bytes, path: str, chunk: Population, device: torch.device) -> Outcomes:
    """Train one chunk on a device; nothing comes of it where it is over before it has begun."""
    with training:
        job = _unpacked(packed)
        if job.is_over():
            return []
        try:
            # What has no device by name would open a context on the first GPU.
            gpu = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
            with computing(1), gpu:
                return run_in_parts(job, _load(path, device), chunk)
        except Exception as error:
            if not _travels(error):
                name = type(error).__qualname__
                raise RuntimeError(
                    f"{name} (which cannot be pickled) in a worker process: {error}"
                ) from error
            raise


@functools.lru_cache(maxsize=1)
def _unpacked(packed: bytes) -> Job:
    """Return a job: one object for all chunks of a search, so that steps that were recorded for one serve the next."""
    job: Job = pickle.loads(packed)
    return job


def _travels(error: Exception) -> bool:
    """Whether an error can be pickled, and read again."""
    try:
        pickle.loads(cloudpickle.dumps(error))
    except Exception:
        return False
    return True


@functools.lru_cache(maxsize=1)
def _load(path: str, device: torch.device) -> Dataset:
    # copy-on-write: torch wants arrays that could be written, and nobody writes to them
    return moved(to_tensors(joblib.load(path, mmap_mode="c")), device)
