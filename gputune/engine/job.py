"""One chunk, from its configurations to its results: the unit of work of a process, of a store, of a cluster.

It trains to its end, or to a rung, from which it goes on later.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gputune.data.dataset import Dataset
from gputune.engine.backend import trains_as
from gputune.engine.checkpoint import Checkpoint, Checkpointing
from gputune.engine.mlp import StackedMLP
from gputune.engine.stop import Stop
from gputune.engine.train import AfterEpoch, BegunChunk, Spent, State, Trained, Training, train
from gputune.modules.construction import Builder
from gputune.modules.inspection import traits_of
from gputune.modules.looped import LoopedModule
from gputune.modules.module import StackedModule, Traits
from gputune.population.population import Network, Population, Shape
from gputune.scoring.objective import Objective, make_objective
from gputune.types import Outputs, Precision, first_metric

Progress = Callable[[int, np.ndarray], Any]
"""Called with the number of trial-epochs just done, and their scores (C, epochs, F)."""


@dataclass(frozen=True, kw_only=True)
class Job(Training):
    """What every chunk of a search has in common."""

    module_class: Builder | None = None
    traits: Mapping[str, Traits] = field(default_factory=dict)  # what the module does, by ``Population.arguments``
    objective: Objective | None = None  # what a module is trained on; None: the loss of its task
    stop: Stop = field(default_factory=Stop)  # says when training ends, and no chunk begins any more
    checkpointing: Checkpointing | None = None  # how the state of a long training is kept; None: not at all
    keep_stopped: bool = True  # whether a chunk that is stopped keeps its state, not the one who gets its outcome
    patience: int | None = None  # epochs without a better fold mean after which a trial leaves its chunk
    each_epoch: bool = False  # whether someone is told of every epoch, who may end training then
    precision: Precision = "full"

    def is_over(self) -> bool:
        """Whether training ends now."""
        return self.stop.is_over()

    def network(self, data: Dataset, chunk: Population) -> Network:
        """Return the stacked model of a chunk."""
        shape = Shape.of(data, self.precision)
        if chunk.kind != "module":
            return StackedMLP(chunk.kind, chunk.configs, shape, seed=self.seed)
        assert self.module_class is not None
        first, known = chunk.configs[0], self.traits.get(chunk.arguments)  # a worker need not try the module again
        traits = known or traits_of(self.module_class, first, data, objective=self.objective)
        objective = self.objective or make_objective(None, None, None, data.task)
        way = trains_as(self.backend, chunk.kind, first, traits.loop_reason)
        kind = LoopedModule if way == "loop" else StackedModule
        return kind(self.module_class, chunk.configs, shape, seed=self.seed, traits=traits, objective=objective)

    def run(self, data: Dataset, chunk: Population, progress: Progress | None = None) -> "Outcome":
        """Train one chunk and return its curves."""
        begin = time.monotonic()
        trained = train_chunk(self, data, chunk, progress)
        seconds = time.monotonic() - begin + BegunChunk.of(chunk).seconds
        outputs = trained.outputs_of(chunk.index)
        return Outcome(chunk.index, trained.curves, trained.epochs, seconds, spent=trained.spent, outputs=outputs)


@dataclass(frozen=True)
class Outcome:
    """What training a chunk gave: ``index`` of its trials, ``curves`` (C, epochs, F), epochs done, seconds.

    ``spent`` is what they were spent on, where that is known; ``fault`` says what went wrong and did no harm;
    ``outputs`` are those that were kept, by the entries of ``index``.
    """

    index: tuple[int, ...]
    curves: np.ndarray
    epochs: int
    seconds: float
    spent: Spent = field(default=Spent(), kw_only=True)
    fault: str = field(default="", kw_only=True)
    outputs: Mapping[int, Outputs] = field(default_factory=dict, kw_only=True)


def train_chunk(
    job: Job, data: Dataset, chunk: Population, progress: Progress | None = None, after_epoch: AfterEpoch | None = None
) -> Trained:
    """Train one chunk, from where it was begun, and return it with its members.

    With ``after_epoch`` that alone decides when it ends, and no checkpoint is written.
    """
    begun, data = BegunChunk.of(chunk), data.of(chunk.configs[0])
    at_once = after_epoch is None and job.patience is None and not job.each_epoch
    watch = after_epoch or _Watch(job, begun, progress)
    return train(job.network(data, chunk), data, begun, job, watch, at_once=at_once)


@dataclass(frozen=True)
class RungOutcome(Outcome):
    """What a chunk gave up to a rung: ``state`` has a row for each of the trials ``alive`` (positions in the chunk)."""

    state: State
    alive: tuple[int, ...]


@dataclass(frozen=True)
class RungJob(Job):
    """Trains every chunk on from where it is up to ``epochs``, of ``horizon``."""

    def run(self, data: Dataset, chunk: Population, progress: Progress | None = None) -> RungOutcome:
        """Train one chunk; its curves have the epochs since it was begun."""
        begin, start = time.monotonic(), BegunChunk.of(chunk).epoch
        trained = train_chunk(self, data, chunk, progress)
        state = State(trained.epochs, tuple(buffer.cpu() for buffer in trained.state.buffers))
        return RungOutcome(
            chunk.index,
            trained.curves[:, start : trained.epochs],
            trained.epochs - start,
            time.monotonic() - begin,
            state,
            trained.alive,
            spent=trained.spent,
            outputs=trained.outputs_of(chunk.index),
        )


class _Watch:
    """What happens after an epoch, or several: they are told, the state is kept where that is due, training may end."""

    def __init__(self, job: Job, chunk: BegunChunk, progress: Progress | None) -> None:
        self.job, self.chunk, self.progress = job, chunk, progress
        self.begin, self.told = time.monotonic(), chunk.epoch
        self.due = self.begin + (math.inf if job.checkpointing is None else job.checkpointing.seconds)

    def __call__(self, trained: Trained) -> bool | np.ndarray:
        epoch, curves = trained.epochs, trained.curves
        if self.progress is not None:
            for done in range(self.told, epoch):
                self.progress(len(curves), curves[:, done : done + 1])
        self.told = epoch
        over, checkpointing, now = self.job.is_over(), self.job.checkpointing, time.monotonic()
        is_due = now >= self.due or (over and self.job.keep_stopped)
        if checkpointing is not None and is_due and epoch < self.job.epochs and trained.alive:
            trials = tuple(checkpointing.numbers[i] for i in self.chunk.index)
            seconds = self.chunk.seconds + now - self.begin
            checkpoint = Checkpoint(trials, trained.alive, curves[:, :epoch], trained.state, seconds)
            self.due = time.monotonic() + checkpointing.keep(checkpoint, self.chunk.configs)
        if over or self.job.patience is None or not trained.alive:
            return over
        means = first_metric(curves[list(trained.alive), :epoch], axes=3).mean(2)
        return stalled_epochs(means)[:, -1] < self.job.patience


def stalled_epochs(means: np.ndarray) -> np.ndarray:
    """Return (C, epochs) how many epochs have passed since the best of the means (C, epochs) so far, the earliest."""
    epochs = np.arange(means.shape[1])
    best = np.maximum.accumulate(means, axis=1)
    is_better = np.pad(best[:, 1:] > best[:, :-1], ((0, 0), (1, 0)))
    stalled: np.ndarray = epochs - np.maximum.accumulate(np.where(is_better, epochs, 0), axis=1)
    return stalled
