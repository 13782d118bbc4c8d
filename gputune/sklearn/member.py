"""Members that were trained: each a network of its own as soon as it is asked for, and what the chunks gave of them."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gputune.data.dataset import Dataset
from gputune.data.scaling import Scaling
from gputune.engine.job import Job, Outcome, Progress, train_chunk
from gputune.errors import DivergedError
from gputune.population.network import Network
from gputune.population.population import Population
from gputune.sklearn.recipe import Patience, Stopping
from gputune.types import Config, Params

Place = tuple[int, int]
"""(fold, trial): which member of a search."""


@dataclass(frozen=True, eq=False)
class Member:
    """One trained member: a network of its own as soon as it is asked for.

    classes   positions of its outputs' classes among all classes, None for a regression
    present   (K,) which of them take part, None where all do
    center, scale   a regression's target is ``output * scale + center``, numbers or (K,)
    scaling   what an input becomes before it is given to the module, None: what it is
    rows      that it was trained on
    epochs, seed    how long it has trained, and what its random numbers come from
    buffers   the engine's buffers of this member where it may train on, None where its training is over
    losses    (epochs,) on its training rows after each epoch; none where it was not watched
    stalled   epochs at its end without an improvement
    """

    network: Network
    params: Params
    place: Place
    classes: NDArray[np.int64] | None
    present: NDArray[np.bool_] | None
    center: NDArray[np.float64]
    scale: NDArray[np.float64]
    scaling: tuple[Scaling | None, ...]
    rows: int
    epochs: int
    seed: int
    buffers: tuple[Tensor, ...] | None
    losses: NDArray[np.float64]
    stalled: int

    def module(self) -> nn.Module:
        """Return a plain module with copies of the member's parameters, in evaluation mode, on the CPU."""
        return self.network.member(self.params, *self.place)


Members = dict[Place, Member | Exception]
"""What became of each (fold, trial): DivergedError, InputError for a module that cannot be trained, TimeoutError."""


@dataclass(frozen=True, kw_only=True)
class MemberJob(Job):
    """A job whose chunks give their members' weights, not their scores; where they may train on, all their state.

    ``patiences`` are those of the trials by their index, none where all train to the last epoch.
    """

    keeps_state: bool = False
    patiences: Mapping[int, Patience] = field(default_factory=dict)

    def run(self, data: Dataset, chunk: Population, progress: Progress | None = None) -> "Weights":
        """Train one chunk and return its weights."""
        begin = time.monotonic()
        if self.patiences:
            return self._watch(data, chunk)
        trained = train_chunk(self, data, chunk, progress)
        state = tuple(buffer.cpu() for buffer in trained.state.buffers) if self.keeps_state else None
        seconds = time.monotonic() - begin
        # A copy: the next chunk may train in this one's memory.
        flat = trained.scored.to("cpu", copy=True).numpy()
        ends = np.full((2, len(chunk.index), data.n_folds), trained.epochs)
        ends[1] = 0
        return Weights(chunk.index, trained.curves, trained.epochs, seconds, flat, state, ends)

    def _watch(self, data: Dataset, chunk: Population) -> "Weights":
        begin = time.monotonic()
        stopping = Stopping(self, [self.patiences[i] for i in chunk.index], data.n_folds)
        curves = train_chunk(self, data, chunk, after_epoch=stopping).curves
        seconds = time.monotonic() - begin
        ends = np.stack([stopping.epochs, stopping.stalled])
        if stopping.rows is None or not stopping.epochs.all():  # the time was over
            return Weights(chunk.index, curves, 0, seconds, np.empty(0), None, ends)
        flat = self.network(data, chunk).blocks.from_rows(stopping.rows).numpy()
        return Weights(chunk.index, curves, self.epochs, seconds, flat, None, ends)


@dataclass(frozen=True)
class Weights(Outcome):
    """What training a chunk gave: ``flat`` has all members' parameters in the order of its blocks.

    ``buffers`` (C, F, N) are their whole state, None where they do not train on; ``ends`` (2, C, F) are the epochs of
    each member, and how many of its last ones had stalled.
    """

    flat: np.ndarray
    buffers: tuple[Tensor, ...] | None
    ends: NDArray[np.int64]


def members_of(
    job: MemberJob, data: Dataset, chunk: Population, weights: Weights, classes: NDArray[np.int64] | None
) -> Members:
    """Return the members of a chunk that trained to their last epoch; none where it did not."""
    if weights.epochs < job.epochs:
        return {}
    network = job.network(data, chunk)
    flat = torch.from_numpy(weights.flat)
    params = network.blocks.views(flat)
    shape = (data.n_folds, len(chunk.index), -1)
    whole = [w.reshape(shape).all(2) for w in network.blocks.by_member(flat.isfinite()).values()]
    finite = torch.stack(whole).all(0).tolist()  # F lists of C
    center, scale = data.center.cpu().numpy(), data.scale.cpu().numpy()
    present = None if data.present is None else data.present.cpu().numpy()
    members: Members = {}
    for f in range(data.n_folds):
        scaling = tuple(None if of is None else of.of_fold(f) for of in data.scaling)
        takes_part = None if present is None or present[f].all() else present[f]
        for c, i in enumerate(chunk.index):
            if not finite[f][c]:
                members[f, i] = _diverged_error(chunk.configs[c])
                continue
            epochs, stalled = weights.ends[:, c, f].tolist()
            members[f, i] = Member(
                network,
                params,
                (f, c),
                classes=classes,
                present=takes_part,
                center=center[f],
                scale=scale[f],
                scaling=scaling,
                rows=len(data.folds[f].train),
                epochs=epochs,
                seed=job.seed,
                buffers=None if weights.buffers is None else tuple(b[c, f] for b in weights.buffers),
                losses=-weights.curves[c, : epochs if job.patiences else 0, f],
                stalled=stalled,
            )
    return members


def _diverged_error(config: Config) -> DivergedError:
    return DivergedError(
        f"the training diverged with {config['optimizer']} and a learning rate of {config['lr']:.3g}: its weights are "
        "no finite numbers any more; use a smaller rate, or scale the inputs (StandardScaler in a pipeline)."
    )
