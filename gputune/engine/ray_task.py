"""One chunk in a worker of a Ray cluster: are the versions ours, where are the data and the job, train."""

import functools
import pickle
import time
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch

from gputune.data.dataset import Dataset, Fold
from gputune.engine.chunk import Job
from gputune.engine.out_of_memory import run_in_parts
from gputune.engine.packing import to_tensors
from gputune.engine.stopping import Stop
from gputune.engine.workers import Outcomes, computing


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
        run: Callable[..., Outcomes] = importlib.import_module("gputune.engine.ray_task").run_in_task
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
