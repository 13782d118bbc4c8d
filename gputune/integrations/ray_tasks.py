"""Train the trials of a search on a Ray cluster. Each chunk (trials that train together) is one Ray
task.

A task has one GPU or some CPUs. The data goes to Ray's object store once. This process trains
nothing itself. gputune imports Ray only for a search that uses a cluster.
"""

import functools
import os
import pickle
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from gputune.data.dataset import Dataset
from gputune.engine.backend import torch_threads
from gputune.engine.job import Failure, Job, Outcome, run_in_parts
from gputune.engine.plan import Plan, cores
from gputune.engine.stop import Stop
from gputune.executors.cluster import Cluster, Connection
from gputune.executors.executor import Ended, Executor, LostWorkerError, Outcomes
from gputune.executors.processes import pickle_job, to_arrays, to_device, to_tensors
from gputune.ground.errors import ClusterError, InputError, option, per_interface
from gputune.ground.text import count
from gputune.population.population import Population
from gputune.version import __version__

_COUNT_SECONDS = 5.0  # between two counts of the nodes
_WAIT_SECONDS = 0.25  # between two checks for a request to stop
_SUBMISSION_SECONDS = 0.5  # after its submission a task is not canceled: see RayTasks.stop
_CONNECTION_SECONDS = 10.0  # limit of a test connection; Ray itself waits for minutes
_RESUME = "Finished results are kept. " + per_interface(
    "If study= names a file, the same call continues from there.",
    "The same command continues from there.",
)
_TOKEN = (
    " A cluster that asks for a token (Ray 2.52 and newer can) lets this process in with "
    "RAY_AUTH_MODE=token in its environment and the token in RAY_AUTH_TOKEN, in the file of "
    "RAY_AUTH_TOKEN_PATH or in ~/.ray/auth_token."
)


@contextmanager
def connection(cluster: Cluster, cpus: int, device: str) -> Iterator["RayCluster"]:
    """Connect to the Ray cluster for the duration of a ``with`` block. See ``Ray.connect``."""
    ray = import_module("ray")
    is_ours = not ray.is_initialized()
    if cluster.is_elsewhere and not is_ours:
        raise InputError(
            f"Ray(address={cluster.address!r})",
            "names a cluster, but this process is connected to a Ray cluster already",
            remedy="Call ray.shutdown() first, or leave the address out to use that cluster.",
        )
    try:
        if is_ours:
            # Ray replaces this handler when it connects.
            before = signal.getsignal(signal.SIGTERM)
            try:
                _connect(ray, cluster)
            finally:
                if threading.current_thread() is threading.main_thread():
                    with suppress(TypeError):  # a handler that was not set from Python
                        signal.signal(signal.SIGTERM, before)
        yield RayCluster(cluster, ray, cpus, device)
    finally:
        if is_ours:
            ray.shutdown()


def _connect(ray: ModuleType, cluster: Any) -> None:
    """Connect this process to the Ray cluster at an address. Raises InputError if the cluster
    cannot be used."""
    address = cluster.address
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        # Ray reports usage statistics to its makers by default. Off in a cluster that we start.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", num_cpus=cores(), include_dashboard=False, **quiet)
        return
    hint = ""
    noted = address
    try:
        if address == "auto":  # the address that Ray has stored; its head node may be gone
            find = getattr(
                import_module("ray._private.services"), "canonicalize_bootstrap_address", None
            )
            # A version of Ray without this private function needs minutes to report a failure.
            noted = os.environ.get("RAY_ADDRESS", "") or (
                str(find(address, None)) if find else address
            )
        if (place := cluster.place(noted)) is not None:
            socket.create_connection(place, timeout=_CONNECTION_SECONDS).close()
        hint = _TOKEN  # a server answered, but Ray does not say when a token is missing
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(
            None,
            f"The Ray cluster at {address!r} cannot be used: {reason}",
            remedy="Start it with 'ray start --head', check the address and the versions of Ray "
            f"and Python, or use 'local'.{hint} Nothing was changed.",
        ) from error


def make_task(ray: ModuleType) -> Any:
    """Return the Ray remote function that trains one chunk (group of trials).

    The remote function is defined inside this function, so that Ray sends its code. The remote
    function therefore starts even on a node without gputune.
    """

    def chunk(
        foreign: str,
        expected: dict[str, str],
        common: Sequence[object],
        population: bytes,
        *limits: object,
    ) -> tuple[object, ...]:
        import importlib
        import socket
        import sys

        sys.path[:] = [folder for folder in sys.path if folder != foreign]
        versions = {}
        for name in expected:
            try:
                versions[name] = str(importlib.import_module(name).__version__).partition("+")[0]
            except ImportError:
                versions[name] = ""
        if versions != expected:
            return "other versions", socket.gethostname(), expected, versions
        run: Callable[..., Outcomes] = importlib.import_module(
            "gputune.integrations.ray_tasks"
        ).run_in_task
        return "done", run(common, population, *limits)

    return ray.remote(chunk)


def run_in_task(
    common: list[Any], population: bytes, left: float | None, threads: int, device: str
) -> Outcomes:
    """Train one chunk (group of trials) in a Ray worker.

    Args:
        common: Ray's references to the dataset and to the pickled job.
        population: The pickled chunk.
        left: The time that is left for the search, in seconds. None means no limit.
        threads: The number of threads to compute with.
        device: "cpu" or "cuda".
    """
    import ray

    begin = time.monotonic()
    job = replace(
        pickle.loads(ray.get(common[1])), stop=Stop(None if left is None else begin + left)
    )
    with torch_threads(threads):
        return run_in_parts(job, _dataset(common[0], device), pickle.loads(population))


@functools.lru_cache(maxsize=1)
def _dataset(reference: Any, device: str) -> Dataset:
    import ray

    with warnings.catch_warnings():
        # The arrays lie in Ray's shared memory, which is read-only. Nothing writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return to_device(to_tensors(ray.get(reference)), torch.device(device))


def free_bytes() -> int:
    """Return the number of free bytes of GPU memory, when called inside a Ray task."""
    return int(torch.cuda.mem_get_info()[0])


class RayCluster(Connection):
    """A Ray cluster to which this process is connected, with its nodes and stored datasets.

    The tasks of the cluster compute on ``device``. ``free`` is the number of free bytes on a GPU,
    or None on a CPU.
    """

    def __init__(self, cluster: Cluster, ray: ModuleType, cpus: int, device: str) -> None:
        self.cluster = cluster
        self.ray = ray
        self.threads = cpus
        gpus = sum(node.get("GPU", 0) for node in self._nodes())
        self.device = ("cuda" if gpus else "cpu") if device == "auto" else device
        self.tasks = self.count_tasks(cpus)
        self.task = make_task(ray)
        self._stored: tuple[Dataset, int, object] | None = None
        self.free: int | None = None
        if self.device == "cuda":
            self.free = int(
                ray.get(ray.remote(free_bytes).options(num_gpus=1, num_cpus=cpus).remote())
            )

    def count_tasks(self, cpus: int) -> int:
        """Return the number of tasks with ``cpus`` CPUs each that can run at the same time.

        Raises InputError if the cluster cannot run even one such task.
        """
        nodes = self._nodes()
        tasks = sum(_tasks_on(node, cpus, self.device) for node in nodes)
        if tasks == 0:
            sizes = []
            for node in nodes:
                sizes.append(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs")
            needs = count(cpus, "CPU")
            if self.device == "cuda":
                needs = f"{needs} and a GPU"
            raise InputError(
                None,
                f"With {option('workers', 'ray')} and {option('device', self.device)}, a task "
                f"needs {needs} on one node, but no node of the cluster has them (nodes: "
                f"{'; '.join(sizes) or 'none'})",
                remedy=f"Start nodes with these resources, or change {option('device')} or the "
                "cpus of gputune.Ray.",
            )
        return tasks

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def bytes_of_a_task(self) -> int:
        """Return the number of bytes of memory that one Ray task may use.

        On a GPU, the result is the GPU's free memory. On a CPU, the memory of each node is divided
        by its number of tasks, and the result is the smallest quotient.
        """
        if self.free is not None:
            return self.free
        shares = []
        for node in self._nodes():
            tasks = _tasks_on(node, self.threads, self.device)
            if tasks:
                shares.append(node.get("memory", 0) // tasks)
        return int(min(shares))

    def executor(self, job: Job, data: Dataset, plan: Plan) -> "RayTasks":
        """Return the executor that trains each chunk (group of trials) of a plan as a Ray task."""
        return RayTasks(self, job, data, plan)

    def put(self, data: Dataset) -> object:
        """Store a dataset in Ray's object store, only once, and return its Ray reference."""
        prepared = len(data.preparations)
        if self._stored is None or self._stored[0] is not data or self._stored[1] < prepared:
            self._stored = data, prepared, self.ray.put(to_arrays(data))
        return self._stored[2]


def _tasks_on(node: dict[str, float], cpus: int, device: str) -> int:
    """Return the number of tasks that can run on a node of a Ray cluster at the same time."""
    tasks = int(node.get("CPU", 0) // cpus)
    return min(tasks, int(node.get("GPU", 0))) if device == "cuda" else tasks


class RayTasks(Executor[Population, Outcome | Failure]):
    """The executor that trains each chunk (group of trials) of a search as a Ray task.

    The workers write no checkpoints. Raises InputError and ClusterError.
    """

    worker = "a Ray worker"

    def __init__(self, cluster: RayCluster, job: Job, data: Dataset, plan: Plan) -> None:
        self.ray = cluster.ray
        self.cluster = cluster
        self.stopping = job.stop
        self.cpus = max(cluster.threads, plan.threads)
        self.threads = plan.threads
        options = {
            "num_cpus": self.cpus,
            "num_gpus": int(cluster.device == "cuda"),
            "max_retries": 0,
        }
        self.task = cluster.task.options(name="gputune chunk", **options)
        sent = pickle_job(replace(job, stop=Stop(), checkpointing=None), same_machine=False)
        self.common = [cluster.put(data), self.ray.put(sent)]
        self.running: dict[object, tuple[Population, Ended[Population, Outcome | Failure]]] = {}
        self.has_given_up = False
        self.has_trained = False
        self.submitted = 0.0
        self.counted = time.monotonic()
        self.n_tasks = cluster.count_tasks(self.cpus)

    @property
    def capacity(self) -> int:
        """The number of Ray tasks that can run at the same time.

        The value is 0 if a chunk lost too many workers before any other chunk was trained.
        """
        return 0 if self.has_given_up and not self.has_trained else self.n_tasks

    def submit(self, chunk: Population, ended: Ended[Population, Outcome | Failure]) -> bool:
        """Start the training of a chunk (group of trials) as a Ray task."""
        # The task gets the remaining seconds, not a time of day: clocks of machines differ.
        deadline = self.stopping.deadline
        self.submitted = time.monotonic()
        left = None if deadline is None else deadline - self.submitted
        # Compared without the build suffix, such as +cpu: machines with and without a GPU have
        # different builds of the same torch.
        versions = ("gputune", __version__), ("torch", str(torch.__version__))
        expected = {name: version.partition("+")[0] for name, version in versions}
        # Ray adds the current folder to the import path of its workers. A checkout in that folder
        # would hide the installed package.
        foreign = "" if "" in sys.path or os.getcwd() in sys.path else os.getcwd()
        limits = left, self.threads, self.cluster.device
        self.running[
            self.task.remote(foreign, expected, self.common, pickle.dumps(chunk), *limits)
        ] = chunk, ended
        return True

    def wait(self) -> None:
        """Wait for a Ray task to end, but only for a short time, and collect its results."""
        # Tasks do not receive the request to stop. They are canceled, and a later call trains their
        # chunks again.
        if self.stopping.requested:
            self.stop()
            for chunk, ended in self.running.values():
                ended(chunk, [])
            self.running.clear()
            return
        refs, _ = self.ray.wait(list(self.running), num_returns=1, timeout=_WAIT_SECONDS)
        if time.monotonic() - self.counted > _COUNT_SECONDS:  # clusters grow and shrink
            self.counted = time.monotonic()
            try:
                self.n_tasks = self.cluster.count_tasks(self.cpus)
            except InputError as error:
                message = f"The cluster has lost its nodes. {error.message} {_RESUME}"
                raise ClusterError(message) from error
        for ref in refs:
            chunk, ended = self.running.pop(ref)
            ended(chunk, self._result(ref))

    def _result(self, ref: object) -> Outcomes | Exception:
        """Return the results of a Ray task, or a LostWorkerError if its worker was lost."""
        errors = self.ray.exceptions
        try:
            end, *content = self.ray.get(ref)
        except errors.RayTaskError as error:
            if isinstance(error.cause, ModuleNotFoundError):
                raise InputError(
                    None,
                    f"A Ray worker has no module {error.cause.name!r}, which your module or "
                    "scorer imports",
                    remedy="Install the module there, or move the imported code into the file of "
                    "your module or scorer. "
                    f"{_RESUME}",
                ) from error
            raise error.cause from error
        except errors.RayError as error:
            text = " ".join(str(error).split()) or type(error).__name__
            return LostWorkerError(text.partition(". ")[0].rstrip(".") + ".")  # its first sentence
        if end == "other versions":
            host, expected, versions = content
            name = next(name for name in expected if versions[name] != expected[name])
            version = f"{name} {versions[name]}" if versions[name] else f"no {name}"
            raise InputError(
                None,
                f"The Ray worker on {host} has {version}, but this process has {name} "
                f"{expected[name]}",
                remedy=f"Install {name}=={expected[name]} there. {_RESUME}",
            )
        self.has_trained = True
        outcomes: Outcomes = content[0]
        return outcomes

    def give_up(self, chunk: Population, losses: int, reason: str) -> Exception:
        """Return the error for a chunk (group of trials) that has lost ``losses`` Ray workers.

        A later call with the same study trains the trials of the chunk.
        """
        self.has_given_up = True
        return ClusterError(
            f"{count(len(chunk.index), 'trial')} that train together have lost {losses} workers "
            f"one after the other, the last because: {reason} Use a smaller {option('memory')}, "
            f"which makes chunks of fewer trials. {_RESUME}"
        )

    def stop(self) -> None:
        """Cancel all Ray tasks at once, also while they train.

        A bug of Ray 2.60 can end this process. The bug occurs if a task is canceled in the
        milliseconds between its submission and its arrival in Ray's queue. Ray then marks the task
        as failed, trains it nevertheless, and does not expect its answer. Therefore this function
        waits after a submission.
        """
        if self.running:
            time.sleep(max(0.0, self.submitted + _SUBMISSION_SECONDS - time.monotonic()))
        for ref in self.running:
            try:
                self.ray.cancel(ref, force=True)
            except Exception:  # the cluster itself may have failed
                return
