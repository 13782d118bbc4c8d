"""MLPClassifier and MLPRegressor: the multilayer perceptron, in scikit-learn's words."""

from numbers import Integral
from typing import Any, ClassVar

import numpy as np

from gputune.errors import InputError
from gputune.methods.config import check_value
from gputune.sklearn.base import Foreign, keep_parameters
from gputune.sklearn.networks import TrainedClassifier, TrainedEstimator, TrainedRegressor
from gputune.sklearn.recipe import MOMENTUM, DrawSeed, Recipe, draw_seed, engine_config, whole_number
from gputune.types import SCHEDULES

# Each with Nesterov's momentum, which scikit-learn's "sgd" has too unless told otherwise, and without.
_NESTEROVS = {"sgd": ("nesterov", "sgd"), "sgdhd": ("nesterovhd", "sgdhd")}
_SOLVERS = ("sgd", "adam", "adamw", "sgdhd", "adamhd", "adamwhd")

_REFUSED_ACTIVATIONS = {
    "logistic": "use 'tanh', which is the same function shifted and scaled",
    "identity": "a network without an activation is a linear model: use gputune.sklearn.LogisticRegression",
}

_LAST_EPOCH = (
    "training always goes to the last epoch; leave it out and search max_iter, or use HalvingRandomSearchCV"
)


class _MLP(TrainedEstimator):
    """The constructor of both."""

    _epochs = "max_iter"
    _differentiable: ClassVar = {
        "learning_rate_init": "lr",
        "weight_decay": "weight_decay",
        "alpha": "weight_decay",
        "momentum": "momentum",
    }
    _foreign = Foreign(
        ignored={
            "verbose": (None, ""),
            "shuffle": ((True,), "rows are shuffled anew in every epoch; leave it True"),
            "warm_start": ((False,), "fit always begins anew; leave it False, or train longer with max_iter"),
            "early_stopping": ((False,), _LAST_EPOCH),
        },
        refused={
            **dict.fromkeys(("tol", "n_iter_no_change", "validation_fraction"), _LAST_EPOCH),
            "power_t": "there is no learning_rate='invscaling'; use learning_rate='cosine'",
            **dict.fromkeys(("beta_1", "beta_2", "epsilon"), "adam has 0.9, 0.999 and 1e-8; leave it out"),
            "max_fun": "there is no solver='lbfgs'; leave it out",
            "loss": "the loss is the log loss of classes, or the squared error; leave it out",
            **dict.fromkeys(("width", "depth"), "give hidden_layer_sizes, (64, 64) for two layers of 64"),
            "lr": "give learning_rate_init",
            "max_epochs": "give max_iter",
            "optimizer": "give solver",
            "schedule": "give learning_rate",
        },
    )

    def __init__(
        self,
        hidden_layer_sizes: object = (128, 128),
        activation: str = "relu",
        *,
        solver: str | None = None,
        alpha: float | None = None,
        batch_size: int | str = "auto",
        learning_rate: str = "constant",
        learning_rate_init: float = 0.001,
        max_iter: int = 50,
        shuffle: bool = True,
        random_state: object = None,
        verbose: object = False,
        warm_start: bool = False,
        momentum: float = 0.9,
        nesterovs_momentum: bool = True,
        early_stopping: bool = False,
        dropout: float = 0.0,
        weight_decay: float | None = None,
        device: str = "auto",
    ) -> None:
        keep_parameters(self, locals())

    def _recipe(self, draw: DrawSeed) -> Recipe:
        self._checked_params()
        width, depth = _layers(self.hidden_layer_sizes)
        alpha = _check_alpha(self.alpha, self.weight_decay, self.solver)
        optimizer = self._optimizer("adamw" if alpha is None else "adam")
        _check_words(self.activation, self.learning_rate)
        momentum = check_value("momentum", self.momentum, "momentum")
        values = {
            "width": ("hidden_layer_sizes", width),
            "depth": ("hidden_layer_sizes", depth),
            "activation": ("activation", self.activation),
            "dropout": ("dropout", self.dropout),
            "optimizer": ("solver", optimizer),
            "lr": ("learning_rate_init", self.learning_rate_init),
            "schedule": ("learning_rate", self.learning_rate),
            "batch_size": ("batch_size", self.batch_size),
            "weight_decay": ("weight_decay", self.weight_decay if alpha is None else None),
            "momentum": ("momentum", momentum if optimizer in MOMENTUM else None),
        }
        return Recipe(
            kind="mlp",
            config=engine_config(values, optimizer=optimizer),
            alpha=alpha,
            epochs=whole_number("max_iter", self.max_iter),
            seed=draw_seed(self.random_state, draw),
            device=self.device,
        )

    def _optimizer(self, default: str) -> str:
        """Return the engine's word for the solver and its momentum."""
        solver = default if self.solver is None else self.solver
        if not isinstance(solver, str) or solver not in _SOLVERS:
            if solver in ("nesterov", "nesterovhd"):
                remedy = f"{solver.replace('nesterov', 'sgd')!r} has Nesterov's momentum"
            else:
                remedy = "there is no line search over minibatches of many models; use solver='adam' or 'sgd'"
            raise InputError(f"solver must be one of {', '.join(_SOLVERS)}, got {solver!r}: {remedy}.")
        if not isinstance(self.nesterovs_momentum, bool | np.bool_):
            raise InputError(f"nesterovs_momentum must be True or False, got {self.nesterovs_momentum!r}.")
        return _NESTEROVS.get(solver, (solver, solver))[0 if self.nesterovs_momentum else 1]


def _layers(sizes: Any) -> tuple[int, int]:
    """Return width and depth of hidden_layer_sizes."""
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


def _check_alpha(alpha: object, weight_decay: object, solver: object) -> float | None:
    """Return alpha, a number >= 0 or None. Raises InputError where another decay stands beside it."""
    if alpha is None:
        return None
    number = float(check_value("weight_decay", alpha, "alpha"))
    if weight_decay is not None and not weight_decay == number == 0:
        raise InputError(
            f"weight_decay={weight_decay!r} and alpha={number!r} are two penalties of one kind (alpha is "
            "divided by the weight of a minibatch's rows); give one of them."
        )
    if solver in ("adamw", "adamwhd"):
        raise InputError(
            f"alpha={number!r} is an L2 penalty, and the decay of solver={solver!r} is another one; "
            "give weight_decay, or solver='adam'."
        )
    return number


def _check_words(activation: object, learning_rate: object) -> None:
    """Raise InputError for words of scikit-learn that have no counterpart, with what to use."""
    if isinstance(activation, str) and activation in _REFUSED_ACTIVATIONS:
        raise InputError(
            f"activation={activation!r} is not among relu, gelu, silu, tanh: {_REFUSED_ACTIVATIONS[activation]}."
        )
    if learning_rate in ("invscaling", "adaptive"):
        raise InputError(
            f"learning_rate={learning_rate!r} is not among {', '.join(SCHEDULES)}: use 'cosine', or a solver that "
            "adapts its rate, as 'adamwhd'."
        )


_PARAMETERS = """

    Trains for ``max_iter`` epochs, always to the last one, on X as it comes: put a StandardScaler in front.

    hidden_layer_sizes   equal layers, as (64, 64)
    activation, dropout  "relu", "gelu", "silu" or "tanh"; the rate in [0, 1) that follows each
    solver               "adam", "sgd", "adamw" (weight decay apart from the gradient), and those that adapt their rate:
                         "sgdhd", "adamhd", "adamwhd"; None is adamw, and adam where alpha is given
    alpha                scikit-learn's L2 penalty: a weight decay of alpha / (weight of a minibatch's rows) in the
                         gradient. Departures: the biases decay too, and a short last minibatch decays as a whole one
    weight_decay         in place of alpha the decay itself, as in torch.optim; None is 0.01 for adamw, 0 for the others
    learning_rate_init   the learning rate
    learning_rate        how it goes on: "constant", "cosine", "linear", "warmup+cosine" or "one_cycle"
    batch_size           rows of a minibatch; "auto" is min(200, n)
    max_iter             epochs
    momentum, nesterovs_momentum   of sgd and sgdhd; the others have none
    random_state         an integer gives the same numbers again, alone as in a search
    device               "auto" (a GPU only for what is long), "cpu", "cuda", "cuda:1"

    ``verbose``, ``shuffle=True``, ``early_stopping=False`` and ``warm_start=False`` are taken as scikit-learn's scripts
    have them, without effect; other values are refused, and so are ``tol``, ``n_iter_no_change`` and
    ``validation_fraction``.

    Numbers have X's precision on a CPU, single precision on a GPU.
"""


class MLPClassifier(TrainedClassifier, _MLP):
    __doc__ = f"""A multilayer perceptron for classes.{_PARAMETERS}
    After ``fit``: ``module_`` (a plain torch module on the CPU that returns logits), ``classes_``, ``n_iter_``
    (epochs), ``n_features_in_``, ``feature_names_in_``.
    """


class MLPRegressor(TrainedRegressor, _MLP):
    __doc__ = f"""A multilayer perceptron for a number, trained on the standardised target.{_PARAMETERS}
    After ``fit``: ``module_`` (a plain torch module on the CPU), ``target_mean_`` and ``target_scale_`` (the target
    is the module's output * scale + mean), ``n_iter_`` (epochs), ``n_features_in_``, ``feature_names_in_``.
    """
