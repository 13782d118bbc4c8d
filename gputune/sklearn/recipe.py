"""How one configuration trains, whatever words it was written in: what an estimator's parameters mean to the engine."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from types import FunctionType

import cloudpickle
from sklearn.utils import check_random_state
from torch import Tensor

from gputune.modules.construction import Builder
from gputune.population.population import ModelKind
from gputune.scoring.objective import Objective, make_objective
from gputune.types import Config, Task

DrawSeed = Callable[[], int]
"""Draws the seed of random_state=None: once for all configurations that are fitted together."""

MOMENTUM = ("sgd", "nesterov", "rmsprop", "muon", "sgdhd", "nesterovhd")
"""The optimizers that have a momentum."""

AUTO_BATCH = 200
"""What ``batch_size="auto"`` is in scikit-learn, and at most all rows."""


@dataclass(frozen=True)
class Patience:
    """When training has converged: after more than ``epochs`` epochs whose loss was not below the least by ``tol``."""

    tol: float
    epochs: int


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
        return self.device, self.kind, functions, self.numbers, self.seed, length, self.patience is None

    def objective(self, task: Task) -> Objective | None:
        """Return what a module is trained on, None for a built-in model; InputError for what does not fit the task."""
        if self.kind != "module":
            return None
        objective = make_objective(self.loss, self.step, self.augment, task)
        objective.check(self.config)
        return objective

    def resumed(self, state: RungState) -> "Recipe":
        """Return the recipe of a training that goes on from a rung, up to its last epoch."""
        return replace(self, state=state, seed=self.seed if state.seed is None else state.seed, patience=None)

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
    """Return an integer as it is, a draw from a RandomState, ``draw()`` for None; else raise scikit-learn's error."""
    if random_state is None:
        return draw()
    generator = check_random_state(random_state)
    return int(random_state) if isinstance(random_state, Integral) else int(generator.randint(2**31 - 1))


def content(value: object) -> Hashable:
    """Return what a value and its copies have in common; nothing else equals one that cannot be pickled."""
    if value is None or isinstance(value, str | type | FunctionType):
        return value
    try:
        return type(value), cloudpickle.dumps(value)
    except Exception:
        return id(value), object()
