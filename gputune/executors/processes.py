"""Worker processes on this machine: how a job and its data come to one, how it starts, trains, ends and is lost.

Also those that call the objective of a user's own loop, with a GPU or some cores each.
"""

import functools
import math
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import cast

import cloudpickle
import joblib
import torch
from joblib.externals.loky.process_executor import BrokenProcessPool, ProcessPoolExecutor, TerminatedWorkerError

from gputune.data.dataset import Dataset
from gputune.engine.backend import torch_threads
from gputune.engine.job import Job, Outcome
from gputune.engine.memory import Failure, run_in_parts
from gputune.engine.plan import cores
from gputune.errors import InputError
from gputune.executors.executor import Chunk, Ended, Executor, LostWorkerError, Outcomes, Result
from gputune.executors.objective import Ending, Task, Trial, call_in_worker
from gputune.executors.pools import idle, one_worker, pickled_with_code, submit, training, why_lost
from gputune.executors.sharing import to_arrays, to_device, to_tensors
from gputune.population.population import Population
from gputune.scratch import scratch_folder
from gputune.text import count

Place = tuple[Mapping[str, str] | None, object]
"""Of a worker: its environment variables where it has some of its own, and what its work is given beside a chunk."""


def pickle_job(job: Job, *, here: bool = True) -> bytes:
    """Pickle a job for a worker. A class or function that it could not import (of a file, a test) goes as code.

    A worker on another machine (``here`` false) could import what is installed, and nothing else.
    """
    metrics = () if job.scoring is None else (job.scoring, *job.scoring.others)
    scorers = [function for metric in metrics for function in (metric.scorer, metric.of_outputs)]
    functions = () if job.objective is None else (job.objective.loss, job.objective.step, job.objective.augment)
    return pickled_with_code(job, (job.module_class, *scorers, *functions), here=here)


class Processes(Executor[Chunk, Result]):
    """Worker processes, each with environment variables and an argument for ``work`` of its own: its place.

    A worker starts up while this process goes on.
    """

    worker = "a worker process"

    def __init__(self, work: Callable[..., Sequence[Result]], places: Sequence[Place]) -> None:
        self.work = work
        # A start of its own, as it would let the signals through that are held off from a worker's.
        resource_tracker.ensure_running()
        self.places = {one_worker(place[0]): place for place in places}
        self.idle = list(self.places)
        self.busy: dict[Future[Sequence[Result]], ProcessPoolExecutor] = {}
        self.news = threading.Event()

    @property
    def capacity(self) -> int:
        """Chunks that the workers train at once."""
        return len(self.places)

    def submit(self, chunk: Chunk, ended: Ended[Chunk, Result]) -> bool:
        """Give a chunk to an idle worker; False where the interpreter ends, and starts no worker any more."""
        while True:
            pool = self.idle.pop()
            try:
                future = submit(pool, self.work, chunk, self.places[pool][1])
            except BrokenProcessPool:  # its worker was killed while it was idle
                self.idle.append(self._instead_of(pool))
            except RuntimeError:
                self.idle.append(pool)
                return False
            else:
                self.busy[future] = pool
                future.add_done_callback(partial(self._collect, chunk, ended))
                return True

    def _collect(self, chunk: Chunk, ended: Ended[Chunk, Result], future: "Future[Sequence[Result]]") -> None:
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
        """Return a new worker in the place of one that is lost."""
        pool = one_worker((place := self.places.pop(lost))[0])
        self.places[pool] = place
        return pool

    def wait(self) -> None:
        """Return when a worker has ended a chunk, or after a second."""
        self.news.wait(timeout=1.0)
        self.news.clear()

    def stop(self) -> None:
        """End the workers, whatever they are doing."""
        for pool in [*self.idle, *self.busy.values()]:
            pool.shutdown(wait=False, kill_workers=True)
        self.idle.clear()


class ChunkProcesses(Processes[Population, Outcome | Failure]):
    """Worker processes of one thread each, each for a device, beside this process, which trains too.

    The data is written once and mapped into every worker, so that it is held in memory once.
    """

    def __init__(self, job: Job, path: Path, devices: Sequence[torch.device]) -> None:
        super().__init__(partial(_run_in_worker, pickle_job(job), str(path)), [(None, d) for d in devices])

    def give_up(self, chunk: Population, losses: int, reason: str) -> Outcomes:
        """Return the trials of a chunk that has ended so many workers as those that cannot be trained."""
        n = len(chunk.index)
        smaller = "a smaller memory= makes chunks of fewer trials" if n > 1 else "a smaller one takes less"
        words = (
            f"its chunk of {count(n, 'trial')} has lost {losses} worker processes one after the other, the last "
            f"because {reason} Where memory has run out, fewer workers= leave more to each, and {smaller}."
        )
        return [Failure((place,), words) for place in chunk.index]


@contextmanager
def worker_processes(job: Job, data: Dataset, devices: Sequence[torch.device]) -> Iterator[ChunkProcesses]:
    """Have a worker for each device inside, with the data at hand; those idle at the end wait for the next search."""
    with scratch_folder() as folder:
        path = folder / "data.joblib"
        joblib.dump(to_arrays(to_device(data, torch.device("cpu")), here=True), path)
        with job.stop.heard_by_workers(folder / "stop"):
            processes = ChunkProcesses(job, path, devices)
            yield processes
            if job.is_over():
                processes.stop()  # idle workers, for whose end this process would wait when it ends
            else:
                idle.extend(processes.idle)


def _run_in_worker(packed: bytes, path: str, chunk: Population, device: torch.device) -> Outcomes:
    """Train one chunk on a device; nothing comes of it where it is over before it has begun."""
    with training:
        job = _unpack_job(packed)
        if job.is_over():
            return []
        try:
            # What has no device by name would open a context on the first GPU.
            gpu = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
            with torch_threads(1), gpu:
                return run_in_parts(job, _load(path, device), chunk)
        except Exception as error:
            try:
                pickle.loads(cloudpickle.dumps(error))
            except Exception:
                name = type(error).__qualname__
                raise RuntimeError(f"{name} (which cannot be pickled) in a worker process: {error}") from error
            raise


@functools.lru_cache(maxsize=1)
def _unpack_job(packed: bytes) -> Job:
    """Return a job: one object for all chunks of a search, so that steps that were recorded for one serve the next."""
    job: Job = pickle.loads(packed)
    return job


@functools.lru_cache(maxsize=1)
def _load(path: str, device: torch.device) -> Dataset:
    # copy-on-write: torch wants arrays that could be written, and nobody writes to them
    return to_device(to_tensors(joblib.load(path, mmap_mode="c")), device)


class TrialProcesses(Processes[Trial, Ending]):
    """Worker processes that call the objective of a user's own loop, a trial at a time each."""

    def __init__(self, task: Task, environments: Sequence[Mapping[str, str]], folder: Path) -> None:
        path = folder / "task.pkl"
        try:
            path.write_bytes(pickled_with_code(task, [task.objective]))
        except Exception as error:  # whatever pickling it raises
            raise InputError(
                f"objective cannot be sent to worker processes ({type(error).__name__}: {error}). Make what it uses "
                "inside of it, or choose workers=1, which calls it in this process."
            ) from error
        super().__init__(partial(call_in_worker, str(path)), [(each, None) for each in environments])

    def give_up(self, chunk: Trial, losses: int, reason: str) -> Sequence[Ending]:
        """Return a trial that has ended so many workers as a failed one."""
        words = f"it has lost {losses} worker processes, the last because {reason.removesuffix('.')}"
        return [Ending(chunk.number, "failed", math.nan, (), math.nan, words)]


def environments(workers: int | None, n_trials: int) -> list[dict[str, str]]:
    """Return the environment of each worker: one GPU each where there are some, else its part of the cores.

    ``workers`` None: one a GPU, or one a core. A GPU is chosen by CUDA_VISIBLE_DEVICES, so that "cuda" is it.
    """
    gpus = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = (gpus or list(map(str, range(there))))[:there]
    number = workers or max(1, min(len(gpus) or cores(), n_trials))
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores() // number))}
    devices = [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {} for i in range(number)]
    return [{**threads, **device} for device in devices]
