"""The axis alphabet, the words for values that cross files, and the table of defaults.

Axes, used in signatures, docs and errors: C trials, F folds, P = C*F members, B batch rows, D
inputs, H width, K outputs, T steps, L layers. The member axis comes first; inside a chunk members
are fold-major (``p = f*C + c``), so that one fold's members are contiguous. Public arrays are (C,
epochs, F).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:  # the command line reads this file, and must not wait for torch
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

Config = dict[str, Any]
"""One configuration: hyperparameter name -> value."""

Json = Mapping[str, Any]
"""An object of a JSON text, to be read only: name -> value."""

Params = dict[str, "Tensor"]
"""Parameter name -> tensor of all members: (P, ...) in update rules, (F, C, ...) or as its Block
says in a chunk."""

Task = Literal["binary", "multiclass", "regression", "multilabel", "custom"]

Goal = Literal["classes", "numbers", ""]
"""What a model predicts, where that decides its defaults: classes by their cross-entropy, numbers,
or neither."""

Precision = Literal["full", "bf16"]
"""Of what a module computes while it trains; bf16: torch.autocast to bfloat16."""

Backend = Literal["eager", "compiled", "graph", "loop", "kernel"]
"""How a chunk trains: as operations on stacked tensors, one by one or each step recorded once and
replayed, member by member in a compiled loop on a CPU or in a kernel of a GPU, or as plain modules
one after another."""

BY_MEMBER: tuple[Backend, ...] = ("compiled", "kernel")
"""Those by which each member of an MLP takes steps of its own, whatever the batch sizes of the
others."""

BackendWord = Literal["auto", "eager", "compiled", "graph", "stacked", "loop", "kernel"]

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
"""What a trial uses where its configuration is silent; lr, weight decay and momentum depend on the
optimizer."""

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
"""What a search without a space draws each key from: values, or the ends of a log-uniform range."""

LR_FACTORS = (0.1, 30.0)
PLAIN_LR_FACTORS = (1.0, 1000.0)
"""The ends of the range of lr, as factors on its default; of sgd and nesterov, which do not scale
their steps."""


def defaults_in_words() -> str:
    """Return the default spaces and the default values, a line each, for help texts and the
    documentation."""

    def of(key: str) -> str:
        choices = SEARCHED[key]
        if isinstance(choices, tuple):
            return f"{key} {', '.join(f'{choice:g}' for choice in choices)}"
        return f"{key} {choices['low']:g}..{choices['high']:g} (log)"

    def rate(factors: tuple[float, float]) -> str:
        return "..".join(f"{factor * DEFAULT_LR:g}" for factor in factors)

    trained = (
        f"lr {rate(LR_FACTORS)} (log; sgd and nesterov {rate(PLAIN_LR_FACTORS)}), "
        f"{of('batch_size')}"
    )
    values = ", ".join(f"{key} {value}" for key, value in DEFAULTS.items())
    decays = f"weight_decay {default_weight_decay('adamw'):g} (adamw and its kin) or 0"
    momenta = (
        f"momentum {default_momentum('nesterov'):g} (nesterov), {default_momentum('muon'):g} "
        "(muon) or 0"
    )
    return (
        f"The default space of mlp: {trained}, {of('weight_decay')}, {of('width')}.\n"
        f"Of a module: the same without width; hd optimizers also {of('hypergrad_lr')}.\n"
        f"Of logistic, solved: {of('C')}, {of('l1_ratio')}.\n"
        f"Where a space is silent: lr {DEFAULT_LR:g}, {decays}, {momenta}, {values}."
    )


ONLINE = ("sgdhd", "nesterovhd", "adamhd", "adamwhd")
"""Optimizers that adapt each member's learning rate while it trains; ``lr`` is where it begins."""

ONLINE_RULES = ("multiplicative", "additive", "normalized")
"""What they do to it, see ``gputune.optim``."""

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
MethodWord = Literal["random", "halving", "median", "hypergradient"]
ScheduleWord = Literal[
    "constant", "cosine", "linear", "warmup+cosine", "one_cycle", "coslog4", "flat_cos"
]
SCHEDULES = get_args(ScheduleWord)

LR_FACTOR = "lr_factor__"
DECAY_FACTOR = "weight_decay_factor__"
"""Keys of a module's parameters: ``lr_factor__bias`` is a factor on the rate of all that have
"bias" in their path."""
ACTIVATIONS = ("relu", "gelu", "silu", "tanh")

Numbers = Literal["standard", "robust", "quantile", "piecewise", "piecewise-tree", "none"]
NUMBERS = get_args(Numbers)
"""How the numbers of a table are prepared."""
TENSOR_NUMBERS = ("standard", "none")
"""Those of them that tensors, images and sequences can have."""


KEPT_BYTES = 128 << 20
"""Bytes of the outputs that a study keeps, and of those that a chunk keeps while it trains."""


@dataclass(frozen=True, eq=False)
class Outputs:
    """Of one trial after ``epoch`` epochs: ``values`` (N, K), float32, on the validation rows of
    fold after fold.

    At its best epoch: what ensembles are made of.
    """

    epoch: int
    values: "NDArray[np.float32]"


def beyond_limit(sizes: Mapping[int, int], scores: Mapping[int, float]) -> list[int]:
    """Return the trials that go without where all take too many bytes: the worst, of equal ones the
    oldest."""
    order = sorted(sizes, key=lambda number: (scores[number], number), reverse=True)
    return [
        number
        for number, size in zip(order, accumulate(sizes[number] for number in order))
        if size > KEPT_BYTES
    ]


def drop_beyond_limit(outputs: dict[int, Outputs], scores: Mapping[int, float]) -> None:
    """Take out of the outputs of trials those of the worst, where all take too many bytes."""
    for number in beyond_limit(
        {number: one.values.nbytes for number, one in outputs.items()}, scores
    ):
        del outputs[number]


def first_metric(scores: "np.ndarray", *, axes: int) -> "np.ndarray":
    """Return scores of so many axes by the metric that ranks; those of several metrics have one
    axis more, the last."""
    # Of one piece, so that sums over it have the bits of a search with that metric alone.
    return scores if scores.ndim == axes else scores[..., 0].copy()


def default_weight_decay(optimizer: str) -> float:
    """0.01 for adamw and its kin, whose decay is decoupled from the gradient; 0 for the others, as
    in torch.optim."""
    return 0.01 if optimizer in ("adamw", "adamwhd", "muon", "schedulefree") else 0.0


def default_momentum(optimizer: str) -> float:
    """0.9 for nesterov, which without momentum is plain gradient descent; 0.95 for muon, as in
    torch.optim; else 0.

    Adam and its kin have betas instead.
    """
    if optimizer == "muon":
        return 0.95
    return 0.9 if optimizer in ("nesterov", "nesterovhd") else 0.0


EvaluationKey = tuple[int, int, int]
"""The number of epochs that members have trained, the fold, and the place of the first row among
its validation rows.

It seeds what members draw while they are evaluated, each of them the same numbers.
"""
