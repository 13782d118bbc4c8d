"""Worker processes on this machine train chunks (groups of trials) and single trials.

A dataset travels to a worker as arrays in a file. The worker maps the file into its memory. An
input that is already mapped from a file, for example by ``np.load(mmap_mode="r")``, is not copied.
The worker maps the original file again.
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
from joblib.externals.loky.backend import resource_tracker as loky_tracker
from joblib.externals.loky.process_executor import (
    BrokenProcessPool,
    ProcessPoolExecutor,
    TerminatedWorkerError,
)
from torch import Tensor

from gputune.data.arrays import Arrays
from gputune.data.dataset import Dataset, Fold, Inputs, ScorerRows
from gputune.data.scaling import Scaling
from gputune.engine.backend import torch_threads
from gputune.engine.job import Failure, Job, Outcome, run_in_parts
from gputune.engine.plan import cores
from gputune.executors.executor import (
    AnyUnit,
    Ended,
    Executor,
    LostWorkerError,
    Outcomes,
    UnitResult,
    WorkerProgress,
)
from gputune.executors.worker import (
    LoopTask,
    LoopTrial,
    TrialEnding,
    call_in_worker,
    idle,
    loss_reason,
    pickled_with_code,
    signals_held_off,
    single_worker,
    submit,
    training,
)
from gputune.ground.device import CPU
from gputune.ground.errors import InputError, option
from gputune.ground.files import naming_folder, scratch_folder
from gputune.ground.text import count
from gputune.ground.within_epoch import workers_read_by
from gputune.population.population import Population

_LARGE = 1 << 20  # bytes; only for a tensor of at least this size is a mapped file searched
_BFLOAT16 = np.dtype([("bits", "<i2")])  # stands for bfloat16, which NumPy lacks

# the environment variables of a worker, and the last argument of its work function
_WorkerSettings = tuple[Mapping[str, str] | None, object]
_GiveUp = Callable[[AnyUnit, int, str], Sequence[UnitResult]]


@dataclass(frozen=True)
class MappedFile:
    """The position of a tensor's values in a file, from which another process can map the tensor.

    The values begin at the byte ``begin``. The ``strides`` are in bytes.
    """

    path: str
    file: tuple[int, int]  # device and inode, which show whether the file was replaced
    begin: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> np.ndarray:
        """Return the tensor's values as a NumPy array that is mapped from the file.

        Raises InputError if the file was moved or replaced.
        """
        if _identity(self.path) != self.file:
            raise InputError(
                None,
                f"The file {self.path!r}, which {option('X')} is mapped from, was moved or "
                "replaced during the search",
                remedy="Leave the file in its place until the search has ended.",
            )
        # Mode "c" is copy-on-write: torch warns about memory that is read-only. Nothing writes to
        # it.
        size = _extent(self.shape, self.strides, np.dtype(self.dtype).itemsize)
        memory = np.memmap(self.path, np.uint8, "c", self.begin, (size,))
        return np.ndarray(self.shape, self.dtype, memory, 0, self.strides)


def _map_tensors(value: object, change: Any) -> Any:
    """Apply ``change`` to every tensor, array and ``MappedFile`` in a dataset, and return the new
    dataset."""
    if isinstance(value, Tensor | np.ndarray | MappedFile):
        return change(value)
    # A table keeps the type in which the user passed it.
    if isinstance(value, ScorerRows) and isinstance(value.X, Arrays):
        return replace(value, X=_map_tensors(value.X, change))
    if isinstance(value, Arrays):  # ``places`` stays an array
        return replace(value, parts=_map_tensors(value.parts, change))
    if isinstance(value, tuple):
        return tuple(_map_tensors(item, change) for item in value)
    if isinstance(value, dict):  # entries that are made on demand: only the existing ones
        return {key: _map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, Dataset | Fold | Inputs | Scaling):
        return replace(
            value, **{f.name: _map_tensors(getattr(value, f.name), change) for f in fields(value)}
        )
    return value


def to_arrays(data: Dataset, *, same_machine: bool = False) -> Dataset:
    """Convert the tensors of a dataset on the CPU to NumPy arrays, to send the dataset to another
    process.

    With ``same_machine=True``, each tensor that is mapped from a file becomes a ``MappedFile``,
    which only processes of this machine can read.
    """

    def change(tensor: Tensor) -> np.ndarray | MappedFile:
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(_BFLOAT16)
        return (mapped_file(tensor) if same_machine else None) or tensor.numpy()

    return cast(Dataset, _map_tensors(data, change))


def to_tensors(data: Dataset) -> Dataset:
    """Convert the arrays of a dataset, the result of ``to_arrays``, back to tensors."""

    def change(value: np.ndarray | MappedFile) -> Tensor:
        array = value.array() if isinstance(value, MappedFile) else value
        if array.dtype == _BFLOAT16:
            return torch.from_numpy(array["bits"]).view(torch.bfloat16)
        return torch.from_numpy(array)

    return cast(Dataset, _map_tensors(data, change))


def to_device(data: Dataset, device: torch.device) -> Dataset:
    """Copy the tensors of a dataset to a device, and return the new dataset.

    The inputs stay in main memory if the dataset keeps them there (``on_host``). The rows for a
    custom scorer are always in main memory.
    """
    on_device = cast(Dataset, _map_tensors(data, lambda tensor: tensor.to(device)))
    scorer_rows = _map_tensors(data.scorer_rows, lambda tensor: tensor.cpu())
    on_device = replace(on_device, scorer_rows=scorer_rows)
    return replace(on_device, inputs=data.inputs) if data.on_host else on_device


def mapped_file(tensor: Tensor) -> MappedFile | None:
    """Return the position of a tensor's values in a file that this process has mapped into memory.

    Returns None if the tensor is not mapped from a file, or if this process may have changed its
    private copy.
    """
    array = tensor.numpy()
    start = tensor.data_ptr()
    size = _extent(array.shape, array.strides, array.itemsize)
    try:  # only Linux has this list of mapped files
        lines = Path("/proc/self/maps").read_text().splitlines() if size >= _LARGE else []
    except OSError:
        return None
    for line in lines:
        ends, access, offset, _, inode, *path = line.split(maxsplit=5)
        low, high = (int(end, 16) for end in ends.split("-"))
        if low <= start < high:
            private = access[1] == "w" and access[3] == "p"  # changes would be missing in the file
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
    """Return the number of bytes between the start of a strided array's first value and the end of
    its last value."""
    return sum((n - 1) * step for n, step in zip(shape, strides)) + itemsize


def _identity(path: str) -> tuple[int, int] | None:
    """Return the device and inode numbers of a file, or None if the file no longer exists."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def pickle_job(job: Job, *, same_machine: bool = True) -> bytes:
    """Pickle the settings of a search for a worker, together with the code that the worker cannot
    import.

    With ``same_machine=True`` the worker runs on this machine and can import modules from
    ``sys.path``. Otherwise it can import only installed packages.
    """
    parts: list[object] = [job.module_class]
    if job.scoring is not None:
        for metric in (job.scoring, *job.scoring.others):
            parts += [metric.scorer, metric.of_outputs]
    if job.objective is not None:
        parts += [job.objective.loss, job.objective.step, job.objective.augment]
    return pickled_with_code(job, parts, same_machine=same_machine)


_NO_SPACE = "free some space there, set TMPDIR to a folder on another disk, or choose workers=1"
_NO_SEMAPHORES = "make it writable, or choose workers=1, which trains in this process"


class Processes(Executor[AnyUnit, UnitResult]):
    """An executor that trains chunks (groups of trials) in worker processes on this machine.

    Each worker has its own settings: its environment variables, and the last argument of its calls
    of ``work``.
    """

    worker = "a worker process"

    def __init__(
        self,
        work: Callable[..., Sequence[UnitResult]],
        settings: Sequence[_WorkerSettings],
        give_up: _GiveUp[AnyUnit, UnitResult],
        progress: WorkerProgress | None = None,
    ) -> None:
        self.work = work
        self.progress = progress
        self._give_up = give_up
        # The trackers start before the workers: they would unblock the signals that stay blocked
        # while a worker starts.
        with signals_held_off():  # SIGUSR1 to the process group would end both
            resource_tracker.ensure_running()
            loky_tracker.ensure_running()
        shared_memory = Path("/dev/shm")  # Linux keeps the semaphores of the queues here
        with naming_folder(shared_memory, "worker processes cannot be started", _NO_SEMAPHORES):
            self.settings = {single_worker(each[0]): each for each in settings}
        self.idle = list(self.settings)
        self.busy: dict[Future[Sequence[UnitResult]], ProcessPoolExecutor] = {}
        self.news = threading.Event()

    @property
    def capacity(self) -> int:
        """The number of chunks (groups of trials) that the worker processes can train at the same
        time."""
        return len(self.settings)

    def submit(self, chunk: AnyUnit, ended: Ended[AnyUnit, UnitResult]) -> bool:
        """Start the training of a chunk (group of trials) in an idle worker process.

        Returns False if the interpreter is ending and can start no worker any more.
        """
        while True:
            pool = self.idle.pop()
            try:
                future = submit(pool, self.work, chunk, self.settings[pool][1])
            except BrokenProcessPool:  # its worker was killed while it was idle
                self.idle.append(self._replace_worker(pool))
            except RuntimeError:
                self.idle.append(pool)
                return False
            else:
                self.busy[future] = pool
                future.add_done_callback(partial(self._collect, chunk, ended))
                return True

    def _collect(
        self,
        chunk: AnyUnit,
        ended: Ended[AnyUnit, UnitResult],
        future: "Future[Sequence[UnitResult]]",
    ) -> None:
        """Deliver the results of a chunk (group of trials), and mark its worker as idle. Replaces a
        lost worker."""
        error = future.exception()
        # The order matters: a worker is always idle or busy, so that stop() in another thread finds
        # it.
        pool = self.busy[future]
        self.idle.append(
            self._replace_worker(pool) if isinstance(error, BrokenProcessPool) else pool
        )
        del self.busy[future]
        if isinstance(error, TerminatedWorkerError):
            error = LostWorkerError(loss_reason(error))
        try:
            ended(chunk, future.result() if error is None else cast(Exception, error))
        finally:
            self.news.set()

    def _replace_worker(self, lost: ProcessPoolExecutor) -> ProcessPoolExecutor:
        """Return a new worker process with the settings of a lost worker."""
        settings = self.settings.pop(lost)
        pool = single_worker(settings[0])
        self.settings[pool] = settings
        return pool

    def wait(self) -> None:
        """Block until a worker has ended a chunk (group of trials), for at most one second."""
        self.news.wait(timeout=1.0)
        self.news.clear()

    def count(self, index: Sequence[int]) -> None:
        """Forget the progress that workers have reported for some trials."""
        if self.progress is not None:
            self.progress.count(index)

    def give_up(self, chunk: AnyUnit, losses: int, reason: str) -> Sequence[UnitResult]:
        """Return the failed results of a chunk (group of trials) that has lost ``losses``
        workers."""
        return self._give_up(chunk, losses, reason)

    def stop(self) -> None:
        """End all worker processes at once, also while they train."""
        for pool in [*self.idle, *self.busy.values()]:
            pool.shutdown(wait=False, kill_workers=True)
        self.idle.clear()


@contextmanager
def chunk_processes(
    job: Job, data: Dataset, devices: Sequence[torch.device], n_trials: int
) -> Iterator[Processes[Population, Outcome | Failure]]:
    """Provide one single-threaded worker process for each device, in addition to this process.

    ``n_trials`` is larger than every position of a trial in the search. Afterwards the idle workers
    stay available for the next search.
    """
    with scratch_folder() as folder:
        path = folder / "data.joblib"
        with naming_folder(
            folder.parent, "the data for the worker processes cannot be written", _NO_SPACE
        ):
            joblib.dump(to_arrays(to_device(data, CPU), same_machine=True), path)
            progress = WorkerProgress.create(folder / "progress", n_trials)
        with (
            job.stop.shared_with_workers(folder / "stop"),
            workers_read_by(progress.running),
        ):
            work = partial(_run_in_worker, pickle_job(job), str(path), folder / "progress")
            processes = Processes[Population, Outcome | Failure](
                work, [(None, d) for d in devices], _failures, progress
            )
            yield processes
            if job.is_over():
                processes.stop()  # this process would wait for the idle workers when it ends
            else:
                idle.extend(processes.idle)


def _failures(chunk: Population, losses: int, reason: str) -> Outcomes:
    """Return the failed results of a chunk (group of trials) that has lost too many worker
    processes."""
    n = len(chunk.index)
    message = (
        f"its chunk of {count(n, 'trial')} has lost {losses} worker processes one after the "
        f"other, the last because {reason} If memory has run out, use fewer workers, which leaves "
        "more memory to each"
    )
    if n > 1:
        message += ", or a smaller memory limit, which makes chunks of fewer trials"
    else:
        message += ", or a smaller model, which takes less memory"
    return [Failure((number,), f"{message}.") for number in chunk.index]


def _run_in_worker(
    packed: bytes, path: str, progress: Path, chunk: Population, device: torch.device
) -> Outcomes:
    """Train one chunk (group of trials) on a device, in a worker process, and write its progress to
    the file ``progress``.

    Returns an empty result if the search ends before the chunk begins.
    """
    with training:
        job = _unpack_job(packed)
        if job.is_over():
            return []
        try:
            # Without this, CUDA calls that name no device would open a context on the first GPU.
            gpu = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
            written = WorkerProgress.open(progress).written(chunk.index)
            with torch_threads(1), gpu, written as after_epoch:
                return run_in_parts(job, _load(path, device), chunk, after_epoch)
        except Exception as error:
            try:
                pickle.loads(cloudpickle.dumps(error))
            except Exception:
                name = type(error).__qualname__
                raise RuntimeError(
                    f"{name} (which cannot be pickled) in a worker process: {error}"
                ) from error
            raise


@functools.lru_cache(maxsize=1)
def _unpack_job(packed: bytes) -> Job:
    """Unpickle the settings of a search (the job) in a worker process.

    All chunks (groups of trials) of a search share one job object. Training steps that gputune has
    recorded for one chunk can therefore be replayed for the next chunk.
    """
    return cast(Job, pickle.loads(packed))


@functools.lru_cache(maxsize=1)
def _load(path: str, device: torch.device) -> Dataset:
    # Mode "c" is copy-on-write: torch warns about arrays that are read-only. Nothing writes to
    # them.
    return to_device(to_tensors(joblib.load(path, mmap_mode="c")), device)


@contextmanager
def trial_processes(
    task: LoopTask, workers: int | None, n_trials: int, folder: Path
) -> Iterator[Executor[LoopTrial, TrialEnding]]:
    """Provide worker processes that call the objective of a custom training loop.

    If one process is enough, the context manager starts no workers.
    """
    with task.stop.shared_with_workers(folder / "stop"):
        executor = Executor[LoopTrial, TrialEnding]()
        path = folder / "task.pkl"
        worker_environments = environments(workers, n_trials)
        if len(worker_environments) > 1:
            try:
                pickled = pickled_with_code(task, [task.objective])
            except Exception as error:  # pickling user code may raise any error
                in_this_process = option("workers", 1)
                raise InputError(
                    "objective",
                    f"cannot be sent to worker processes ({type(error).__name__}: {error})",
                    remedy="Create the objects that the objective uses inside its function, or "
                    f"choose {in_this_process}, which calls the objective in this process.",
                ) from error
            with naming_folder(
                folder.parent, "the objective for the worker processes cannot be written", _NO_SPACE
            ):
                path.write_bytes(pickled)
            settings = [(environment, None) for environment in worker_environments]
            executor = Processes(partial(call_in_worker, str(path)), settings, _failed_trial)
        try:
            yield executor
        finally:
            executor.stop()


def _failed_trial(trial: LoopTrial, losses: int, reason: str) -> Sequence[TrialEnding]:
    """Return the failed result of a trial that has lost too many workers."""
    message = f"it has lost {losses} worker processes, the last because {reason.removesuffix('.')}"
    return [TrialEnding(trial.number, "failed", math.nan, (), math.nan, message)]


def environments(workers: int | None, n_trials: int) -> list[dict[str, str]]:
    """Return the environment variables of each worker process: its GPU and its number of threads.

    Args:
        workers: The number of workers. None means one for each GPU, without GPUs one for each core,
            but at most one for each trial.
        n_trials: The number of trials.

    Returns:
        One dict for each worker. The worker sees its GPU as "cuda". Its number of threads is its
        share of the cores, unless OMP_NUM_THREADS is already set.
    """
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible = map(str.strip, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","))
    gpus = (list(filter(None, visible)) or list(map(str, range(n_gpus))))[:n_gpus]
    number = workers or max(1, min(len(gpus) or cores(), n_trials))
    threads = {}
    if "OMP_NUM_THREADS" not in os.environ:
        threads["OMP_NUM_THREADS"] = str(max(1, cores() // number))
    devices = [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {} for i in range(number)]
    return [{**threads, **device} for device in devices]
