"""The parameters of an MLP estimator, in gputune's words or scikit-learn's, turned into what the engine trains."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
from sklearn.utils import check_random_state
from torch import Tensor, nn

from gputune.engine.population import ModelKind, complete
from gputune.errors import InputError
from gputune.search.config import check_value
from gputune.types import Config

MAX_EPOCHS = 50
AUTO_BATCH = 200  # batch_size="auto" is min(200, rows), as in scikit-learn

# scikit-learn's solvers: its "sgd" has Nesterov's momentum of 0.9 unless told otherwise.
_SOLVERS = {"sgd": "nesterov", "adam": "adam"}

_SYNONYMS = (("lr", "learning_rate_init"), ("max_epochs", "max_iter"))

_REFUSED_ACTIVATIONS = {
    "logistic": "use 'tanh', which is the same function shifted and scaled",
    "identity": "a network without an activation is a linear model: use gputune.sklearn.LogisticRegression",
}


Fresh = Callable[[], int]
"""Draws the seed of random_state=None: once for all configurations that are fitted together."""


@dataclass(frozen=True, eq=False)
class Begun:
    """Where one configuration is in a training that stops at rungs and goes on: after ``epoch`` of ``horizon`` epochs.

    seed     that of its random numbers, None before the first rung
    states   by fold: the engine's buffers of one member, parameters first
    """

    epoch: int
    horizon: int
    seed: int | None
    states: Mapping[int, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Recipe:
    """How one configuration trains, whatever words it was written in.

    config   the engine's complete configuration; its weight decay still lacks what ``alpha`` adds
    alpha    scikit-learn's L2 penalty, None where ``weight_decay`` says it; see ``config_for``
    epochs   how long it trains, and the horizon of its schedule
    seed     keys its start, row orders and dropout
    device   as the user wrote it
    module   the user's class for kind "module", under the two keywords of the engine
    begun    where a training that stops at rungs is; None for one that goes to its end at once
    """

    kind: ModelKind
    config: Config
    alpha: float | None
    epochs: int
    seed: int
    device: str
    module: type[nn.Module] | None
    begun: Begun | None = None

    @property
    def start(self) -> int:
        """Epochs that it has trained already."""
        return 0 if self.begun is None else self.begun.epoch

    @property
    def horizon(self) -> int:
        """Epochs that its schedule runs over."""
        return self.epochs if self.begun is None else self.begun.horizon

    def going_on(self, begun: Begun) -> "Recipe":
        """Return the recipe of a training that goes on from where it is."""
        return replace(self, begun=begun, seed=self.seed if begun.seed is None else begun.seed)

    def config_for(self, rows: int, weight: float) -> Config:
        """Return the configuration for so many training rows of so much weight in all.

        scikit-learn's gradient is (sum of weight x slope + alpha W) / (sum of weights) over a minibatch, so its
        penalty is an L2 weight decay of alpha / (sum of the minibatch's weights): here of a whole minibatch of
        average weight. Departures: a short last minibatch has the same decay, and the biases decay too.
        """
        if self.alpha is None:
            return self.config
        batch_weight = min(self.config["batch_size"], rows) * weight / rows
        return self.config | {"weight_decay": self.alpha / batch_weight}


def draw_seed(random_state: Any, fresh: Fresh) -> int:
    """Return an integer as it is, one draw from a RandomState, or ``fresh()`` for None.

    ValueError for anything else, as in scikit-learn.
    """
    if random_state is None:
        return fresh()
    generator = check_random_state(random_state)
    return int(random_state) if isinstance(random_state, Integral) else int(generator.randint(2**31 - 1))


def fresh_seed() -> int:
    """Return a draw from numpy's global state, which is what ``random_state=None`` means in scikit-learn."""
    return int(check_random_state(None).randint(2**31 - 1))


def mlp_recipe(params: Mapping[str, Any], *, fresh: Fresh) -> Recipe:
    """Return the recipe of an MLP estimator's parameters; a None among them was not given.

    Raises InputError for a value out of range, for two words that say the same thing and differ, and for what
    scikit-learn's MLP has and this one has not, with the remedy.
    """
    given = {name: value for name, value in params.items() if value is not None}
    _translate_layers(given)
    for own, other in _SYNONYMS:
        _translate(given, own, other)
    _translate_solver(given)
    alpha = _translate_alpha(given)
    _check_activation(given["activation"])
    epochs = whole_number("max_epochs", given.pop("max_epochs", MAX_EPOCHS))
    seed = draw_seed(given.pop("random_state", None), fresh)
    device = given.pop("device")
    config = trained_config(given, optimizer="adamw" if alpha is None else "adam")
    return Recipe("mlp", config, alpha, epochs, seed, device, module=None)


def trained_config(given: Mapping[str, Any], *, optimizer: str) -> Config:
    """Return the engine's complete configuration of checked values; ``optimizer`` where none was given."""
    size = AUTO_BATCH if isinstance(given["batch_size"], str) and given["batch_size"] == "auto" else None
    written = {**given, "batch_size": size or given["batch_size"]}
    config = {name: check_value(name, value, name) for name, value in written.items()}
    return complete(config, optimizer=optimizer, schedule="constant")


def _translate(given: dict[str, Any], own: str, other: str) -> None:
    """Say in gputune's word what may have been said in scikit-learn's."""
    value = given.pop(other, None)
    if value is None:
        return
    value = whole_number(other, value) if own == "max_epochs" else check_value(own, value, other)
    if own in given and given[own] != value:
        raise _unlike(own, given[own], other, value)
    given[own] = value


def _unlike(own: str, value: Any, other: str, other_value: Any) -> InputError:
    return InputError(
        f"{own}={value!r} and {other}={other_value!r} say the same thing and differ; give one of them."
    )


def _translate_layers(given: dict[str, Any]) -> None:
    sizes = given.pop("hidden_layer_sizes", None)
    if sizes is None:
        return
    for own, value in zip(("width", "depth"), _layers(sizes)):
        if own in given and given[own] != value:
            raise _unlike(own, given[own], "hidden_layer_sizes", sizes)
        given[own] = value


def _layers(sizes: Any) -> tuple[int, int]:
    """Return width and depth of scikit-learn's hidden_layer_sizes."""
    layers = [sizes] if isinstance(sizes, Integral) else sizes
    if not isinstance(layers, list | tuple | np.ndarray) or not all(
        isinstance(n, Integral) and not isinstance(n, bool) and int(n) >= 1 for n in layers
    ):
        raise InputError(
            f"hidden_layer_sizes must be one layer's size or a tuple of sizes, integers >= 1, got {sizes!r}. "
            "For example (64, 64)."
        )
    if len(layers) == 0:
        raise InputError(
            "hidden_layer_sizes=() has no hidden layer, which is a linear model: use LogisticRegression."
        )
    if len({int(n) for n in layers}) > 1:
        raise InputError(
            f"hidden_layer_sizes must be equal layers, got {tuple(map(int, layers))}; for layers of unlike sizes give "
            "a torch.nn.Module of your own to NeuralNetClassifier or NeuralNetRegressor."
        )
    return int(layers[0]), len(layers)


def _translate_solver(given: dict[str, Any]) -> None:
    solver = given.pop("solver", None)
    if solver is None:
        return
    if not isinstance(solver, str) or solver not in _SOLVERS:
        remedy = "there is no line search over minibatches of many models; use solver='adam' or 'sgd'"
        raise InputError(f"solver must be one of {', '.join(_SOLVERS)}, got {solver!r}: {remedy}.")
    optimizer = _SOLVERS[solver]
    if given.setdefault("optimizer", optimizer) != optimizer:
        raise InputError(
            f"optimizer={given['optimizer']!r} and solver={solver!r} say the same thing and differ (scikit-learn's "
            f"{solver!r} is the optimizer {optimizer!r}); give one of them."
        )


def _translate_alpha(given: dict[str, Any]) -> float | None:
    alpha = given.pop("alpha", None)
    if alpha is None:
        return None
    alpha = float(check_value("weight_decay", alpha, "alpha"))
    if "weight_decay" in given and not given["weight_decay"] == alpha == 0:
        raise InputError(
            f"weight_decay={given['weight_decay']!r} and alpha={alpha!r} are two penalties of one kind (alpha is "
            "divided by the weight of a minibatch's rows); give one of them."
        )
    if given.get("optimizer", "adam") in ("adamw", "adamwhd"):
        raise InputError(
            f"alpha={alpha!r} is an L2 penalty, and the decay of optimizer={given['optimizer']!r} is another one; "
            "give weight_decay, or optimizer='adam'."
        )
    given.pop("weight_decay", None)
    return alpha


def _check_activation(name: Any) -> None:
    if isinstance(name, str) and name in _REFUSED_ACTIVATIONS:
        raise InputError(
            f"activation={name!r} is not among relu, gelu, silu, tanh: {_REFUSED_ACTIVATIONS[name]}."
        )


def whole_number(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise InputError(f"{name} must be an integer >= 1, got {value!r}. For example {MAX_EPOCHS}.")
    return int(value)
