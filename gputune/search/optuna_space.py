"""Optuna's distributions as what scikit-learn samples from, and the lists and distributions of a space as Optuna's."""

import math
from collections.abc import Mapping
from typing import Any

from scipy import stats

from gputune.errors import InputError
from gputune.extras import import_extra
from gputune.search.distributions import Distribution, LogInt, LogIntegers, Steps, distribution_text

Described = dict[str, Any]
"""One of Optuna's distributions as plain JSON: "kind" float, int or choices, and its arguments."""


def translated(space: Any) -> Any:
    """Return a space, a dict or a list of dicts, with Optuna's distributions in scikit-learn's terms."""
    if isinstance(space, list | tuple):
        return type(space)(translated(part) for part in space)
    if not isinstance(space, Mapping):
        return space
    return {name: _translated(value) for name, value in space.items()}


def _translated(value: Any) -> Any:
    kind = type(value)
    if kind.__module__.partition(".")[0] != "optuna":
        return value
    if kind.__name__ == "CategoricalDistribution":
        return list(value.choices)
    if kind.__name__ == "FloatDistribution":
        return _floats(value)
    return _integers(value) if kind.__name__ == "IntDistribution" else value


def _floats(value: Any) -> Any:
    if value.low == value.high:
        return [value.low]
    if value.log:
        return stats.loguniform(value.low, value.high)
    if value.step is not None:
        return Steps(value.low, value.high, value.step)
    return stats.uniform(value.low, value.high - value.low)


def _integers(value: Any) -> Any:
    if value.low == value.high:
        return [value.low]
    return LogIntegers(value.low, value.high) if value.log else Steps(value.low, value.high, value.step)


def described(choices: list[Any] | Distribution) -> Described | None:
    """Return the list or distribution of one key as one of Optuna's; None for a law that Optuna does not have."""
    if isinstance(choices, list):
        return {"kind": "choices", "choices": labels(choices)}
    if isinstance(choices, LogInt | LogIntegers):
        return {"kind": "int", "low": choices.low, "high": choices.high, "log": True}
    if isinstance(choices, Steps):
        kind = "int" if choices.whole else "float"
        return {"kind": kind, "low": choices.low, "high": choices.high, "step": choices.step}
    return _described_law(choices)


def _described_law(value: Any) -> Described | None:
    law: Any = getattr(value, "dist", value)
    namesake: Any = getattr(stats, str(getattr(law, "name", "")), None)
    if type(law) is not type(namesake):
        return None
    low, high = (end.item() if hasattr(end, "item") else end for end in value.support())
    if law.name == "randint":
        return {"kind": "int", "low": int(low), "high": int(high)}
    if law.name == "uniform":
        return {"kind": "float", "low": float(low), "high": float(high)}
    # A loguniform that is moved by its loc is none any more: its median tells.
    if law.name in ("loguniform", "reciprocal") and math.isclose(value.median() ** 2, low * high):
        return {"kind": "float", "low": float(low), "high": float(high), "log": True}
    return None


def describe(space: Mapping[str, list[Any] | Distribution]) -> dict[str, Described]:
    """Return the keys of one dict of a checked space as Optuna's distributions.

    Raises InputError for a law that Optuna does not have.
    """
    found = {key: described(choices) for key, choices in space.items()}
    for key, description in found.items():
        if description is None:
            raise InputError(
                f"space[{key!r}] must be a list, scipy's uniform, loguniform or randint, gputune.log_int or one of "
                f"Optuna's distributions for an Optuna sampler, got {distribution_text(space[key])}; choose one of "
                "them, or method='random'."
            )
    return {key: description for key, description in found.items() if description is not None}


def as_optuna(description: Described) -> Any:
    """Return the ``optuna.distributions`` object."""
    distributions = import_extra("optuna.distributions", extra="optuna", used_by="An Optuna distribution")
    arguments = {key: value for key, value in description.items() if key != "kind"}
    names = {"float": "FloatDistribution", "int": "IntDistribution", "choices": "CategoricalDistribution"}
    return getattr(distributions, names[description["kind"]])(**arguments)


def label(value: Any) -> Any:
    """Return what stands for a choice in Optuna, whose storages hold numbers, words and None: others as text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else repr(value)


def labels(choices: list[Any]) -> list[Any]:
    """Return the labels of choices, each once."""
    found: dict[tuple[type, Any], Any] = {}
    for choice in choices:
        found.setdefault((type(label(choice)), label(choice)), label(choice))
    return list(found.values())


def of_label(given: Any, choices: list[Any]) -> Any:
    """Return the choice that a label stands for."""
    return next(c for c in choices if type(label(c)) is type(given) and label(c) == given)
