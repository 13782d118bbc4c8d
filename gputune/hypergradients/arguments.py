"""The hyperparameters of a hypergradient: which there are, their ranges, tables of them, and where they move.

They move in the logarithm, or in the logit for what lies between 0 and 1: a step of one size then means the same
change at a rate of 1e-5 as at 1, and never leaves the legal range. Also the arguments of the online optimizers.
"""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gputune.errors import InputError
from gputune.hypergradients.module_training import ModuleTraining
from gputune.optimizers.classes import OPTIMIZER_PREFIX
from gputune.optimizers.rules import BETA1, BETA2
from gputune.population.population import beyond_adam
from gputune.types import DEFAULT_LR, DEFAULTS, ONLINE_RULES, Config, default_momentum, default_weight_decay

_BETWEEN_0_AND_1 = ("momentum", "beta1", "beta2")
HEAVY_BALL = 0.9  # of optimizer="momentum", the usual value

HYPERPARAMETERS_OF = {
    **dict.fromkeys(("sgd", "nesterov"), ("lr", "momentum", "weight_decay")),
    **dict.fromkeys(("adam", "adamw"), ("lr", "weight_decay", "beta1", "beta2")),
}


def check_start(config: Config, name: str, start: str, *, argument: str, remedy: str = "") -> None:
    """Raise InputError where what a ``start`` of a descent trains with has no derivative in a hyperparameter.

    ``argument`` is what has chosen it; ``remedy`` is another one than to change the configuration.
    """
    optimizer = config["optimizer"]
    others = [key for key in beyond_adam(config) if key != "beta2"]
    others += ["ema"] if config["ema"] else []
    if optimizer not in HYPERPARAMETERS_OF:
        reason = f"optimizer={optimizer!r}; choose one of {', '.join(HYPERPARAMETERS_OF)}"
    elif given := [key for key in config if key.startswith(OPTIMIZER_PREFIX)]:
        reason = f"{given[0]}={config[given[0]]!r}, which torch.optim's own class takes; leave it out"
    elif config["clip_norm"] < math.inf:
        reason = f"clip_norm={config['clip_norm']:g}; leave it out"
    elif others:
        reason = f"{others[0]}={config[others[0]]!r}; leave it out"
    elif name in HYPERPARAMETERS_OF[optimizer]:
        return
    else:
        raise InputError(
            f"{argument}: {optimizer} has no {name!r}, and {start} uses it; choose from "
            f"{', '.join(HYPERPARAMETERS_OF[optimizer])}, or an optimizer that has it."
        )
    raise InputError(f"a descent cannot differentiate what {start} has: {reason}{remedy}.")


def check_optimizer(optimizer: object) -> tuple[str, float]:
    """Return the update rule and its default momentum; "momentum" is sgd with a momentum of 0.9."""
    if optimizer == "momentum":
        return "sgd", HEAVY_BALL
    if not isinstance(optimizer, str) or optimizer not in HYPERPARAMETERS_OF:
        words = ", ".join(("sgd", "momentum", *(name for name in HYPERPARAMETERS_OF if name != "sgd"), "exact"))
        raise InputError(f"optimizer must be one of {words}, got {optimizer!r}.")
    return optimizer, default_momentum(optimizer)


def default_tables(optimizer: str, momentum: float, like: Tensor) -> dict[str, Tensor]:
    """Return a (1, 1, 1) table for each hyperparameter, with its default value."""
    values = {"lr": DEFAULT_LR, "momentum": momentum, "weight_decay": default_weight_decay(optimizer)}
    values |= {"beta1": BETA1, "beta2": BETA2}
    return {name: like.new_full((1, 1, 1), value) for name, value in values.items()}


def check_hyperparameters(
    values: Mapping[str, object], optimizer: str, training: ModuleTraining, argument: str = "hyperparameters"
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
        if name not in HYPERPARAMETERS_OF[optimizer]:
            raise InputError(
                f"{argument}: {optimizer} has {', '.join(HYPERPARAMETERS_OF[optimizer])}, got {name!r}; leave it out, "
                "or choose an optimizer that has it."
            )
    return {name: _table(f"{argument}[{name!r}]", name, value, training) for name, value in values.items()}


def _table(place: str, name: str, value: object, training: ModuleTraining) -> Tensor:
    layers = training.layers
    try:
        table = torch.as_tensor(value, dtype=training.dtype, device=training.device).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{place} must be a number or an array of numbers, got {value!r}.") from error
    if table.dim() > 2 or 0 in table.shape or (table.dim() == 2 and table.shape[1] != len(layers)):
        raise InputError(
            f"{place} must be a number, (segments,) or (segments, layers) with {len(layers)} layers "
            f"({', '.join(layer or 'the module itself' for layer in layers)}), got shape {tuple(table.shape)}."
        )
    if table.dim() and len(table) > training.steps:
        raise InputError(
            f"{place} must have at most one segment a step, got {len(table)} segments for {training.steps} minibatches."
        )
    high, rule = (1.0, "in [0, 1)") if name in _BETWEEN_0_AND_1 else (math.inf, "finite and >= 0")
    rule = "finite and > 0" if name == "lr" else rule
    if not bool(((table > 0 if name == "lr" else table >= 0) & (table < high)).all()):  # NaN is no more than anything
        raise InputError(f"{place} must be {rule}, got {table.tolist()}.")
    return table.reshape(1, -1, table.shape[1] if table.dim() == 2 else 1)


def as_table(value: object, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Return a number, a list over segments, or one over segments and layers as a table (S, L), spread to a shape."""
    table = np.asarray(value, dtype=float)
    table = table.reshape(len(table) if table.ndim else 1, -1)
    return table if shape is None else np.broadcast_to(table, shape).copy()


def to_coordinate(name: str, value: Tensor) -> Tensor:
    """Return log(value), or log(value / (1 - value)) for momentum and the betas; -inf at 0."""
    return value.logit() if name in _BETWEEN_0_AND_1 else value.log()


def check_coordinate(name: str, value: float, start: str, *, called: str, space: str) -> None:
    """Raise InputError for a value that a ``start`` cannot move from, since it has no finite coordinate: 0, infinity.

    In errors the hyperparameter is ``called`` so, and drawn from a ``space``.
    """
    if not math.isfinite(float(to_coordinate(name, torch.tensor(float(value), dtype=torch.float64, device="cpu")))):
        raise InputError(
            f"a descent cannot start from {called}={value:g}, as {start} does, because it moves in the "
            f"{'logit' if name in _BETWEEN_0_AND_1 else 'logarithm'}; put {called!r} in {space} with values above 0"
            f"{' and finite' if name == 'C' else ''}, or leave it out of hyperparameters."
        )


def from_coordinate(name: str, coordinate: Tensor) -> Tensor:
    """Return the value at a coordinate."""
    return coordinate.sigmoid() if name in _BETWEEN_0_AND_1 else coordinate.exp()


def speed(name: str, value: Tensor) -> Tensor:
    """Return d value / d coordinate, by which a derivative is turned into one in the coordinate."""
    if name in _BETWEEN_0_AND_1:
        return value * (1 - value)
    # as_tensor would move a tensor to the default device, where one is set
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


Group = dict[str, Any]


def check_group(group: Group) -> Group:
    """Return the hyperparameters of a group in Python's own numbers; raise InputError where one is out of range."""
    rule = group["rule"]
    if rule not in ONLINE_RULES:
        raise InputError(
            f"rule must be one of {', '.join(ONLINE_RULES)}, got {rule!r}. The scale-free one is {ONLINE_RULES[0]!r}."
        )
    scaled = rule == "multiplicative"
    if group["hypergrad_lr"] is None and not scaled:
        raise InputError(
            f"hypergrad_lr must be given with rule={rule!r}, whose unit depends on the model, got None. "
            "Try powers of ten, or use rule='multiplicative'."
        )
    if group["hypergrad_lr"] is None:
        group = {**group, "hypergrad_lr": DEFAULTS["hypergrad_lr"]}
    numbers: Group = {
        "lr": _number(group, "lr", "0.001", low_counts=not scaled),
        # A factor of 0 or below would end the training for good: a multiple of zero stays zero.
        "hypergrad_lr": _number(group, "hypergrad_lr", "0.02", high=1.0 if scaled else math.inf),
        "weight_decay": _number(group, "weight_decay", "0.01"),
    }
    bounds = [name for name in ("lr_min", "lr_max") if group[name] is not None]
    numbers |= {name: _number(group, name, "0.1", low=-math.inf) for name in bounds}
    if not numbers.get("lr_min", -math.inf) <= numbers["lr"] <= numbers.get("lr_max", math.inf):
        raise InputError(
            f"lr must be within lr_min and lr_max, got lr={numbers['lr']}, lr_min={group['lr_min']}, "
            f"lr_max={group['lr_max']}. Begin with a rate between them; None is no bound."
        )
    if "momentum" in group:
        momentum = _number(group, "momentum", "0.9", high=1.0)
        if group["nesterov"] and not momentum:
            raise InputError("momentum must be > 0 with nesterov=True, got 0.0. For example momentum=0.9.")
        return numbers | {"momentum": momentum}
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise InputError(f"betas must be two numbers in [0, 1), got {betas!r}. For example betas=(0.9, 0.999).")
    named = {f"betas[{i}]": beta for i, beta in enumerate(betas)}
    betas = tuple(_number(named, name, "0.9", high=1.0) for name in named)
    return numbers | {"betas": betas, "eps": _number(group, "eps", "1e-8")}


def _number(
    group: Group, name: str, example: str, *, low: float = 0.0, high: float = math.inf, low_counts: bool = True
) -> float:
    value = group[name]
    if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
        number = float(value)
        if number < high and (number >= low if low_counts else number > low):
            return number
    least = "" if low == -math.inf else f" >= {low:g}" if low_counts else f" > {low:g}"
    most = "" if high == math.inf else f" and < {high:g}"
    raise InputError(f"{name} must be a finite number{least}{most}, got {value!r}. For example {example}.")
