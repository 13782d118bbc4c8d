"""Which estimators are searched together: gputune's own, alone or as the last step of a Pipeline."""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, Self

from sklearn.base import clone
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_memory

from gputune.sklearn.base import FusedEstimator, conductor


def last_step(estimator: Any) -> tuple[str, Any]:
    """Return the prefix of the parameters of what is trained, and that itself: a pipeline's last step, or all of it."""
    if isinstance(estimator, Pipeline) and estimator.steps:
        name, last = estimator.steps[-1]
        return f"{name}__", last
    return "", estimator


def why_not_together(estimator: Any, space: Any) -> str | None:
    """Return the reason why the candidates of a space cannot be trained together, None where they can."""
    prefix, last = last_step(estimator)
    name = type(last).__name__
    if not isinstance(last, FusedEstimator):
        return f"{name} is none of gputune's estimators"
    if type(last).fit is not FusedEstimator.fit:
        return f"{name} has a fit of its own"
    if not prefix:
        return None
    if type(estimator)._fit is not Pipeline._fit or type(estimator).fit is not Pipeline.fit:
        return f"{type(estimator).__name__} fits its steps in a way of its own"
    given = space if isinstance(space, list) else [space]
    searched = {key for each in given if isinstance(each, Mapping) for key in each}
    whole = searched & {prefix.removesuffix("__"), "steps", "memory"}
    return f"{sorted(whole)[0]!r} is searched, which changes more than a parameter" if whole else None


class HandedMemory:
    """The ``memory`` of a pipeline in a search, which is asked for every fitted transformer; elsewhere the user's."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory

    def __repr__(self) -> str:
        return repr(self.memory)

    def cache(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """Return the function that fits a transformer, as the search at work wants it."""
        search = conductor.get()
        if search is not None:
            return functools.partial(search.transform, function)
        cached: Callable[..., Any] = check_memory(self.memory).cache(function, **options)
        return cached

    def __sklearn_clone__(self) -> Self:
        return self


def prepared(estimator: Any, device: str) -> Any:
    """Return the estimator as a search lends it to scikit-learn; the user's own stays as it is."""
    lent = estimator
    if isinstance(estimator, Pipeline):
        lent = copy.copy(estimator)
        lent.steps = list(estimator.steps)
        lent.memory = HandedMemory(estimator.memory)
    if device == "auto":
        return lent
    prefix, last = last_step(lent)
    on_device = clone(last).set_params(device=device)
    if not prefix:
        return on_device
    lent.steps[-1] = (lent.steps[-1][0], on_device)
    return lent


def returned(estimator: Any) -> Any:
    """Return a refitted estimator with the user's own ``memory``."""
    if isinstance(estimator, Pipeline) and isinstance(estimator.memory, HandedMemory):
        estimator.memory = estimator.memory.memory
    return estimator
