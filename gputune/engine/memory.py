"""A chunk that does not fit into memory is halved and run again; a trial that does not fit alone is given up.

The memory that a chunk takes on its device, measured at two sizes, where an estimate would decide too much.

Training is the same tensor program at every size, so its peak is a straight line over the number of trials: what is
there once, and what each trial adds.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from gputune.data.dataset import Dataset, Fold
from gputune.engine.job import Job, Outcome, Progress, train_chunk
from gputune.engine.kernel import KernelChunk
from gputune.engine.reuse import Fits
from gputune.errors import TOO_BIG
from gputune.memory import empty_cache, is_out_of_memory, synchronize
from gputune.modules.recorder import CudaRecorder
from gputune.population.population import Population


@dataclass(frozen=True)
class Failure:
    """A trial (its place in the search) that cannot be trained, and why; ``fits``: into memory, alone."""

    index: tuple[int]
    reason: str
    fits: bool = True

    def error(self) -> Exception:
        """Return the error of a training in which no trial may fail."""
        if self.fits:
            return RuntimeError(self.reason)
        return MemoryError(f"{self.reason}. One training alone does not fit; make it smaller.")


def run_in_parts(
    job: Job, data: Dataset, chunk: Population, progress: Progress | None = None
) -> list[Outcome | Failure]:
    """Train one chunk, in as many parts as the memory makes necessary.

    Parts that have not begun when training is over are left out.
    """
    waiting, done = [chunk], list[Outcome | Failure]()
    while waiting and not (done and job.is_over()):
        part = waiting.pop()
        if (most := job.fits.most(part)) < len(part.index):
            waiting += [part.part(most, len(part.index)), part.part(0, most)]
            continue
        outcome = _attempt(job, data, part, progress)
        if not isinstance(outcome, str):
            # A GPU trains in another way than was chosen where a kernel or a recording has failed.
            kernel = KernelChunk.failure if job.backend == "kernel" else ""
            graph = CudaRecorder.failure if job.backend in ("kernel", "graph") else ""
            fault = " ".join(filter(None, (kernel, graph))) if data.device.type == "cuda" else ""
            done.append(replace(outcome, fault=fault))
            continue
        # Only here, where the error and the frames that it holds are gone, is there anything to free.
        gc.collect()
        empty_cache(data.device)
        job.fits.refused(part)
        if len(part.index) == 1:
            done.append(Failure((part.index[0],), outcome, fits=False))
        else:
            waiting.append(part)
    return done


def _attempt(job: Job, data: Dataset, chunk: Population, progress: Progress | None) -> Outcome | str:
    """Train a chunk; where memory runs out, take back what was told of it and return the reason."""
    told = 0

    def tell(trial_epochs: int, curves: np.ndarray) -> None:
        nonlocal told
        told += trial_epochs
        if progress is not None:
            progress(trial_epochs, curves)

    try:
        return job.run(data, chunk, tell)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = f"{TOO_BIG}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    if progress is not None and told:
        progress(-told, np.full((1, 1, 1), np.nan))
    return reason


_TRIALS = 16  # of the larger of both sizes
# Where steps are recorded, the fourth of each shape is: of whole minibatches and of the last.
_BATCHES, _EPOCHS = 2, 4

Peak = Callable[[Callable[[], object]], int]
"""Runs some work and returns the most bytes that it had at any time beyond those that were there before."""


@dataclass(frozen=True)
class Need:
    """Bytes of a chunk while it trains: ``once``, and what each of its trials adds."""

    once: int
    trial: int


def measure_need(job: Job, data: Dataset, population: Population, peak: Peak, *, most: int = _TRIALS) -> Need | None:
    """Train two small chunks for a few steps, score them on all validation rows, and return what that took.

    The chunks have at most ``most`` trials, those with the largest and the smallest batches among them. Returns None
    where there is nothing to measure: a single trial, or chunks that memory does not hold.
    """
    small = min(most, len(population.index)) // 2
    large = 2 * small
    if small == 0:
        return None
    order = sorted(range(len(population.index)), key=lambda i: -population.configs[i]["batch_size"])
    size = population.configs[order[0]]["batch_size"]
    # All but two of the whole minibatches are left out of each fold: the last one stays as it is.
    left_out = [max(0, len(fold.train) // size - _BATCHES) * size for fold in data.folds]
    folds = tuple(Fold(fold.train[rows:], fold.valid) for fold, rows in zip(data.folds, left_out))
    few = replace(data, folds=folds)
    short = replace(job, epochs=_EPOCHS, checkpointing=None, fits=Fits())

    def train(trials: int) -> Callable[[], object]:
        chosen = [order[place] for place in np.linspace(0, len(order) - 1, trials).astype(int)]
        configs = tuple(population.configs[i] for i in chosen)
        return lambda: train_chunk(short, few, Population(population.kind, tuple(chosen), configs))

    try:
        train(small)()  # libraries take their own memory at the first call
        least, greatest = peak(train(small)), peak(train(large))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    trial = max(1, -(-(greatest - least) // (large - small)))
    return Need(once=max(0, least - small * trial), trial=trial)


def cuda_peak(device: torch.device) -> Peak:
    """Return the measure of a GPU: what PyTorch's allocator gave out."""

    def peak(work: Callable[[], object]) -> int:
        synchronize(device)
        empty_cache(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    return peak
