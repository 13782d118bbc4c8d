"""Which estimators are searched together: gputune's own, alone or as the last step of a Pipeline."""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, Self

from sklearn.base import clone
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_memory

from gputune.sklearn.base import FusedEstimator, fit_hook


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
    dicts = space if isinstance(space, list) else [space]
    searched = {key for each in dicts if isinstance(each, Mapping) for key in each}
    whole = searched & {prefix.removesuffix("__"), "steps", "memory"}
    return f"{sorted(whole)[0]!r} is searched, which changes more than a parameter" if whole else None


class HookedMemory:
    """The ``memory`` of a pipeline in a search: the hook has every fitted transformer; elsewhere it is the user's."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory

    def __repr__(self) -> str:
        return repr(self.memory)

    def cache(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """Return the function that fits a transformer, through the hook where there is one."""
        hook = fit_hook.get()
        if hook is not None:
            return functools.partial(hook.transform, function)
        cached: Callable[..., Any] = check_memory(self.memory).cache(function, **options)
        return cached

    def __sklearn_clone__(self) -> Self:
        return self


def with_hook(estimator: Any, device: str) -> Any:
    """Return the estimator as scikit-learn gets it while a search runs; the user's own stays as it is."""
    copied = estimator
    if isinstance(estimator, Pipeline):
        copied = copy.copy(estimator)
        copied.steps = list(estimator.steps)
        copied.memory = HookedMemory(estimator.memory)
    if device == "auto":
        return copied
    prefix, last = last_step(copied)
    on_device = clone(last).set_params(device=device)
    if not prefix:
        return on_device
    copied.steps[-1] = (copied.steps[-1][0], on_device)
    return copied


def without_hook(estimator: Any) -> None:
    """Give a refitted estimator the user's own ``memory`` back."""
    if isinstance(estimator, Pipeline) and isinstance(estimator.memory, HookedMemory):
        estimator.memory = estimator.memory.memory
