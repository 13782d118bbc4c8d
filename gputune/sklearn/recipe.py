"""How one configuration trains, whatever words it was written in: what an estimator's parameters mean to the engine.

Training may end where its loss stalls: each member by itself, while those beside it in its chunk go on.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from types import FunctionType

import cloudpickle
import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor

from gputune.data.dataset import Dataset
from gputune.engine.job import Job
from gputune.engine.train import Trained
from gputune.errors import InputError
from gputune.methods.config import check_value
from gputune.modules.construction import Builder
from gputune.population.population import ModelKind, complete
from gputune.scoring.losses import row_losses
from gputune.scoring.objective import Objective, make_objective
from gputune.scoring.scoring import Member, Scoring
from gputune.types import Config, Task

LARGEST = float(np.finfo(np.float64).max)
"""In place of a loss that is no number: a member that diverges leaves its trial in the other folds alone."""


@dataclass(frozen=True)
class Patience:
    """When training has converged, in scikit-learn's words.

    It ends after more than ``epochs`` epochs one after another whose loss was not below the least by ``tol``.
    """

    tol: float
    epochs: int


class TrainingLoss(Scoring):
    """Minus the loss on the training rows, which are a dataset's validation rows here, by their weights."""

    def __init__(self) -> None:
        super().__init__("neg_loss", None, None, None)

    def __call__(self, data: Dataset, fold: int, outputs: Tensor, member: Member | None = None) -> Tensor:
        """Return the scores (C,), float64, of outputs (C, m, K); of numbers half the squared error, standardised."""
        del member
        rows = data.folds[fold].valid
        outputs = outputs.double()
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
    epochs     (C, F) that each member has trained
    rows       (C, F, N) its parameters at its end
    stalled    (C, F) epochs without an improvement
    """

    def __init__(self, job: Job, patiences: Sequence[Patience], folds: int) -> None:
        self.job = job
        self.tol = np.array([p.tol for p in patiences])[:, None]
        self.most = np.array([p.epochs for p in patiences])[:, None]
        self.best = np.full((len(patiences), folds), np.inf)
        self.stalled = np.zeros((len(patiences), folds), dtype=int)
        self.epochs = np.zeros((len(patiences), folds), dtype=int)
        self.rows: Tensor | None = None

    def __call__(self, trained: Trained) -> bool | np.ndarray:
        """Return which of the trials that are still there have a member that goes on; True where time is over."""
        alive = np.array(trained.alive)
        loss = -trained.curves[alive, trained.epochs - 1]
        goes_on = self.epochs[alive] == 0
        best, stalled = self.best[alive], self.stalled[alive]
        stalled = np.where(goes_on, np.where(loss > best - self.tol[alive], stalled + 1, 0), stalled)
        self.stalled[alive], self.best[alive] = stalled, np.where(goes_on, np.fmin(best, loss), best)
        ends = goes_on & ((stalled > self.most[alive]) | (trained.epochs == self.job.epochs))
        if ends.any():
            self._keep(trained, alive, ends)
        return self.job.is_over() or (self.epochs[alive] == 0).any(1)

    def _keep(self, trained: Trained, alive: np.ndarray, ends: np.ndarray) -> None:
        rows = trained.network.blocks.to_rows(trained.scored).cpu()
        if self.rows is None:
            self.rows = rows.new_empty((*self.best.shape, rows.shape[2]))
        self.epochs[alive] = np.where(ends, trained.epochs, self.epochs[alive])
        for c, f in np.argwhere(ends):
            self.rows[alive[c], f] = rows[c, f]


DrawSeed = Callable[[], int]
"""Draws the seed of random_state=None: once for all configurations that are fitted together."""

MOMENTUM = ("sgd", "nesterov", "rmsprop", "muon", "sgdhd", "nesterovhd")
"""The optimizers that have a momentum."""

AUTO_BATCH = 200  # batch_size="auto" is min(200, rows), as in scikit-learn


@dataclass(frozen=True, eq=False)
class RungState:
    """Where one configuration is in a training that stops at rungs: after ``epoch`` of ``horizon`` epochs.

    seed     that of its random numbers, None before the first rung
    buffers  by fold: the engine's buffers of one member, parameters first
    """

    epoch: int
    horizon: int
    seed: int | None
    buffers: Mapping[int, tuple[Tensor, ...]]


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
    def family(self) -> Hashable:
        """What recipes have in common that train together, on one device and for as long."""
        length = (self.begin, self.epochs, self.horizon, self.state is None)
        functions = tuple(map(content, (self.module, self.loss, self.step, self.augment)))
        return self.device, self.kind, functions, self.numbers, self.seed, length, self.patience is None

    @property
    def standardises(self) -> bool:
        """Whether numbers to be predicted are standardised: a loss of the user's own takes them as they are."""
        return self.step is None and (self.loss is None or isinstance(self.loss, str))

    def objective(self, task: Task) -> Objective | None:
        """Return what a module is trained on, None for a built-in model; InputError for what does not fit the task."""
        if self.kind != "module":
            return None
        objective = make_objective(self.loss, self.step, self.augment, task)
        objective.check(self.config)
        return objective

    @property
    def begin(self) -> int:
        """Epochs that it has trained already."""
        return 0 if self.state is None else self.state.epoch

    @property
    def horizon(self) -> int:
        """Epochs that its schedule runs over."""
        return self.epochs if self.state is None else self.state.horizon

    def resumed(self, state: RungState) -> "Recipe":
        """Return the recipe of a training that goes on from a rung, up to its last epoch."""
        seed = self.seed if state.seed is None else state.seed
        return replace(self, state=state, seed=seed, patience=None)

    def config_for(self, rows: int, weight: float) -> Config:
        """Return the configuration for so many training rows of so much weight in all.

        scikit-learn's gradient is (sum of weight x slope + alpha W) / (sum of weights) over a minibatch, so its
        penalty is an L2 weight decay of alpha / (sum of the minibatch's weights): here of a whole minibatch of
        average weight. Departures: a short last minibatch has the same decay, and the biases decay too.
        """
        if self.alpha is None:
            return self.config
        batch_weight = min(self.config["batch_size"], rows) * weight / rows
        return self.config | {"weight_decay": self.alpha / batch_weight}


def draw_seed(random_state: object, draw: DrawSeed) -> int:
    """Return an integer as it is, one draw from a RandomState, or ``draw()`` for None.

    ValueError for anything else, as in scikit-learn.
    """
    if random_state is None:
        return draw()
    generator = check_random_state(random_state)
    return int(random_state) if isinstance(random_state, Integral) else int(generator.randint(2**31 - 1))


def fresh_seed() -> int:
    """Return a draw from numpy's global state, which is what ``random_state=None`` means in scikit-learn."""
    return int(check_random_state(None).randint(2**31 - 1))


def engine_config(values: Mapping[str, tuple[str, object]], *, optimizer: str) -> Config:
    """Return the engine's complete configuration of checked values: its word -> the estimator's word and value.

    A value None is left to the engine's default; ``optimizer`` is that of a configuration without one.
    """
    config = {}
    for name, (word, value) in values.items():
        if name == "batch_size" and isinstance(value, str) and value == "auto":
            value = AUTO_BATCH
        if value is not None:
            config[name] = check_value(name, value, word)
    return complete(config, optimizer=optimizer, schedule="constant")


def whole_number(name: str, value: object, least: int = 1) -> int:
    """Return an integer >= ``least``. Raises InputError for anything else."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise InputError(f"{name} must be an integer >= {least}, got {value!r}. For example 50.")
    return int(value)


def content(value: object) -> Hashable:
    """Return what a value and its copies have in common; nothing else equals one that cannot be pickled."""
    if value is None or isinstance(value, str | type | FunctionType):
        return value
    try:
        return type(value), cloudpickle.dumps(value)
    except Exception:
        return id(value), object()
