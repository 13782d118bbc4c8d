"""Train given configurations of a module together, without a search, a study or a file.

Shape letters: C configurations, F folds, n rows, E epochs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gputune.data.dataset import Rows
from gputune.data.source import Source
from gputune.engine.backend import matrix_products, torch_threads
from gputune.engine.job import Job, train_chunk
from gputune.engine.stop import entry
from gputune.engine.train import Trained
from gputune.ground.errors import DivergedError, InputError, Verbatim
from gputune.ground.types import Config, Params
from gputune.modules.network import ModuleNetwork
from gputune.population.population import Network
from gputune.spaces.config import check_config, check_key
from gputune.spaces.distributions import CheckedSpace
from gputune.spaces.layers import check_has_layers
from gputune.study.store import Candidate
from gputune.tuning.choices import ModelChoice
from gputune.tuning.options import Options
from gputune.tuning.pipeline import context_of, set_up
from gputune.tuning.problem import Problem, make_problem
from gputune.tuning.progress import Progress
from gputune.tuning.session import keys_of


@dataclass(frozen=True, eq=False)
class _Group:
    """Configurations of one tensor shape after their training, in stacked tensors."""

    network: Network
    tensors: Params
    alive: tuple[int, ...]

    @staticmethod
    def of(trained: Trained) -> "_Group":
        """Copy the tensors of a trained chunk, because the next chunk may train in them."""
        views = trained.network.blocks.views(trained.scored.clone())
        return _Group(trained.network, views, trained.alive)


@dataclass(frozen=True, eq=False)
class TrainedModules:
    """The modules that ``gputune.train_many`` has trained: C configurations on F folds.

    Attributes:
        configs: The configurations, as they were passed.
        curves: The validation scores (C, E, F) after each of E epochs. Greater is better. The
            scores of a configuration that diverged are NaN from that epoch on.
        folds: The positions of the training rows and of the validation rows of each fold, two int64
            arrays per fold.
        scoring: The name of the score, such as "accuracy" or "neg_loss".
        backends: The backend that trained each configuration, C names such as "compiled".

    Example:
        >>> import gputune, torch
        >>> class Net(torch.nn.Module):
        ...     def __init__(self, n_features, n_outputs):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(n_features, n_outputs)
        ...
        ...     def forward(self, x):
        ...         return self.layer(x)
        >>> x, y = torch.randn(60, 4), torch.arange(60) % 3
        >>> trained = gputune.train_many(Net, [{"lr": 0.1}, {"lr": 0.01}], x, y, max_epochs=5)
        >>> trained
        TrainedModules(2 configurations, 1 fold, 5 epochs, scoring='accuracy')
        >>> trained.member(1)(x[:2]).shape
        torch.Size([2, 3])
    """

    configs: tuple[Mapping[str, object], ...]
    curves: np.ndarray
    folds: tuple[Rows, ...]
    scoring: str
    backends: tuple[str, ...]
    _groups: tuple[_Group, ...] = field(repr=False)
    _places: tuple[tuple[int, int], ...] = field(repr=False)  # (group, place in it), by config

    def __repr__(self) -> str:
        n_configs, n_epochs, n_folds = self.curves.shape
        names = [f"{n_configs} configuration", f"{n_folds} fold", f"{n_epochs} epoch"]
        counts = zip(names, (n_configs, n_folds, n_epochs))
        sizes = ", ".join(name if number == 1 else f"{name}s" for name, number in counts)
        return f"TrainedModules({sizes}, scoring={self.scoring!r})"

    def member(self, config: int, fold: int = 0) -> nn.Module:
        """Return the trained module of one configuration on one fold.

        Args:
            config: The position of the configuration, from 0 to C - 1. A negative position counts
                from the end.
            fold: The number of the fold, from 0 to F - 1.

        Returns:
            A new, plain module on the CPU in evaluation mode.

        Raises:
            InputError: There is no such configuration or fold.
            DivergedError: The training of this configuration diverged.
        """
        n_configs, _, n_folds = self.curves.shape
        for name, value, length in (("config", config, n_configs), ("fold", fold, n_folds)):
            if not isinstance(value, int | np.integer) or not -length <= value < length:
                raise InputError(
                    f"member({name})", f"must be an integer from 0 to {length - 1}", got=value
                )
        config = range(n_configs)[config]
        group, place = self._places[config]
        trained = self._groups[group]
        if place not in trained.alive:
            raise DivergedError(
                f"Configuration {config} diverged when it was trained: its scores became NaN or "
                "infinite. Lower its lr, or set clip_norm."
            )
        return trained.network.member(
            trained.tensors, range(n_folds)[fold], trained.alive.index(place)
        )

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The trained parameters and buffers of all members, stacked: a dict from the name of a
        tensor to a tensor (C, F, ...) on the device of the training.

        ``torch.func.functional_call`` accepts the tensors of one member. Tensors that training does
        not change, such as frozen parameters, are left out. The tensors of a configuration that
        diverged are NaN.

        Raises:
            InputError: The configurations have tensors of different shapes.
        """
        shapes = {repr(sorted(self._shapes(group).items())) for group in self._groups}
        if len(shapes) > 1:
            raise InputError(
                None,
                f"The configurations have tensors of {len(shapes)} different shapes, which cannot "
                "be stacked",
                remedy="Call member(config, fold).state_dict() for each configuration.",
            )
        stacked: dict[str, list[Tensor]] = {}
        for group, place in self._places:
            trained = self._groups[group]
            for name, tensor in _of_trial(trained, place, len(self.folds)).items():
                stacked.setdefault(name, []).append(tensor)
        return {name: torch.stack(tensors) for name, tensors in stacked.items()}

    @staticmethod
    def _shapes(group: _Group) -> dict[str, torch.Size]:
        network = group.network
        assert isinstance(network, ModuleNetwork)
        return {name: w.shape for name, w in (network.trainable | network.mutable).items()}


def _of_trial(group: _Group, place: int, folds: int) -> Params:
    """Return the tensors (F, ...) of one configuration. They are NaN if it diverged."""
    network = group.network
    assert isinstance(network, ModuleNetwork)
    if place not in group.alive:
        tensors = (network.trainable | network.mutable).items()
        return {
            name: w.new_full((folds, *w.shape), torch.nan)
            if w.is_floating_point()
            else w.expand(folds, *w.shape)
            for name, w in tensors
        }
    trial = group.alive.index(place)
    members = [network.values(group.tensors, fold, trial) for fold in range(folds)]
    return {name: torch.stack([values[name] for values in members]) for name in members[0]}


def mean_squared_error(outputs: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared error of outputs for numbers y, which may lack the last axis."""
    return functional.mse_loss(outputs.reshape(y.shape), y)


@entry
def train_given(
    choice: ModelChoice, given: Sequence[Mapping[str, object]], source: Source, options: Options
) -> TrainedModules:
    """Train configurations of a module on rows, on all folds.

    ``options.rows.cv`` may be None: the only fold then has all rows for training and for
    validation. Raises InputError.
    """
    params = _checked(given, choice)
    progress = Progress(options.machine.verbose)
    cv = options.rows.cv
    problem = make_problem(source, options.rows.task, choice, options, params)
    _check_classes(problem)
    everything = np.arange(len(source.X))
    folds: list[Rows] = [(everything, everything)] if cv is None else problem.folds()
    trials = [Candidate(number, config, "include") for number, config in enumerate(params)]
    space: CheckedSpace = [{key: [value] for key, value in config.items()} for config in params]
    setup = set_up(problem, space, folds, trials, progress)
    context = context_of(setup, progress)
    configs = setup.configs
    epochs = options.training.epochs
    plan = context.plan(configs, epochs=epochs)
    job = context.trainer.job(Job, epochs=epochs)
    curves = np.full((len(configs), epochs, len(folds)), np.nan)
    backends = [""] * len(configs)
    places: dict[int, tuple[int, int]] = {}
    groups: list[_Group] = []
    progress.scoring = setup.scoring.name
    progress.plan(plan)
    bar = progress.bar_over(len(configs), epochs)
    with matrix_products(tf32=False), torch_threads(plan.threads), bar:
        for chunk, way in zip(plan.chunks, plan.ways):
            trained = train_chunk(job, context.data, chunk, progress.advance)
            curves[list(chunk.index)] = trained.curves
            for place, number in enumerate(chunk.index):
                places[number] = (len(groups), place)
                backends[number] = "loop" if trained.network.one_by_one else way
            groups.append(_Group.of(trained))
            progress.finished(len(chunk.index))
    return TrainedModules(
        configs=tuple(given),
        curves=curves,
        folds=tuple(folds),
        scoring=setup.scoring.name,
        backends=tuple(backends),
        _groups=tuple(groups),
        _places=tuple(places[number] for number in range(len(configs))),
    )


def _checked(given: object, choice: ModelChoice) -> list[Config]:
    """Return the configurations of the user after their check.

    Raises InputError for a wrong key or a value out of range.
    """
    configs = given if isinstance(given, Sequence) and not isinstance(given, str) else ()
    if not configs or not all(isinstance(config, Mapping) for config in configs):
        raise InputError(
            "configs",
            "must be a list of at least one dict",
            got=given,
            remedy="For example configs=[{'lr': 0.01}, {'lr': 0.001}].",
        )
    keys = keys_of(choice)
    checked = []
    for number, config in enumerate(configs):
        name = f"configs[{number}]"
        for key in config:
            check_key(key, keys=keys, module=True, name=name)
        check_has_layers(config, name, keys)
        checked.append(check_config(config, name=name))
    return checked


def _check_classes(problem: Problem) -> None:
    """Raise InputError if the classes of y are not 0 to K - 1, the positions of the K outputs."""
    classes = problem.target.classes
    if classes is None or np.array_equal(classes, np.arange(len(classes))):
        return
    shown = ", ".join(map(str, classes[:5])) + (", ..." if len(classes) > 5 else "")
    raise InputError(
        "y",
        f"must hold the classes 0 to {len(classes) - 1}, because a class is the position of an "
        "output of the module",
        got=Verbatim(shown),
        remedy="Convert y with sklearn.preprocessing.LabelEncoder. gputune.tune accepts any "
        "classes.",
    )
