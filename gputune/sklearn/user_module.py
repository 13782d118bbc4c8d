"""A user's module class under the engine's two keywords, of which it is given those that it has.

The parameters of a NeuralNet estimator, in skorch's words, turned into what the engine trains.
"""

import inspect
from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import nn

from gputune.engine.population import module_arguments
from gputune.errors import InputError
from gputune.sklearn.words import Fresh, Recipe, draw_seed, trained_config, whole_number
from gputune.types import OPTIMIZERS

_SIZES = ("n_features", "n_outputs")


class UserModule:
    """Builds ``module_class(**arguments)``, with ``n_features`` and ``n_outputs`` where its signature has them.

    Two of one class are equal. Raises InputError for what is no class of modules.
    """

    def __init__(self, module_class: Any) -> None:
        if isinstance(module_class, nn.Module):
            raise InputError(
                f"module must be the class, not an instance, since every fit builds its own: pass "
                f"{type(module_class).__name__}, and its arguments as module__*."
            )
        if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
            raise InputError(f"module must be a torch.nn.Module class, got {module_class!r}.")
        self.module_class = module_class
        # What an error calls it, and where a process that trains it finds it.
        self.__name__, self.__module__ = module_class.__name__, module_class.__module__
        own = inspect.signature(module_class).parameters
        self._takes_any = any(p.kind is p.VAR_KEYWORD for p in own.values())
        named = {name for name, p in own.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
        self._sizes = tuple(name for name in _SIZES if name in named or self._takes_any)
        self._arguments = named - set(_SIZES)
        # The engine passes arguments by name, and reads here which ones there are.
        self.__signature__ = inspect.Signature(
            [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in sorted(named | set(_SIZES))]
            + [p for p in own.values() if p.kind is p.VAR_KEYWORD]
        )

    def __call__(self, *, n_features: int, n_outputs: int, **arguments: Any) -> nn.Module:
        sizes = {"n_features": n_features, "n_outputs": n_outputs}
        module: nn.Module = self.module_class(**{name: sizes[name] for name in self._sizes}, **arguments)
        return module

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UserModule) and other.module_class is self.module_class

    def __hash__(self) -> int:
        return hash(self.module_class)

    def check_arguments(self, names: Collection[str]) -> None:
        """Raise InputError for an argument that the class has not, or that the data gives."""
        for name in names:
            if name in _SIZES:
                raise InputError(f"module__{name} is given by the data; leave it out.")
            if name not in self._arguments and not self._takes_any:
                signature = f"{self.__name__}{inspect.signature(self.module_class)}"
                raise InputError(f"module__{name} is no argument of {signature}; remove it or rename it.")


_OPTIMIZERS = {torch.optim.SGD: "sgd", torch.optim.Adam: "adam", torch.optim.AdamW: "adamw"}
_MOMENTUM = ("sgd", "nesterov", "sgdhd", "nesterovhd")


def net_recipe(params: Mapping[str, Any], *, loss: type[nn.Module], fresh: Fresh) -> Recipe:
    """Return the recipe of a NeuralNet estimator's parameters; ``loss`` is the criterion that it has.

    Raises InputError for a value out of range, and for a module, optimizer or criterion that cannot be trained so.
    """
    module = UserModule(params["module"])
    arguments = {name: value for name, value in params.items() if name.startswith("module__")}
    module.check_arguments(module_arguments(arguments))
    _check_criterion(params["criterion"], loss)
    optimizer = _optimizer(params["optimizer"])
    given = {
        "lr": params["lr"],
        "batch_size": params["batch_size"],
        "optimizer": optimizer,
        "weight_decay": params["optimizer__weight_decay"],
        "momentum": params["optimizer__momentum"],
    }
    if given["momentum"] is not None and optimizer not in _MOMENTUM:
        raise InputError(
            f"optimizer__momentum={given['momentum']!r} is for {', '.join(_MOMENTUM)}, and {optimizer!r} has none; "
            "leave it out."
        )
    written = {name: value for name, value in given.items() if value is not None}
    return Recipe(
        kind="module",
        config=trained_config(written | arguments, optimizer=optimizer),
        alpha=None,
        epochs=whole_number("max_epochs", params["max_epochs"]),
        seed=draw_seed(params["random_state"], fresh),
        device=params["device"],
        module=cast(type[nn.Module], module),  # to the engine, what builds a module is its class
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
