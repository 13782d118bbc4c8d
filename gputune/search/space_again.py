"""A space as plain values, for a study file, and made again from them: by names of scipy.stats, never by a pickle."""

from typing import Any

import numpy as np
from scipy import stats

from gputune.errors import InputError
from gputune.search.distributions import Distribution, LogInt, LogIntegers, Steps, log_int
from gputune.search.space import Space
from gputune.study.values import to_json


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
