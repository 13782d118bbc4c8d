"""MLPClassifier and MLPRegressor: scikit-learn's classes, trained by gputune if it supports the
settings."""

from numbers import Integral, Real
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn import neural_network
from sklearn.base import is_classifier
from sklearn.neural_network._base import ACTIVATIONS as SCIKIT_LEARN_ACTIVATIONS
from sklearn.preprocessing import LabelBinarizer
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import validate_data
from torch import nn

from gputune.ground.errors import InputError
from gputune.ground.types import ACTIVATIONS, SCHEDULES
from gputune.models import MLP
from gputune.models.mlp import ACTIVATIONS as MLP_ACTIVATIONS
from gputune.population.population import complete
from gputune.sklearn.base import FLOATS, constructor, has_columns
from gputune.sklearn.dataset import CheckedRows, as_dense, as_tensor
from gputune.sklearn.networks import TrainedEstimator
from gputune.sklearn.recipe import (
    AUTO_BATCH,
    MOMENTUM,
    DrawSeed,
    Patience,
    Recipe,
    TrainedMember,
    draw_seed,
)
from gputune.spaces.config import check_value

# Solver -> the optimizer with Nesterov's momentum, and the one without it. scikit-learn's "sgd"
# uses Nesterov's momentum by default.
_NESTEROVS = {"sgd": ("nesterov", "sgd"), "sgdhd": ("nesterovhd", "sgdhd")}
_SOLVERS = ("sgd", "adam", "adamw", "sgdhd", "adamhd", "adamwhd")

_SCIKIT_LEARN_VALUES: dict[str, tuple[object, ...]] = {
    "solver": ("lbfgs", "sgd", "adam"),
    "activation": ("identity", "logistic", "tanh", "relu"),
    "learning_rate": ("constant", "invscaling", "adaptive"),
    "dropout": (0,),
    "weight_decay": (None,),
    "device": ("auto", "cpu"),
}
"""Maps parameters with more possible values in gputune to the values that scikit-learn's own
``fit`` supports."""


class _MLP(TrainedEstimator):
    """The common base class of MLPClassifier and MLPRegressor."""

    _epochs = "max_iter"
    _differentiable: ClassVar = {
        "learning_rate_init": "lr",
        "weight_decay": "weight_decay",
        "alpha": "weight_decay",
        "momentum": "momentum",
    }
    _refused: ClassVar = {
        **dict.fromkeys(
            ("width", "depth"), "Pass hidden_layer_sizes, (64, 64) for two layers of 64 units."
        ),
        "lr": "Pass learning_rate_init.",
        "max_epochs": "Pass max_iter.",
        "optimizer": "Pass solver.",
        "schedule": "Pass learning_rate.",
    }
    _parameter_constraints: ClassVar[dict[str, list[object]]] = {
        **neural_network.MLPRegressor._parameter_constraints,
        "activation": [StrOptions({*_SCIKIT_LEARN_VALUES["activation"], *ACTIVATIONS})],
        "solver": [StrOptions({"lbfgs", *_SOLVERS})],
        "learning_rate": [StrOptions({"invscaling", "adaptive", *SCHEDULES})],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "weight_decay": [Interval(Real, 0, None, closed="left"), None],
        "device": [str],
    }

    loss: str
    _loss: ClassVar[str]

    def _left_to_scikit_learn(self, y: object) -> str | None:
        if (reason := self._setting_of_scikit_learn()) is not None:
            return reason
        if has_columns(y):
            return "a target of several columns"
        labels = np.asarray(y, dtype=object).ravel()
        if is_classifier(self) and labels.size and (labels == labels[0]).all():
            return "a target of one class"
        return None

    def _setting_of_scikit_learn(self) -> str | None:
        """Return the first setting that only scikit-learn can train, such as "early_stopping=True",
        or None."""
        sgd = self.solver == "sgd"
        adam = self.solver == "adam"
        unsupported = {
            "solver": self.solver == "lbfgs",
            "activation": self.activation in ("identity", "logistic"),
            "learning_rate": sgd and self.learning_rate in ("invscaling", "adaptive"),
            "hidden_layer_sizes": np.size(self.hidden_layer_sizes) == 0,
            "loss": self.loss != self._loss,
            "shuffle": not self.shuffle,
            "warm_start": self.warm_start,
            "early_stopping": self.early_stopping,
            "beta_1": adam and self.beta_1 != 0.9,
            "beta_2": adam and self.beta_2 != 0.999,
            "epsilon": adam and self.epsilon != 1e-8,
        }
        for name, is_unsupported in unsupported.items():
            if is_unsupported:
                return f"{name}={getattr(self, name)!r}"
        return None

    def _validate_input(self, X: object, y: object, incremental: bool, reset: bool) -> object:
        """Check settings at the beginning of scikit-learn's own ``fit`` or ``partial_fit``.

        The method also removes the network of an earlier fit. Raises InputError for settings that
        only gputune trains.
        """
        reason = "partial_fit" if incremental else self._left_to_scikit_learn(y)
        for name, values in _SCIKIT_LEARN_VALUES.items():
            value = getattr(self, name)
            if value not in values:
                raise InputError(
                    None,
                    f"{name}={value!r} is supported only by gputune's training, but {reason} "
                    f"needs scikit-learn's own {type(self).__name__}",
                    remedy="Leave one of them out.",
                )
        for name in ("module_", "target_mean_", "target_scale_"):
            self.__dict__.pop(name, None)
        return super()._validate_input(X, y, incremental, reset)

    def _check_solver(self) -> bool:
        """Return True if the solver supports ``partial_fit``, otherwise raise AttributeError."""
        if self.solver not in ("sgd", "adam"):
            raise AttributeError(
                f"partial_fit supports only solver='sgd' and solver='adam', got {self.solver!r}."
            )
        return True

    def _recipe(self, draw: DrawSeed) -> Recipe:
        self._validate_params()
        if (reason := self._setting_of_scikit_learn()) is not None:
            raise InputError(
                None,
                f"{reason} needs scikit-learn's own {type(self).__name__}, which trains one "
                "estimator at a time",
            )
        layers = _layers(self.hidden_layer_sizes)
        alpha = self._alpha()
        patience = None
        if self.n_iter_no_change < np.inf:
            patience = Patience(float(self.tol), int(self.n_iter_no_change))
        with_nesterov, without = _NESTEROVS.get(self.solver, (self.solver, self.solver))
        optimizer = with_nesterov if self.nesterovs_momentum else without
        # scikit-learn's other values, "invscaling" and "adaptive", affect only sgd.
        schedule = self.learning_rate if self.learning_rate in SCHEDULES else "constant"
        momentum = check_value("momentum", self.momentum, "momentum")
        width = tuple(layers) if len({*layers}) > 1 else layers[0]
        config = {
            "width": check_value("width", width, "hidden_layer_sizes"),
            "depth": check_value("depth", len(layers), "hidden_layer_sizes"),
            "activation": self.activation,
            "dropout": float(self.dropout),
            "optimizer": optimizer,
            "lr": float(self.learning_rate_init),
            "schedule": schedule,
            "batch_size": AUTO_BATCH if self.batch_size == "auto" else int(self.batch_size),
        }
        if alpha is None and self.weight_decay is not None:
            config["weight_decay"] = float(self.weight_decay)
        if optimizer in MOMENTUM:
            config["momentum"] = momentum
        config = complete(config, optimizer=optimizer, schedule="constant")
        seed = draw_seed(self.random_state, draw)
        return Recipe(
            "mlp", config, alpha, int(self.max_iter), seed, self.device, patience=patience
        )

    def _alpha(self) -> float | None:
        """Return the L2 penalty ``alpha``, or None if ``weight_decay`` replaces the penalty.

        Raises InputError if the user sets both.
        """
        chosen = self.alpha != 1e-4  # scikit-learn's default
        if self.solver in ("adamw", "adamwhd"):
            if chosen:
                raise InputError(
                    None,
                    f"alpha={self.alpha!r} is an L2 penalty, but solver={self.solver!r} uses a "
                    "decoupled weight decay",
                    remedy="Pass weight_decay instead, or solver='adam'.",
                )
            return None
        if self.weight_decay is None:
            return float(self.alpha)
        if chosen and not self.weight_decay == self.alpha == 0:
            raise InputError(
                None,
                f"weight_decay={self.weight_decay!r} and alpha={self.alpha!r} set the same "
                "penalty (alpha is divided by the weight of a minibatch's rows)",
                remedy="Pass only one of them.",
            )
        return None

    def _set_fitted(self, fitted: TrainedMember, rows: CheckedRows) -> None:
        super()._set_fitted(fitted, rows)
        assert isinstance(self.module_, MLP)
        layers = [layer for layer in self.module_.layers if isinstance(layer, nn.Linear)]
        # torch stores (outputs, inputs), scikit-learn (inputs, outputs).
        self.coefs_ = [layer.weight.detach().numpy().T.copy() for layer in layers]
        self.intercepts_ = [layer.bias.detach().numpy().copy() for layer in layers]
        self._set_outputs(fitted, rows)
        self.n_layers_ = len(layers) + 1
        self.n_outputs_ = len(self.intercepts_[-1])
        self.loss_curve_ = fitted.losses.tolist()
        self._no_improvement_count = fitted.stalled
        self.best_loss_ = min(self.loss_curve_, default=np.inf)
        if self.loss_curve_:
            self.loss_ = self.loss_curve_[-1]
        self.validation_scores_ = self.best_validation_score_ = None
        # scikit-learn counts training samples here.
        self.t_ = fitted.epochs * fitted.rows
        # Otherwise ``partial_fit`` would continue with the optimizer of an earlier fit.
        self.__dict__.pop("_optimizer", None)

    def _set_outputs(self, fitted: TrainedMember, rows: CheckedRows) -> None:
        """Convert the trained last layer to the form that scikit-learn's attributes have.

        For two classes the converted layer has one output, a probability. For a regression its
        outputs are in the units of the target.
        """
        raise NotImplementedError

    def _forward_pass_fast(self, X: object, check_input: bool = True) -> NDArray[np.floating]:
        """Return the network's predictions for rows X: probabilities, or values for a
        regression."""
        if self.activation in SCIKIT_LEARN_ACTIVATIONS:
            return np.asarray(super()._forward_pass_fast(X, check_input=check_input))
        if check_input:
            X = validate_data(self, X, dtype=FLOATS, accept_sparse="csr", reset=False)
        hidden = as_tensor(as_dense(X))
        activation = MLP_ACTIVATIONS[self.activation]()
        for weight, bias in zip(self.coefs_[:-1], self.intercepts_[:-1]):
            hidden = activation(
                # (m, inputs) @ (inputs, units) -> (m, units)
                hidden @ as_tensor(weight).to(hidden.dtype) + as_tensor(bias).to(hidden.dtype)
            )
        outputs: NDArray[np.floating] = hidden.numpy() @ self.coefs_[-1] + self.intercepts_[-1]
        SCIKIT_LEARN_ACTIVATIONS[self.out_activation_](outputs)
        return outputs


def _layers(sizes: object) -> list[int]:
    """Return the sizes of the hidden layers as a list of integers.

    Raises InputError for values that are not sizes.
    """
    layers = [sizes] if isinstance(sizes, Integral) else sizes
    if not isinstance(layers, list | tuple | np.ndarray) or not all(map(_is_size, layers)):
        raise InputError(
            "hidden_layer_sizes",
            "must be the size of one layer or a tuple of sizes, all integers of at least 1",
            got=sizes,
            remedy="For example (64, 32).",
        )
    return list(map(int, layers))


def _is_size(value: object) -> bool:
    """Return True if a value is a valid number of units of a hidden layer."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


_PARAMETERS = """

    The class has the parameters and defaults of scikit-learn's class, and its attributes after
    ``fit``. gputune trains the network if it supports the settings. In a search gputune trains all
    such candidates together, and warns about the others.

    scikit-learn's own ``fit`` trains these cases, one estimator at a time:

    - solver "lbfgs", or other constants of "adam" (``beta_1``, ``beta_2``, ``epsilon``);
    - activation "logistic" or "identity", or no hidden layer;
    - learning_rate "invscaling" or "adaptive" of "sgd";
    - early_stopping, warm_start, shuffle=False or another ``loss``;
    - a target with several columns or with one class;
    - ``partial_fit``.

    Sparse X is converted to a dense array, if memory holds it. Numbers have X's precision on a CPU
    and single precision on a GPU.

    Args:
        activation: "relu" or "tanh", and in gputune also "gelu" or "silu".
        dropout: dropout rate after every activation, in [0, 1) [default: 0].
        solver: "adam" or "sgd", and in gputune also "adamw" (decoupled weight decay), and "sgdhd",
            "adamhd" and "adamwhd", which adapt their learning rate.
        alpha: scikit-learn's L2 penalty: a weight decay of alpha / (weight of a minibatch's rows)
            in the gradient. Departures: the biases decay too, and a short last minibatch decays
            like a whole one.
        weight_decay: the weight decay itself, as in torch.optim, in place of ``alpha``. "adamw" and
            "adamwhd" have no alpha. For them None is 0.01.
        learning_rate: "constant", and for every solver also "cosine", "linear", "warmup+cosine",
            "one_cycle", "coslog4" or "flat_cos".
        tol: improvement of the loss that counts. The loss is computed on all training rows after
            each epoch, without the penalty. This takes time. scikit-learn uses the mean over the
            minibatches of the epoch.
        n_iter_no_change: training ends after more than this number of epochs without a loss below
            the best loss minus ``tol``. inf computes no loss and trains to the last epoch.
        max_iter: number of epochs at most. No ConvergenceWarning appears if all were trained.
        random_state: an integer gives the same numbers again, in a single fit and in a search. They
            differ from scikit-learn's numbers.
        verbose: no effect.
        device: "auto" (a GPU only for long trainings), "cpu", "cuda" or "cuda:1".

    Raises:
        InputError: a setting that only gputune trains is combined with one that only scikit-learn
            trains. It is raised by ``fit``, like the other errors.
        DivergedError: the training diverges.
"""

_EXTRAS = {"dropout": 0.0, "weight_decay": None, "device": "auto"}


class MLPClassifier(_MLP, neural_network.MLPClassifier):  # type: ignore[misc]
    __doc__ = f"""A multilayer perceptron for classes, with scikit-learn's parameters.{_PARAMETERS}
    Attributes:
        module_: a plain torch module on the CPU with logits (n, K), if gputune trained it.

    Example:
        >>> from gputune.sklearn import MLPClassifier
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> model = MLPClassifier(max_iter=50, random_state=0)
        >>> model.fit(X, y).predict(X[:3])
        array([0, 0, 0])
    """

    loss = _loss = "log_loss"
    __init__ = constructor(neural_network.MLPClassifier, _EXTRAS)

    def _set_outputs(self, fitted: TrainedMember, rows: CheckedRows) -> None:
        assert rows.classes is not None
        self.classes_ = rows.classes[fitted.classes]
        self._label_binarizer = LabelBinarizer().fit(self.classes_)
        self.out_activation_ = "softmax"
        if fitted.present is not None:  # classes whose training rows have weight 0 are excluded
            self.intercepts_[-1][~fitted.present] = -np.inf
        if len(self.classes_) == 2:
            self.out_activation_ = "logistic"
            # The softmax of two logits is the sigmoid of their difference: (H, 2) -> (H, 1).
            self.coefs_[-1] = np.diff(self.coefs_[-1], axis=1)
            self.intercepts_[-1] = np.diff(self.intercepts_[-1])


class MLPRegressor(_MLP, neural_network.MLPRegressor):  # type: ignore[misc]
    __doc__ = f"""A multilayer perceptron for a number, with scikit-learn's parameters.{_PARAMETERS}
    Note:
        gputune trains on the standardized target. ``alpha`` weighs against the error of this
        target, and ``tol`` refers to half of its squared error.

    Attributes:
        module_: a plain torch module on the CPU, if gputune trained it.
        target_mean_: the target is the module's output * ``target_scale_`` + ``target_mean_``.
        target_scale_: see ``target_mean_``.

    Example:
        >>> from gputune.sklearn import MLPRegressor
        >>> from sklearn.datasets import load_diabetes
        >>> X, y = load_diabetes(return_X_y=True)
        >>> model = MLPRegressor(learning_rate_init=0.01, max_iter=50, random_state=0)
        >>> model.fit(X, y).score(X, y) > 0.4
        True
    """

    loss = _loss = "squared_error"
    __init__ = constructor(neural_network.MLPRegressor, _EXTRAS)

    def _set_outputs(self, fitted: TrainedMember, rows: CheckedRows) -> None:
        self.target_mean_ = float(fitted.center)
        self.target_scale_ = float(fitted.scale)
        self.out_activation_ = "identity"
        # The last layer then returns numbers in the units of the target.
        self.coefs_[-1] *= self.target_scale_
        self.intercepts_[-1] = self.intercepts_[-1] * self.target_scale_ + self.target_mean_
