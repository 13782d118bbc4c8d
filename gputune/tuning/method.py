"""The method of a search: what its word means, and how a study file holds it."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

from gputune.errors import InputError
from gputune.search.descent import Hypergradient
from gputune.search.optuna_sampler import OptunaSampler
from gputune.search.stopping import Halving, Median

Method = Literal["random"] | Halving | Median | Hypergradient | OptunaSampler


def check_method(method: Any) -> Method:
    """Return the search method of a word or of a value."""
    words: dict[str, Method] = {
        "random": "random",
        "halving": Halving(),
        "median": Median(),
        "hypergradient": Hypergradient(),
    }
    if isinstance(method, str) and method in words:
        return words[method]
    if isinstance(method, Halving | Median | Hypergradient | OptunaSampler):
        return method
    raise InputError(
        "method must be 'random', 'halving', 'median', 'hypergradient', gputune.Halving(...), gputune.Median(...), "
        f"gputune.Hypergradient(...) or gputune.OptunaSampler(...), got {method!r}."
    )


def method_meta(method: Method) -> str | dict[str, Any]:
    """Return a method as a study file holds it."""
    if isinstance(method, str):
        return method
    if isinstance(method, OptunaSampler):
        halving = None if method.halving is None else asdict(method.halving)
        return {"name": "optuna", "sampler": type(method.sampler).__name__, "halving": halving}
    return {"name": method_name(method), **asdict(method)}


def method_name(method: Method) -> str:
    """Return the word for a method."""
    if isinstance(method, OptunaSampler):
        return "optuna"
    return method if isinstance(method, str) else type(method).__name__.lower()


def method_again(meta: str | Mapping[str, Any]) -> Method:
    """Return the method that ``method_meta`` wrote, for a refit; a sampler has no part in that."""
    if isinstance(meta, str):
        return check_method(meta)
    if meta["name"] == "optuna":
        return "random"
    options = {key: value for key, value in meta.items() if key != "name"}
    kinds = {"halving": Halving, "median": Median, "hypergradient": Hypergradient}
    again: Method = kinds[meta["name"]](**options)
    return again
