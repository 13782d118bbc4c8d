"""Chunks over processes: this process trains too, while workers with one thread each take from the same queue.

The data is written once and mapped into every worker, so that it is held in memory once. A worker starts up
while this process is already training.
"""

import functools
import pickle
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Protocol

import cloudpickle
import joblib
import numpy as np
import torch
from joblib.externals.loky import get_reusable_executor

from gputune.data.dataset import Dataset, Fold
from gputune.engine.chunk import Job, Outcome, Progress
from gputune.engine.plan import Plan
from gputune.engine.population import Population

OnOutcome = Callable[[Outcome], None]

Claim = Callable[[Population], bool]
"""Asked, from any thread, before a chunk begins: whether this process may train it."""


class Cluster(Protocol):
    """Other machines, which train the chunks of a plan."""

    def run_chunks(
        self, job: Job, data: Dataset, plan: Plan, *, progress: Progress, on_outcome: OnOutcome, claim: Claim
    ) -> None:
        """Train the chunks; ``on_outcome`` is called here, in this process, for each one done."""


def run_chunks(
    job: Job,
    data: Dataset,
    plan: Plan,
    *,
    progress: Progress,
    on_outcome: OnOutcome,
    claim: Claim = lambda chunk: True,
    cluster: Cluster | None = None,
) -> None:
    """Train the chunks of a plan; ``on_outcome`` is called here, in this process, for each one done.

    A chunk that ``claim`` refuses is passed over: another process has it. A ``cluster`` trains all of them.
    """
    if cluster is not None:
        cluster.run_chunks(job, data, plan, progress=progress, on_outcome=on_outcome, claim=claim)
        return
    with computing(plan.threads):
        if plan.workers == 1:
            begun = False
            for chunk in plan.chunks:
                if begun and job.is_over():
                    break
                if claim(chunk):
                    begun = True
                    on_outcome(job.run(data, chunk, progress))
        else:
            _run_with_workers(job, data, plan, progress, on_outcome, claim)


def _run_with_workers(
    job: Job, data: Dataset, plan: Plan, progress: Progress, on_outcome: OnOutcome, claim: Claim
) -> None:
    with tempfile.TemporaryDirectory(prefix="gputune-") as folder:
        path = Path(folder) / "data.joblib"
        joblib.dump(to_arrays(data), path)
        queue = _Queue(job, str(path), plan.chunks, plan.workers - 1, claim)

        def collect(outcomes: Iterator[Outcome]) -> None:
            for outcome in outcomes:
                progress(len(outcome.index) * outcome.epochs, outcome.curves[:, : outcome.epochs])
                on_outcome(outcome)

        try:
            while (chunk := queue.take()) is not None:
                on_outcome(job.run(data, chunk, progress))
                collect(queue.finished())
                if job.is_over():
                    break
            collect(queue.drain())
        except BaseException:
            queue.stop()
            raise


class _Queue:
    """The chunks that wait. A worker that ends one is given the next at once, from the executor's own thread."""

    def __init__(self, job: Job, path: str, chunks: Sequence[Population], workers: int, claim: Claim) -> None:
        self.job, self.packed, self.path, self.claim = job, packed(job), path, claim
        self.waiting = deque(chunks)
        # Reentrant: a future that is done already calls back from within add_done_callback.
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.running: set[Future[Outcome]] = set()
        self.done: deque[Future[Outcome]] = deque()
        self.executor = get_reusable_executor(max_workers=workers, timeout=60)
        for _ in range(workers):
            self._submit()

    def take(self) -> Population | None:
        with self.lock:
            while self.waiting:
                if self.claim(chunk := self.waiting.popleft()):
                    return chunk
            return None

    def _submit(self) -> None:
        with self.lock:
            if (chunk := self.take()) is not None:
                future = self.executor.submit(_run_in_worker, self.packed, self.path, chunk)
                self.running.add(future)
                future.add_done_callback(self._on_done)

    def _on_done(self, future: "Future[Outcome]") -> None:
        with self.changed:
            if not future.cancelled() and future.exception() is None and not self.job.is_over():
                self._submit()  # before this one leaves, so that drain never sees an empty room too early
            self.running.discard(future)
            self.done.append(future)
            self.changed.notify()

    def finished(self) -> Iterator[Outcome]:
        """Yield what is done by now. An error in a worker is raised here."""
        while True:
            with self.lock:
                if not self.done:
                    return
                future = self.done.popleft()
            yield future.result()

    def drain(self) -> Iterator[Outcome]:
        """Yield what is done until nothing runs any more."""
        while True:
            yield from self.finished()
            with self.changed:
                if not self.running and not self.done:
                    return
                if not self.done:
                    self.changed.wait(timeout=1.0)

    def stop(self) -> None:
        """Forget what waits and end the workers, whatever they are doing."""
        with self.lock:
            self.waiting.clear()
        self.executor.shutdown(wait=False, kill_workers=True)


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


def _run_in_worker(packed: bytes, path: str, chunk: Population) -> Outcome:
    with computing(1):
        job: Job = pickle.loads(packed)
        return job.run(_load(path), chunk)


@functools.lru_cache(maxsize=1)
def _load(path: str) -> Dataset:
    # copy-on-write: torch wants arrays that could be written, and nobody writes to them
    found: Dataset = to_tensors(joblib.load(path, mmap_mode="c"))
    return found


@contextmanager
def computing(threads: int) -> Iterator[None]:
    """Let torch compute with so many threads inside, and take numbers below 1e-38 (float32) for zero.

    The momentum of units that no longer learn decays into such denormal numbers, which a CPU handles so slowly
    that the training of a wide network took twice as long.
    """
    flushed = bool(torch.tensor(1e-39, dtype=torch.float32) * 1 == 0)
    torch.set_flush_denormal(True)
    try:
        with on_threads(threads):
            yield
    finally:
        torch.set_flush_denormal(flushed)


@contextmanager
def on_threads(threads: int) -> Iterator[None]:
    """Let torch compute with so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def to_arrays(value: Any) -> Any:
    """Datasets and folds as dicts, tensors as arrays, so that joblib can map them."""
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, tuple):
        return tuple(to_arrays(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        content = {field.name: to_arrays(getattr(value, field.name)) for field in fields(value)}
        return type(value).__name__, content
    return value


def to_tensors(value: Any) -> Any:
    kinds = {kind.__name__: kind for kind in (Dataset, Fold)}
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    # Two folds are a tuple of two as well, whose first is no name.
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and value[0] in kinds:
        return kinds[value[0]](**{name: to_tensors(item) for name, item in value[1].items()})
    if isinstance(value, tuple):
        return tuple(to_tensors(item) for item in value)
    return value
