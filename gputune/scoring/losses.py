"""Training losses of all members at once: those of the built-in models with their gradient, and all
that have a name.

A minibatch's loss is ``sum(weight * loss) / sum(weight)`` over its rows: cross-entropy for classes,
squared error for regression, as ``torch.nn.functional.cross_entropy`` and ``mse_loss`` define them.

Temperature scaling: one number by which all logits are divided, so that probabilities are as sure
as they are right.
Source: Guo et al. (2017), On calibration of modern neural networks, arXiv:1706.04599, section 4.2;
it is found as scikit-learn's CalibratedClassifierCV(method="temperature") finds it.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from gputune.errors import InputError
from gputune.scoring.scores import neg_cross_entropy
from gputune.types import Task

# With fewer classes than fill a vector register, torch's softmax on a CPU goes one number at a
# time: 7 times slower.
_FULL_REGISTER = 16
_FEW = 4096  # numbers, of which one operation costs less than the five that go around it


def cross_entropy_slope_(logits: Tensor, onehot: Tensor, share: Tensor | float) -> Tensor:
    """Turn logits (..., B, K) into the slope of the loss in them, in place.

    ``onehot`` (..., B, K) is the target, ``share`` (..., B, 1) each row's weight over the sum of
    weights (a float where all are equal). Source: d/dz of -log softmax(z)[y] is softmax(z) -
    onehot(y). Classes that take no part carry a logit of -inf and get slope 0.
    """
    if logits.device.type != "cpu" or logits.shape[-1] >= _FULL_REGISTER:
        torch.softmax(logits, -1, out=logits)
    else:
        logits.sub_(logits.amax(-1, keepdim=True)).exp_()
        logits.div_(logits.sum(-1, keepdim=True))
    return logits.sub_(onehot).mul_(share)


def number_slope_(
    outputs: Tensor, y: Tensor, share: Tensor | float, *, loss: str = "mse", number: float = 0.0
) -> Tensor:
    """Turn outputs (..., B, 1) into the slope of a loss of numbers in them, in place.

    ``loss`` is a name in ``LOSSES``, and ``number`` the delta of the Huber loss or the level of the
    quantile loss. Where an output equals the target, the slope is that of PyTorch's autograd.
    """
    gap = outputs.sub_(y)
    if loss == "mse":
        return gap.mul_(share).mul_(2)
    if loss == "huber":
        return gap.clamp_(-number, number).mul_(share)
    sign = gap.sign_()
    if loss == "mae":
        return sign.mul_(share)
    return sign.add_(1).mul_(0.5).sub_(number).mul_(share)


def row_losses(outputs: Tensor, y: Tensor) -> Tensor:
    """Return the loss of each row, (..., B), of outputs (..., B, K), twice differentiable.

    y (..., B) is codes (classes) or values. A class that takes no part has the output -inf.
    """
    if y.is_floating_point():
        return (outputs.squeeze(-1) - y) ** 2
    y = y.expand(outputs.shape[:-1])
    if (
        outputs.device.type != "cpu"
        or outputs.shape[-1] >= _FULL_REGISTER
        or outputs.numel() < _FEW
    ):
        flat = functional.cross_entropy(outputs.flatten(0, -2), y.flatten(), reduction="none")
        return flat.view(y.shape)
    shifted = outputs - outputs.detach().amax(-1, keepdim=True)
    picked = shifted.gather(-1, y[..., None]).squeeze(-1)
    return shifted.exp().sum(-1).log() - picked


class LossNumber(NamedTuple):
    """A number that a loss takes: its default, and the open interval that it lies in (``low``
    counts if closed)."""

    default: float
    low: float
    high: float
    closed: bool = False

    def rule(self) -> str:
        return f"a number in {'[' if self.closed else '('}{self.low:g}, {self.high:g})"

    def holds(self, value: object) -> bool:
        """Whether a value is one that it may have."""
        if isinstance(value, bool) or not isinstance(value, Real):
            return False
        return self.low < float(value) < self.high or (self.closed and float(value) == self.low)


def _cross_entropy(outputs: Tensor, y: Tensor, *, label_smoothing: Tensor | None = None) -> Tensor:
    """(1 - s) * -log p(label) + s * the mean of -log p over the classes that take part (the others
    are at -inf).

    Source: Szegedy et al. (2016), section 7, as ``torch.nn.functional.cross_entropy`` has it.
    """
    of_label = row_losses(outputs, y)
    if label_smoothing is None:
        return of_label
    log_p = outputs.log_softmax(-1)
    absent = outputs == -torch.inf
    others = -log_p.masked_fill(absent, 0).sum(-1) / (~absent).sum(-1)
    return (1 - label_smoothing) * of_label + label_smoothing * others


def _gap(outputs: Tensor, y: Tensor) -> Tensor:
    """Return y - outputs, (..., B, K)."""
    return (y if y.dim() == outputs.dim() else y[..., None]) - outputs


def _huber(outputs: Tensor, y: Tensor, *, delta: Tensor) -> Tensor:
    """Half the squared gap up to ``delta`` (in standard deviations of y), linear beyond. Source:
    Huber (1964)."""
    gap = _gap(outputs, y).abs()
    delta = delta[..., None]
    return torch.where(gap <= delta, gap.square() / 2, delta * (gap - delta / 2)).mean(-1)


def _quantile(outputs: Tensor, y: Tensor, *, q: Tensor) -> Tensor:
    """The gap times q above the output, times q - 1 below. Source: Koenker and Bassett (1978)."""
    gap = _gap(outputs, y)
    q = q[..., None]
    return torch.maximum(q * gap, (q - 1) * gap).mean(-1)


def _bce(outputs: Tensor, y: Tensor) -> Tensor:
    y = (y if y.dim() == outputs.dim() else y[..., None]).to(outputs.dtype).expand(outputs.shape)
    return functional.binary_cross_entropy_with_logits(outputs, y, reduction="none").mean(-1)


@dataclass(frozen=True)
class NamedLoss:
    """A loss that has a name: row losses of outputs (..., B, K), the tasks it is for, and the
    numbers it takes."""

    rows: Callable[..., Tensor]
    tasks: tuple[Task, ...]
    arguments: Mapping[str, LossNumber]


_CLASSES: tuple[Task, ...] = ("binary", "multiclass")
LOSSES: Mapping[str, NamedLoss] = {
    "cross_entropy": NamedLoss(
        _cross_entropy, _CLASSES, {"label_smoothing": LossNumber(0.0, 0, 1, closed=True)}
    ),
    "mse": NamedLoss(lambda outputs, y: _gap(outputs, y).square().mean(-1), ("regression",), {}),
    "mae": NamedLoss(lambda outputs, y: _gap(outputs, y).abs().mean(-1), ("regression",), {}),
    "huber": NamedLoss(_huber, ("regression",), {"delta": LossNumber(1.0, 0, torch.inf)}),
    "quantile": NamedLoss(_quantile, ("regression",), {"q": LossNumber(0.5, 0, 1)}),
    "bce": NamedLoss(_bce, ("multilabel", "binary"), {}),
}
LOSS_ALIASES: Mapping[str, str] = {
    "squared_error": "mse",
    "l2": "mse",
    "absolute_error": "mae",
    "l1": "mae",
    "pinball": "quantile",
    "log_loss": "cross_entropy",
}
"""What scikit-learn and others call the losses."""


def parse_loss(word: str) -> tuple[str, dict[str, float]]:
    """Return the loss that a word names and the numbers that it gives: "quantile:0.9" is
    ``("quantile", {"q": 0.9})``.

    A word that names no loss is returned as it is. Raises InputError for a number that the loss
    does not take.
    """
    name, colon, text = word.partition(":")
    name = LOSS_ALIASES.get(name, name)
    if not colon or name not in LOSSES:
        return (name if name in LOSSES else word), {}
    if not (arguments := LOSSES[name].arguments):
        raise InputError(f"loss={word!r}: {name!r} takes no number. Say loss={name!r}.")
    ((argument, rule),) = arguments.items()
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not rule.holds(number):
        raise InputError(
            f"loss={word!r}: {argument} of {name!r} must be {rule.rule()}, got {text!r}."
        )
    return name, {argument: number}


LOSS_OF_TASK: Mapping[Task, str] = {
    "binary": "cross_entropy",
    "multiclass": "cross_entropy",
    "regression": "mse",
    "multilabel": "bce",
}
"""The loss that a module is trained on where none is given; a custom target has none."""


_OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss)
_OF_NUMBERS = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.PoissonNLLLoss)


def only_classifies(loss: object) -> bool:
    """Whether a loss is for one class a row, whatever the target looks like."""
    if isinstance(loss, str):
        return LOSS_ALIASES.get(loss, loss) == "cross_entropy"
    return issubclass(_kind(loss), _OF_CLASSES) or loss in (
        functional.cross_entropy,
        functional.nll_loss,
    )


def takes_probabilities(loss: object) -> bool:
    """Whether a loss compares logits, or log-probabilities, with a probability of each class."""
    if issubclass(_kind(loss), (nn.CrossEntropyLoss, nn.KLDivLoss)):
        return True
    return loss in (functional.cross_entropy, functional.kl_div)


def is_absolute(loss: object) -> bool:
    """Whether a loss is of absolute errors, or of those except for small ones."""
    return loss in ("mae", "huber") or issubclass(
        _kind(loss), (nn.L1Loss, nn.HuberLoss, nn.SmoothL1Loss)
    )


def _kind(loss: object) -> type:
    return loss if isinstance(loss, type) else type(loss)  # which may be given as the class itself


def loss_fitting(loss: object, task: Task) -> object:
    """Return the name of torch's binary cross-entropy for classes and labels, any other loss as it
    is.

    Raises InputError for a loss of numbers where the target is classes, of one class for labels,
    and for nn.BCELoss.
    """
    kind = _kind(loss)
    if task in ("binary", "multiclass") and issubclass(kind, _OF_NUMBERS):
        other = "'cross_entropy' or 'bce'" if task == "binary" else "'cross_entropy'"
        remedy = f"say task='regression' where they are numbers, or choose loss={other}"
        raise InputError(
            f"loss=torch.nn.{kind.__name__} is of numbers, and y is classes: {remedy}."
        )
    if task == "multilabel" and issubclass(kind, _OF_CLASSES):
        raise InputError(
            f"loss=torch.nn.{kind.__name__} is of one class a row, and y is labels, of which a "
            "row may have several: give loss=torch.nn.BCEWithLogitsLoss, or y.argmax(1) as y "
            "where each row has one."
        )
    if task not in ("binary", "multilabel"):
        return loss
    if issubclass(kind, nn.BCELoss):
        raise InputError(
            "loss=torch.nn.BCELoss takes probabilities, and predictions and scores are made of "
            "logits: give loss='bce', which is torch.nn.BCEWithLogitsLoss, and leave out the "
            "sigmoid at the end of the module."
        )
    plain = ("mean", None, None)
    is_default = (
        isinstance(loss, nn.BCEWithLogitsLoss)
        and (loss.reduction, loss.weight, loss.pos_weight) == plain
    )
    return "bce" if is_default or loss is nn.BCEWithLogitsLoss else loss


def refuse_one_number(loss: object, y: Tensor) -> None:
    """Raise InputError for a loss of classes where y (B,) or (B, 1) is floats: of one class it is
    always 0."""
    kind = _kind(loss)
    if issubclass(kind, _OF_CLASSES) and y.is_floating_point() and y.numel() == len(y):
        remedy = (
            "say task='classification' where they are classes, or choose a loss of numbers, such "
            "as 'mse'"
        )
        raise InputError(
            f"loss=torch.nn.{kind.__name__} is of classes, and y is one number a row: {remedy}."
        )


def takes_log_probabilities(loss: object) -> bool:
    """Whether a loss of torch takes the logarithms of probabilities: NLLLoss, KLDivLoss, or one of
    their functions."""
    return issubclass(_kind(loss), nn.NLLLoss | nn.KLDivLoss) or loss in (
        functional.nll_loss,
        functional.kl_div,
    )


def is_divergence(loss: object) -> bool:
    """Whether a loss is torch's Kullback-Leibler divergence, whose outputs may have their classes
    in any dimension."""
    return issubclass(_kind(loss), nn.KLDivLoss) or loss is functional.kl_div


def is_cross_entropy(loss: object) -> bool:
    """Whether a loss is the cross-entropy of classes, by its name or one of torch's."""
    is_named = isinstance(loss, str) and loss == "cross_entropy"
    return (
        is_named or issubclass(_kind(loss), nn.CrossEntropyLoss) or loss is functional.cross_entropy
    )


def by_rows(loss: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Let a loss of torch's give a number a row, of which the mean is what it gives otherwise,
    where it can."""
    rows: Any = copy.deepcopy(loss)
    if getattr(loss, "reduction", None) != "mean" or getattr(loss, "weight", None) is not None:
        return loss
    rows.reduction = "none"

    def of_rows(outputs: Tensor, y: Tensor) -> Tensor:
        y = y.to(outputs.dtype) if isinstance(loss, nn.BCEWithLogitsLoss) else y
        if y.shape != outputs.shape and y.numel() == outputs.numel():
            y = y.view(outputs.shape)  # (B,) and (B, 1) would be broadcast to (B, B)
        losses: Tensor = rows(outputs, y)
        return losses.flatten(1).mean(1) if losses.dim() > 1 else losses

    return of_rows


_LOG_RANGE = 10.0
_TOLERANCE = 64 * torch.finfo(torch.float64).eps
"""Of the logarithm of a temperature, as in scikit-learn."""


def best_temperature(logits: Tensor, target: Tensor) -> float:
    """Return the temperature at which logits (n, K), divided by it, have the least log loss on
    class codes (n,)."""
    from scipy.optimize import minimize_scalar

    if bool((logits.argmax(1) == target).all()):
        return 1.0  # the loss would fall for ever as the temperature does

    def loss(log_inverse: float) -> float:
        return -float(neg_cross_entropy(logits * math.exp(log_inverse), target))

    bounds = (-_LOG_RANGE, _LOG_RANGE)
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": _TOLERANCE})
    return math.exp(-found.x)
