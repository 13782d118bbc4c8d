"""The words for the methods of a search, and how a study file holds one."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Literal

from gputune.errors import InputError
from gputune.methods.descent import Hypergradient
from gputune.methods.optuna import OptunaSampler
from gputune.methods.stopping import STOPPING_RULES, StoppingRule
from gputune.text import did_you_mean
from gputune.types import Json

Method = Literal["random"] | StoppingRule | Hypergradient | OptunaSampler

METHODS: Mapping[str, type[StoppingRule] | type[Hypergradient]] = {**STOPPING_RULES, "hypergradient": Hypergradient}
"""The methods that a word names; "random" is another one, without options."""


def check_method(method: object) -> Method:
    """Return the search method of a word or of a value."""
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]()
    if isinstance(method, StoppingRule | Hypergradient | OptunaSampler):
        return method
    if method == "random":
        return "random"
    words = ", ".join(map(repr, ("random", *METHODS)))
    values = ", ".join(f"gputune.{kind.__name__}(...)" for kind in METHODS.values())
    raise InputError(
        f"method must be {words}, {values} or gputune.OptunaSampler(...), got {method!r}."
        f"{did_you_mean(method, ('random', *METHODS)) if isinstance(method, str) else ''}"
    )


def check_patience(method: Method, epoch: str, *, solved: bool) -> None:
    """Raise InputError where ``patience`` has no part in a search: trials must train, and to their best epoch."""
    if solved:
        why = "the logistic regression solved with optimizer='exact' has no epochs"
    elif epoch == "last":
        why = "epoch='last' scores the last one"
    elif method == "random" or (isinstance(method, OptunaSampler) and method.halving is None):
        return
    else:
        why = f"method={method_name(method)!r} decides itself how long a trial trains"
    raise InputError(f"patience is for trials that train on from their best epoch, and {why}; leave patience out.")


def method_name(method: Method) -> str:
    """Return the word for a method."""
    if isinstance(method, OptunaSampler):
        return "optuna"
    return method if isinstance(method, str) else type(method).__name__.lower()


def method_to_json(method: Method) -> str | Json:
    """Return a method as a study file holds it."""
    if isinstance(method, str):
        return method
    if isinstance(method, OptunaSampler):
        halving = None if method.halving is None else asdict(method.halving)
        return {"name": "optuna", "sampler": type(method.sampler).__name__, "halving": halving}
    return {"name": method_name(method), **asdict(method)}


def method_from_json(value: str | Json) -> Method:
    """Return the method that ``method_to_json`` wrote, for a refit; a sampler has no part in that."""
    if isinstance(value, str):
        return check_method(value)
    if value["name"] == "optuna":
        return "random"
    return METHODS[value["name"]](**{key: option for key, option in value.items() if key != "name"})
