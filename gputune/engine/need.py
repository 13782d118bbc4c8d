"""Measure the memory that a group of trials needs on a GPU.

The planner measures the memory if an estimate is not accurate enough. It trains a group at two sizes.
Training is the same tensor program at every size, so its peak is a straight line over the number of
trials: a constant part plus a part for each trial.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from gputune.data.dataset import Dataset, Fold
from gputune.engine.job import Job, train_chunk
from gputune.engine.reuse import ChunkPool
from gputune.ground.device import empty_cache, is_out_of_memory, synchronize
from gputune.population.population import Population

_TRIALS = 16  # trials of the larger chunk
# The fourth step of each shape is recorded. There are two shapes: whole minibatches and the last
# one.
_BATCHES = 2
_EPOCHS = 4

Peak = Callable[[Callable[[], object]], int]
"""A function that runs ``work`` and returns the peak memory in bytes, in addition to the memory in
use before."""


@dataclass(frozen=True)
class Need:
    """Memory that a group of trials takes while it trains: ``once`` bytes, plus ``trial`` bytes for
    each trial."""

    once: int
    trial: int


def measure_need(
    job: Job, data: Dataset, population: Population, peak: Peak, *, most: int = _TRIALS
) -> Need | None:
    """Measure the memory that training a population needs, by training two small groups of its
    trials for a few steps.

    gputune also scores the groups on all validation rows. A group has at most ``most`` trials,
    including the trials with the largest and the smallest batches. Returns None for a single trial,
    or if the groups do not fit into memory.
    """
    small = min(most, len(population.index)) // 2
    large = 2 * small
    if small == 0:
        return None
    order = sorted(range(len(population.index)), key=lambda i: -population.configs[i]["batch_size"])
    size = population.configs[order[0]]["batch_size"]
    folds = []
    for fold in data.folds:
        # Two of its whole minibatches, and the last minibatch as it is.
        left_out = max(0, len(fold.train) // size - _BATCHES) * size
        folds.append(Fold(fold.train[left_out:], fold.valid))
    short_data = replace(data, folds=tuple(folds))
    short_job = replace(job, epochs=_EPOCHS, checkpointing=None, pool=ChunkPool())

    def training(trials: int) -> Callable[[], object]:
        places = np.linspace(0, len(order) - 1, trials).astype(int)
        chunk = population.select(np.array(order)[places].tolist())
        return partial(train_chunk, short_job, short_data, chunk)

    try:
        training(small)()  # libraries take their own memory at the first call
        least = peak(training(small))
        greatest = peak(training(large))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    # Peak memory is once + trial * (number of trials): two sizes give both unknowns.
    trial = max(1, -(-(greatest - least) // (large - small)))
    return Need(once=max(0, least - small * trial), trial=trial)


def cuda_peak(device: torch.device) -> Peak:
    """Return a function that measures the peak GPU memory of some work, as counted by PyTorch's
    allocator."""

    def peak(work: Callable[[], object]) -> int:
        synchronize(device)
        empty_cache(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    return peak
