"""One chunk in a worker of a Ray cluster: are the versions ours, where are the data and the job, train.

Chunks over a cluster: whole chunks of a plan as Ray tasks, each with a GPU or with some CPUs of its own.

The data goes to Ray's object store once. This process hands out chunks, at most as many as can run, and takes results
in as they finish; the chunk of a worker that is lost is handed out again. Ray is imported where it is asked for.
"""

import functools
import os
import pickle
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch

from gputune.data.dataset import Dataset, Fold
from gputune.engine.job import Job, Progress
from gputune.engine.memory import run_in_parts
from gputune.engine.plan import Plan
from gputune.engine.population import Population
from gputune.engine.stop import Stop
from gputune.errors import ClusterError, InputError
from gputune.executors.processes import packed, to_arrays, to_tensors
from gputune.executors.workers import LOSSES, Claim, Losses, Outcomes, Settle, computing, tell
from gputune.version import __version__


def make_task(ray: Any) -> Any:
    """Return the remote function. Being defined in here it travels as code, and arrives where gputune is missing."""

    def chunk(
        foreign: str, expected: dict[str, str], common: list[Any], population: bytes, *how: Any
    ) -> tuple[Any, ...]:
        import importlib
        import socket
        import sys

        sys.path[:] = [folder for folder in sys.path if folder != foreign]
        found = {}
        for name in expected:
            try:
                found[name] = str(importlib.import_module(name).__version__).partition("+")[0]
            except ImportError:
                found[name] = ""
        if found != expected:
            return "unlike", socket.gethostname(), expected, found
        run: Callable[..., Outcomes] = importlib.import_module("gputune.executors.ray_cluster").run_in_task
        return "done", run(common, population, *how)

    return ray.remote(chunk)


def run_in_task(
    common: list[Any], population: bytes, left: float | None, threads: int, device: str
) -> Outcomes:
    """Train one chunk in a worker of the cluster, in as many parts as its memory makes necessary.

    ``common`` holds references to the data and to the packed job; ``left`` are seconds until the deadline.
    """
    import ray

    begin = time.monotonic()
    job: Job = pickle.loads(ray.get(common[1]))
    job = replace(job, stop=Stop(None if left is None else begin + left))
    with computing(threads):
        return run_in_parts(job, _dataset(common[0], device), pickle.loads(population))


@functools.lru_cache(maxsize=1)
def _dataset(reference: Any, device: str) -> Dataset:
    import ray

    with warnings.catch_warnings():
        # The arrays lie in shared memory that cannot be written to; nobody writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        data: Dataset = to_tensors(ray.get(reference))
    return data if device == "cpu" else moved(data, torch.device(device))


def moved(value: Any, device: torch.device) -> Any:
    """A dataset, fold by fold and tensor by tensor, on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(moved(item, device) for item in value)
    if isinstance(value, Dataset | Fold):
        return replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)})
    return value


def free_bytes() -> int:
    """Return the bytes that are free on the GPU of a task."""
    return int(torch.cuda.mem_get_info()[0])


_LOOK = 5.0  # seconds between two looks at the nodes
_WAIT = 0.25  # seconds between two looks at whether someone asks for the end
_ON_ITS_WAY = 0.5  # seconds in which a task that is handed out is not ended: see _Run.stop
_GO_ON = "What was finished is kept, and the same call goes on from there where study= names a file."


class RayCluster:
    """A cluster to which this process is connected. ``device`` is where its tasks compute, ``free`` bytes of a GPU.

    ``cpus`` of a task are its threads too. Raises InputError where no node has what a task needs.
    """

    def __init__(self, ray: Any, *, device: str, cpus: int) -> None:
        self.ray, self.threads = ray, cpus
        gpus = sum(node.get("GPU", 0) for node in self._nodes())
        self.device = ("cuda" if gpus else "cpu") if device == "auto" else device
        self.tasks = self.room(cpus)
        self._task = make_task(ray)
        self._held: tuple[Dataset, Any] | None = None
        self.free: int | None = None
        if self.device == "cuda":
            self.free = int(ray.get(ray.remote(free_bytes).options(num_gpus=1, num_cpus=cpus).remote()))

    def room(self, cpus: int) -> int:
        """Return how many tasks of so many CPUs run at once. Raises InputError where none does."""
        nodes = self._nodes()
        tasks = sum(_tasks_on(node, cpus, self.device) for node in nodes)
        if tasks == 0:
            sizes = [f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes]
            need = f"{cpus} CPU{'s' * (cpus > 1)}" + " and a GPU" * (self.device == "cuda")
            raise InputError(
                f"device={self.device!r} with workers='ray': a task needs {need} on one node, and no node of the "
                f"cluster has them (nodes: {'; '.join(sizes) or 'none'}). Start nodes that do, or change device= or "
                "the cpus of gputune.Ray."
            )
        return tasks

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def bytes_of_a_task(self) -> int:
        """Return the bytes that one task may take: of the GPU, or of the main memory of the smallest node."""
        if self.free is not None:
            return self.free
        of_nodes = [
            (node.get("memory", 0), _tasks_on(node, self.threads, self.device)) for node in self._nodes()
        ]
        return int(min(memory // tasks for memory, tasks in of_nodes if tasks))

    def run_chunks(
        self, job: Job, data: Dataset, plan: Plan, *, progress: Progress, settle: Settle, claim: Claim
    ) -> None:
        """Train the chunks of a plan on the cluster, as ``workers.run_chunks`` does on this machine.

        Raises ClusterError where a chunk has lost ``LOSSES`` workers, or no node is left; InputError where a worker
        has other versions. Whatever else was trained has been handed to ``settle`` by then.
        """

        def collect(outcomes: Outcomes) -> None:
            tell(progress, outcomes)
            settle(outcomes)

        run = _Run(self, job, self._put(data), plan, claim)
        try:
            run.to_the_end(collect)
        except BaseException:
            run.stop()
            raise

    def _put(self, data: Dataset) -> Any:
        if self._held is None or self._held[0] is not data:
            self._held = data, self.ray.put(to_arrays(data))
        return self._held[1]

    def task(self, cpus: int) -> Any:
        """Return the function that trains a chunk far away, with the resources it needs."""
        gpus = 1 if self.device == "cuda" else 0
        return self._task.options(num_cpus=cpus, num_gpus=gpus, max_retries=0, name="gputune chunk")


class _Run:
    """The chunks of one plan on their way."""

    def __init__(self, cluster: RayCluster, job: Job, data: Any, plan: Plan, claim: Claim) -> None:
        self.ray, self.cluster, self.job, self.claim = cluster.ray, cluster, job, claim
        self.cpus, self.threads = max(cluster.threads, plan.threads), plan.threads
        self.task = cluster.task(self.cpus)
        sent = packed(replace(job, stop=Stop()), here=False)
        self.common = [data, self.ray.put(sent)]
        self.waiting = deque(plan.chunks)
        self.running: dict[Any, Population] = {}
        self.losses = Losses("a Ray worker")
        self.given_up: dict[tuple[int, ...], str] = {}
        self.begun = self.done = 0
        self.submitted = 0.0
        self.looked, self.room = time.monotonic(), cluster.room(self.cpus)

    def to_the_end(self, collect: Settle) -> None:
        """Hand out chunks and collect what comes back until nothing is left to do, or someone asks for the end.

        Tasks do not hear that they are asked: they are ended, and their chunks are trained again by a later call.
        """
        self._fill()
        while self.running:
            if self.job.stop.asked:
                self.stop()
                return
            ready, _ = self.ray.wait(list(self.running), num_returns=1, timeout=_WAIT)
            self._look()
            for ref in ready:
                outcomes = self._outcomes(ref, self.running.pop(ref))
                self._fill()  # first, so that no worker waits while a result is written
                if outcomes is not None:
                    self.done += 1
                    collect(outcomes)
        if self.given_up:
            index, reason = next(iter(self.given_up.items()))
            raise ClusterError(
                f"{len(index)} trials that train together have lost {LOSSES} workers one after the other, the last "
                f"because: {reason} A smaller memory= makes chunks of fewer trials. {_GO_ON}"
            )

    def _fill(self) -> None:
        hopeless = bool(self.given_up) and not self.done
        while self.waiting and len(self.running) < self.room and not hopeless:
            if self.begun and self.job.is_over():
                return
            chunk = self.waiting.popleft()
            if chunk.index in self.losses.count or self.claim(chunk):
                self.running[self._submit(chunk)] = chunk
                self.begun += 1

    def _submit(self, chunk: Population) -> Any:
        # Clocks of machines differ; what is left of the time does not.
        deadline = self.job.stop.deadline
        left = None if deadline is None else deadline - time.monotonic()
        expected = {"gputune": _public(__version__), "torch": _public(torch.__version__)}
        how = left, self.threads, self.cluster.device
        self.submitted = time.monotonic()
        return self.task.remote(_foreign_folder(), expected, self.common, pickle.dumps(chunk), *how)

    def _outcomes(self, ref: Any, chunk: Population) -> Outcomes | None:
        """Return what a task gave; None where its worker was lost, and the chunk waits again or is given up."""
        errors = self.ray.exceptions
        try:
            end, *found = self.ray.get(ref)
        except errors.RayTaskError as error:
            if isinstance(error.cause, ModuleNotFoundError):
                raise InputError(
                    f"a Ray worker has no module {error.cause.name!r}, which your module or scorer imports: install "
                    f"it there, or put what they need into their own file. {_GO_ON}"
                ) from error
            raise error.cause from error
        except errors.RayError as error:
            self._again(chunk, _first_sentence(error))
            return None
        if end == "unlike":
            raise InputError(_unlike(*found))
        outcomes: Outcomes = found[0]
        return outcomes

    def _again(self, chunk: Population, reason: str) -> None:
        words = self.losses.again(chunk, reason)
        if words is None:
            self.given_up[chunk.index] = reason
            return
        warnings.warn(words, UserWarning, stacklevel=2)
        self.waiting.appendleft(chunk)

    def _look(self) -> None:
        """Count the nodes again, now and then: a cluster grows and shrinks."""
        if time.monotonic() - self.looked > _LOOK:
            self.looked = time.monotonic()
            try:
                self.room = self.cluster.room(self.cpus)
            except InputError as error:
                raise ClusterError(f"the cluster has lost its nodes: {error} {_GO_ON}") from error

    def stop(self) -> None:
        """Forget what waits and end the tasks, whatever they are doing.

        Ray 2.60 takes down this process where a task is cancelled in the milliseconds between its submission and its
        arrival in Ray's queue: it fails the task, trains it all the same and does not expect the answer.
        """
        self.waiting.clear()
        if self.running:
            time.sleep(max(0.0, self.submitted + _ON_ITS_WAY - time.monotonic()))
        for ref in self.running:
            try:
                self.ray.cancel(ref, force=True)
            except Exception:  # the cluster may be what has failed
                return


def _foreign_folder() -> str:
    """Return the folder that workers search for modules and this process does not: Ray adds the current one.

    A checkout of gputune there would hide the package that is installed.
    """
    here = os.getcwd()
    return "" if here in sys.path or "" in sys.path else here


def _tasks_on(node: dict[str, float], cpus: int, device: str) -> int:
    tasks = int(node.get("CPU", 0) // cpus)
    return min(tasks, int(node.get("GPU", 0))) if device == "cuda" else tasks


def _public(version: str) -> str:
    """Leave out what a build adds: machines with and without a GPU have the same torch in two builds."""
    return version.partition("+")[0]


def _unlike(host: str, expected: dict[str, str], found: dict[str, str]) -> str:
    """Say which packages of a worker differ from ours."""
    name = next(name for name in expected if found[name] != expected[name])
    there = f"{name} {found[name]}" if found[name] else f"no {name}"
    return (
        f"the Ray worker on {host} has {there}, and this process {name} {expected[name]}: install "
        f"{name}=={expected[name]} there. {_GO_ON}"
    )


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.partition(". ")[0].rstrip(".") + "."
