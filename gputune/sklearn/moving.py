"""What a descent moves: hyperparameters in gputune's words, held in an estimator's parameters of other names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sklearn.base import clone

from gputune.errors import InputError
from gputune.hypergradients.arguments import hyperparameters_of
from gputune.hypergradients.coordinates import has_coordinate
from gputune.sklearn.pipelines import last_step
from gputune.sklearn.solving import Penalty
from gputune.sklearn.words import Recipe
from gputune.types import ONLINE

_WORDS = {
    "lr": ("lr", "learning_rate_init"),
    "weight_decay": ("weight_decay", "alpha", "optimizer__weight_decay"),
    "momentum": ("momentum", "optimizer__momentum"),
    "C": ("C",),
}
"""What estimators call each hyperparameter; alpha is a weight decay in another unit."""


@dataclass(frozen=True)
class Start:
    """Where a descent starts: the value of each hyperparameter, in the unit of the parameters that hold it."""

    values: dict[str, float]
    words: dict[str, tuple[str, ...]]

    def moved(self, params: Mapping[str, Any], values: Mapping[str, float]) -> dict[str, Any]:
        """Return a candidate's parameters with other values of the hyperparameters."""
        return {**params, **{word: values[name] for name, words in self.words.items() for word in words}}


def moved_names(hyperparameters: Any, estimator: Any) -> tuple[str, ...]:
    """Return the hyperparameters that are descended on, given in any word of the estimator.

    Raises InputError for one that the estimator has not, and for one named twice.
    """
    prefix, last = last_step(estimator)
    own = last.get_params(deep=False)
    offered = {name: [word for word in words if word in own] for name, words in _WORDS.items()}
    given = (hyperparameters,) if isinstance(hyperparameters, str) else tuple(hyperparameters)
    if given == ("lr",) and offered["C"] and not offered["lr"]:
        given = ("C",)  # the default, for the estimator that has C alone
    meant = {word: name for name, words in offered.items() if words for word in (name, *words)}
    names = tuple(meant.get(str(word).removeprefix(prefix), "") for word in given)
    if not names or "" in names or len(set(names)) < len(names):
        words = ", ".join(" or ".join(words) for words in offered.values() if words)
        raise InputError(
            f"hyperparameters: a descent of {type(last).__name__} moves some of {words}, each named once, got "
            f"{hyperparameters!r}."
        )
    return names


def start_of(estimator: Any, params: Mapping[str, Any], names: tuple[str, ...], number: int) -> Start | None:
    """Return where candidate ``number`` starts; None where the estimator refuses the candidate, as its fit will.

    Raises InputError where it cannot be descended from, and scikit-learn's ValueError for an unknown parameter.
    """
    candidate = clone(estimator).set_params(**clone(params, safe=False))
    prefix, last = last_step(candidate)
    try:
        recipe = last._recipe(lambda: 0)
    except (TypeError, ValueError):
        return None
    own = last.get_params(deep=False)
    words = {name: tuple(prefix + word for word in _words(name, own)) for name in names}
    values = {name: _value(recipe, name, number) for name in names}
    for name, value in values.items():
        if not has_coordinate(name, value):
            raise InputError(
                f"a descent cannot start from {words[name][0]}={value:g}, as start {number} does, because it moves "
                f"{'in the logit' if name == 'momentum' else 'in the logarithm'}; put {words[name][0]!r} in "
                f"param_distributions with values above 0{' and finite' if name == 'C' else ''}, or leave it out of "
                "hyperparameters."
            )
    return Start(values, words)


def _words(name: str, own: Mapping[str, Any]) -> list[str]:
    """Return the parameters that hold a hyperparameter: those that are set, or the first that could be."""
    has = [word for word in _WORDS[name] if word in own]
    return [word for word in has if own[word] is not None] or has[:1]


def _value(recipe: Recipe | Penalty, name: str, number: int) -> float:
    if isinstance(recipe, Penalty):
        if not recipe.fit_intercept:
            raise InputError(
                "the derivative in C is that of a logistic regression with intercepts, got fit_intercept=False in "
                f"start {number}; leave it True, or search C with RandomizedSearchCV."
            )
        return recipe.C
    optimizer = recipe.config["optimizer"]
    if optimizer in ONLINE:
        raise InputError(
            f"a descent differentiates sgd, nesterov, adam and adamw, got optimizer={optimizer!r} in start {number}, "
            "which adapts its rate itself; choose one of those, or use RandomizedSearchCV."
        )
    if name not in hyperparameters_of(optimizer):
        raise InputError(
            f"hyperparameters: {optimizer} has no {name!r}, and start {number} uses it; leave {name!r} out, or choose "
            "an optimizer that has it."
        )
    if name == "weight_decay" and recipe.alpha is not None:
        return recipe.alpha
    return float(recipe.config[name])
