"""Which Ray cluster, the connection to it, and whole chunks of a plan as its tasks, with a GPU or
some CPUs each.

The data goes to Ray's object store once. This process trains nothing itself. Ray is imported where
it is asked for.
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
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from gputune.data.dataset import Dataset
from gputune.engine.backend import torch_threads
from gputune.engine.job import Failure, Job, Outcome, run_in_parts
from gputune.engine.plan import Plan, cores
from gputune.engine.stop import Stop
from gputune.errors import ClusterError, InputError, MissingExtraError, check_count
from gputune.executors.executor import Ended, Executor, LostWorkerError, Outcomes
from gputune.executors.processes import pickle_job, to_arrays, to_device, to_tensors
from gputune.population.population import Population
from gputune.version import __version__

_COUNT_SECONDS = 5.0  # between two looks at the nodes
_WAIT_SECONDS = 0.25  # between two looks at whether someone asks for the end
_SUBMISSION_SECONDS = 0.5  # in which a task that is handed out is not ended: see RayTasks.stop
_KNOCK_SECONDS = 10.0  # to answer a knock; Ray itself waits for minutes
_GO_ON = (
    "What was finished is kept, and the same call goes on from there where study= names a file."
)
_TOKEN = (
    " A cluster that asks for a token (Ray 2.52 and newer can) lets this process in with "
    "RAY_AUTH_MODE=token in its environment and the token in RAY_AUTH_TOKEN, in the file of "
    "RAY_AUTH_TOKEN_PATH or in ~/.ray/auth_token."
)


@dataclass(frozen=True)
class Ray:
    """Where the chunks of a search train: ``tune(..., workers=gputune.Ray("auto"))``;
    ``workers="ray"`` is ``Ray()``.

    address  "local": a cluster of this machine's cores and GPUs, started for the search and ended
             with it; "auto": the cluster that this machine belongs to; "HOST:PORT" or
             "ray://HOST:PORT" of another. A connection that the process already has (``ray.init``)
             is used by "local" and "auto".
    cpus     CPUs that a task reserves on its node, and threads that it computes with

    Raises InputError for anything else.
    """

    address: str = "local"
    cpus: int = 1

    def __post_init__(self) -> None:
        check_count(self.cpus, "Ray(cpus=...)")
        if self.is_elsewhere and _host_and_port(self.address) is None:
            words = "'local', 'auto', 'HOST:PORT' or 'ray://HOST:PORT'"
            raise InputError(f"Ray(address=...), --ray: must be {words}, got {self.address!r}.")

    @property
    def is_elsewhere(self) -> bool:
        """Whether the address itself says which cluster, and not this machine."""
        return self.address not in ("local", "auto")


def check_ray(device: str) -> None:
    """Raise MissingExtraError where Ray is missing, InputError for a device that its tasks cannot
    have."""
    if find_spec("ray") is None:
        raise MissingExtraError(
            'workers="ray" needs Ray, which is missing: pip install "gputune[ray]".'
        )
    if device not in ("auto", "cpu", "cuda"):
        words = "'auto', 'cpu' or 'cuda' (each task has one GPU, whichever it is)"
        raise InputError(f"device with workers='ray' must be {words}, got {device!r}.")


@contextmanager
def ray_cluster(workers: Ray, *, device: str) -> Iterator["RayCluster"]:
    """Connect to the cluster for what happens inside; a connection that was there before stays.
    Raises InputError."""
    ray = import_module("ray")
    is_ours = not ray.is_initialized()
    if workers.is_elsewhere and not is_ours:
        remedy = "call ray.shutdown() first, or leave the address out to use that one"
        why = "this process is connected to a Ray cluster already"
        raise InputError(f"Ray(address={workers.address!r}): {why}; {remedy}.")
    try:
        if is_ours:
            before = signal.getsignal(signal.SIGTERM)  # which Ray changes when it connects
            try:
                _connect(ray, workers.address)
            finally:
                if threading.current_thread() is threading.main_thread():
                    with suppress(TypeError):  # a handler that was not set from Python
                        signal.signal(signal.SIGTERM, before)
        yield RayCluster(ray, device=device, cpus=workers.cpus)
    finally:
        if is_ours:
            ray.shutdown()


def _connect(ray: ModuleType, address: str) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        # Ray would report usage to its makers; a cluster that is ours stays with us.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", num_cpus=cores(), include_dashboard=False, **quiet)
        return
    hint = ""
    noted = address
    try:
        if address == "auto":  # the address that Ray has noted, whose head may be long gone
            find = getattr(
                import_module("ray._private.services"), "canonicalize_bootstrap_address", None
            )
            # Where Ray has this function no longer it finds out by itself, in minutes.
            noted = os.environ.get("RAY_ADDRESS", "") or (
                str(find(address, None)) if find else address
            )
        if (place := _host_and_port(noted)) is not None:
            socket.create_connection(place, timeout=_KNOCK_SECONDS).close()
        hint = _TOKEN  # someone is there; Ray does not say when it was the token that was missing
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        why = (
            f"the Ray cluster at {address!r} cannot be used: "
            f"{' '.join(str(error).split()).rstrip('.')}"
        )
        checks = "check the address and the versions of Ray and Python, or use 'local'"
        remedy = f"Start it with 'ray start --head', {checks}.{hint}"
        raise InputError(f"{why}. {remedy} Nothing was changed.") from error


def _host_and_port(address: str) -> tuple[str, int] | None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    return (host, int(port)) if host and port.isdecimal() and "/" not in host else None


def make_task(ray: ModuleType) -> Any:
    """Return the remote function. Being defined in here it travels as code, and arrives where
    gputune is missing."""

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
            "gputune.executors.ray_cluster"
        ).run_in_task
        return "done", run(common, population, *limits)

    return ray.remote(chunk)


def run_in_task(
    common: list[Any], population: bytes, left: float | None, threads: int, device: str
) -> Outcomes:
    """Train one chunk in a worker: ``common`` refers to the data and the packed job, ``left`` are
    seconds of time."""
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
        # The arrays lie in shared memory that cannot be written to; nobody writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return to_device(to_tensors(ray.get(reference)), torch.device(device))


def free_bytes() -> int:
    """Return the bytes that are free on the GPU of a task."""
    return int(torch.cuda.mem_get_info()[0])


class RayCluster:
    """A cluster to which this process is connected; ``device`` is where its tasks compute, ``free``
    bytes of a GPU."""

    def __init__(self, ray: ModuleType, *, device: str, cpus: int) -> None:
        self.ray = ray
        self.threads = cpus
        gpus = sum(node.get("GPU", 0) for node in self._nodes())
        self.device = ("cuda" if gpus else "cpu") if device == "auto" else device
        self.tasks = self.room(cpus)
        self.task = make_task(ray)
        self._stored: tuple[Dataset, int, object] | None = None
        self.free: int | None = None
        if self.device == "cuda":
            self.free = int(
                ray.get(ray.remote(free_bytes).options(num_gpus=1, num_cpus=cpus).remote())
            )

    def room(self, cpus: int) -> int:
        """Return how many tasks of so many CPUs run at once. Raises InputError where none does."""
        nodes = self._nodes()
        tasks = sum(_tasks_on(node, cpus, self.device) for node in nodes)
        if tasks == 0:
            sizes = [
                f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes
            ]
            need = f"{cpus} CPU{'s' * (cpus > 1)}" + " and a GPU" * (self.device == "cuda")
            why = f"a task needs {need} on one node, and no node of the cluster has them"
            remedy = "Start nodes that do, or change device= or the cpus of gputune.Ray."
            place = f"device={self.device!r} with workers='ray'"
            raise InputError(f"{place}: {why} (nodes: {'; '.join(sizes) or 'none'}). {remedy}")
        return tasks

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def bytes_of_a_task(self) -> int:
        """Return the bytes that one task may take: of the GPU, or of the main memory of the
        smallest node."""
        if self.free is not None:
            return self.free
        of_nodes = [
            (node.get("memory", 0), _tasks_on(node, self.threads, self.device))
            for node in self._nodes()
        ]
        return int(min(memory // tasks for memory, tasks in of_nodes if tasks))

    def put(self, data: Dataset) -> object:
        """Return the reference to a dataset in Ray's store, where it lies once."""
        prepared = len(data.preparations)
        if self._stored is None or self._stored[0] is not data or self._stored[1] < prepared:
            self._stored = data, prepared, self.ray.put(to_arrays(data))
        return self._stored[2]


def _tasks_on(node: dict[str, float], cpus: int, device: str) -> int:
    tasks = int(node.get("CPU", 0) // cpus)
    return min(tasks, int(node.get("GPU", 0))) if device == "cuda" else tasks


class RayTasks(Executor[Population, Outcome | Failure]):
    """The chunks of one plan on their way. Their workers write no checkpoints. Raises InputError
    and ClusterError."""

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
        sent = pickle_job(replace(job, stop=Stop(), checkpointing=None), here=False)
        self.common = [cluster.put(data), self.ray.put(sent)]
        self.running: dict[object, tuple[Population, Ended[Population, Outcome | Failure]]] = {}
        self.has_given_up = self.has_trained = False
        self.submitted = 0.0
        self.counted = time.monotonic()
        self.room = cluster.room(self.cpus)

    @property
    def capacity(self) -> int:
        """Tasks that run at once; none where a chunk was given up before any was trained."""
        return 0 if self.has_given_up and not self.has_trained else self.room

    def submit(self, chunk: Population, ended: Ended[Population, Outcome | Failure]) -> bool:
        """Send a chunk on its way."""
        # Clocks of machines differ; what is left of the time does not.
        deadline = self.stopping.deadline
        self.submitted = time.monotonic()
        left = None if deadline is None else deadline - self.submitted
        # Without what a build adds: machines with and without a GPU have the same torch in two
        # builds.
        versions = ("gputune", __version__), ("torch", str(torch.__version__))
        expected = {name: version.partition("+")[0] for name, version in versions}
        # Ray adds the current folder to what workers search: a checkout there would hide the
        # package that is installed.
        foreign = "" if "" in sys.path or os.getcwd() in sys.path else os.getcwd()
        limits = left, self.threads, self.cluster.device
        self.running[
            self.task.remote(foreign, expected, self.common, pickle.dumps(chunk), *limits)
        ] = chunk, ended
        return True

    def wait(self) -> None:
        """Take in what has come back, if anything does in a moment."""
        # which tasks do not hear: they are ended, and a later call trains their chunks again
        if self.stopping.asked:
            self.stop()
            for chunk, ended in self.running.values():
                ended(chunk, [])
            self.running.clear()
            return
        refs, _ = self.ray.wait(list(self.running), num_returns=1, timeout=_WAIT_SECONDS)
        if time.monotonic() - self.counted > _COUNT_SECONDS:  # a cluster grows and shrinks
            self.counted = time.monotonic()
            try:
                self.room = self.cluster.room(self.cpus)
            except InputError as error:
                raise ClusterError(f"the cluster has lost its nodes: {error} {_GO_ON}") from error
        for ref in refs:
            chunk, ended = self.running.pop(ref)
            ended(chunk, self._result(ref))

    def _result(self, ref: object) -> Outcomes | Exception:
        """Return what a task gave, or its error."""
        errors = self.ray.exceptions
        try:
            end, *content = self.ray.get(ref)
        except errors.RayTaskError as error:
            if isinstance(error.cause, ModuleNotFoundError):
                why = (
                    f"a Ray worker has no module {error.cause.name!r}, which your module or "
                    "scorer imports"
                )
                remedy = "install it there, or put what they need into their own file"
                raise InputError(f"{why}: {remedy}. {_GO_ON}") from error
            raise error.cause from error
        except errors.RayError as error:
            text = " ".join(str(error).split()) or type(error).__name__
            return LostWorkerError(text.partition(". ")[0].rstrip(".") + ".")  # its first sentence
        if end == "other versions":
            host, expected, there = content
            name = next(name for name in expected if there[name] != expected[name])
            version = f"{name} {there[name]}" if there[name] else f"no {name}"
            here = expected[name]
            why = f"the Ray worker on {host} has {version}, and this process {name} {here}"
            raise InputError(f"{why}: install {name}=={here} there. {_GO_ON}")
        self.has_trained = True
        outcomes: Outcomes = content[0]
        return outcomes

    def give_up(self, chunk: Population, losses: int, reason: str) -> Exception:
        """Return the error of a chunk that has lost so many workers; its trials wait for a later
        call."""
        self.has_given_up = True
        why = f"have lost {losses} workers one after the other, the last because: {reason}"
        remedy = "A smaller memory= makes chunks of fewer trials."
        return ClusterError(
            f"{len(chunk.index)} trials that train together {why} {remedy} {_GO_ON}"
        )

    def stop(self) -> None:
        """End the tasks, whatever they are doing.

        Ray 2.60 takes down this process where a task is cancelled in the milliseconds between its
        submission and its arrival in Ray's queue: it fails the task, trains it all the same and
        does not expect the answer.
        """
        if self.running:
            time.sleep(max(0.0, self.submitted + _SUBMISSION_SECONDS - time.monotonic()))
        for ref in self.running:
            try:
                self.ray.cancel(ref, force=True)
            except Exception:  # the cluster may be what has failed
                return
