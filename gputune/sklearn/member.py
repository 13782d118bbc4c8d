"""Members that were trained: how a chunk of them ends, each by itself where its loss stalls, and what it gave."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gputune.data.dataset import Dataset
from gputune.data.scaling import Scaling
from gputune.engine.job import Job, Outcome, Progress, train_chunk
from gputune.engine.train import Trained
from gputune.errors import DivergedError
from gputune.population.population import Network, Population
from gputune.scoring import scoring
from gputune.scoring.losses import row_losses
from gputune.sklearn.recipe import Patience
from gputune.types import Params

LARGEST = float(np.finfo(np.float64).max)
"""In place of a loss that is no number: a member that diverges leaves its trial in the other folds alone."""

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


class TrainingLoss(scoring.Scoring):
    """Minus the loss on the training rows, which are a dataset's validation rows here, by their weights."""

    def __init__(self) -> None:
        super().__init__("neg_loss", None, None, None)

    def __call__(self, data: Dataset, fold: int, outputs: Tensor, member: scoring.Member | None = None) -> Tensor:
        """Return the scores (C,), float64, of outputs (C, m, K); of numbers half the squared error, standardised."""
        del member
        rows, outputs = data.folds[fold].valid, outputs.double()
        if data.present is not None:
            outputs = outputs.masked_fill(~data.present[fold], -torch.inf)
        y = data.y[rows] if data.y.dim() == 1 else data.y[fold, rows].double()
        losses = row_losses(outputs, y.expand(outputs.shape[:2])) / (1 if data.y.dim() == 1 else 2)
        weights = torch.ones(len(rows), dtype=torch.float64, device=losses.device)
        if data.weights is not None:
            weights = data.weights[fold, rows].double()
        mean = (losses * weights).sum(1) / weights.sum()
        return -mean.nan_to_num(LARGEST, LARGEST).clamp(max=LARGEST)


class Stopping:
    """What happens after every epoch of a chunk: members whose loss stalls end, and their parameters are kept.

    patiences  of the trials (C)
    ends       (2, C, F) epochs that each member has trained, and those of them at its end without an improvement
    rows       (C, F, N) its parameters at its end
    """

    def __init__(self, job: Job, patiences: Sequence[Patience], folds: int) -> None:
        self.job = job
        self.tol = np.array([p.tol for p in patiences])[:, None]
        self.most = np.array([p.epochs for p in patiences])[:, None]
        self.best = np.full((len(patiences), folds), np.inf)
        self.ends = np.zeros((2, len(patiences), folds), dtype=int)
        self.rows: Tensor | None = None

    def __call__(self, trained: Trained) -> bool | np.ndarray:
        """Return which of the trials that are still there have a member that goes on; True where time is over."""
        alive = np.array(trained.alive)
        epochs, stalled = self.ends[:, alive]
        loss, best = -trained.curves[alive, trained.epochs - 1], self.best[alive]
        goes_on = epochs == 0
        stalled = np.where(goes_on, np.where(loss > best - self.tol[alive], stalled + 1, 0), stalled)
        ends = goes_on & ((stalled > self.most[alive]) | (trained.epochs == self.job.epochs))
        epochs = np.where(ends, trained.epochs, epochs)
        self.ends[:, alive], self.best[alive] = [epochs, stalled], np.where(goes_on, np.fmin(best, loss), best)
        if ends.any():
            rows = trained.network.blocks.to_rows(trained.scored).cpu()
            if self.rows is None:
                self.rows = rows.new_empty((*self.best.shape, rows.shape[2]))
            for c, f in np.argwhere(ends):
                self.rows[alive[c], f] = rows[c, f]
        return self.job.is_over() or (epochs == 0).any(1)


@dataclass(frozen=True)
class Weights(Outcome):
    """What training a chunk gave: ``flat`` has all members' parameters in the order of its blocks.

    ``buffers`` (C, F, N) are their whole state, None where they do not train on; ``ends`` (2, C, F) are the epochs of
    each member, and how many of its last ones had stalled.
    """

    flat: np.ndarray
    buffers: tuple[Tensor, ...] | None
    ends: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class MemberJob(Job):
    """A job whose chunks give their members' weights, not their scores; where they may train on, all their state.

    ``patiences`` are those of the trials by their index, none where all train to the last epoch.
    """

    keeps_state: bool = False
    patiences: Mapping[int, Patience] = field(default_factory=dict)

    def run(self, data: Dataset, chunk: Population, progress: Progress | None = None) -> Weights:
        """Train one chunk and return its weights."""
        begin = time.monotonic()
        if self.patiences:
            stopping = Stopping(self, [self.patiences[i] for i in chunk.index], data.n_folds)
            curves, epochs = train_chunk(self, data, chunk, after_epoch=stopping).curves, 0
            flat, state, ends = np.empty(0), None, stopping.ends
            if stopping.rows is not None and ends[0].all():  # else the time was over
                flat, epochs = self.network(data, chunk).blocks.from_rows(stopping.rows).numpy(), self.epochs
        else:
            trained = train_chunk(self, data, chunk, progress)
            curves, epochs = trained.curves, trained.epochs
            state = tuple(buffer.cpu() for buffer in trained.state.buffers) if self.keeps_state else None
            flat = trained.scored.to("cpu", copy=True).numpy()  # the next chunk may train in this one's memory
            ends = np.zeros((2, len(chunk.index), data.n_folds), dtype=int)
            ends[0] = epochs
        return Weights(chunk.index, curves, epochs, time.monotonic() - begin, flat, state, ends)


def members_of(
    job: MemberJob, data: Dataset, chunk: Population, weights: Weights, classes: NDArray[np.int64] | None
) -> list[Member | Exception]:
    """Return the members of a chunk, fold by fold, that trained to their last epoch; none where it did not."""
    if weights.epochs < job.epochs:
        return []
    network, flat = job.network(data, chunk), torch.from_numpy(weights.flat)
    params, shape = network.blocks.views(flat), (data.n_folds, len(chunk.index), -1)
    whole = [w.reshape(shape).all(2) for w in network.blocks.by_member(flat.isfinite()).values()]
    finite = torch.stack(whole).all(0).tolist()  # F lists of C
    center, scale = data.center.cpu().numpy(), data.scale.cpu().numpy()
    present = None if data.present is None else data.present.cpu().numpy()
    members: list[Member | Exception] = []
    for f in range(data.n_folds):
        scaling = tuple(None if of is None else of.of_fold(f) for of in data.scaling)
        takes_part = None if present is None or present[f].all() else present[f]
        for c, config in enumerate(chunk.configs):
            if not finite[f][c]:
                error = DivergedError(
                    f"the training diverged with {config['optimizer']} and a learning rate of {config['lr']:.3g}: its "
                    "weights are no finite numbers any more; use a smaller rate, or scale the inputs (StandardScaler "
                    "in a pipeline)."
                )
                members.append(error)
                continue
            epochs, stalled = weights.ends[:, c, f].tolist()
            member = Member(
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
            members.append(member)
    return members
