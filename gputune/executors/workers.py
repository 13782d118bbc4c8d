"""Chunks over processes: this process trains too, while workers with one thread each take from the same queue.

The data is written once and mapped into every worker, so that it is held in memory once. A worker starts up
while this process is already training.
"""

import functools
import pickle
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import resource_tracker
from typing import Protocol

import cloudpickle
import joblib
import torch
from joblib.externals.loky.process_executor import (
    BrokenProcessPool,
    ProcessPoolExecutor,
    TerminatedWorkerError,
)

from gputune.data.dataset import Dataset
from gputune.engine.checkpoint import Checkpointing
from gputune.engine.job import Job, Outcome, Progress
from gputune.engine.memory import DoesNotFit, GivenUp, run_in_parts
from gputune.engine.plan import Plan
from gputune.engine.population import Population
from gputune.executors.processes import (
    idle,
    one_worker,
    packed,
    submit,
    to_arrays,
    to_tensors,
    training,
    why_lost,
)
from gputune.scratch import scratch_folder
from gputune.text import count

OnOutcome = Callable[[Outcome], None]
OnFailure = Callable[[int, str], None]
Outcomes = Sequence[Outcome | GivenUp]
Settle = Callable[[Outcomes], None]

Claim = Callable[[Population], bool]
"""Asked, from any thread, before a chunk begins: whether this process may train it."""

LOSSES = 3  # workers that one chunk may lose before it is given up


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
    parts. ``on_failure`` is called for a trial that does not fit alone, or whose chunk has lost ``LOSSES`` workers,
    with its place in the search and the reason; without it that is a MemoryError, or a RuntimeError. A ``cluster``
    trains all chunks, and its workers write no checkpoints.
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
        elif on_failure is not None:
            on_failure(outcome.index[0], outcome.reason)
        elif isinstance(outcome, DoesNotFit):
            raise MemoryError(f"{outcome.reason}. One training alone does not fit; make it smaller.")
        else:
            raise RuntimeError(outcome.reason)


def tell(progress: Progress, outcomes: Outcomes) -> None:
    """Count what a worker has trained."""
    for outcome in outcomes:
        if isinstance(outcome, Outcome):
            progress(len(outcome.index) * outcome.epochs, outcome.curves[:, : outcome.epochs])


def _run_with_workers(
    job: Job, data: Dataset, plan: Plan, progress: Progress, settle: Settle, claim: Claim
) -> None:
    with scratch_folder() as folder:
        path = folder / "data.joblib"
        joblib.dump(to_arrays(data), path)

        def collect(found: Iterator[Outcomes]) -> None:
            for outcomes in found:
                tell(progress, outcomes)
                settle(outcomes)

        with job.stop.heard_by_workers(folder / "stop"):
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
                else:
                    idle.extend(queue.idle)
            except BaseException:
                queue.stop()
                raise


class Losses:
    """How many workers each chunk has lost."""

    def __init__(self, worker: str) -> None:
        self.worker = worker
        self.count: Counter[tuple[int, ...]] = Counter()

    def again(self, chunk: Population, reason: str) -> str | None:
        """Count one more; return the words of a chunk that is handed out again, None where it is given up."""
        self.count[chunk.index] += 1
        if self.count[chunk.index] >= LOSSES:
            return None
        trials = count(len(chunk.index), "trial")
        return f"{self.worker} was lost while it trained {trials}, now handed out again: {reason}"


class _Queue:
    """The chunks that wait. A worker that ends one is given the next at once, from its executor's own thread.

    A chunk whose worker is lost goes to another worker, never to this process, which it might end as well.
    """

    def __init__(self, job: Job, path: str, chunks: Sequence[Population], workers: int, claim: Claim) -> None:
        self.job, self.packed, self.path, self.claim = job, packed(job), path, claim
        self.waiting, self.lost = deque(chunks), deque[Population]()
        self.losses = Losses("a worker process")
        # Reentrant: a future that is done already calls back from within add_done_callback.
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.running: dict[Future[Outcomes], tuple[ProcessPoolExecutor, Population]] = {}
        self.done: deque[Callable[[], Outcomes]] = deque()
        # A start of its own, as it would let the signals through that are held off from a worker's.
        resource_tracker.ensure_running()
        self.idle = [one_worker() for _ in range(workers)]
        self._submit()

    def take(self) -> Population | None:
        with self.lock:
            while self.waiting:
                if self.claim(chunk := self.waiting.popleft()):
                    return chunk
            return None

    def _submit(self) -> None:
        """Give every idle worker a chunk, as long as there are any."""
        with self.lock:
            while self.idle and (chunk := self.lost.popleft() if self.lost else self.take()) is not None:
                executor = self.idle.pop()
                try:
                    future = submit(executor, _run_in_worker, self.packed, self.path, chunk)
                except BrokenProcessPool:  # its worker was killed while it was idle
                    self.idle.append(one_worker())
                    self.lost.append(chunk)
                    continue
                except RuntimeError:  # the interpreter ends, and starts no worker any more
                    self.waiting.appendleft(chunk)
                    return
                self.running[future] = executor, chunk
                future.add_done_callback(self._on_done)

    def _on_done(self, future: "Future[Outcomes]") -> None:
        with self.changed:
            executor, chunk = self.running[future]
            error = future.exception()
            result: Callable[[], Outcomes] = future.result
            if isinstance(error, BrokenProcessPool):
                executor = one_worker()
            if isinstance(error, TerminatedWorkerError):
                error, result = None, self._lose(chunk, why_lost(error))
            self.idle.append(executor)
            try:
                if error is None and not self.job.is_over():
                    self._submit()  # before this one leaves, so that drain never sees an empty room too early
            finally:
                del self.running[future]
                self.done.append(result)
                self.changed.notify()

    def _lose(self, chunk: Population, reason: str) -> Callable[[], Outcomes]:
        """Let the chunk of a lost worker wait again, or give up its trials; return what says so."""
        if (words := self.losses.again(chunk, reason)) is not None:
            self.lost.append(chunk)
            return partial(_warned, words)
        n = len(chunk.index)
        smaller = "a smaller memory= makes chunks of fewer trials" if n > 1 else "a smaller one takes less"
        words = (
            f"its chunk of {count(n, 'trial')} has lost {LOSSES} worker processes one after the other, the last "
            f"because {reason} Where memory has run out, fewer workers= leave more to each, and {smaller}."
        )
        return lambda: [GivenUp((place,), words) for place in chunk.index]

    def finished(self) -> Iterator[Outcomes]:
        """Yield what is done by now. An error in a worker is raised here."""
        while True:
            with self.lock:
                if not self.done:
                    return
                result = self.done.popleft()
            yield result()

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
            self.lost.clear()
            for executor in [*self.idle, *(executor for executor, _ in self.running.values())]:
                executor.shutdown(wait=False, kill_workers=True)
            self.idle.clear()


def _warned(words: str) -> Outcomes:
    warnings.warn(words, UserWarning, stacklevel=2)
    return []


def _run_in_worker(packed: bytes, path: str, chunk: Population) -> Outcomes:
    """Train one chunk; nothing comes of it where it is over before it has begun."""
    with training:
        job: Job = pickle.loads(packed)
        if job.is_over():
            return []
        try:
            with computing(1):
                return run_in_parts(job, _load(path), chunk)
        except Exception as error:
            if not _travels(error):
                name = type(error).__qualname__
                raise RuntimeError(
                    f"{name} (which cannot be pickled) in a worker process: {error}"
                ) from error
            raise


def _travels(error: Exception) -> bool:
    """Whether an error can be pickled, and read again."""
    try:
        pickle.loads(cloudpickle.dumps(error))
    except Exception:
        return False
    return True


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
