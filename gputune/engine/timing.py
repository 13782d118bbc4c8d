"""Whether members of a module train faster stacked or one by one: both take a few steps, where much is to be trained.

On a CPU a step of stacked members moves their activations through memory where those of one member stay in a cache:
wide convolutions lose by it what small layers gain. Which of both a module does is found by trying.
"""

import time
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import numpy as np

from gputune.data.dataset import Dataset, Fold
from gputune.engine.backend import computing
from gputune.engine.job import Fits, Job, train_chunk
from gputune.population.population import Population
from gputune.types import Backend

_STEPS, _EPOCHS = 3, 4  # of one shape, which is recorded in the first of these epochs
_WORTH_SECONDS = 3.0  # of all members one by one: less is trained before it could be told
_TRIALS = 4
_MARGIN = 1.1  # a difference below this is noise
_PATIENCE_SECONDS = 2.0  # after which two epochs must be enough


class _Enough(Exception):
    """The time of a step is known well enough."""


def slower_stacked(job: Job, data: Dataset, chunk: Population, *, member_steps: float) -> str:
    """Return by how much the members of a chunk train faster one by one, in words; "" where they do not, or hardly.

    ``member_steps`` is how many steps all members of a search take that train as these do.
    """
    few = _with_few_rows(data, chunk.configs[0]["batch_size"])
    alone = _seconds(job, few, chunk.part(0, 1), "loop")
    if alone * member_steps < _WORTH_SECONDS:
        return ""
    stacked = _seconds(job, few, chunk.part(0, min(_TRIALS, len(chunk.index))), job.backend)
    if stacked < _MARGIN * alone:
        return ""
    return f"a step of a member takes {1e3 * alone:.3g} ms so, and {1e3 * stacked:.3g} ms with its members stacked"


def _seconds(job: Job, data: Dataset, chunk: Population, backend: Backend) -> float:
    """Return the seconds of one step of one member, once what is made in the first steps is there."""
    times: list[float] = []
    begun = time.perf_counter()

    def note(_trials: int, _scores: np.ndarray) -> None:
        times.append(time.process_time())  # of one thread, whatever else the machine does
        if len(times) > 1 and time.perf_counter() - begun > _PATIENCE_SECONDS:
            raise _Enough

    # Over a long horizon a recording pays, as it will in the search.
    short = replace(
        job, epochs=_EPOCHS, horizon=10**6, scoring=None, checkpointing=None, backend=backend, fits=Fits()
    )
    with computing(1), suppress(_Enough):
        train_chunk(short, data, chunk, note)
    size = int(chunk.configs[0]["batch_size"])
    steps = sum(-(-len(fold.train) // size) for fold in data.folds)
    if len(times) < 2:
        return 0.0  # training is over
    between = [b - a for a, b in pairwise(times)]
    fastest = min(between[1:] or between)
    return fastest / (steps * len(chunk.index))


def _with_few_rows(data: Dataset, batch_size: int) -> Dataset:
    """Return the data with so many whole minibatches in each fold, or what rows there are."""
    folds = [Fold(fold.train[: _STEPS * batch_size], fold.valid) for fold in data.folds]
    return replace(data, folds=tuple(folds))
