"""The memory that a chunk takes on its device, measured at two sizes, where an estimate would decide too much.

Training is the same tensor program at every size, so its peak is a straight line over the number of trials: what is
there once, and what each trial adds.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from gputune.data.dataset import Dataset, Fold
from gputune.engine.chunk import Job, train_chunk
from gputune.engine.out_of_memory import is_out_of_memory
from gputune.engine.population import Population

_TRIALS = 16  # of the larger of both sizes
_BATCHES, _EPOCHS = (
    2,
    4,
)  # where steps are recorded, the fourth of each shape is: of whole minibatches and of the last

Peak = Callable[[Callable[[], object]], int]
"""Runs some work and returns the most bytes that it had at any time beyond those that were there before."""


@dataclass(frozen=True)
class Need:
    """Bytes of a chunk while it trains: ``once``, and what each of its trials adds."""

    once: int
    trial: int


def measure_need(
    job: Job, data: Dataset, population: Population, peak: Peak, *, most: int = _TRIALS
) -> Need | None:
    """Train two small chunks for a few steps, score them on all validation rows, and return what that took.

    The chunks have at most ``most`` trials, those with the largest and the smallest batches among them. Returns None
    where there is nothing to measure: a single trial, or chunks that memory does not hold.
    """
    small = min(most, len(population.index)) // 2
    large = 2 * small
    if small == 0:
        return None
    order = sorted(range(len(population.index)), key=lambda i: -population.configs[i]["batch_size"])
    few = _with_few_rows(data, population.configs[order[0]]["batch_size"])
    short = replace(job, epochs=_EPOCHS, checkpointing=None)

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


def _with_few_rows(data: Dataset, batch_size: int) -> Dataset:
    """Return the data with all but two of the whole minibatches left out of each fold: the last one stays as it is."""
    left_out = [max(0, len(fold.train) // batch_size - _BATCHES) * batch_size for fold in data.folds]
    folds = [Fold(fold.train[rows:], fold.valid) for fold, rows in zip(data.folds, left_out)]
    return replace(data, folds=tuple(folds))


def cuda_peak(device: torch.device) -> Peak:
    """Return the measure of a GPU: what PyTorch's allocator gave out."""

    def peak(work: Callable[[], object]) -> int:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    return peak
