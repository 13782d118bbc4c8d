"""Chunks over processes: this process trains too, while workers with one thread each take from the same queue.

The data is written once and mapped into every worker, so that it is held in memory once. A worker starts up
while this process is already training.
"""

import functools
import pickle
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Protocol

import joblib
import torch
from joblib.externals.loky import get_reusable_executor

from gputune.data.dataset import Dataset
from gputune.engine.checkpoint import Checkpointing
from gputune.engine.chunk import Job, Outcome, Progress
from gputune.engine.out_of_memory import DoesNotFit, run_in_parts
from gputune.engine.packing import packed, to_arrays, to_tensors
from gputune.engine.plan import Plan
from gputune.engine.population import Population

OnOutcome = Callable[[Outcome], None]
OnFailure = Callable[[int, str], None]
Outcomes = Sequence[Outcome | DoesNotFit]
Settle = Callable[[Outcomes], None]

Claim = Callable[[Population], bool]
"""Asked, from any thread, before a chunk begins: whether this process may train it."""


class Cluster(Protocol):
    """Other machines, which train the chunks of a plan."""

    def run_chunks(
        self, job: Job, data: Dataset, plan: Plan, *, progress: Progress, settle: Settle, claim: Claim
    ) -> None:
        """Train the chunks; ``settle`` is called here, in this process, with what came of each one."""


def run_chunks(
    job: Job,
    data: Dataset,
    plan: Plan,
    *,
    progress: Progress,
    on_outcome: OnOutcome,
    claim: Claim = lambda chunk: True,
    on_failure: OnFailure | None = None,
    cluster: Cluster | None = None,
) -> None:
    """Train the chunks of a plan; ``on_outcome`` is called here, in this process, for each one done.

    A chunk that ``claim`` refuses is passed over: another process has it. One that memory does not hold comes in
    parts. ``on_failure`` is called for a trial that does not fit alone, with its place in the search and the reason;
    without it that is a MemoryError. A ``cluster`` trains all chunks, and its workers write no checkpoints.
    """
    settle = partial(_settle, job.checkpointing, on_outcome, on_failure)
    if cluster is not None:
        job = replace(job, checkpointing=None)
        cluster.run_chunks(job, data, plan, progress=progress, settle=settle, claim=claim)
        return
    if job.checkpointing is not None:
        for chunk in plan.chunks:
            job.checkpointing.expect(chunk.index)
    with computing(plan.threads):
        if plan.workers == 1:
            begun = False
            for chunk in plan.chunks:
                if begun and job.is_over():
                    break
                if claim(chunk):
                    begun = True
                    settle(run_in_parts(job, data, chunk, progress))
        else:
            _run_with_workers(job, data, plan, progress, settle, claim)


def _settle(
    checkpointing: Checkpointing | None,
    on_outcome: OnOutcome,
    on_failure: OnFailure | None,
    outcomes: Outcomes,
) -> None:
    """Hand on what came of a chunk, part by part."""
    for outcome in outcomes:
        if isinstance(outcome, Outcome):
            if checkpointing is not None:
                checkpointing.expect(outcome.index)
            on_outcome(outcome)
        elif on_failure is None:
            raise MemoryError(f"{outcome.reason}. One training alone does not fit; make it smaller.")
        else:
            on_failure(outcome.index[0], outcome.reason)


def tell(progress: Progress, outcomes: Outcomes) -> None:
    """Count what a worker has trained."""
    for outcome in outcomes:
        if isinstance(outcome, Outcome):
            progress(len(outcome.index) * outcome.epochs, outcome.curves[:, : outcome.epochs])


def _run_with_workers(
    job: Job, data: Dataset, plan: Plan, progress: Progress, settle: Settle, claim: Claim
) -> None:
    with tempfile.TemporaryDirectory(prefix="gputune-") as folder:
        path = Path(folder) / "data.joblib"
        joblib.dump(to_arrays(data), path)

        def collect(found: Iterator[Outcomes]) -> None:
            for outcomes in found:
                tell(progress, outcomes)
                settle(outcomes)

        with job.stop.heard_by_workers(Path(folder) / "stop"):
            queue = _Queue(job, str(path), plan.chunks, plan.workers - 1, claim)
            try:
                while (chunk := queue.take()) is not None:
                    settle(run_in_parts(job, data, chunk, progress))
                    collect(queue.finished())
                    if job.is_over():
                        break
                collect(queue.drain())
                if job.is_over():
                    queue.stop()  # idle workers, for whose end this process would wait when it ends
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
        self.running: set[Future[Outcomes]] = set()
        self.done: deque[Future[Outcomes]] = deque()
        self.executor = get_reusable_executor(max_workers=workers, timeout=60)
        # A start of its own, as it would let the signals through that are held off from a worker's.
        resource_tracker.ensure_running()
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
                with _signals_held_off():
                    future = self.executor.submit(_run_in_worker, self.packed, self.path, chunk)
                self.running.add(future)
                future.add_done_callback(self._on_done)

    def _on_done(self, future: "Future[Outcomes]") -> None:
        with self.changed:
            if not future.cancelled() and future.exception() is None and not self.job.is_over():
                self._submit()  # before this one leaves, so that drain never sees an empty room too early
            self.running.discard(future)
            self.done.append(future)
            self.changed.notify()

    def finished(self) -> Iterator[Outcomes]:
        """Yield what is done by now. An error in a worker is raised here."""
        while True:
            with self.lock:
                if not self.done:
                    return
                future = self.done.popleft()
            yield future.result()

    def drain(self) -> Iterator[Outcomes]:
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


def _run_in_worker(packed: bytes, path: str, chunk: Population) -> Outcomes:
    """Train one chunk; nothing comes of it where it is over before it has begun."""
    job: Job = pickle.loads(packed)
    if job.is_over():
        return []
    with computing(1):
        return run_in_parts(job, _load(path), chunk)


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
