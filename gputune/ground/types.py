"""The names of tensor axes, shared type aliases, and the table of defaults.

Axes, used in signatures, docs and errors: C trials, F folds, P = C*F members, B batch rows, D
inputs, H width, K outputs, T steps, L layers. The member axis comes first. A member is one trial on
one fold, and a chunk is a group of trials that train together. Inside a chunk, members are
fold-major (``p = f*C + c``), so the members of one fold are contiguous. Public arrays are (C,
epochs, F).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:  # the command line imports this file and must not wait for torch
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

Config = dict[str, Any]
"""One configuration: hyperparameter name -> value."""

Json = Mapping[str, Any]
"""A JSON object, as a read-only dict from name to value."""

Say = Callable[[str], object]
"""A function that gputune calls with a message for the user."""

Params = dict[str, "Tensor"]
"""Parameter name -> tensor of all members.

In update rules the tensors have the shape (P, ...). In a chunk the shape is (F, C, ...), or the
shape of the tensor's Block.
"""

Task = Literal["binary", "multiclass", "regression", "multilabel", "custom"]

Goal = Literal["classes", "numbers", ""]
"""The kind of prediction that decides defaults: classes (cross-entropy), regression or neither."""

Precision = Literal["full", "bf16"]
"""The number format of a module's computations in training.

"bf16" means torch.autocast to bfloat16.
"""

BackendWord = Literal[
    "auto", "kernel", "compiled", "recorded", "eager", "merged", "loop", "stacked", "graph"
]
"""A value of the option ``backend``. "graph" is an earlier name of "recorded"."""

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "width": 128,
        "depth": 2,
        "activation": "relu",
        "dropout": 0.0,
        "batch_size": 32,
        "hypergrad_lr": 0.02,
        "hypergrad_rule": "multiplicative",
        "schedule": "constant",
        "beta2": 0.999,
        "weight_decay_schedule": "constant",
        "dropout_schedule": "constant",
        "clip_norm": math.inf,
        "ema": 0.0,
        "C": 1.0,
        "l1_ratio": 0.0,
    }
)
"""Default values of hyperparameters that a configuration lacks. lr, weight decay and momentum
depend on the optimizer."""

DEFAULT_LR = 1e-3

SEARCHED: Mapping[str, Any] = MappingProxyType(
    {
        "batch_size": (32, 64, 128, 256),
        "weight_decay": {"low": 1e-5, "high": 1e-1},
        "hypergrad_lr": {"low": 1e-3, "high": 1e-1},
        "width": (32, 64, 128, 256),
        "C": {"low": 1e-3, "high": 1e3},
        "l1_ratio": (0.0, 0.5, 1.0),
    }
)
"""The values of each hyperparameter in the default space: a list, or the ends of a log-uniform
range."""

LR_FACTORS = (0.1, 30.0)
PLAIN_LR_FACTORS = (1.0, 1000.0)
"""The lowest and highest learning rate of the default space, as factors on the default rate.

The second pair is for sgd and nesterov, which do not scale their steps.
"""


def defaults_in_words() -> str:
    """Return the default search spaces and default values as text, for help and documentation."""

    def choices(key: str) -> str:
        values = SEARCHED[key]
        if isinstance(values, tuple):
            return f"{key} {', '.join(f'{value:g}' for value in values)}"
        return f"{key} {values['low']:g}..{values['high']:g} (log)"

    def rates(factors: tuple[float, float]) -> str:
        low, high = factors
        return f"{low * DEFAULT_LR:g}..{high * DEFAULT_LR:g}"

    lr = f"lr {rates(LR_FACTORS)} (log; sgd and nesterov {rates(PLAIN_LR_FACTORS)})"
    decay = f"weight_decay {default_weight_decay('adamw'):g} (adamw and its relatives) or 0"
    momentum = (
        f"momentum {default_momentum('nesterov'):g} (nesterov), {default_momentum('muon'):g} "
        "(muon) or 0"
    )
    others = ", ".join(f"{key} {value}" for key, value in DEFAULTS.items())
    return (
        f"Default space of mlp: {lr}, {choices('batch_size')}, {choices('weight_decay')}, "
        f"{choices('width')}.\n"
        "Default space of a module: the same without width. For optimizers whose names end in hd, "
        f"also {choices('hypergrad_lr')}.\n"
        f"Default space of logistic (solved directly, not trained): {choices('C')}, "
        f"{choices('l1_ratio')}.\n"
        f"Defaults of keys that are not in the space: lr {DEFAULT_LR:g}, {decay}, {momentum}, "
        f"{others}."
    )


ONLINE = ("sgdhd", "nesterovhd", "adamhd", "adamwhd")
"""Optimizers that adapt each member's learning rate in training. ``lr`` is the initial rate."""

ONLINE_RULES = ("multiplicative", "additive", "normalized")
"""The rules by which the optimizers in ``ONLINE`` change the learning rate.

See ``gputune.optim``.
"""

OPTIMIZERS = (
    "sgd",
    "nesterov",
    "adam",
    "adamw",
    "rmsprop",
    "lion",
    "muon",
    "schedulefree",
    *ONLINE,
)
MethodWord = Literal["random", "halving", "median", "pbt", "hypergradient", "tpe"]
"""The names of the search methods. Each one is also the name of a file in ``gputune/methods/``."""

HYPERPARAMETERS = ("lr", "momentum", "weight_decay", "beta1", "beta2")
"""The hyperparameters in which a training can be differentiated."""

ScheduleWord = Literal[
    "constant", "cosine", "linear", "warmup+cosine", "one_cycle", "coslog4", "flat_cos"
]
SCHEDULES = get_args(ScheduleWord)

LR_FACTOR = "lr_factor__"
DECAY_FACTOR = "weight_decay_factor__"
"""Prefixes of keys that scale the learning rate or weight decay of some parameters of a module.

``lr_factor__bias`` is a factor on the learning rate of all parameters that have "bias" in their
path.
"""
ACTIVATIONS = ("relu", "gelu", "silu", "tanh")

PER_LAYER = ("width", "activation", "dropout")
"""The hyperparameters of the MLP that may be a tuple with one value for each hidden layer."""

Numbers = Literal["standard", "robust", "quantile", "piecewise", "piecewise-tree", "none"]
NUMBERS = get_args(Numbers)
"""The ways to prepare the numeric columns of a table."""
TENSOR_NUMBERS = ("standard", "none")
"""The ways to prepare tensors, images and sequences."""


LARGE_TABLE = 50_000
"""Number of rows of a table up to which the defaults of a search do not depend on the rows."""
KEPT_BYTES = 128 << 20
"""Bytes of the outputs that a study keeps.

During training, a chunk (trials that train together) keeps at most the same number of bytes.
"""


@dataclass(frozen=True, eq=False)
class Outputs:
    """The outputs of one trial for the validation rows, after the trial's best epoch.

    gputune makes ensembles from these outputs.

    Attributes:
        epoch: number of trained epochs.
        values: (N, K) float32. The rows are the validation rows of all folds, in order of the
            folds.
    """

    epoch: int
    values: "NDArray[np.float32]"


def beyond_limit(sizes: Mapping[int, int], scores: Mapping[int, float]) -> list[int]:
    """Return the trial numbers of the outputs to delete, so that the rest stays within the limit of
    bytes.

    The outputs of the trials with the worst scores are deleted. Among equal scores the oldest
    trials come first.
    """
    order = sorted(sizes, key=lambda number: (scores[number], number), reverse=True)
    totals = accumulate(sizes[number] for number in order)
    return [number for number, total in zip(order, totals) if total > KEPT_BYTES]


def drop_beyond_limit(outputs: dict[int, Outputs], scores: Mapping[int, float]) -> None:
    """Delete the outputs of the worst trials, so that the rest fits into the limit of bytes."""
    sizes = {number: output.values.nbytes for number, output in outputs.items()}
    for number in beyond_limit(sizes, scores):
        del outputs[number]


def first_metric(scores: "np.ndarray", *, axes: int) -> "np.ndarray":
    """Return the scores of the first metric, which ranks the trials.

    Args:
        scores: scores with ``axes`` axes for one metric. With several metrics, the scores have one
            more axis, the last axis.
        axes: number of axes for one metric.
    """
    # A contiguous copy, so that sums over it have the same bits as in a search with only that
    # metric.
    return scores if scores.ndim == axes else scores[..., 0].copy()


def fixed_depth(config: Config) -> int | None:
    """Return the number of hidden layers that the tuples of a configuration set, None without
    tuples."""
    lengths = (len(config[key]) for key in PER_LAYER if isinstance(config.get(key), tuple))
    return next(lengths, None)


def default_weight_decay(optimizer: str) -> float:
    """Return the default weight decay of an optimizer.

    The default is 0.01 for adamw and its relatives, whose decay is decoupled from the gradient. For
    all other optimizers it is 0, as in torch.optim.
    """
    return 0.01 if optimizer in ("adamw", "adamwhd", "muon", "schedulefree") else 0.0


def default_momentum(optimizer: str) -> float:
    """Return the default momentum of an optimizer.

    The default is 0.9 for nesterov, because without momentum it is plain gradient descent. The
    default is 0.95 for muon, as in torch.optim. For all other optimizers it is 0. Adam and its
    relatives have betas instead.
    """
    if optimizer == "muon":
        return 0.95
    return 0.9 if optimizer in ("nesterov", "nesterovhd") else 0.0


StepKey = tuple[int, int]
"""The key (epoch, step) that seeds the random numbers of a training step."""

EvaluationKey = tuple[int, int, int]
"""The key that seeds the random numbers of modules in evaluation. The modules of all trials get the
same random numbers.

The key holds the count of trained epochs, the fold, and the position of the first row among the
fold's validation rows.
"""
