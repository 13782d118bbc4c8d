"""Check the search space before training begins, and define the default space of each model.

A search space maps hyperparameters to lists, scipy.stats distributions or fixed values.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal, TypeGuard

import numpy as np
from scipy import stats
from torch import nn

from gputune.ground.errors import InputError, Verbatim
from gputune.ground.types import (
    LR_FACTORS,
    ONLINE,
    PER_LAYER,
    PLAIN_LR_FACTORS,
    SEARCHED,
    Config,
    Goal,
)
from gputune.models import CNN, GRU, RealMLP
from gputune.optimizers.classes import optimizer_defaults
from gputune.spaces.config import (
    INTEGER_REMEDY,
    MODULE_PREFIX,
    OPTIMIZERS_WITH,
    RANGES,
    WORDS,
    check_config,
    check_key,
    check_penalty,
    check_value,
    plain_config,
)
from gputune.spaces.distributions import (
    CheckedSpace,
    Choices,
    EvenSteps,
    OwnDistribution,
    distribution_text,
    is_distribution,
)
from gputune.spaces.layers import check_has_layers, check_layer_choices


def check_space(space: object, *, keys: Collection[str], module: bool) -> CheckedSpace:
    """Check a search space, and return it as a list of dicts with lists and distributions.

    After the check, every value is in the range of its key. ``penalty`` stays a key of the space,
    so that scikit-learn samples the same configurations. ``check_config`` translates it later.

    Args:
        space: A dict, or a list of dicts (alternatives). A value is a list, tuple, range or 1-D
            array of choices, a frozen scipy.stats distribution or another object with ``rvs``, or
            one fixed value.
        keys: The legal keys, see ``legal_keys``.
        module: If True, ``module__*`` keys are legal too. They accept any value.

    Raises:
        InputError: The space is invalid.
    """
    named = _dicts_by_name(space, remedy="Leave it out (space=None) for the default space.")
    for name, part in named.items():
        for key in part:
            check_key(key, keys=keys, module=module, name=name)
        check_penalty(part, name)
        _check_online(part, name)
    checked = []
    for name, part in named.items():
        choices = _check_part(part, name)
        checked.append(choices)
        check_layer_choices(choices, name, keys)
    return checked


def _check_part(part: Mapping[str, object], name: str, prefix: str = "") -> dict[str, Choices]:
    """Check one dict of a search space, and return its lists and distributions.

    The check puts ``prefix`` before each key.
    """
    return {
        key: _check_choices(f"{prefix}{key}", value, f"{name}[{key!r}]")
        for key, value in part.items()
    }


def choices_of(space: CheckedSpace, key: str, *, default: object) -> list[Any]:
    """Return all values that a hyperparameter can have in the lists of a search space.

    In a dict of the space without this key, the value is ``default``.
    """
    values = []
    for part in space:
        choices = part.get(key, [default])
        if isinstance(choices, list):
            values += choices
    return values


def check_own_space(space: object) -> CheckedSpace:
    """Check the search space of a custom training loop, and return it as a list of dicts.

    The keys may be any strings, and the values may have any type.
    """
    named = _dicts_by_name(space, remedy="For example space={'lr': [0.01, 0.001]}.")
    for name, part in named.items():
        for key in part:
            if not isinstance(key, str):
                raise InputError(
                    name, "must have strings as keys", got=key, remedy="Write it as a string."
                )
    # Keys with this prefix accept any value.
    return [_check_part(part, name, MODULE_PREFIX) for name, part in named.items()]


def _dicts_by_name(space: object, *, remedy: str) -> dict[str, Mapping[Any, object]]:
    """Return the dicts of a search space. The keys of the result are their names in error
    messages."""
    parts = [space] if isinstance(space, Mapping) else space
    if not _are_dicts(parts):
        raise InputError(
            "space",
            "must be a dict or a list of dicts",
            got=space,
            remedy="For example space={'lr': [0.01, 0.001]}.",
        )
    if not parts or not all(parts):
        raise InputError("space", "must have at least one key", got=space, remedy=remedy)
    if len(parts) == 1:
        return {"space": parts[0]}
    return {f"space[{i}]": part for i, part in enumerate(parts)}


def _check_online(part: Mapping[str, object], name: str) -> None:
    """Raise InputError for ``hypergrad_lr`` or ``hypergrad_rule`` in a space without an optimizer
    that uses it.

    Only the optimizers that adapt their learning rate use these keys.
    """
    optimizers = part.get("optimizer")
    names = [optimizers] if isinstance(optimizers, str) else optimizers
    if not isinstance(names, list | tuple) or not set(ONLINE).isdisjoint(map(str, names)):
        return
    for key in ("hypergrad_lr", "hypergrad_rule"):
        if key in part:
            raise InputError(
                name,
                f"has the key {key!r}, which only the optimizers {', '.join(ONLINE)} use, but its "
                f"optimizer is {optimizers!r}",
                remedy="Leave the key out, or add one of these optimizers.",
            )


def check_include(include: object, *, keys: Collection[str], module: bool) -> list[Config]:
    """Check the configurations that the user wants to run (the argument ``include``), and return
    them.

    ``keys`` and ``module`` are as in ``check_space``. Raises InputError for an invalid
    configuration.
    """
    configs = _dicts(include)
    for i, config in enumerate(configs):
        for key in config:
            check_key(key, keys=keys, module=module, name=f"include[{i}]")
        check_has_layers(config, f"include[{i}]", keys)
    return [check_config(config, name=f"include[{i}]") for i, config in enumerate(configs)]


def check_own_include(include: object, space: CheckedSpace) -> list[Config]:
    """Check the configurations that the user wants to run in a custom training loop (``include``).

    Each configuration must have exactly the keys of one dict of the space. Raises InputError
    otherwise.
    """
    configs = _dicts(include)
    for i, config in enumerate(configs):
        if all(config.keys() != part.keys() for part in space):
            raise InputError(
                f"include[{i}]",
                f"must have a value for each key of the space, {', '.join(space[0])}, and no other "
                "key",
                got=dict(config),
            )
    return list(map(plain_config, configs))


def _dicts(include: object) -> Sequence[Mapping[str, object]]:
    """Return the argument ``include``, or raise InputError if it is not a list of dicts."""
    if not _are_dicts(include):
        raise InputError(
            "include",
            "must be a list of dicts",
            got=include,
            remedy="For example include=[{'lr': 0.01}].",
        )
    return include


def _are_dicts(value: object) -> TypeGuard[Sequence[Mapping[Any, object]]]:
    return isinstance(value, list | tuple) and all(isinstance(part, Mapping) for part in value)


def _check_choices(key: str, value: object, name: str) -> Choices:
    """Check the values of one hyperparameter in a search space, and return a list or distribution.
    Raises InputError."""
    if is_distribution(value):
        _check_distribution(key, value, name)
        return value
    if isinstance(value, np.ndarray) and value.ndim > 1:
        got = Verbatim(f"an array of shape {value.shape}")
        raise InputError(name, "must be 1-D", got=got, remedy="Pass a list of the choices.")
    if isinstance(value, np.ndarray) and value.ndim:
        value = list(value)
    if isinstance(value, set | frozenset):
        raise InputError(name, "must be a list, because a set has no order", got=value)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return [check_value(key, value, name)]
    if not len(value):
        raise InputError(
            name,
            "must have at least one value",
            got=Verbatim("an empty list"),
            remedy="Add a value, or leave the key out.",
        )
    if isinstance(value, tuple) and len(value) == 2 and key != "width":
        _refuse_pair(value, name)
    if key in PER_LAYER and isinstance(value, tuple):
        raise InputError(
            name,
            "must be a list, because a tuple lists the layers of one network",
            got=value,
            remedy=f"Write {list(value)!r} for values to choose from, [{value!r}] for one network.",
        )
    return [check_value(key, choice, name) for choice in value]


def _refuse_pair(pair: tuple[Any, ...], name: str) -> None:
    """Raise InputError for a tuple of two ascending numbers, which other libraries read as a
    range."""
    low, high = pair
    are_numbers = all(isinstance(end, Real) and not isinstance(end, bool) for end in pair)
    if not are_numbers or not low < high:
        return
    if isinstance(low, Integral) and isinstance(high, Integral):
        example = f"scipy.stats.randint({low}, {high + 1})"
    elif low > 0:
        example = f"scipy.stats.loguniform({low}, {high})"
    else:
        example = f"scipy.stats.uniform({low}, {high - low})"
    raise InputError(
        name,
        "must be a list or a distribution, because a tuple of two numbers may mean a range",
        got=pair,
        remedy=f"Write {list(pair)!r} for two values to choose from, or {example} for a range.",
    )


def _check_distribution(key: str, value: Any, name: str) -> None:
    """Raise InputError for a distribution that can sample values outside the hyperparameter's valid
    range."""
    scipy_classes = (stats.rv_continuous, stats.rv_discrete)
    is_unfrozen = isinstance(value, scipy_classes)
    if is_unfrozen and value.numargs:
        raise InputError(
            name,
            "must be a frozen distribution",
            got=Verbatim(f"stats.{value.name} without its parameters {value.shapes}"),
            remedy="For example scipy.stats.loguniform(0.0001, 0.1).",
        )
    if key in WORDS:
        words = WORDS[key]
        raise InputError(
            name,
            f"must be a list of values from {', '.join(words)}",
            got=Verbatim("a distribution"),
            remedy=f"For example {list(words[:2])}.",
        )
    family = value if is_unfrozen else getattr(value, "dist", None)
    if not isinstance(value, OwnDistribution) and not isinstance(family, scipy_classes):
        return  # a custom class: only its draws can be checked
    low = float(np.min(value.support()[0]))
    high = float(np.max(value.support()[1]))
    if math.isnan(low) or math.isnan(high):
        raise InputError(
            name,
            "must have parameters in their range",
            got=Verbatim(distribution_text(value)),
            remedy="loguniform needs 0 < low < high, uniform(low, width) needs width > 0, and "
            "randint(low, high) needs low < high.",
        )
    if (rule := RANGES.get(key)) is None:
        return
    is_continuous = isinstance(family, stats.rv_continuous)
    is_real = is_continuous or (isinstance(value, EvenSteps) and not value.is_integer)
    if is_continuous:
        # A continuous draw equals an end of its range with probability zero. So an end may lie on
        # an excluded bound.
        is_inside = rule.low <= low and high <= rule.high
    else:
        is_unbounded = high == rule.high == math.inf
        is_inside = rule.includes(low) and (rule.includes(high) or is_unbounded)
    if rule.integer and is_real:
        draws = "real numbers"
        remedy = INTEGER_REMEDY
    elif is_inside:
        return
    else:
        draws = f"from {low:g} to {high:g}"
        remedy = "Narrow its range."
    got = Verbatim(f"{distribution_text(value)}, which draws {draws}")
    raise InputError(name, f"must be {rule.rule}", got=got, remedy=remedy)


_REALMLP: Mapping[str, float | str] = {
    "batch_size": 256,
    "beta2": 0.95,
    "schedule": "coslog4",
    "dropout": 0.15,
    "dropout_schedule": "flat_cos",
    "weight_decay": 0.02,
    "weight_decay_schedule": "flat_cos",
    "lr_factor__scale": 6.0,
    "lr_factor__bias": 0.1,
    "lr_factor__embedding": 0.1,
    "lr_factor__slopes": 0.1,
    # The effective decay (lr x weight decay) of all parameters except the biases changes with the
    # square of the lr factor, as in the package of the authors.
    "weight_decay_factor__scale": 6.0,
    "weight_decay_factor__bias": 0.0,
    "weight_decay_factor__embedding": 0.1,
    "weight_decay_factor__slopes": 0.1,
}
"""RealMLP-TD. Source: Holzmueller et al. (2024), arXiv:2407.04491, table A.1, and pytabkit,
default_params.py."""

_SIZES: Mapping[type[nn.Module], Mapping[str, Choices]] = {
    CNN: {"module__channels": [8, 16, 32]},
    GRU: {"module__hidden": [16, 32, 64]},
}
"""The additional keys of the default space for modules of ``gputune.models``."""


def recipe_of(builder: object, goal: Goal) -> Config:
    """Return a model's own default values, which replace the common defaults, or an empty dict.

    ``goal`` says whether the model predicts classes, numeric values (regression), or neither.
    """
    if builder is not RealMLP:
        return {}
    if goal == "classes":
        return {**_REALMLP, "lr": 0.04, "module__activation": "selu", "loss__label_smoothing": 0.1}
    return {**_REALMLP, "lr": 0.2, "module__activation": "mish"}


def default_space(
    model: Literal["mlp", "logistic", "module"],
    optimizer: str,
    builder: object = None,
    lr: float | None = None,
) -> dict[str, Choices]:
    """Return the default search space for a kind of model and an optimizer.

    The learning rate matters most and has a log scale. SGD does not scale each step as Adam does,
    so its range is one or two powers of ten higher. For a class of torch.optim the range lies
    around the default of this class. Batch size and width come from short lists of powers of two.
    Many trials then share one tensor shape and train as one population. Depth, activation and
    dropout stay at their defaults, because each of them splits populations or adds little on
    tables. The space of the solved logistic regression (no training steps) has only its penalty.

    Args:
        model: The kind of model.
        optimizer: The optimizer of the search.
        builder: The class or function that makes the modules, or None.
        lr: The default learning rate, or None for the default of the optimizer.
    """
    if model == "logistic" and optimizer == "exact":
        return {"C": _choices_of("C"), "l1_ratio": _choices_of("l1_ratio")}
    # sgdhd and nesterovhd adapt the learning rate of sgd and nesterov.
    plain = optimizer.removesuffix("hd") in ("sgd", "nesterov")
    low, high = PLAIN_LR_FACTORS if plain and lr is None else LR_FACTORS
    if lr is None:
        lr = optimizer_defaults(optimizer)["lr"]
    space = {"lr": stats.loguniform(low * lr, high * lr), "batch_size": _choices_of("batch_size")}
    if optimizer in OPTIMIZERS_WITH["weight_decay"]:
        space["weight_decay"] = _choices_of("weight_decay")
    if optimizer in ONLINE:
        space["hypergrad_lr"] = _choices_of("hypergrad_lr")
    if model == "mlp":
        return space | {"width": _choices_of("width")}
    return space | dict(_SIZES.get(builder, {}) if isinstance(builder, type) else {})


def _choices_of(key: str) -> Choices:
    """Return the default search values of a hyperparameter: a list, or a log-uniform
    distribution."""
    searched = SEARCHED[key]
    if isinstance(searched, tuple):
        return list(searched)
    distribution: Choices = stats.loguniform(searched["low"], searched["high"])
    return distribution
