"""The description of one training run, independent of the estimator's parameter names.

This module also defines when a chunk stops training, and the result of each member. A member is one
trial on one fold. A chunk is a set of members that train together. A member can end earlier than
the others when its loss stalls.

In shapes, C counts configurations, F folds, and N elements of one member's parameters.
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
from torch.nn import functional

from gputune.data.dataset import Dataset
from gputune.data.scaling import Scaling
from gputune.engine.job import Job, Outcome, ProgressCallback, train_chunk
from gputune.engine.train import Trained
from gputune.ground.annotations import FloatArray, IntArray
from gputune.ground.errors import DivergedError
from gputune.ground.types import Config, Task
from gputune.modules.construction import Builder
from gputune.population.kinds import ModelKind, is_module
from gputune.population.population import Population
from gputune.population.state import Selection, State
from gputune.scoring import scoring
from gputune.scoring.losses import row_losses
from gputune.scoring.objective import Objective, make_objective

FoldTrial = tuple[int, int]  # (fold, trial): which member of a search
FoldStates = Mapping[int, State]  # the state (1, 1, N) of one trial in each fold
MemberSlope = tuple[float, ...]
"""For one member: its validation loss, the derivative of this loss in each hyperparameter, and the
chaos ratio."""
# Returns the seed for random_state=None, drawn once for all configurations that are fitted
# together.
DrawSeed = Callable[[], int]

# optimizers that have a momentum
MOMENTUM = ("sgd", "nesterov", "rmsprop", "muon", "sgdhd", "nesterovhd")
AUTO_BATCH = 200  # scikit-learn's batch_size="auto"; at most all rows
# Replaces a NaN loss. A member that diverges then ends only itself, and its trial trains on in the
# other folds.
LARGEST = float(np.finfo(np.float64).max)


@dataclass(frozen=True)
class Patience:
    """The rule by which a training run counts as converged.

    The run has converged after more than ``epochs`` epochs in a row without a loss below the lowest
    loss minus ``tol``.
    """

    tol: float
    epochs: int


@dataclass(frozen=True, eq=False)
class TrainedMember:
    """The result of training one member (one trial on one fold).

    Attributes:
        module: function that makes a plain module with copies of the parameters, in evaluation
            mode, on the CPU.
        classes: positions of its outputs' classes among all classes. None for a regression.
        present: (K,) True for the classes that take part in training. None if all classes do.
        center: a regression's prediction is ``output * scale + center``. A scalar or (K,).
        scale: see ``center``.
        scaling: the scaling of each input. None leaves an input unchanged.
        rows: number of training rows.
        epochs: number of trained epochs.
        stalled: number of last epochs without an improvement.
        seed: seed of its random numbers.
        state: the state (1, 1, N) of this member if it can continue training. The state has no
            buffers if the training is over.
        losses: (epochs,) loss on its training rows after each epoch. Empty if the loss was not
            watched.
        draws: whether the module draws random numbers in predictions.
        has_probabilities: whether the module returns probabilities instead of logits.
    """

    module: Callable[[], nn.Module]
    classes: IntArray | None
    present: NDArray[np.bool_] | None
    center: FloatArray
    scale: FloatArray
    scaling: tuple[Scaling | None, ...]
    rows: int
    epochs: int
    stalled: int
    seed: int
    state: State
    losses: FloatArray
    draws: bool
    has_probabilities: bool = False


@dataclass(frozen=True)
class FitOptions:
    """The options that all fits of a joint training share: processes, deadline, rungs.

    Attributes:
        workers: number of processes. None lets an estimate decide.
        deadline: a ``time.monotonic()`` time. Fits that have not ended by then fail with
            TimeoutError.
        horizon: number of epochs of the schedule, in a search that stops at rungs. None in other
            searches.
        states: the seed and the state in each fold with which a trial continues at a rung. Empty at
            the first rung.
        patient: False makes members train to their last epoch, even if their loss stalls.
    """

    workers: int | None = 1
    deadline: float | None = None
    horizon: int | None = None
    states: Mapping[int, tuple[int, FoldStates]] = field(default_factory=dict)
    patient: bool = True


@dataclass(frozen=True)
class Recipe:
    """The description of one training run, independent of the estimator's parameter names.

    Attributes:
        kind: kind of model.
        config: the engine's complete configuration. Its weight decay does not include ``alpha``
            yet.
        alpha: scikit-learn's L2 penalty. None if ``weight_decay`` replaces it. See ``config_for``.
        epochs: number of epochs.
        seed: seed of initial weights, row orders and dropout.
        device: the device that the user set.
        module: function or class that makes the user's module, for kind "module".
        loss: name of a loss or the user's own loss. None for the default of the task.
        step: the user's training step for a minibatch, as in ``Objective``.
        augment: the user's augmentation of a minibatch, as in ``Objective``.
        numbers: "standard" scales the channels of each input by the training rows, "none" does not.
        horizon: number of epochs of the schedule, if the training stops at rungs. None for a
            training without rungs.
        states: the states from which the training continues. Empty if it begins.
        patience: rule that ends the training before its last epoch. None: never.
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
    horizon: int | None = None
    states: FoldStates = field(default_factory=dict)
    patience: Patience | None = None

    @property
    def begin(self) -> int:
        """The number of epochs that this configuration has trained at earlier rungs."""
        return max((state.epoch for state in self.states.values()), default=0)

    @property
    def family(self) -> Hashable:
        """A key that is equal for recipes that can train together: same device, model, seed and
        epochs."""
        length = (self.begin, self.epochs, self.horizon)
        functions = tuple(map(content, (self.module, self.loss, self.step, self.augment)))
        never_stops = self.patience is None
        return self.device, self.kind, functions, self.numbers, self.seed, length, never_stops

    def objective(self, task: Task) -> Objective | None:
        """Return the training objective of a module, or None for a built-in model.

        Raises InputError if the loss does not fit the task.
        """
        if not is_module(self.kind):
            return None
        objective = make_objective(self.loss, self.step, self.augment, task)
        objective.check(self.config)
        return objective

    def config_for(self, rows: int, weight: float) -> Config:
        """Return the configuration, with ``alpha`` converted to a weight decay for the training
        rows.

        scikit-learn's gradient over a minibatch is (sum of weight x slope + alpha W) / (sum of
        weights). So its penalty is an L2 weight decay of alpha / (sum of the minibatch's weights).
        Here the sum is that of a whole minibatch with average weights. Departures: a short last
        minibatch has the same decay, and the biases decay too.
        """
        if self.alpha is None:
            return self.config
        # weight of a whole minibatch with average weights
        batch_weight = min(self.config["batch_size"], rows) * weight / rows
        return self.config | {"weight_decay": self.alpha / batch_weight}


def likelihood_loss(outputs: Tensor, y: Tensor) -> Tensor:
    """Return the negative log-likelihood (B,) of classes y (B,) for probabilities (B, K).

    skorch adds the same small number to the probabilities before it takes their logarithms.
    """
    logarithms = torch.log(outputs + torch.finfo(outputs.dtype).eps)
    return functional.nll_loss(logarithms, y, reduction="none")


def draw_seed(random_state: object, draw: DrawSeed) -> int:
    """Return an integer seed for scikit-learn's parameter ``random_state``.

    An integer stays unchanged, a RandomState gives its next random integer, and None gives
    ``draw()``. Anything else raises scikit-learn's error.
    """
    if random_state is None:
        return draw()
    generator = check_random_state(random_state)
    if isinstance(random_state, Integral):
        return int(random_state)
    return int(generator.randint(2**31 - 1))


def content(value: object) -> Hashable:
    """Return a hashable key for a value, so that a value and its copies have equal keys.

    A value that cannot be pickled gets a unique key.
    """
    if value is None or isinstance(value, str | type | FunctionType):
        return value
    try:
        return type(value), cloudpickle.dumps(value)
    except Exception:
        return id(value), object()


class TrainingLoss(scoring.Scoring):
    """A score that is the negative weighted loss on the training rows.

    The dataset must have the training rows as its validation rows.
    """

    def __init__(self) -> None:
        super().__init__("neg_loss", None, None, None)

    def __call__(
        self, data: Dataset, fold: int, outputs: Tensor, member: scoring.TrialModel | None = None
    ) -> Tensor:
        """Return the score (C,), float64, of each trial: minus the weighted mean loss of its
        outputs (C, m, K).

        For a regression the loss is half the squared error of the standardized target.
        """
        rows = data.folds[fold].valid
        outputs = outputs.double()
        numbers = data.y.dim() > 1
        outputs = scoring.without_absent(outputs, data, fold)
        y = data.y[fold, rows].double() if numbers else data.y[rows]
        losses = row_losses(outputs, y.expand(outputs.shape[:2])) / (2 if numbers else 1)
        if data.weights is None:
            weights = losses.new_ones(len(rows))
        else:
            weights = data.weights[fold, rows].double()
        # (C, m) * (m,) -> (C,)
        mean = (losses * weights).sum(1) / weights.sum()
        return -mean.nan_to_num(LARGEST, LARGEST).clamp(max=LARGEST)


class Stopping:
    """A callback after every epoch that ends members with a stalled loss, and stores their
    parameters.

    Attributes:
        ends: (2, C, F) the number of trained epochs of each member, and the number of its last
            epochs without an improvement.
        rows: (C, F, N) the parameters of each member at its end.

    Args:
        job: the job of the chunk.
        patiences: the rule of each trial (C).
        folds: number of folds F.
    """

    def __init__(self, job: Job, patiences: Sequence[Patience], folds: int) -> None:
        self.job = job
        # (C, 1)
        self.tol = np.array([patience.tol for patience in patiences])[:, None]
        self.most = np.array([patience.epochs for patience in patiences])[:, None]
        self.best = np.full((len(patiences), folds), np.inf)
        self.ends = np.zeros((2, len(patiences), folds), dtype=int)
        self.rows: Tensor | None = None

    def __call__(self, trained: Trained) -> bool | Selection:
        """End the members with a stalled loss, and return the trials that continue.

        The result is True if the time is over. A trial continues if at least one of its members
        continues.
        """
        alive = np.array(trained.alive)
        epochs, stalled = self.ends[:, alive]
        # (remaining trials, F); the scores are negative losses
        loss = -trained.curves[alive, trained.epochs - 1]
        best = self.best[alive]
        trains = epochs == 0
        counted = np.where(loss > best - self.tol[alive], stalled + 1, 0)
        # Members that have ended keep their count.
        stalled = np.where(trains, counted, stalled)
        ends = trains & ((stalled > self.most[alive]) | (trained.epochs == self.job.epochs))
        epochs = np.where(ends, trained.epochs, epochs)
        self.ends[:, alive] = [epochs, stalled]
        self.best[alive] = np.where(trains, np.fmin(best, loss), best)
        if ends.any():
            # (remaining trials, F, N) parameters of the members
            rows = trained.network.blocks.to_rows(trained.scored).cpu()
            if self.rows is None:
                self.rows = rows.new_empty((*self.best.shape, rows.shape[2]))
            for c, f in np.argwhere(ends):
                self.rows[alive[c], f] = rows[c, f]
        return self.job.is_over() or Selection.of_mask((epochs == 0).any(1))


@dataclass(frozen=True)
class ChunkWeights(Outcome):
    """The trained parameters of the members of one chunk (members that train together).

    Attributes:
        rows: (C, F, N) the parameters of each member. None if a member did not reach its end.
        buffers: (C, F, N) the whole state of the members. Empty if the members do not continue
            training.
        ends: (2, C, F) the number of trained epochs of each member, and the number of its last
            epochs that had stalled.
    """

    rows: np.ndarray | None
    buffers: tuple[Tensor, ...]
    ends: IntArray


@dataclass(frozen=True, kw_only=True)
class MemberJob(Job):
    """A training job that returns the trained parameters of its members instead of scores.

    Attributes:
        keeps_state: whether the chunks return the whole state, so that members can continue
            training.
        patiences: the rule of each trial by its index. Empty if all trials train to the last epoch.
    """

    keeps_state: bool = False
    patiences: Mapping[int, Patience] = field(default_factory=dict)

    def run(
        self, data: Dataset, chunk: Population, progress: ProgressCallback | None = None
    ) -> ChunkWeights:
        """Train the members of one chunk together, and return their parameters."""
        begin = time.monotonic()
        stopping = None
        if self.patiences:
            stopping = Stopping(self, [self.patiences[i] for i in chunk.index], data.n_folds)
        trained = train_chunk(self, data, chunk, progress, stopping)
        epochs = trained.epochs
        rows = None
        state: tuple[Tensor, ...] = ()
        if stopping is not None:
            ends = stopping.ends
            if stopping.rows is not None and ends[0].all():  # otherwise the time was over
                rows = stopping.rows.numpy()
        else:
            ends = np.zeros((2, len(chunk.index), data.n_folds), dtype=int)
            ends[0] = epochs
            if epochs == self.epochs:
                rows = trained.network.blocks.to_rows(trained.scored).cpu().numpy()
            if self.keeps_state:
                state = tuple(buffer.cpu() for buffer in trained.state.buffers)
        return ChunkWeights(
            chunk.index, trained.curves, epochs, time.monotonic() - begin, rows, state, ends
        )

    def members(
        self,
        data: Dataset,
        chunk: Population,
        weights: ChunkWeights,
        classes: IntArray | None,
    ) -> list[TrainedMember | Exception]:
        """Return the trained members of a chunk, or their errors, fold by fold.

        The list is empty if the chunk did not train to its end.
        """
        if weights.rows is None:
            return []
        network = self.network(data, chunk)
        rows = torch.from_numpy(weights.rows)
        params = network.blocks.views(network.blocks.from_rows(rows))
        # (C, F): whether all parameters of a member are finite
        is_finite = rows.isfinite().all(2).tolist()
        center = data.center.cpu().numpy()
        scale = data.scale.cpu().numpy()
        has_probabilities = self.objective is not None and self.objective.loss is likelihood_loss
        members: list[TrainedMember | Exception] = []
        for f, fold in enumerate(data.folds):
            scaling = tuple(None if each is None else each.of_fold(f) for each in data.scaling)
            present = None
            if data.present is not None and not data.present[f].all():
                present = data.present[f].cpu().numpy()
            for c, config in enumerate(chunk.configs):
                if not is_finite[c][f]:
                    members.append(_diverged(config))
                    continue
                epochs, stalled = weights.ends[:, c, f].tolist()
                buffers = tuple(buffer[c : c + 1, f : f + 1] for buffer in weights.buffers)
                member = TrainedMember(
                    partial(network.member, params, f, c),
                    classes,
                    present,
                    center[f],
                    scale[f],
                    scaling,
                    rows=len(fold.train),
                    epochs=epochs,
                    stalled=stalled,
                    seed=self.seed,
                    state=State(epochs, buffers),
                    losses=-weights.curves[c, : epochs if self.patiences else 0, f],
                    draws=network.evaluation_draws,
                    has_probabilities=has_probabilities,
                )
                members.append(member)
        return members


def _diverged(config: Config) -> DivergedError:
    """Return the DivergedError for a member that has weights which are not finite."""
    return DivergedError(
        f"the training diverged with {config['optimizer']} and a learning rate of "
        f"{config['lr']:.3g}: its weights are not finite. Use a smaller learning rate, or scale "
        "the inputs (StandardScaler in a pipeline)."
    )
