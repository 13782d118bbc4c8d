"""How one configuration trains, whatever words it was written in, how a chunk of them ends, and
what it gave.

A member ends by itself where its loss stalls.
"""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from types import FunctionType

import cloudpickle
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils import check_random_state
from torch import Tensor, nn

from gputune.data.dataset import Dataset
from gputune.data.scaling import Scaling
from gputune.engine.job import Job, Outcome, Progress, train_chunk
from gputune.engine.train import Trained
from gputune.errors import DivergedError
from gputune.modules.construction import Builder
from gputune.population.population import ModelKind, Population
from gputune.scoring import scoring
from gputune.scoring.losses import row_losses
from gputune.scoring.objective import Objective, make_objective
from gputune.types import Config, Task

Place = tuple[int, int]  # (fold, trial): which member of a search
MemberSlope = tuple[float, dict[str, float], float]
"""Of one member: its validation loss, the loss's slope in each hyperparameter, the ratio of the
chaos guard."""
# of random_state=None: once for all configurations that are fitted together
DrawSeed = Callable[[], int]

# the optimizers that have one
MOMENTUM = ("sgd", "nesterov", "rmsprop", "muon", "sgdhd", "nesterovhd")
AUTO_BATCH = 200  # what batch_size="auto" is in scikit-learn, and at most all rows
# In place of a loss that is no number: a member that diverges leaves its trial in the other folds
# alone.
LARGEST = float(np.finfo(np.float64).max)


@dataclass(frozen=True)
class Patience:
    """When training has converged: after more than ``epochs`` epochs whose loss was not below the
    least by ``tol``."""

    tol: float
    epochs: int


@dataclass(frozen=True, eq=False)
class Member:
    """One trained member.

    module    makes a plain module with copies of its parameters, in evaluation mode, on the CPU
    classes   positions of its outputs' classes among all classes, None for a regression
    present   (K,) which of them take part, None where all do
    center, scale   a regression's target is ``output * scale + center``, numbers or (K,)
    scaling   what an input becomes before it is given to the module, None: what it is
    rows      that it was trained on
    epochs, stalled   how long it has trained, and how many epochs at its end without an improvement
    seed      what its random numbers come from
    buffers   the engine's buffers of this member where it may train on, None where its training is
              over
    losses    (epochs,) on its training rows after each epoch; none where it was not watched
    draws     whether it draws random numbers when it predicts
    """

    module: Callable[[], nn.Module]
    classes: NDArray[np.int64] | None
    present: NDArray[np.bool_] | None
    center: NDArray[np.float64]
    scale: NDArray[np.float64]
    scaling: tuple[Scaling | None, ...]
    rows: int
    epochs: int
    stalled: int
    seed: int
    buffers: tuple[Tensor, ...] | None
    losses: NDArray[np.float64]
    draws: bool


@dataclass(frozen=True, eq=False)
class RungState:
    """Where one configuration is in a training that stops at rungs: after ``epoch`` of ``horizon``
    epochs.

    seed     that of its random numbers, None before the first rung
    buffers  by fold: the engine's buffers of one member, parameters first
    """

    epoch: int
    horizon: int
    seed: int | None
    buffers: Mapping[int, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Training:
    """How fits that are made together train.

    workers   processes; None lets an estimate decide
    deadline  a ``time.monotonic()``; what has not ended by then fails with TimeoutError
    states    where each trial goes on from, in a search that stops at rungs
    patient   False: members train to their last epoch, wherever their loss stalls
    """

    workers: int | None = 1
    deadline: float | None = None
    states: Mapping[int, RungState] = field(default_factory=dict)
    patient: bool = True


@dataclass(frozen=True)
class Recipe:
    """How one configuration trains, whatever words it was written in.

    config   the engine's complete configuration; its weight decay still lacks what ``alpha`` adds
    alpha    scikit-learn's L2 penalty, None where ``weight_decay`` says it; see ``config_for``
    epochs   how long it trains, and the horizon of its schedule
    seed     keys its start, row orders and dropout
    device   as the user wrote it
    module   what makes a module of the user's, for kind "module"
    loss     the name of a loss or the user's own, None for that of the task
    step, augment  functions of the user's for a minibatch, as ``Objective`` has them
    numbers  "standard" scales the channels of each input by the training rows, "none" leaves them
    state    where a training that stops at rungs is; None for one that goes to its end at once
    patience when it ends before its last epoch; None: never
    """

    kind: ModelKind
    config: Config
    alpha: float | None
    epochs: int
    seed: int
    device: str
    module: Builder | None = None
    loss: str | Callable[..., object] | None = None
    step: Callable[..., object] | None = None
    augment: Callable[..., object] | None = None
    numbers: str = "none"
    state: RungState | None = None
    patience: Patience | None = None

    @property
    def begin(self) -> int:
        """Epochs that it has trained already."""
        return 0 if self.state is None else self.state.epoch

    @property
    def horizon(self) -> int:
        """Epochs that its schedule runs over."""
        return self.epochs if self.state is None else self.state.horizon

    @property
    def family(self) -> Hashable:
        """What recipes have in common that train together, on one device and for as long."""
        length = (self.begin, self.epochs, self.horizon, self.state is None)
        functions = tuple(map(content, (self.module, self.loss, self.step, self.augment)))
        return (
            self.device,
            self.kind,
            functions,
            self.numbers,
            self.seed,
            length,
            self.patience is None,
        )

    def objective(self, task: Task) -> Objective | None:
        """Return what a module is trained on, None for a built-in model; InputError for what does
        not fit the task."""
        if self.kind != "module":
            return None
        objective = make_objective(self.loss, self.step, self.augment, task)
        objective.check(self.config)
        return objective

    def config_for(self, rows: int, weight: float) -> Config:
        """Return the configuration for so many training rows of so much weight in all.

        scikit-learn's gradient is (sum of weight x slope + alpha W) / (sum of weights) over a
        minibatch, so its penalty is an L2 weight decay of alpha / (sum of the minibatch's weights):
        here of a whole minibatch of average weight. Departures: a short last minibatch has the same
        decay, and the biases decay too.
        """
        if self.alpha is None:
            return self.config
        batch_weight = min(self.config["batch_size"], rows) * weight / rows
        return self.config | {"weight_decay": self.alpha / batch_weight}


def draw_seed(random_state: object, draw: DrawSeed) -> int:
    """Return an integer as it is, a draw from a RandomState, ``draw()`` for None; else raise
    scikit-learn's error."""
    if random_state is None:
        return draw()
    generator = check_random_state(random_state)
    return (
        int(random_state)
        if isinstance(random_state, Integral)
        else int(generator.randint(2**31 - 1))
    )


def content(value: object) -> Hashable:
    """Return what a value and its copies have in common; nothing else equals one that cannot be
    pickled."""
    if value is None or isinstance(value, str | type | FunctionType):
        return value
    try:
        return type(value), cloudpickle.dumps(value)
    except Exception:
        return id(value), object()


class TrainingLoss(scoring.Scoring):
    """Minus the loss on the training rows, which are a dataset's validation rows here, by their
    weights."""

    def __init__(self) -> None:
        super().__init__("neg_loss", None, None, None)

    def __call__(
        self, data: Dataset, fold: int, outputs: Tensor, member: scoring.Member | None = None
    ) -> Tensor:
        """Return the scores (C,), float64, of outputs (C, m, K); of numbers half the squared error,
        standardised."""
        rows = data.folds[fold].valid
        outputs = outputs.double()
        numbers = data.y.dim() > 1
        if data.present is not None:
            outputs = outputs.masked_fill(~data.present[fold], -torch.inf)
        y = data.y[fold, rows].double() if numbers else data.y[rows]
        losses = row_losses(outputs, y.expand(outputs.shape[:2])) / (2 if numbers else 1)
        weights = (
            losses.new_ones(len(rows))
            if data.weights is None
            else data.weights[fold, rows].double()
        )
        mean = (losses * weights).sum(1) / weights.sum()
        return -mean.nan_to_num(LARGEST, LARGEST).clamp(max=LARGEST)


class Stopping:
    """What happens after every epoch of a chunk: members whose loss stalls end, and their
    parameters are kept.

    patiences  of the trials (C)
    ends       (2, C, F) epochs that each member has trained, and those of them at its end without
               an improvement
    rows       (C, F, N) its parameters at its end
    """

    def __init__(self, job: Job, patiences: Sequence[Patience], folds: int) -> None:
        self.job = job
        self.tol, self.most = (
            np.array(of)[:, None] for of in zip(*((p.tol, p.epochs) for p in patiences))
        )
        self.best = np.full((len(patiences), folds), np.inf)
        self.ends = np.zeros((2, len(patiences), folds), dtype=int)
        self.rows: Tensor | None = None

    def __call__(self, trained: Trained) -> bool | np.ndarray:
        """Return which of the trials that are still there have a member that goes on; True where
        time is over."""
        alive = np.array(trained.alive)
        epochs, stalled = self.ends[:, alive]
        loss = -trained.curves[alive, trained.epochs - 1]
        best = self.best[alive]
        goes_on = epochs == 0
        stalled = np.where(
            goes_on, np.where(loss > best - self.tol[alive], stalled + 1, 0), stalled
        )
        ends = goes_on & ((stalled > self.most[alive]) | (trained.epochs == self.job.epochs))
        epochs = np.where(ends, trained.epochs, epochs)
        self.ends[:, alive] = [epochs, stalled]
        self.best[alive] = np.where(goes_on, np.fmin(best, loss), best)
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

    ``buffers`` (C, F, N) are their whole state, None where they do not train on; ``ends`` (2, C, F)
    are the epochs of each member, and how many of its last ones had stalled.
    """

    flat: np.ndarray
    buffers: tuple[Tensor, ...] | None
    ends: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class MemberJob(Job):
    """A job whose chunks give their members' weights, not their scores; where they may train on,
    all their state.

    ``patiences`` are those of the trials by their index, none where all train to the last epoch.
    """

    keeps_state: bool = False
    patiences: Mapping[int, Patience] = field(default_factory=dict)

    def run(self, data: Dataset, chunk: Population, progress: Progress | None = None) -> Weights:
        """Train one chunk and return its weights."""
        begin = time.monotonic()
        state = None
        if self.patiences:
            stopping = Stopping(self, [self.patiences[i] for i in chunk.index], data.n_folds)
            curves = train_chunk(self, data, chunk, after_epoch=stopping).curves
            epochs = 0
            flat = np.empty(0)
            ends = stopping.ends
            if stopping.rows is not None and ends[0].all():  # else the time was over
                flat = self.network(data, chunk).blocks.from_rows(stopping.rows).numpy()
                epochs = self.epochs
        else:
            trained = train_chunk(self, data, chunk, progress)
            curves = trained.curves
            epochs = trained.epochs
            state = (
                tuple(buffer.cpu() for buffer in trained.state.buffers)
                if self.keeps_state
                else None
            )
            # the next chunk may train in this one's memory
            flat = trained.scored.to("cpu", copy=True).numpy()
            ends = np.zeros((2, len(chunk.index), data.n_folds), dtype=int)
            ends[0] = epochs
        return Weights(chunk.index, curves, epochs, time.monotonic() - begin, flat, state, ends)

    def members(
        self, data: Dataset, chunk: Population, weights: Weights, classes: NDArray[np.int64] | None
    ) -> list[Member | Exception]:
        """Return the members of a chunk, fold by fold, that trained to their last epoch; none where
        it did not."""
        if weights.epochs < self.epochs:
            return []
        network = self.network(data, chunk)
        flat = torch.from_numpy(weights.flat)
        params = network.blocks.views(flat)
        shape = (data.n_folds, len(chunk.index), -1)
        whole = [
            w.reshape(shape).all(2) for w in network.blocks.by_member(flat.isfinite()).values()
        ]
        finite = torch.stack(whole).all(0).tolist()  # F lists of C
        center = data.center.cpu().numpy()
        scale = data.scale.cpu().numpy()
        members: list[Member | Exception] = []
        for f, fold in enumerate(data.folds):
            scaling = tuple(None if of is None else of.of_fold(f) for of in data.scaling)
            present = (
                None
                if data.present is None or data.present[f].all()
                else data.present[f].cpu().numpy()
            )
            for c, config in enumerate(chunk.configs):
                if not finite[f][c]:
                    words = (
                        f"the training diverged with {config['optimizer']} and a learning rate of"
                    )
                    members.append(
                        DivergedError(
                            f"{words} {config['lr']:.3g}: its weights are no finite numbers any "
                            "more; use a smaller rate, or scale the inputs (StandardScaler in a "
                            "pipeline)."
                        )
                    )
                    continue
                epochs, stalled = weights.ends[:, c, f].tolist()
                state = None if weights.buffers is None else tuple(b[c, f] for b in weights.buffers)
                losses = -weights.curves[c, : epochs if self.patiences else 0, f]
                module = partial(network.member, params, f, c)
                lengths = (len(fold.train), epochs, stalled)
                outputs = (classes, present, center[f], scale[f], scaling)
                members.append(
                    Member(
                        module,
                        *outputs,
                        *lengths,
                        self.seed,
                        state,
                        losses,
                        network.evaluation_draws,
                    )
                )
        return members
