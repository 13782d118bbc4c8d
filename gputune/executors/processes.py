"""Worker processes on this machine: how a job and its data come to one, how it starts, trains, ends and is lost.

Who calls the objective of a user's own loop: this process, or worker processes with a GPU or some cores each.
"""

import functools
import math
import os
import pickle
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import cast

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
from gputune.engine.plan import cores
from gputune.errors import InputError
from gputune.executors.executor import LOSSES, Ended, Executor, LostWorkerError, Outcomes
from gputune.executors.objective import Ending, Task, call_in_worker
from gputune.executors.pools import dumped, idle, one_worker, submit, training, why_lost
from gputune.executors.sharing import moved, to_arrays, to_tensors
from gputune.population.population import Population
from gputune.scratch import scratch_folder
from gputune.text import count
from gputune.types import Config


def packed(job: Job, *, here: bool = True) -> bytes:
    """Pickle a job for a worker. A class or function that it could not import (of a file, a test) goes as code.

    A worker on another machine (``here`` false) could import what is installed, and nothing else.
    """
    metrics = () if job.scoring is None else (job.scoring, *job.scoring.others)
    scorers = [function for metric in metrics for function in (metric.scorer, metric.of_outputs)]
    functions = (
        () if job.objective is None else (job.objective.loss, job.objective.step, job.objective.augment)
    )
    return dumped(job, (job.module_class, *scorers, *functions), here=here)


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


_LOOK = 0.5
"""Seconds between two looks at the clock while workers train."""

Claim = Callable[[int], bool]
Trials = Sequence[tuple[int, Config]]


class ThisProcess:
    """Calls the objective here, one trial after another."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def train(self, trials: Trials, claim: Claim) -> Iterator[tuple[int, Ending]]:
        """Yield what came of the trials that ``claim`` grants, by number, until time is over."""
        for number, params in trials:
            if self.task.stop.is_over():
                return
            if claim(number):
                yield number, self.task(number, params)

    def close(self) -> None:
        """There is nothing to end."""


class Workers:
    """Worker processes, each with environment variables of its own, that call the objective, a trial at a time each."""

    def __init__(self, task: Task, environments: Sequence[Mapping[str, str]], folder: Path) -> None:
        self.stop, self.path = task.stop, folder / "task.pkl"
        try:
            self.path.write_bytes(dumped(task, [task.objective]))
        except Exception as error:  # whatever pickling it raises
            raise InputError(
                f"objective cannot be sent to worker processes ({type(error).__name__}: {error}). Make what it uses "
                "inside of it, or choose workers=1, which calls it in this process."
            ) from error
        self.environments = {one_worker(environment): environment for environment in environments}
        self.free = list(self.environments)

    def train(self, trials: Trials, claim: Claim) -> Iterator[tuple[int, Ending]]:
        """Yield what came of the trials that ``claim`` grants, by number, until time is over."""
        waiting, losses = deque(trials), Counter[int]()
        running: dict[Future[Ending], tuple[ProcessPoolExecutor, int, Config]] = {}
        while True:
            while self.free and waiting and not self.stop.is_over():
                number, params = waiting.popleft()
                if losses[number] or claim(number):
                    pool = self.free.pop()
                    future = submit(pool, call_in_worker, str(self.path), number, params)
                    running[future] = pool, number, params
            if not running:
                return
            for future in wait(running, _LOOK, FIRST_COMPLETED).done:
                pool, number, params = running.pop(future)
                error = future.exception()
                self.free.append(self._instead_of(pool) if isinstance(error, BrokenProcessPool) else pool)
                if error is None:
                    yield number, future.result()
                    continue
                if not isinstance(error, BrokenProcessPool):
                    raise error
                losses[number] += 1
                if losses[number] < LOSSES:
                    waiting.appendleft((number, params))
                else:
                    why = why_lost(error).removesuffix(".")
                    reason = f"it has lost {LOSSES} worker processes, the last because {why}"
                    yield number, Ending("failed", math.nan, (), math.nan, reason)

    def _instead_of(self, lost: ProcessPoolExecutor) -> ProcessPoolExecutor:
        pool = one_worker(environment := self.environments.pop(lost))
        self.environments[pool] = environment
        return pool

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        for pool in self.environments:
            pool.shutdown(wait=False, kill_workers=True)


def environments(workers: int | None, n_trials: int) -> list[dict[str, str]]:
    """Return the environment of each worker: one GPU each where there are some, else its part of the cores.

    ``workers`` None: one a GPU, or one a core. A GPU is chosen by CUDA_VISIBLE_DEVICES, so that "cuda" is it.
    """
    gpus = _gpus()
    number = workers or max(1, min(len(gpus) or cores(), n_trials))
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores() // number))}
    devices = [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {} for i in range(number)]
    return [{**threads, **device} for device in devices]


def _gpus() -> list[str]:
    """Return the names of the GPUs that this process may use."""
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (names or list(map(str, range(number))))[:number]
