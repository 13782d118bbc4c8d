"""NeuralNetClassifier and NeuralNetRegressor: a user's nn.Module as an estimator, in skorch's words."""

import inspect
from typing import Any, Self

from torch import nn

from gputune.sklearn.base import TrainedClassifier, TrainedEstimator, TrainedRegressor
from gputune.sklearn.foreign import NET
from gputune.sklearn.user_module import net_recipe
from gputune.sklearn.words import Fresh, Recipe

_PREFIX = "module__"


class _NeuralNet(TrainedEstimator):
    """Parameters of both: those of the constructor, and ``module__*`` for the arguments of the module's class."""

    _loss: type[nn.Module]
    _foreign = NET

    def __init__(
        self,
        module: Any,
        *,
        criterion: Any = None,
        optimizer: Any = "sgd",
        lr: float = 0.01,
        optimizer__weight_decay: float | None = None,
        optimizer__momentum: float | None = None,
        batch_size: int | str = 128,
        max_epochs: int = 10,
        random_state: Any = None,
        device: str = "auto",
        train_split: Any = None,
        verbose: int = 0,
        **module_arguments: Any,
    ) -> None:
        self.module = module
        self.criterion = criterion
        self.optimizer = optimizer
        self.lr = lr
        self.optimizer__weight_decay = optimizer__weight_decay
        self.optimizer__momentum = optimizer__momentum
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.random_state = random_state
        self.device = device
        self.train_split = train_split
        self.verbose = verbose
        self._module_arguments = module_arguments

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return all parameters, the ``module__*`` that were given among them."""
        params: dict[str, Any] = super().get_params(deep)
        return params | self._module_arguments

    def set_params(self, **params: Any) -> Self:
        """Set parameters, any ``module__*`` among them, and return the estimator."""
        own = inspect.signature(type(self)).parameters
        rest = {}
        for name, value in params.items():
            if name.startswith(_PREFIX) or name in self._module_arguments:
                self._module_arguments = self._module_arguments | {name: value}
            elif "__" in name and name in own:  # scikit-learn would look for the parameters of an optimizer
                setattr(self, name, value)
            else:
                rest[name] = value
        super().set_params(**rest)
        return self

    def _recipe(self, fresh: Fresh) -> Recipe:
        unknown = [name for name in self._module_arguments if not name.startswith(_PREFIX)]
        if unknown:  # said here, because scikit-learn wants constructors that take everything
            raise TypeError(
                f"{type(self).__name__} has no parameter {unknown[0]!r}; arguments of the module are written module__*."
            )
        return net_recipe(self._ours(), loss=self._loss, fresh=fresh)


_PARAMETERS = """

    Trains for ``max_epochs`` epochs on all rows, on X as it comes: put a StandardScaler in front.

    module               a torch.nn.Module class; it is built with ``n_features`` and ``n_outputs`` where its
                         signature has them, and with ``module__*``: module__hidden=32 is its argument hidden
    criterion            None is torch.nn.CrossEntropyLoss for classes, MSELoss for numbers, the only ones
    optimizer            torch.optim.SGD, Adam or AdamW, or a word: "sgd", "nesterov", "adam", "adamw", and
                         those that adapt their rate: "sgdhd", "nesterovhd", "adamhd", "adamwhd"
    lr                   the learning rate
    optimizer__weight_decay, optimizer__momentum   as in torch.optim; None is the optimizer's default
    batch_size           rows of a minibatch; "auto" is min(200, n)
    max_epochs           epochs, always to the last one
    random_state         an integer gives the same numbers again, alone as in a search
    device               "auto", "cpu", "cuda", "cuda:1"
    train_split          None: no row is held out, and nothing else is taken
    verbose              taken, and without effect

    The module must treat every row by itself: running statistics (BatchNorm) are refused by name. Departures from
    skorch: every row is trained on, none is held out, and numbers have X's precision on a CPU (skorch: single).
"""


class NeuralNetClassifier(TrainedClassifier, _NeuralNet):
    __doc__ = f"""A user's nn.Module as a classifier; it returns logits (n, K) for the cross-entropy.{_PARAMETERS}
    After ``fit``: ``module_`` (a plain module of the user's class, on the CPU), ``classes_``, ``n_iter_`` (epochs),
    ``n_features_in_``, ``feature_names_in_``.
    """

    _loss = nn.CrossEntropyLoss


class NeuralNetRegressor(TrainedRegressor, _NeuralNet):
    __doc__ = f"""A user's nn.Module as a regressor; it returns (n, 1) or (n,), the standardised target.{_PARAMETERS}
    The module learns the target less its mean over its standard deviation, of the training rows (skorch: the target).

    After ``fit``: ``module_`` (a plain module of the user's class, on the CPU), ``target_mean_`` and
    ``target_scale_`` (the target is the module's output * scale + mean), ``n_iter_`` (epochs), ``n_features_in_``,
    ``feature_names_in_``.
    """

    _loss = nn.MSELoss
