"""How members of a module train fastest: stacked, one by one, or in compiled code. Each takes a few steps, where much
is to be trained.

On a CPU a step of stacked members moves their activations through memory where those of one member stay in a cache:
wide convolutions lose by it what small layers gain. Which of these a module does is found by trying.
"""

import math
import time
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from gputune.data.dataset import Dataset, Fold
from gputune.engine.backend import computing, trains_as
from gputune.engine.job import Fits, Job, train_chunk
from gputune.engine.members import MemberChunk
from gputune.modules.module import StackedModule
from gputune.modules.trace import TraceError
from gputune.native.library import NotBuiltError
from gputune.population.population import Population
from gputune.types import Backend

_STEPS, _EPOCHS = 3, 4  # of one shape, which is recorded in the first of these epochs
_WORTH_SECONDS = 3.0  # of all members one by one: less is trained before it could be told
_CODE_SECONDS = (
    6.0  # of all members the faster way: on two cores, from there one or two of building code are repaid
)
_TRIALS = 4
_TIMED_NUMBERS = 1 << 22  # of the parameters of all members that are timed in compiled code
_MARGIN = 1.1  # a difference below this is noise
_PATIENCE_SECONDS = 2.0  # after which two epochs must be enough


class _Enough(Exception):
    """The time of a step is known well enough."""


def fastest_way(job: Job, data: Dataset, group: Population, *, member_steps: float) -> tuple[str, bool]:
    """Return by how much trials of one shape train faster one by one, in words, "" where they do not, or hardly; and
    whether they train fastest in compiled code.

    ``member_steps`` is how many steps all members of a search take that train as these do.
    """
    few = _with_few_rows(data, group.configs[0]["batch_size"])
    alone = _seconds(job, few, group.part(0, 1), "loop")
    if alone * member_steps < _WORTH_SECONDS:
        return "", False
    stacked = _seconds(job, few, group.part(0, min(_TRIALS, len(group.index))), job.backend)
    known = min(alone, stacked)
    if known * member_steps > _CODE_SECONDS and _MARGIN * _coded_seconds(job, data, group) < known:
        return "", True
    job.fits.reuse.timed = None
    if stacked < _MARGIN * alone:
        return "", False
    slow = f"a step of a member takes {1e3 * alone:.3g} ms so, and {1e3 * stacked:.3g} ms with its members stacked"
    return slow, False


def _coded_seconds(job: Job, data: Dataset, group: Population) -> float:
    """Return the seconds of one step of one member in compiled code, which is built here; infinity where none is.

    The chunk that is timed is that of all trials, unless they are large, and trains afterwards.
    """
    network, chunk = job.network(data, group), group
    if network.blocks.size > _TIMED_NUMBERS:
        chunk = group.part(0, _TRIALS)
        network = job.network(data, chunk)
    if trains_as(job.backend, chunk.kind, chunk.configs[0]) != "graph" or not isinstance(
        network, StackedModule
    ):
        return math.inf
    try:
        with computing(1), torch.no_grad():
            timed = job.fits.reuse.timed = MemberChunk(
                network, data, chunk.configs, seed=job.seed, horizon=job.horizon, scoring=job.scoring
            )
            return timed.seconds_of_a_step()
    except (TraceError, NotBuiltError):
        return math.inf


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
