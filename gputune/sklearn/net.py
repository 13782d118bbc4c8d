"""NeuralNet, NeuralNetClassifier and NeuralNetRegressor: a user's nn.Module as an estimator.

The parameters have the names that skorch uses.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import ClassVar, Self

import numpy as np
import torch
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils import Tags
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from gputune.ground.annotations import FloatArray
from gputune.ground.errors import InputError, InputWarning, check_count, warn
from gputune.ground.types import Config
from gputune.modules.own_training import step_of_class
from gputune.optimizers.classes import (
    OPTIMIZER_PREFIX,
    check_optimizer,
    has_weight_decay,
    optimizer_word,
)
from gputune.population.outputs import two_logits
from gputune.population.population import complete
from gputune.scoring.losses import name_of_loss, other_units, remedy_for_units
from gputune.scoring.objective import LOSS_PREFIX
from gputune.sklearn.dataset import CheckedRows
from gputune.sklearn.networks import (
    EstimatorNames,
    TrainedEstimator,
    hint_for_parameter,
    module_builder,
)
from gputune.sklearn.recipe import AUTO_BATCH, MOMENTUM, DrawSeed, Recipe, TrainedMember, draw_seed
from gputune.spaces.config import check_value

_PREFIXES = ("module__", "criterion__", OPTIMIZER_PREFIX)
"""Prefixes of the parameters that are arguments of the module, the loss and the optimizer."""

_HARMLESS: dict[str, tuple[tuple[object, ...], str]] = {
    "train_split": (
        (None, False),
        "gputune trains on every row. Leave train_split out, and let a search split the rows.",
    ),
    "callbacks": (
        (None, []),
        "gputune calls no callbacks here. Leave callbacks out, or pass them to gputune.tune.",
    ),
}
"""Maps parameters without effect to the values that mean "off" in skorch, and a remedy for other
values."""


class _NeuralNet(TrainedEstimator):
    """The common base class of NeuralNet, NeuralNetClassifier and NeuralNetRegressor.

    Its parameters are the parameters of the constructor, ``module__*`` for arguments of the module,
    ``criterion__*`` and ``optimizer__*``.
    """

    _own_losses: ClassVar[Mapping[type[nn.Module], str]]
    """Maps each torch.nn loss class to gputune's own loss that replaces the class."""
    _takes_arrays = True
    _epochs = "max_epochs"
    _differentiable: ClassVar = {
        "lr": "lr",
        "optimizer__weight_decay": "weight_decay",
        "optimizer__momentum": "momentum",
    }
    _refused: ClassVar = {
        "warm_start": "Each fit starts from new weights. Train longer with max_epochs.",
        "iterator_train__shuffle": "gputune shuffles rows in every epoch. Leave the parameter out.",
        "optimizer__nesterov": "Pass optimizer='nesterov'.",
        **dict.fromkeys(("optimizer__lr", "learning_rate_init"), "Pass lr."),
        "max_iter": "Pass max_epochs.",
        "solver": "Pass optimizer.",
        **dict.fromkeys(("alpha", "weight_decay"), "Pass optimizer__weight_decay."),
        "momentum": "Pass optimizer__momentum.",
    }

    def __init__(
        self,
        module: object,
        *,
        criterion: object = None,
        optimizer: object = "sgd",
        lr: float = 0.01,
        optimizer__weight_decay: float | None = None,
        optimizer__momentum: float | None = None,
        batch_size: int | str = 128,
        max_epochs: int = 10,
        random_state: object = None,
        device: str = "auto",
        training_step: object = None,
        augment: object = None,
        numbers: str = "none",
        train_split: object = None,
        verbose: int = 0,
        callbacks: object = None,
        **arguments: object,
    ) -> None:
        parameters = locals()
        del parameters["self"]
        self._arguments = parameters.pop("arguments")
        # scikit-learn requires a constructor to store its arguments unchanged.
        self.__dict__.update(parameters)

    def get_params(self, deep: bool = True) -> Config:
        """Return all parameters, including the ``module__*``, ``criterion__*`` and ``optimizer__*``
        values."""
        params: Config = super().get_params(deep)
        arguments: Config = self._arguments
        return params | arguments

    def set_params(self, **params: object) -> Self:
        """Set parameters, including any ``module__*``, ``criterion__*`` and ``optimizer__*``.

        Returns the estimator.
        """
        self._check_names(params)
        signature = inspect.signature(type(self)).parameters
        rest = {}
        for name, value in params.items():
            # scikit-learn would look for the parameters of a nested estimator named "optimizer".
            if "__" in name and name in signature:
                setattr(self, name, value)
            elif name.startswith(_PREFIXES) or name in self._arguments:
                self._arguments = self._arguments | {name: value}
            else:
                rest[name] = value
        super().set_params(**rest)
        return self

    def _hint_for(self, name: str) -> str:
        return hint_for_parameter(name, inspect.signature(type(self)).parameters, self.module)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.target_tags.multi_output = True
        return tags

    def _recipe(self, draw: DrawSeed) -> Recipe:
        """Return the recipe (the description of a training run) for the estimator's parameters.

        Raises InputError for a module, an optimizer or a criterion that cannot be trained.
        """
        for name, (harmless, remedy) in _HARMLESS.items():
            value = getattr(self, name)
            if value not in harmless:
                rule = f"{type(self).__name__} does not support {name}={value!r}"
                raise InputError(None, rule, remedy=remedy)
        if self.numbers not in ("none", "standard"):
            raise InputError("numbers", "must be 'none' or 'standard'", got=self.numbers)
        check_count(self.max_epochs, "max_epochs", remedy="For example 50.")
        builder = module_builder(self.module)
        step = self.training_step
        if step is None and self.criterion is None:
            step = step_of_class(builder)
        return Recipe(
            "module",
            self._config(),
            alpha=None,
            epochs=int(self.max_epochs),
            seed=draw_seed(self.random_state, draw),
            device=self.device,
            module=builder,
            loss=self._loss(),
            step=step,
            augment=self.augment,
            numbers=self.numbers,
        )

    def _config(self) -> Config:
        """Return all hyperparameters by name, as gputune's training engine needs them."""
        optimizer = optimizer_word(self.optimizer, "optimizer")
        decay = self.optimizer__weight_decay
        momentum = self.optimizer__momentum
        if momentum is not None and optimizer not in MOMENTUM:
            raise InputError(
                "optimizer__momentum",
                f"must be left out, because optimizer={optimizer!r} has no momentum",
                got=momentum,
                remedy=f"Only {', '.join(MOMENTUM)} have one.",
            )
        if decay is not None and not has_weight_decay(optimizer):
            raise InputError(
                "optimizer__weight_decay",
                f"must be left out, because optimizer={optimizer!r} has no weight decay",
                got=decay,
            )
        is_auto = isinstance(self.batch_size, str) and self.batch_size == "auto"
        values = {
            "lr": self.lr,
            "batch_size": AUTO_BATCH if is_auto else self.batch_size,
            "optimizer__weight_decay": decay,
            "optimizer__momentum": momentum,
        }
        config: Config = {"optimizer": optimizer}
        for name, value in values.items():
            if value is not None:
                key = name.removeprefix(OPTIMIZER_PREFIX)
                config[key] = check_value(key, value, name)
        config = complete(config, optimizer=optimizer, schedule="constant")
        for name, value in self._arguments.items():
            # The constructor cannot check this, because a clone passes its arguments unchanged.
            if not name.startswith(_PREFIXES):
                raise TypeError(
                    f"{type(self).__name__} has no parameter {name!r}. {self._hint_for(name)}"
                )
            key = name
            if name.startswith("criterion__"):
                key = LOSS_PREFIX + name.removeprefix("criterion__")
            config[key] = check_value(name, value, name)
        try:
            check_optimizer(config, "module")
        except InputError as error:
            raise error.shown_by(EstimatorNames()) from None
        return config

    def _loss(self) -> str | Callable[..., object] | None:
        """Return the loss for ``criterion``: a loss name, the user's own loss, or None for the
        default loss."""
        criterion: str | Callable[..., object] | None = self.criterion
        arguments = {name for name in self._arguments if name.startswith("criterion__")}
        for loss, name in self._own_losses.items():
            if criterion is loss and arguments <= {"criterion__label_smoothing"}:
                return name
            if arguments or type(self.criterion) is not loss:
                continue
            if _settings(self.criterion) == _settings(loss()):
                return name
        return criterion


def _settings(criterion: nn.Module) -> Config:
    """Return the settings of a loss object as a dict. A tensor of weights becomes a list."""
    settings = {name: value for name, value in vars(criterion).items() if not name.startswith("_")}
    settings |= {name: buffer.tolist() for name, buffer in criterion.named_buffers()}
    settings.pop("training")
    return settings


_PARAMETERS = """

    X is one of:

    - a table (n, D), or an array or tensor (n, ...) of any shape;
    - a tensor of integers (n, T), such as token ids;
    - several of these as a dict or a tuple. A search needs a ``SliceDict`` instead.

    ``fit`` trains for ``max_epochs`` epochs on all rows. X is not scaled by default: put a
    StandardScaler in front of a table. The members of a search train stacked if the module allows
    it, otherwise one by one.

    Departures from skorch: every row is trained on, none is held out. Floats have X's precision on
    a CPU (skorch: single precision).

    Args:
        module: a torch.nn.Module class, or a function or functools.partial that returns a module.
            It is called with ``module__*``, and with ``n_features``, ``n_outputs`` and
            ``input_shape`` if its signature has them.
        module__*: arguments of the module. ``module__hidden=32`` is its argument ``hidden``.
        criterion: the loss.

            - None: the ``training_step`` of a LightningModule class. For other modules, the
              cross-entropy for classes (the module may end with a softmax, as in
              skorch), the binary cross-entropy (``nn.BCEWithLogitsLoss``) for labels and for one
              logit for two classes, and the squared error of standardized numbers.
            - A name of ``gputune.tune(loss=...)``.
            - A loss of torch.nn, as a class or an instance.
            - ``callable(outputs, y)``, which returns the losses of the rows or their mean.

        criterion__*: arguments of the loss, such as criterion__delta=2.0 for "huber" or
            criterion__beta=0.5 for nn.SmoothL1Loss.
        optimizer: a name, or a class of torch.optim or its name [default: "sgd"]. The names are
            "sgd", "nesterov", "adam", "adamw", "rmsprop", "lion", "muon" and "schedulefree", and
            "sgdhd", "nesterovhd", "adamhd" and "adamwhd", which adapt their learning rate. The
            classes SGD, Adam, AdamW, RMSprop and Muon are the same as their names. Members of other
            classes train one by one.
        optimizer__*: arguments of an optimizer class, such as optimizer__betas=(0.8, 0.9). Members
            then train one by one.
        lr: the learning rate [default: 0.01].
        optimizer__weight_decay: as in torch.optim. None is the optimizer's default.
        optimizer__momentum: as in torch.optim. None is the optimizer's default.
        batch_size: rows of a minibatch [default: 128]. "auto" is min(200, n).
        max_epochs: number of epochs, all of which are trained [default: 10].
        random_state: an integer gives the same numbers again, in a single fit and in a search.
        device: "auto", "cpu", "cuda" or "cuda:1".
        training_step: ``callable(module, (x, y))`` in place of the criterion. It returns the losses
            of the rows or their mean. In skorch it is the method ``train_step_single``.
        augment: ``callable(x, generator)``, applied to training minibatches. It returns inputs of
            the same shape.
        numbers: "standard" scales the channels of floats and bytes (of a table the columns) by the
            training rows. "none" [default] does not.
        train_split: None or False, because no row is held out. Other values are refused.
        verbose: accepted, without effect.
        callbacks: None or [], because an estimator calls no callbacks.

    Raises:
        InputError: the module, an optimizer or the criterion cannot be trained, or a parameter is
            not supported. It is raised by ``fit``.
        DivergedError: the training diverges.
"""


class NeuralNet(_NeuralNet):
    __doc__ = f"""A user's nn.Module on any numeric target, with a criterion.{_PARAMETERS}
    Note:
        The target has numbers (n, ...), which are used unchanged. ``predict`` returns the outputs
        of the module. A search needs ``scoring``, as in skorch.

    Attributes:
        module_: the trained module, a plain module of the user's class on the CPU.
        n_iter_: number of epochs.
        n_features_in_: number of features of a table.
        feature_names_in_: names of the features of a table.

    Example:
        >>> import numpy as np
        >>> from gputune.sklearn import NeuralNet
        >>> from torch import nn
        >>> def make_module(n_features, n_outputs, hidden=32):
        ...     return nn.Sequential(
        ...         nn.Linear(n_features, hidden), nn.ReLU(), nn.Linear(hidden, n_outputs)
        ...     )
        >>> X = np.random.default_rng(0).normal(size=(100, 3))
        >>> net = NeuralNet(make_module, criterion=nn.L1Loss, lr=0.1, random_state=0)
        >>> net.fit(X, X[:, :2]).predict(X).shape  # two numbers per row
        (100, 2)
    """

    _takes_any_target = True
    _own_losses: ClassVar = {}

    def predict(self, X: object) -> FloatArray:
        """Return the outputs of the module for rows X, (n, ...)."""
        return self._outputs(X).numpy()


class NeuralNetClassifier(ClassifierMixin, _NeuralNet):  # type: ignore[misc]
    __doc__ = f"""A user's nn.Module as a classifier that returns logits or probabilities (n, K).{_PARAMETERS}
    Note:
        For two classes the module can also return one logit. With y (n, K) of 0 and 1 every column
        is a separate label.

    Attributes:
        module_: the trained module, a plain module of the user's class on the CPU.
        classes_: the classes. For labels a list.
        n_iter_: number of epochs.
        n_features_in_: number of features of a table.
        feature_names_in_: names of the features of a table.

    Example:
        >>> from gputune.sklearn import NeuralNetClassifier
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> from torch import nn
        >>> def make_module(n_features, n_outputs, hidden=32):
        ...     return nn.Sequential(
        ...         nn.Linear(n_features, hidden), nn.ReLU(), nn.Linear(hidden, n_outputs)
        ...     )
        >>> net = NeuralNetClassifier(make_module, lr=0.1, max_epochs=30, random_state=0)
        >>> net.fit(X, y).predict_proba(X).shape
        (150, 3)
    """

    _own_losses: ClassVar = {nn.CrossEntropyLoss: "cross_entropy", nn.BCEWithLogitsLoss: "bce"}
    classes_: np.ndarray | list[np.ndarray]

    def predict(self, X: object) -> np.ndarray:
        """Return the most probable class of each row, (n,).

        For a multilabel target the result is (n, K) of 0 and 1, with 1 for a probability above one
        half.
        """
        outputs = self._logits(X)  # raises NotFittedError first
        if isinstance(self.classes_, list):
            return (outputs > 0).numpy().astype(np.int64)
        labels: np.ndarray = self.classes_[outputs.argmax(1).numpy()]
        return labels

    def predict_proba(self, X: object) -> FloatArray:
        """Return the predicted probability (n, K) of each class in the order of ``classes_``, or of
        each label."""
        outputs = self._logits(X)
        has_labels = isinstance(self.classes_, list)
        return (outputs.sigmoid() if has_labels else outputs.softmax(1)).numpy()

    def predict_log_proba(self, X: object) -> FloatArray:
        """Return the logarithms of the predicted probabilities, (n, K), as in ``predict_proba``."""
        outputs = self._logits(X)
        has_labels = isinstance(self.classes_, list)
        return (logsigmoid(outputs) if has_labels else outputs.log_softmax(1)).numpy()

    def _set_fitted(self, fitted: TrainedMember, rows: CheckedRows) -> None:
        super()._set_fitted(fitted, rows)
        self._present = fitted.present
        if rows.classes is None:  # the form of scikit-learn's forests for labels
            self.classes_ = [np.array([0, 1])] * rows.y.shape[1]
        else:
            self.classes_ = rows.classes[fitted.classes]

    def _logits(self, X: object) -> Tensor:
        outputs = self._outputs(X)
        if outputs.shape[1] == 1 and not isinstance(self.classes_, list):
            return two_logits(outputs)
        if self._present is None:
            return outputs
        # Classes whose training rows have weight 0 get probability 0.
        return outputs.masked_fill(torch.from_numpy(~self._present), -torch.inf)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class NeuralNetRegressor(RegressorMixin, _NeuralNet):  # type: ignore[misc]
    __doc__ = f"""A user's nn.Module as a regressor that returns (n, K) or (n,).{_PARAMETERS}
    Note:
        With a named criterion or MSELoss the module learns the standardized target: minus the mean
            and divided by the standard deviation of the training rows (skorch: the target itself).
            With any other criterion it learns the target itself.

    Attributes:
        module_: the trained module, a plain module of the user's class on the CPU.
        target_mean_: the target is the module's output * ``target_scale_`` + ``target_mean_``. A
            number, or (K,) for several numbers.
        target_scale_: see ``target_mean_``.
        n_iter_: number of epochs.
        n_features_in_: number of features of a table.
        feature_names_in_: names of the features of a table.

    Example:
        >>> from gputune.sklearn import NeuralNetRegressor
        >>> from sklearn.datasets import load_diabetes
        >>> X, y = load_diabetes(return_X_y=True)
        >>> from torch import nn
        >>> def make_module(n_features, n_outputs, hidden=32):
        ...     return nn.Sequential(
        ...         nn.Linear(n_features, hidden), nn.ReLU(), nn.Linear(hidden, n_outputs)
        ...     )
        >>> net = NeuralNetRegressor(make_module, lr=0.1, max_epochs=30, random_state=0)
        >>> net.fit(X, y).score(X, y) > 0.2
        True
    """

    _own_losses: ClassVar = {nn.MSELoss: "mse"}
    target_mean_: float | FloatArray
    target_scale_: float | FloatArray

    def predict(self, X: object) -> FloatArray:
        """Return the predicted target of each row in the units of y, (n,) or (n, K) like y."""
        outputs = self._outputs(X).numpy()
        values: FloatArray = outputs * self.target_scale_ + self.target_mean_
        return values if isinstance(self.target_mean_, np.ndarray) else values[:, 0]

    def _set_fitted(self, fitted: TrainedMember, rows: CheckedRows) -> None:
        super()._set_fitted(fitted, rows)
        self._warn_of_units()
        if rows.y.ndim == 1:
            self.target_mean_ = float(fitted.center)
            self.target_scale_ = float(fitted.scale)
        else:
            zeros = np.zeros(rows.y.shape[1:])
            self.target_mean_ = fitted.center + zeros
            self.target_scale_ = fitted.scale + zeros

    def _warn_of_units(self) -> None:
        """Warn the user if the criterion makes the module's outputs have other units than y."""
        if self.training_step is not None:
            return
        arguments = {
            name.removeprefix("criterion__"): value for name, value in self._arguments.items()
        }
        units = other_units(self.criterion, arguments)
        if not units:
            return
        message = (
            f"criterion={name_of_loss(self.criterion)} makes the outputs {units}. predict returns "
            "these, and score compares them with y."
        )
        remedy = remedy_for_units(self.criterion).replace("loss=", "criterion=")
        if remedy:
            message = f"{message} {EstimatorNames().render(remedy)}."
        warn(message, InputWarning)
