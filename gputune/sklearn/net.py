"""NeuralNetClassifier and NeuralNetRegressor: a user's nn.Module as an estimator, in skorch's words."""

import functools
import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, ClassVar, Self

import torch
from torch import nn

from gputune.engine.construction import Builder, call_arguments
from gputune.engine.population import module_arguments
from gputune.errors import InputError
from gputune.search.config import check_value
from gputune.sklearn.base import (
    Foreign,
    TrainedClassifier,
    TrainedEstimator,
    TrainedRegressor,
    keep_parameters,
)
from gputune.sklearn.recipe import MOMENTUM, DrawSeed, Recipe, draw_seed, engine_config, whole_number
from gputune.study.module_source import is_builder
from gputune.types import OPTIMIZERS

_PREFIX = "module__"
_SIZES = {"n_features": 0, "n_outputs": 0, "input_shape": ()}


def _builder(module: Any, arguments: Mapping[str, Any]) -> Builder:
    """Return what makes an estimator's module. Raises InputError for anything else, and for arguments it has not."""
    if isinstance(module, nn.Module):
        raise InputError(
            f"module must be the class, not an instance, since every fit builds its own: pass "
            f"{type(module).__name__}, and its arguments as module__*."
        )
    if not is_builder(module):
        raise InputError(
            f"module must be a torch.nn.Module class, or a function that makes modules, got {module!r}."
        )
    call_arguments(module, _SIZES, dict(arguments))
    if isinstance(module, functools.partial):
        with suppress(TypeError):  # an argument that cannot be hashed
            return _same_partial(module.func, module.args, tuple(module.keywords.items()))
    return module


@functools.cache
def _same_partial(
    make: Builder, arguments: tuple[Any, ...], keywords: tuple[tuple[str, Any], ...]
) -> Builder:
    """Return one partial for all that are alike, which scikit-learn's clones are: they train together."""
    return functools.partial(make, *arguments, **dict(keywords))


_OPTIMIZERS = {torch.optim.SGD: "sgd", torch.optim.Adam: "adam", torch.optim.AdamW: "adamw"}


class _NeuralNet(TrainedEstimator):
    """Parameters of both: those of the constructor, and ``module__*`` for the arguments of the module's class."""

    _loss: type[nn.Module]
    _epochs = "max_epochs"
    _differentiable: ClassVar = {
        "lr": "lr",
        "optimizer__weight_decay": "weight_decay",
        "optimizer__momentum": "momentum",
    }
    _foreign = Foreign(
        ignored={
            "train_split": (
                (None, False),
                "every row is trained on; leave it out, and let a search split the rows",
            ),
            "verbose": (None, ""),
        },
        refused={
            "callbacks": "there are none; for a schedule of the learning rate use MLPClassifier or gputune.tune",
            "warm_start": "fit always begins anew; train longer with max_epochs",
            "iterator_train__shuffle": "rows are shuffled anew in every epoch; leave it out",
            "optimizer__lr": "give lr",
            "optimizer__nesterov": "give optimizer='nesterov'",
            "learning_rate_init": "give lr",
            "max_iter": "give max_epochs",
            "solver": "give optimizer",
            **dict.fromkeys(("alpha", "weight_decay"), "give optimizer__weight_decay"),
            "momentum": "give optimizer__momentum",
        },
    )

    def __init__(
        self,
        module: Any,
        *,
        criterion: Any = None,
        optimizer: Any = "sgd",
        lr: float = 0.01,
        optimizer__weight_decay: float | None = None,
        optimizer__momentum: float | None = None,
        batch_size: int | str = 128,
        max_epochs: int = 10,
        random_state: Any = None,
        device: str = "auto",
        train_split: Any = None,
        verbose: int = 0,
        **module_arguments: Any,
    ) -> None:
        parameters = locals()
        self._module_arguments = parameters.pop("module_arguments")
        keep_parameters(self, parameters)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return all parameters, the ``module__*`` that were given among them."""
        params: dict[str, Any] = super().get_params(deep)
        arguments: dict[str, Any] = self._module_arguments
        return params | arguments

    def set_params(self, **params: Any) -> Self:
        """Set parameters, any ``module__*`` among them, and return the estimator."""
        own = inspect.signature(type(self)).parameters
        rest = {}
        for name, value in params.items():
            if name.startswith(_PREFIX) or name in self._module_arguments:
                self._module_arguments = self._module_arguments | {name: value}
            elif "__" in name and name in own:  # scikit-learn would look for the parameters of an optimizer
                setattr(self, name, value)
            else:
                rest[name] = value
        super().set_params(**rest)
        return self

    def _recipe(self, draw: DrawSeed) -> Recipe:
        """Raises InputError also for a module, an optimizer or a criterion that cannot be trained."""
        unknown = [name for name in self._module_arguments if not name.startswith(_PREFIX)]
        if unknown:  # said here, because scikit-learn wants constructors that take everything
            raise TypeError(
                f"{type(self).__name__} has no parameter {unknown[0]!r}; arguments of the module are written module__*."
            )
        self._checked_params()
        module = _builder(self.module, module_arguments(self._module_arguments))
        _check_criterion(self.criterion, self._loss)
        optimizer, momentum = _optimizer(self.optimizer), self.optimizer__momentum
        if momentum is not None and optimizer not in MOMENTUM:
            raise InputError(
                f"optimizer__momentum={momentum!r} is for {', '.join(MOMENTUM)}, and {optimizer!r} has none; "
                "leave it out."
            )
        values = {
            "lr": ("lr", self.lr),
            "batch_size": ("batch_size", self.batch_size),
            "optimizer": ("optimizer", optimizer),
            "weight_decay": ("optimizer__weight_decay", self.optimizer__weight_decay),
            "momentum": ("optimizer__momentum", momentum),
        }
        arguments = {name: check_value(name, value, name) for name, value in self._module_arguments.items()}
        return Recipe(
            kind="module",
            config=engine_config(values, optimizer=optimizer) | arguments,
            alpha=None,
            epochs=whole_number("max_epochs", self.max_epochs),
            seed=draw_seed(self.random_state, draw),
            device=self.device,
            module=module,
        )


def _optimizer(optimizer: Any) -> str:
    """Return the engine's word of a word or of a class of torch.optim."""
    if isinstance(optimizer, type) and optimizer in _OPTIMIZERS:
        return _OPTIMIZERS[optimizer]
    if isinstance(optimizer, str) and optimizer in OPTIMIZERS:
        return optimizer
    name = optimizer.__name__ if isinstance(optimizer, type) else repr(optimizer)
    raise InputError(
        f"optimizer must be torch.optim.SGD, Adam or AdamW, or one of the words {', '.join(OPTIMIZERS)}, got {name}: "
        "the update of all members at once is written for these."
    )


def _check_criterion(criterion: Any, loss: type[nn.Module]) -> None:
    """Raise InputError unless the criterion is the loss, as a class or as an instance with default settings."""
    if criterion is None or criterion is loss:
        return
    name = criterion.__name__ if isinstance(criterion, type) else repr(criterion)
    if type(criterion) is not loss:
        remedy = (
            "it wants logits: leave out a softmax" if loss is nn.CrossEntropyLoss else "leave criterion out"
        )
        raise InputError(f"criterion must be torch.nn.{loss.__name__}, got {name}; {remedy}.")
    if _settings(criterion) != _settings(loss()):
        raise InputError(
            f"criterion must be torch.nn.{loss.__name__} with its default settings, got {name} with "
            f"{_settings(criterion)}; weigh rows with sample_weight."
        )


def _settings(criterion: nn.Module) -> dict[str, Any]:
    """Return what a loss was built with; a tensor of class weights as a list."""
    own = {name: value for name, value in vars(criterion).items() if not name.startswith("_")}
    weight = getattr(criterion, "weight", None)
    own["weight"] = weight.tolist() if isinstance(weight, torch.Tensor) else weight
    own.pop("training")
    return own


_PARAMETERS = """

    Trains for ``max_epochs`` epochs on all rows, on X as it comes: put a StandardScaler in front.

    module               a torch.nn.Module class; it is built with ``n_features`` and ``n_outputs`` where its
                         signature has them, and with ``module__*``: module__hidden=32 is its argument hidden
    criterion            None is torch.nn.CrossEntropyLoss for classes, MSELoss for numbers, the only ones
    optimizer            torch.optim.SGD, Adam or AdamW, or a word: "sgd", "nesterov", "adam", "adamw", and
                         those that adapt their rate: "sgdhd", "nesterovhd", "adamhd", "adamwhd"
    lr                   the learning rate
    optimizer__weight_decay, optimizer__momentum   as in torch.optim; None is the optimizer's default
    batch_size           rows of a minibatch; "auto" is min(200, n)
    max_epochs           epochs, always to the last one
    random_state         an integer gives the same numbers again, alone as in a search
    device               "auto", "cpu", "cuda", "cuda:1"
    train_split          None: no row is held out, and nothing else is taken
    verbose              taken, and without effect

    The module must treat every row by itself: running statistics (BatchNorm) are refused by name. Departures from
    skorch: every row is trained on, none is held out, and numbers have X's precision on a CPU (skorch: single).
"""


class NeuralNetClassifier(TrainedClassifier, _NeuralNet):
    __doc__ = f"""A user's nn.Module as a classifier; it returns logits (n, K) for the cross-entropy.{_PARAMETERS}
    After ``fit``: ``module_`` (a plain module of the user's class, on the CPU), ``classes_``, ``n_iter_`` (epochs),
    ``n_features_in_``, ``feature_names_in_``.
    """

    _loss = nn.CrossEntropyLoss


class NeuralNetRegressor(TrainedRegressor, _NeuralNet):
    __doc__ = f"""A user's nn.Module as a regressor; it returns (n, 1) or (n,), the standardised target.{_PARAMETERS}
    The module learns the target less its mean over its standard deviation, of the training rows (skorch: the target).

    After ``fit``: ``module_`` (a plain module of the user's class, on the CPU), ``target_mean_`` and
    ``target_scale_`` (the target is the module's output * scale + mean), ``n_iter_`` (epochs), ``n_features_in_``,
    ``feature_names_in_``.
    """

    _loss = nn.MSELoss
