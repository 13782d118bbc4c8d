"""The parameters of a NeuralNet estimator, in skorch's words, turned into what the engine trains."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from gputune.engine.population import module_arguments
from gputune.errors import InputError
from gputune.sklearn.user_module import UserModule
from gputune.sklearn.words import Fresh, Recipe, draw_seed, trained_config, whole_number
from gputune.types import OPTIMIZERS

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
