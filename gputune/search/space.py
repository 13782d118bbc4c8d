"""The space of a search: lists, scipy.stats distributions and fixed values, checked before anything trains.

check_space(...)    what the user wrote -> a list of dicts that scikit-learn's ParameterSampler draws from
check_include(...)  the configurations that the user wants run -> the same in their ranges
space_text(...)     a checked space as text that is the same in every process

A space as plain values, for a study file, and made again from them: by names of scipy.stats, never by a pickle.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from inspect import isroutine
from typing import Any

import numpy as np
from scipy import stats

from gputune.errors import InputError
from gputune.search.config import (
    INTEGER_REMEDY,
    RANGES,
    WORDS,
    Range,
    check_config,
    check_key,
    check_penalty,
    check_value,
    legal_keys,
)
from gputune.search.distributions import (
    Distribution,
    LogInt,
    LogIntegers,
    Steps,
    distribution_text,
    is_distribution,
    log_int,
    parse_spec,
    parse_specs,
)
from gputune.study.rows import to_json
from gputune.types import ONLINE, Config

__all__ = [
    "Distribution",
    "Space",
    "check_config",
    "check_include",
    "check_space",
    "legal_keys",
    "log_int",
    "parse_spec",
    "parse_specs",
    "space_text",
]

Space = list[dict[str, list[Any] | Distribution]]
"""A checked space. Several dicts are alternatives: a draw takes one, then a value for each key."""


def check_space(space: object, *, keys: Collection[str], module: bool) -> Space:
    """Return the space as a list of dicts of lists and distributions, every value in the range of its key.

    space: a dict, or a list of dicts (alternatives). A value is a list, tuple, range or 1-D array of choices,
    a frozen scipy.stats distribution or other object with ``rvs``, or one fixed value. keys: see ``legal_keys``.
    module: also allow ``module__*``, whose values are the module's own business.

    ``penalty`` stays a key of the space, so that draws are scikit-learn's; ``check_config`` translates it.
    Raises InputError.
    """
    dicts = [space] if isinstance(space, Mapping) else space
    if not isinstance(dicts, list | tuple) or not all(isinstance(d, Mapping) for d in dicts):
        raise InputError(
            f"space must be a dict or a list of dicts, got {space!r}. "
            "For example space={'lr': [0.01, 0.001]}."
        )
    if not dicts or not all(dicts):
        raise InputError(
            f"space must have at least one key, got {space!r}. "
            "Leave it out (space=None) for the default space."
        )
    names = [f"space[{i}]" for i in range(len(dicts))] if len(dicts) > 1 else ["space"]
    for d, name in zip(dicts, names):
        for key in d:
            check_key(key, keys=keys, module=module, name=name)
        check_penalty(d, name)
        _check_online(d, name)
    return [
        {key: _check_choices(key, value, f"{name}[{key!r}]") for key, value in d.items()}
        for d, name in zip(dicts, names)
    ]


def _check_online(d: Mapping[str, Any], name: str) -> None:
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
    if not isinstance(include, list | tuple) or not all(isinstance(config, Mapping) for config in include):
        raise InputError(
            f"include must be a list of dicts, got {include!r}. For example include=[{{'lr': 0.01}}]."
        )
    for i, config in enumerate(include):
        for key in config:
            check_key(key, keys=keys, module=module, name=f"include[{i}]")
    return [check_config(config, name=f"include[{i}]") for i, config in enumerate(include)]


def _check_choices(key: str, value: object, name: str) -> list[Any] | Distribution:
    if is_distribution(value):
        _check_distribution(key, value, name)
        return value
    if isinstance(value, np.ndarray) and value.ndim > 1:
        raise InputError(
            f"{name} must be 1-D, got an array of shape {value.shape}. Give a list of the choices."
        )
    if isinstance(value, np.ndarray) and value.ndim == 1:
        value = list(value)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return [check_value(key, value, name)]
    if not len(value):
        raise InputError(
            f"{name} must have at least one value, got an empty list. Add one, or leave {key!r} out."
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
    own = isinstance(value, LogInt | LogIntegers | Steps)
    if not own and not isinstance(law, stats.rv_continuous | stats.rv_discrete):
        return  # someone's own class: only its draws can be checked
    low, high = float(np.min(value.support()[0])), float(np.max(value.support()[1]))
    if math.isnan(low) or math.isnan(high):
        raise InputError(
            f"{name} must have parameters in their range, got {distribution_text(value)}. "
            "loguniform needs 0 < low < high, uniform(low, width) a width > 0, randint(low, high) low < high."
        )
    if key in RANGES:
        _check_support(RANGES[key], value, low, high, real, name)


def _check_support(rule: Range, value: Any, low: float, high: float, real: bool, name: str) -> None:
    if real and rule.integer:
        raise InputError(
            f"{name} must be {rule.rule}, got {distribution_text(value)}, which draws real numbers. "
            f"{INTEGER_REMEDY}"
        )
    # A continuous draw meets an end of its support with probability zero, so an end may lie on the bound.
    if real and not isinstance(value, Steps):
        inside = rule.low <= low and high <= rule.high
    else:
        inside = rule.holds(low) and (rule.holds(high) or high == rule.high == math.inf)
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


def space_values(space: Space) -> list[dict[str, Any]] | None:
    """Return a checked space as values that a study file holds; None where it has an object of the user's own."""
    try:
        values = [{key: _values(choices) for key, choices in d.items()} for d in space]
        to_json(values)
    except InputError:
        return None
    return values


def space_again(values: list[dict[str, Any]]) -> Space:
    """Return the space that ``space_values`` described. Raises InputError for a name that scipy.stats lacks."""
    return [{key: _choices(value) for key, value in d.items()} for d in values]


def _values(choices: list[Any] | Distribution) -> dict[str, Any]:
    if isinstance(choices, list):
        return {"list": choices}
    if isinstance(choices, LogInt):
        return {"log_int": [choices.low, choices.high]}
    if isinstance(choices, Steps):
        return {"steps": [choices.low, choices.high, choices.step]}
    if isinstance(choices, LogIntegers):
        return {"log_integers": [choices.low, choices.high]}
    law: Any = getattr(choices, "dist", choices)
    namesake: Any = getattr(stats, str(getattr(law, "name", "")), None)
    if namesake is None or type(law) is not type(namesake):
        raise InputError(f"{choices!r} is no distribution of scipy.stats.")
    names = [*(law.shapes.split(", ") if law.shapes else ()), "loc", "scale"]
    kwds: dict[str, Any] = getattr(choices, "kwds", {})
    given = dict(zip(names, getattr(choices, "args", ()))) | kwds
    return {"scipy": law.name, "with": {name: np.asarray(value).tolist() for name, value in given.items()}}


def _choices(value: dict[str, Any]) -> Any:
    if "list" in value:
        return value["list"]
    if "log_int" in value:
        return log_int(*value["log_int"])
    if "steps" in value:
        return Steps(*value["steps"])
    if "log_integers" in value:
        return LogIntegers(*value["log_integers"])
    law: Any = getattr(stats, str(value["scipy"]), None)
    if not isinstance(law, stats.rv_continuous | stats.rv_discrete):
        raise InputError(
            f"scipy.stats has no distribution {value['scipy']!r}; use the scipy that made the study."
        )
    return law(**value["with"])
