"""The hyperparameters of a hypergradient, checked: names, ranges, and one table for each."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gputune.engine.optim import BETA1, BETA2, RULES
from gputune.errors import InputError
from gputune.types import DEFAULTS, default_momentum, default_weight_decay

HEAVY_BALL = 0.9  # of optimizer="momentum", the usual value

_OF = {
    "sgd": ("lr", "momentum", "weight_decay"),
    "nesterov": ("lr", "momentum", "weight_decay"),
    "adam": ("lr", "weight_decay", "beta1", "beta2"),
    "adamw": ("lr", "weight_decay", "beta1", "beta2"),
}


def hyperparameters_of(optimizer: str) -> tuple[str, ...]:
    """Return the hyperparameters that an optimizer has."""
    return _OF[optimizer]


def check_optimizer(optimizer: object) -> tuple[str, float]:
    """Return the update rule and its default momentum; "momentum" is sgd with a momentum of 0.9."""
    if optimizer == "momentum":
        return "sgd", HEAVY_BALL
    if not isinstance(optimizer, str) or optimizer not in RULES:
        words = ", ".join(("sgd", "momentum", *(name for name in RULES if name != "sgd"), "exact"))
        raise InputError(f"optimizer must be one of {words}, got {optimizer!r}.")
    return optimizer, default_momentum(optimizer)


def default_tables(optimizer: str, momentum: float, like: Tensor) -> dict[str, Tensor]:
    """Return a (1, 1, 1) table for each hyperparameter, with its default value."""
    values = {
        "lr": float(DEFAULTS["lr"]),
        "momentum": momentum,
        "weight_decay": default_weight_decay(optimizer),
        "beta1": BETA1,
        "beta2": BETA2,
    }
    return {name: like.new_full((1, 1, 1), value) for name, value in values.items()}


def check_hyperparameters(
    values: Mapping[str, Any],
    optimizer: str,
    *,
    steps: int,
    layers: Sequence[str],
    like: Tensor,
    argument: str = "hyperparameters",
) -> dict[str, Tensor]:
    """Return a table (1, S, L) for each value: a number, (S,) segments, or (S, L) segments and layers.

    ``argument`` is how errors call ``values``. Raises InputError for a name the optimizer has not, a value out of
    range, another shape, more segments than steps.
    """
    if not isinstance(values, Mapping) or not values:
        raise InputError(
            f'{argument} must be a dict with at least one of them, for example {{"lr": 0.1}}, got {values!r}.'
        )
    for name in values:
        if name not in _OF[optimizer]:
            raise InputError(
                f"{argument}: {optimizer} has {', '.join(_OF[optimizer])}, got {name!r}; leave it out, or choose "
                "an optimizer that has it."
            )
    return {
        name: _table(f"{argument}[{name!r}]", name, value, steps, layers, like)
        for name, value in values.items()
    }


def _table(place: str, name: str, value: Any, steps: int, layers: Sequence[str], like: Tensor) -> Tensor:
    try:
        table = torch.as_tensor(value, dtype=like.dtype, device=like.device).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{place} must be a number or an array of numbers, got {value!r}.") from error
    if table.dim() > 2 or 0 in table.shape or (table.dim() == 2 and table.shape[1] != len(layers)):
        raise InputError(
            f"{place} must be a number, (segments,) or (segments, layers) with {len(layers)} layers "
            f"({', '.join(layer or 'the module itself' for layer in layers)}), got shape {tuple(table.shape)}."
        )
    if table.dim() and len(table) > steps:
        raise InputError(
            f"{place} must have at most one segment a step, got {len(table)} segments for {steps} minibatches."
        )
    _check_range(place, name, table)
    return table.reshape(1, -1, table.shape[1] if table.dim() == 2 else 1)


def _check_range(place: str, name: str, table: Tensor) -> None:
    low, high = float(table.min()), float(table.max())
    if name == "lr":
        legal, rule = low > 0 and high < float("inf"), "finite and > 0"
    elif name == "weight_decay":
        legal, rule = low >= 0 and high < float("inf"), "finite and >= 0"
    else:
        legal, rule = low >= 0 and high < 1, "in [0, 1)"
    if not legal or bool(table.isnan().any()):
        raise InputError(f"{place} must be {rule}, got {table.tolist()}.")
