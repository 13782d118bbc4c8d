"""The space of a search: lists, scipy.stats distributions and fixed values, checked before anything trains."""

import math
from collections.abc import Collection, Mapping, Sequence
from inspect import isroutine
from typing import Any

import numpy as np
from scipy import stats

from gputune.errors import InputError
from gputune.methods.config import (
    INTEGER_REMEDY,
    MODULE_PREFIX,
    RANGES,
    WORDS,
    check_config,
    check_key,
    check_penalty,
    check_value,
    plain_config,
)
from gputune.methods.distributions import (
    Choices,
    OwnDistribution,
    Steps,
    choices_from_json,
    choices_to_json,
    distribution_text,
    from_optuna,
    is_distribution,
)
from gputune.study.values import to_json
from gputune.types import ONLINE, Config, Json

Space = list[dict[str, Choices]]
"""A checked space. Several dicts are alternatives: a draw takes one, then a value for each key."""


def check_space(space: object, *, keys: Collection[str], module: bool) -> Space:
    """Return the space as a list of dicts of lists and distributions, every value in the range of its key.

    space: a dict, or a list of dicts (alternatives). A value is a list, tuple, range or 1-D array of choices,
    a frozen scipy.stats distribution or other object with ``rvs``, or one fixed value. keys: see ``legal_keys``.
    module: also allow ``module__*``, whose values are the module's own business.

    ``penalty`` stays a key of the space, so that draws are scikit-learn's; ``check_config`` translates it.
    Raises InputError.
    """
    named = _dicts_by_name(space, remedy="Leave it out (space=None) for the default space.")
    for name, d in named.items():
        for key in d:
            check_key(key, keys=keys, module=module, name=name)
        check_penalty(d, name)
        _check_online(d, name)
    parts = []
    for name, d in named.items():
        parts.append(part := {key: _check_choices(key, value, f"{name}[{key!r}]") for key, value in d.items()})
        widths = part.get("width")
        if "depth" in part and isinstance(widths, list) and any(isinstance(width, tuple) for width in widths):
            raise InputError(
                f"{name} must have no 'depth' beside a width that is a tuple, which has its layers, got {widths!r}. "
                "Write a list of spaces, one with the tuples and one with 'depth'."
            )
    return parts


def choices_of(space: Space, key: str, *, default: object) -> list[Any]:
    """Return the values that the lists of a space have for a key, with the default where a part has no such key."""
    lists = [part.get(key, [default]) for part in space]
    return [value for choices in lists if isinstance(choices, list) for value in choices]


def check_own_space(space: object) -> Space:
    """Return the space of a user's own loop as ``check_space`` does; its keys are any words, its values any values."""
    named = _dicts_by_name(space, remedy="For example space={'lr': [0.01, 0.001]}.")
    for name, d in named.items():
        if odd := [key for key in d if not isinstance(key, str)]:
            raise InputError(f"{name} must have words as keys, got {odd[0]!r}; write it as text.")
    return [
        {key: _check_choices(f"{MODULE_PREFIX}{key}", value, f"{name}[{key!r}]") for key, value in d.items()}
        for name, d in named.items()
    ]


def _dicts_by_name(space: object, *, remedy: str) -> dict[str, Mapping[Any, object]]:
    """Return the dicts of a space by what errors call them."""
    dicts = [space] if isinstance(space, Mapping) else space
    if not isinstance(dicts, list | tuple) or not all(isinstance(d, Mapping) for d in dicts):
        raise InputError(
            f"space must be a dict or a list of dicts, got {space!r}. For example space={{'lr': [0.01, 0.001]}}."
        )
    if not dicts or not all(dicts):
        raise InputError(f"space must have at least one key, got {space!r}. {remedy}")
    names = [f"space[{i}]" for i in range(len(dicts))] if len(dicts) > 1 else ["space"]
    return dict(zip(names, dicts))


def _check_online(d: Mapping[str, object], name: str) -> None:
    """Refuse what only an optimizer that adapts its rate reads, where the space never draws one."""
    given = [key for key in ("hypergrad_lr", "hypergrad_rule") if key in d]
    optimizers = d.get("optimizer")
    drawn = [optimizers] if isinstance(optimizers, str) else optimizers
    if given and isinstance(drawn, list | tuple) and not set(ONLINE) & {str(word) for word in drawn}:
        raise InputError(
            f"{name} has the key {given[0]!r}, which only the optimizers {', '.join(ONLINE)} read, and draws "
            f"the optimizer {optimizers!r}; leave it out, or add one of those."
        )


def check_include(include: object, *, keys: Collection[str], module: bool) -> list[Config]:
    """Return the configurations that the user wants run, each checked; ``keys`` and ``module`` as in check_space.

    Raises InputError.
    """
    named = {f"include[{i}]": config for i, config in enumerate(_dicts(include))}
    for name, config in named.items():
        for key in config:
            check_key(key, keys=keys, module=module, name=name)
    return [check_config(config, name=name) for name, config in named.items()]


def check_own_include(include: object, space: Space) -> list[Config]:
    """Return the configurations that a user's own loop is to run, each with the keys of a dict of the space.

    Raises InputError.
    """
    for i, config in enumerate(_dicts(include)):
        if all(config.keys() != part.keys() for part in space):
            raise InputError(
                f"include[{i}] must have a value for each key of the space, {', '.join(space[0])}, and no other, "
                f"got {dict(config)!r}."
            )
    return [plain_config(config) for config in _dicts(include)]


def _dicts(include: object) -> Sequence[Mapping[str, object]]:
    if not isinstance(include, list | tuple) or not all(isinstance(config, Mapping) for config in include):
        raise InputError(f"include must be a list of dicts, got {include!r}. For example include=[{{'lr': 0.01}}].")
    return include


def _check_choices(key: str, value: object, name: str) -> Choices:
    if is_distribution(value):
        _check_distribution(key, value, name)
        return value
    if isinstance(value, np.ndarray) and value.ndim > 1:
        raise InputError(f"{name} must be 1-D, got an array of shape {value.shape}. Give a list of the choices.")
    value = list(value) if isinstance(value, np.ndarray) and value.ndim else value
    if isinstance(value, set | frozenset):
        raise InputError(f"{name} must be a list, since a set has no order, got {value!r}.")
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return [check_value(key, value, name)]
    if not len(value):
        raise InputError(f"{name} must have at least one value, got an empty list. Add one, or leave the key out.")
    if key == "width" and isinstance(value, tuple):
        raise InputError(
            f"{name} must be a list, since a tuple is the layers of one network, got {value!r}. "
            f"Write {list(value)!r} for widths to choose from, [{value!r}] for one network."
        )
    return [check_value(key, choice, name) for choice in value]


def _check_distribution(key: str, value: Any, name: str) -> None:
    unfrozen = isinstance(value, stats.rv_continuous | stats.rv_discrete)
    if unfrozen and value.numargs:
        raise InputError(
            f"{name} must be a frozen distribution, got stats.{value.name} without its parameters "
            f"{value.shapes}. For example scipy.stats.loguniform(0.0001, 0.1)."
        )
    if key in WORDS:
        raise InputError(
            f"{name} must be a list of words out of {', '.join(WORDS[key])}, got a distribution. "
            f"For example {list(WORDS[key][:2])}."
        )
    law = value if unfrozen else getattr(value, "dist", None)
    real = isinstance(law, stats.rv_continuous) or (isinstance(value, Steps) and not value.whole)
    if not isinstance(value, OwnDistribution) and not isinstance(law, stats.rv_continuous | stats.rv_discrete):
        return  # someone's own class: only its draws can be checked
    low, high = float(np.min(value.support()[0])), float(np.max(value.support()[1]))
    if math.isnan(low) or math.isnan(high):
        raise InputError(
            f"{name} must have parameters in their range, got {distribution_text(value)}. "
            "loguniform needs 0 < low < high, uniform(low, width) a width > 0, randint(low, high) low < high."
        )
    if (rule := RANGES.get(key)) is None:
        return
    if real and rule.integer:
        raise InputError(
            f"{name} must be {rule.rule}, got {distribution_text(value)}, which draws real numbers. {INTEGER_REMEDY}"
        )
    inside = rule.holds(low) and (rule.holds(high) or high == rule.high == math.inf)
    # A continuous draw meets an end of its support with probability zero, so an end may lie on the bound.
    if real and not isinstance(value, Steps):
        inside = rule.low <= low and high <= rule.high
    if not inside:
        raise InputError(
            f"{name} must be {rule.rule}, got {distribution_text(value)}, which draws from {low:g} to {high:g}. "
            "Narrow its range."
        )


def space_text(space: Space) -> str:
    """Return a checked space as text, keys sorted, the same in every process: for the study file and its hash.

    Raises InputError for a value (of a ``module__*`` key) that only its address in memory tells apart.
    """
    return " | ".join(", ".join(f"{key}={_text(d[key], key)}" for key in sorted(d)) for d in space)


def _text(value: Any, key: str) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_text(choice, key) for choice in value)}]"
    if is_distribution(value):
        return distribution_text(value)
    if isinstance(value, type) or isroutine(value):
        text = f"{value.__module__}.{value.__qualname__}"
    elif getattr(value, "ndim", 0):  # an array, whose own text leaves out most of it
        text = f"{type(value).__name__}({value.tolist()!r}, {value.dtype})"
    else:
        text = repr(value)
    if "<lambda>" in text or " at 0x" in text:
        raise InputError(
            f"space[{key!r}] must have values with the same text in every process, got {value!r}. "
            "Use a number, a word, a class or a named function, or give its class a __repr__."
        )
    return text


def space_to_json(space: Space) -> Sequence[Json] | None:
    """Return a checked space as values that a study file holds; None where it has an object of the user's own."""
    try:
        values = [{key: choices_to_json(choices) for key, choices in d.items()} for d in space]
        to_json(values)
    except InputError:
        return None
    return values


def space_from_json(values: Sequence[Json]) -> Space:
    """Return the space that ``space_to_json`` described. Raises InputError for a name that scipy.stats lacks."""
    return [{key: choices_from_json(value) for key, value in d.items()} for d in values]


def to_scipy(space: object) -> object:
    """Return a space, a dict or a list of dicts, with Optuna's distributions in scikit-learn's terms."""
    if isinstance(space, list | tuple):
        return type(space)(map(to_scipy, space))
    if not isinstance(space, Mapping):
        return space
    return {name: from_optuna(value) for name, value in space.items()}
