"""One chunk, from its configurations to its results: the unit of work of a process, of a store, of a cluster."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from gputune.data.dataset import Dataset
from gputune.engine.backprop import StackedMLP
from gputune.engine.network import Network, Shape
from gputune.engine.population import Population
from gputune.engine.scoring import Scoring
from gputune.engine.stopping import Stop
from gputune.engine.train import Trained, train
from gputune.engine.vmap import StackedModule

Progress = Callable[[int, np.ndarray], Any]
"""Called with the number of trial-epochs just done, and their scores (C, epochs, F)."""


@dataclass(frozen=True)
class Job:
    """What every chunk of a search has in common."""

    seed: int
    epochs: int
    horizon: int
    scoring: Scoring | None
    module_class: type[nn.Module] | None
    stop: Stop = field(default_factory=Stop)
    """Says when training ends after the running epoch, and no chunk begins any more."""

    def is_over(self) -> bool:
        """Whether training ends now."""
        return self.stop.is_over()

    def run(self, data: Dataset, chunk: Population, progress: Progress | None = None) -> "Outcome":
        """Train one chunk and return its curves."""
        begin = time.monotonic()
        trained = train_chunk(self, data, chunk, progress)
        return Outcome(chunk.index, trained.curves, trained.epochs, time.monotonic() - begin)


@dataclass(frozen=True)
class Outcome:
    """What training a chunk gave: ``index`` of its trials, ``curves`` (C, epochs, F), epochs done, seconds."""

    index: tuple[int, ...]
    curves: np.ndarray
    epochs: int
    seconds: float


def train_chunk(job: Job, data: Dataset, chunk: Population, progress: Progress | None = None) -> Trained:
    """Train one chunk and return it with its members."""

    def after_epoch(epoch: int, curves: np.ndarray) -> bool:
        if progress is not None:
            progress(len(curves), curves[:, epoch - 1 : epoch])
        return job.is_over()

    return train(
        make_network(chunk, data, seed=job.seed, module_class=job.module_class),
        data,
        chunk.configs,
        seed=job.seed,
        epochs=job.epochs,
        horizon=job.horizon,
        scoring=job.scoring,
        after_epoch=after_epoch,
    )


def make_network(
    chunk: Population, data: Dataset, *, seed: int, module_class: type[nn.Module] | None
) -> Network:
    """Return the stacked model of a chunk."""
    shape = Shape(
        folds=data.n_folds,
        n_features=data.n_features,
        n_outputs=data.n_outputs,
        dtype=data.dtype,
        device=data.device,
        regression=data.task == "regression",
        present=data.present,
    )
    if chunk.kind == "module":
        assert module_class is not None
        return StackedModule(module_class, chunk.configs, shape, seed=seed)
    return StackedMLP(chunk.kind, chunk.configs, shape, seed=seed)
