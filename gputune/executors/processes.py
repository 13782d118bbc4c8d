"""Worker processes on this machine: how a job and its data come to one, how it starts, trains, ends
and is lost.

A dataset travels as arrays for tensors, which processes map into their memory. An input whose
memory is a file's already, such as one of ``np.load(mmap_mode="r")``, is not copied: a process of
this machine maps that file again.
"""

import functools
import math
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, cast

import cloudpickle
import joblib
import numpy as np
import torch
from joblib.externals.loky.process_executor import (
    BrokenProcessPool,
    ProcessPoolExecutor,
    TerminatedWorkerError,
)
from torch import Tensor

from gputune.data.dataset import Dataset, Fold, Inputs
from gputune.data.scaling import Scaling
from gputune.engine.backend import torch_threads
from gputune.engine.job import Failure, Job, Outcome, run_in_parts
from gputune.engine.plan import cores
from gputune.errors import InputError
from gputune.executors.executor import Chunk, Ended, Executor, LostWorkerError, Outcomes, Result
from gputune.executors.worker import (
    Ending,
    Task,
    Trial,
    call_in_worker,
    idle,
    one_worker,
    pickled_with_code,
    submit,
    training,
    why_lost,
)
from gputune.population.population import Population
from gputune.scratch import naming_folder, scratch_folder
from gputune.text import count

_LARGE = 1 << 20  # bytes from which a tensor's file is looked for
_BFLOAT16 = np.dtype([("bits", "<i2")])  # NumPy has no such numbers

# the environment variables of a worker, and what its work is given
_Place = tuple[Mapping[str, str] | None, object]
_GiveUp = Callable[[Chunk, int, str], Sequence[Result]]


@dataclass(frozen=True)
class MappedFile:
    """Where the values of a tensor lie in a file: from the byte ``begin`` on, with ``strides`` in
    bytes."""

    path: str
    file: tuple[int, int]  # device and inode, by which the file is known again
    begin: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> np.ndarray:
        """Return the values, mapped. Raises InputError where the file is another one by now."""
        if _identity(self.path) != self.file:
            why = (
                f"the file {self.path!r}, which X is mapped from, was moved or replaced while it "
                "was being used"
            )
            raise InputError(f"{why}; leave it in its place until the search has ended.")
        # Copy-on-write: torch wants memory that could be written, and nobody writes to it.
        size = _extent(self.shape, self.strides, np.dtype(self.dtype).itemsize)
        memory = np.memmap(self.path, np.uint8, "c", self.begin, (size,))
        return np.ndarray(self.shape, self.dtype, memory, 0, self.strides)


def _map_tensors(value: object, change: Any) -> Any:
    """Return a dataset with ``change`` of every tensor, or of everything that stands for one."""
    if isinstance(value, Tensor | np.ndarray | MappedFile):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_map_tensors(item, change) for item in value)
    if isinstance(value, dict):  # of what is made when it is asked for, what is there
        return {key: _map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, Dataset | Fold | Inputs | Scaling):
        return replace(
            value, **{f.name: _map_tensors(getattr(value, f.name), change) for f in fields(value)}
        )
    return value


def to_arrays(data: Dataset, *, here: bool = False) -> Dataset:
    """Return a dataset on the CPU with arrays for tensors; ``here``, for those of a mapped file,
    where they lie."""

    def change(tensor: Tensor) -> np.ndarray | MappedFile:
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(_BFLOAT16)
        return (mapped_file(tensor) if here else None) or tensor.numpy()

    return cast(Dataset, _map_tensors(data, change))


def to_tensors(data: Dataset) -> Dataset:
    """Return the dataset of ``to_arrays``."""

    def change(value: np.ndarray | MappedFile) -> Tensor:
        array = value.array() if isinstance(value, MappedFile) else value
        if array.dtype == _BFLOAT16:
            return torch.from_numpy(array["bits"]).view(torch.bfloat16)
        return torch.from_numpy(array)

    return cast(Dataset, _map_tensors(data, change))


def to_device(data: Dataset, device: torch.device) -> Dataset:
    """Return a dataset with its tensors on a device, but for inputs that stay in main memory."""
    on_device = cast(Dataset, _map_tensors(data, lambda tensor: tensor.to(device)))
    return replace(on_device, inputs=data.inputs) if data.on_host else on_device


def mapped_file(tensor: Tensor) -> MappedFile | None:
    """Return where a tensor lies in a file that this process has mapped, None for one that may be
    written to too."""
    array = tensor.numpy()
    start = tensor.data_ptr()
    size = _extent(array.shape, array.strides, array.itemsize)
    try:  # Linux alone says so
        lines = Path("/proc/self/maps").read_text().splitlines() if size >= _LARGE else []
    except OSError:
        return None
    for line in lines:
        ends, access, offset, _, inode, *path = line.split(maxsplit=5)
        low, high = (int(end, 16) for end in ends.split("-"))
        if low <= start < high:
            private = access[1] == "w" and access[3] == "p"  # what was written is not in the file
            if (
                inode == "0"
                or not path
                or private
                or start + size > high
                or (file := _identity(path[0])) is None
            ):
                return None
            begin = start - low + int(offset, 16)
            return MappedFile(path[0], file, begin, array.dtype.str, array.shape, array.strides)
    return None


def _extent(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> int:
    """Return the bytes from the first value to the end of the last one."""
    return sum((n - 1) * step for n, step in zip(shape, strides)) + itemsize


def _identity(path: str) -> tuple[int, int] | None:
    """Return device and inode of a file, None where it is gone."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def pickle_job(job: Job, *, here: bool = True) -> bytes:
    """Pickle a job for a worker, with the code of what it could not import: elsewhere, all that is
    not installed."""
    metrics = () if job.scoring is None else (job.scoring, *job.scoring.others)
    scorers = [function for metric in metrics for function in (metric.scorer, metric.of_outputs)]
    functions = (
        ()
        if job.objective is None
        else (job.objective.loss, job.objective.step, job.objective.augment)
    )
    return pickled_with_code(job, (job.module_class, *scorers, *functions), here=here)


_NO_ROOM = "make room there, let TMPDIR name a folder of another disk, or choose workers=1"
_NO_SEMAPHORES = "let it be writable, or choose workers=1, which trains in this process"


class Processes(Executor[Chunk, Result]):
    """Worker processes, each with environment variables and an argument for ``work`` of its own:
    its place."""

    worker = "a worker process"

    def __init__(
        self,
        work: Callable[..., Sequence[Result]],
        places: Sequence[_Place],
        give_up: _GiveUp[Chunk, Result],
    ) -> None:
        self.work = work
        self._give_up = give_up
        # A start of its own, as it would let the signals through that are held off from a worker's.
        resource_tracker.ensure_running()
        shared_memory = Path("/dev/shm")  # where Linux keeps the semaphores of the queues
        with naming_folder(shared_memory, "worker processes cannot be started", _NO_SEMAPHORES):
            self.places = {one_worker(place[0]): place for place in places}
        self.idle = list(self.places)
        self.busy: dict[Future[Sequence[Result]], ProcessPoolExecutor] = {}
        self.news = threading.Event()

    @property
    def capacity(self) -> int:
        """Chunks that the workers train at once."""
        return len(self.places)

    def submit(self, chunk: Chunk, ended: Ended[Chunk, Result]) -> bool:
        """Give a chunk to an idle worker; False where the interpreter ends, and starts no worker
        any more."""
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

    def _collect(
        self, chunk: Chunk, ended: Ended[Chunk, Result], future: "Future[Sequence[Result]]"
    ) -> None:
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

    def give_up(self, chunk: Chunk, losses: int, reason: str) -> Sequence[Result]:
        """Return what becomes of a chunk that has lost so many workers."""
        return self._give_up(chunk, losses, reason)

    def stop(self) -> None:
        """End the workers, whatever they are doing."""
        for pool in [*self.idle, *self.busy.values()]:
            pool.shutdown(wait=False, kill_workers=True)
        self.idle.clear()


@contextmanager
def chunk_processes(
    job: Job, data: Dataset, devices: Sequence[torch.device]
) -> Iterator[Processes[Population, Outcome | Failure]]:
    """Have a worker of one thread for each device inside, beside this process; idle ones serve the
    next search."""
    with scratch_folder() as folder:
        path = folder / "data.joblib"
        with naming_folder(
            folder.parent, "the data for the worker processes cannot be written", _NO_ROOM
        ):
            joblib.dump(to_arrays(to_device(data, torch.device("cpu")), here=True), path)
        with job.stop.heard_by_workers(folder / "stop"):
            work = partial(_run_in_worker, pickle_job(job), str(path))
            processes = Processes[Population, Outcome | Failure](
                work, [(None, d) for d in devices], _failures
            )
            yield processes
            if job.is_over():
                processes.stop()  # idle workers, for whose end this process would wait when it ends
            else:
                idle.extend(processes.idle)


def _failures(chunk: Population, losses: int, reason: str) -> Outcomes:
    n = len(chunk.index)
    smaller = (
        "a smaller memory= makes chunks of fewer trials" if n > 1 else "a smaller one takes less"
    )
    why = (
        f"its chunk of {count(n, 'trial')} has lost {losses} worker processes one after the "
        "other, the last because"
    )
    words = (
        f"{why} {reason} Where memory has run out, fewer workers= leave more to each, and "
        f"{smaller}."
    )
    return [Failure((place,), words) for place in chunk.index]


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
                why = (
                    f"{type(error).__qualname__} (which cannot be pickled) in a worker process: "
                    f"{error}"
                )
                raise RuntimeError(why) from error
            raise


@functools.lru_cache(maxsize=1)
def _unpack_job(packed: bytes) -> Job:
    """Return a job: one object for all chunks of a search, so that steps that were recorded for one
    serve the next."""
    return cast(Job, pickle.loads(packed))


@functools.lru_cache(maxsize=1)
def _load(path: str, device: torch.device) -> Dataset:
    # Copy-on-write: torch wants arrays that could be written, and nobody writes to them.
    return to_device(to_tensors(joblib.load(path, mmap_mode="c")), device)


@contextmanager
def trial_processes(
    task: Task, workers: int | None, n_trials: int, folder: Path
) -> Iterator[Executor[Trial, Ending]]:
    """Have worker processes inside that call the objective of a user's own loop; none where this
    process is enough."""
    with task.stop.heard_by_workers(folder / "stop"):
        executor = Executor[Trial, Ending]()
        path = folder / "task.pkl"
        if len(places := environments(workers, n_trials)) > 1:
            try:
                pickled = pickled_with_code(task, [task.objective])
            except Exception as error:  # whatever pickling it raises
                why = (
                    f"objective cannot be sent to worker processes ({type(error).__name__}: "
                    f"{error})"
                )
                remedy = (
                    "Make what it uses inside of it, or choose workers=1, which calls it in this "
                    "process."
                )
                raise InputError(f"{why}. {remedy}") from error
            with naming_folder(
                folder.parent, "the objective for the worker processes cannot be written", _NO_ROOM
            ):
                path.write_bytes(pickled)
            executor = Processes(
                partial(call_in_worker, str(path)), [(each, None) for each in places], _failed_trial
            )
        try:
            yield executor
        finally:
            executor.stop()


def _failed_trial(trial: Trial, losses: int, reason: str) -> Sequence[Ending]:
    words = f"it has lost {losses} worker processes, the last because {reason.removesuffix('.')}"
    return [Ending(trial.number, "failed", math.nan, (), math.nan, words)]


def environments(workers: int | None, n_trials: int) -> list[dict[str, str]]:
    """Return the environment of each worker, None: of one a GPU or core. It has that GPU as "cuda",
    or some cores."""
    gpus = [
        name.strip()
        for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if name.strip()
    ]
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = (gpus or list(map(str, range(there))))[:there]
    number = workers or max(1, min(len(gpus) or cores(), n_trials))
    threads = (
        {}
        if "OMP_NUM_THREADS" in os.environ
        else {"OMP_NUM_THREADS": str(max(1, cores() // number))}
    )
    devices = [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {} for i in range(number)]
    return [{**threads, **device} for device in devices]
