"""MLPClassifier and MLPRegressor: the multilayer perceptron, in gputune's words and in scikit-learn's."""

from typing import Any

from gputune.sklearn.base import TrainedClassifier, TrainedEstimator, TrainedRegressor
from gputune.sklearn.foreign import MLP
from gputune.sklearn.words import Fresh, Recipe, mlp_recipe


class _MLP(TrainedEstimator):
    """The constructor of both."""

    _foreign = MLP

    def __init__(
        self,
        hidden_layer_sizes: Any = None,
        activation: str = "relu",
        *,
        width: int | None = None,
        depth: int | None = None,
        dropout: float = 0.0,
        lr: float | None = None,
        batch_size: int | str = "auto",
        max_epochs: int | None = None,
        optimizer: str | None = None,
        weight_decay: float | None = None,
        momentum: float | None = None,
        schedule: str = "constant",
        learning_rate_init: float | None = None,
        max_iter: int | None = None,
        solver: str | None = None,
        alpha: float | None = None,
        random_state: Any = None,
        device: str = "auto",
        learning_rate: str = "constant",
        shuffle: bool = True,
        early_stopping: bool = False,
        warm_start: bool = False,
        verbose: Any = False,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.width = width
        self.depth = depth
        self.dropout = dropout
        self.lr = lr
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.optimizer = optimizer
        self.weight_decay = weight_decay
        self.momentum = momentum
        self.schedule = schedule
        self.learning_rate_init = learning_rate_init
        self.max_iter = max_iter
        self.solver = solver
        self.alpha = alpha
        self.random_state = random_state
        self.device = device
        self.learning_rate = learning_rate
        self.shuffle = shuffle
        self.early_stopping = early_stopping
        self.warm_start = warm_start
        self.verbose = verbose

    def _recipe(self, fresh: Fresh) -> Recipe:
        return mlp_recipe(self._ours(), fresh=fresh)


_PARAMETERS = """

    Trains for ``max_epochs`` epochs, always to the last one, on X as it comes: put a StandardScaler in front. None
    means that a word was not given, and then its default holds.

    width, depth         units of a hidden layer, and number of hidden layers: 128 and 2
    activation, dropout  "relu", "gelu", "silu" or "tanh"; the rate in [0, 1) that follows each
    lr, schedule         the learning rate, 0.001, and how it goes on: "constant" or "cosine"
    batch_size           rows of a minibatch; "auto" is min(200, n)
    max_epochs           50
    optimizer            "adamw"; "sgd", "nesterov", "adam", and those that adapt their rate: "sgdhd",
                         "nesterovhd", "adamhd", "adamwhd"
    weight_decay         0.01 for adamw (decoupled), 0 for the others (L2, in the gradient)
    momentum             of sgd (0) and nesterov (0.9); the others have none
    random_state         an integer gives the same numbers again, alone as in a search
    device               "auto", "cpu", "cuda", "cuda:1"

    scikit-learn's words mean the same: ``hidden_layer_sizes`` (equal layers: (64, 64) is width 64, depth 2),
    ``learning_rate_init`` (lr), ``max_iter`` (max_epochs), ``solver`` ("adam"; "sgd" is nesterov), and ``alpha``,
    its L2 penalty: a weight decay of alpha / (weight of a minibatch's rows) in the gradient, with the optimizer
    adam unless another is given. Departures from scikit-learn: the biases decay too, and a short last minibatch decays
    as a whole one. Two words for one thing that differ are an error.

    ``verbose``, ``shuffle=True``, ``early_stopping=False``, ``warm_start=False`` and ``learning_rate="constant"`` are
    taken as scikit-learn's scripts have them, without effect; other values are refused, and so are ``tol``,
    ``n_iter_no_change`` and ``validation_fraction``.

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
