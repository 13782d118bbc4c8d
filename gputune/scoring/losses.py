"""Training losses of all members at once: those of the built-in models with their gradient, and all that have a name.

A minibatch's loss is ``sum(weight * loss) / sum(weight)`` over its rows: cross-entropy for classes, squared
error for regression, as ``torch.nn.functional.cross_entropy`` and ``mse_loss`` define them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gputune.types import Task

# With fewer classes than fill a vector register, torch's softmax on a CPU goes one number at a time: 7 times slower.
_FULL_REGISTER = 16
_FEW = 4096  # numbers, of which one operation costs less than the five that go around it


def cross_entropy_slope_(logits: Tensor, onehot: Tensor, share: Tensor | float) -> Tensor:
    """Turn logits (..., B, K) into the slope of the loss in them, in place.

    ``onehot`` (..., B, K) is the target, ``share`` (..., B, 1) each row's weight over the sum of weights (a
    float where all are equal). Source: d/dz of -log softmax(z)[y] is softmax(z) - onehot(y). Classes that take
    no part carry a logit of -inf and get slope 0.
    """
    return _softmax_(logits).sub_(onehot).mul_(share)


def _softmax_(logits: Tensor) -> Tensor:
    if logits.device.type != "cpu" or logits.shape[-1] >= _FULL_REGISTER:
        return torch.softmax(logits, -1, out=logits)
    logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    return logits.div_(logits.sum(-1, keepdim=True))


def squared_error_slope_(outputs: Tensor, y: Tensor, share: Tensor | float) -> Tensor:
    """Turn outputs (..., B, 1) into the slope of the squared error in them, in place: 2 (output - y) share."""
    return outputs.sub_(y).mul_(share).mul_(2)


def row_losses(outputs: Tensor, y: Tensor) -> Tensor:
    """Return the loss of each row, (..., B), of outputs (..., B, K), twice differentiable.

    y (..., B) is codes (classes) or values. A class that takes no part has the output -inf.
    """
    if y.is_floating_point():
        return (outputs.squeeze(-1) - y) ** 2
    y = y.expand(outputs.shape[:-1])
    if outputs.device.type != "cpu" or outputs.shape[-1] >= _FULL_REGISTER or outputs.numel() < _FEW:
        flat = functional.cross_entropy(outputs.flatten(0, -2), y.flatten(), reduction="none")
        return flat.view(y.shape)
    shifted = outputs - outputs.detach().amax(-1, keepdim=True)
    picked = shifted.gather(-1, y[..., None]).squeeze(-1)
    return shifted.exp().sum(-1).log() - picked


class LossNumber(NamedTuple):
    """A number that a loss takes: its default, and the open interval that it lies in (``low`` counts if closed)."""

    default: float
    low: float
    high: float
    closed: bool = False

    def rule(self) -> str:
        """Return in words what it must be."""
        return f"a number in {'[' if self.closed else '('}{self.low:g}, {self.high:g})"

    def holds(self, value: object) -> bool:
        """Whether a value is one that it may have."""
        if isinstance(value, bool) or not isinstance(value, Real):
            return False
        number = float(value)
        return (self.low <= number if self.closed else self.low < number) and number < self.high


def _cross_entropy(outputs: Tensor, y: Tensor, *, label_smoothing: Tensor | None = None) -> Tensor:
    """(1 - s) * -log p(label) + s * the mean of -log p over the classes that take part (the others are at -inf).

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


def _mse(outputs: Tensor, y: Tensor) -> Tensor:
    return _gap(outputs, y).square().mean(-1)


def _mae(outputs: Tensor, y: Tensor) -> Tensor:
    return _gap(outputs, y).abs().mean(-1)


def _huber(outputs: Tensor, y: Tensor, *, delta: Tensor) -> Tensor:
    """Half the squared gap up to ``delta`` (in standard deviations of y), linear beyond. Source: Huber (1964)."""
    gap, delta = _gap(outputs, y).abs(), delta[..., None]
    return torch.where(gap <= delta, gap.square() / 2, delta * (gap - delta / 2)).mean(-1)


def _quantile(outputs: Tensor, y: Tensor, *, q: Tensor) -> Tensor:
    """The gap times q above the output, times q - 1 below. Source: Koenker and Bassett (1978)."""
    gap, q = _gap(outputs, y), q[..., None]
    return torch.maximum(q * gap, (q - 1) * gap).mean(-1)


def _bce(outputs: Tensor, y: Tensor) -> Tensor:
    y = y if y.dim() == outputs.dim() else y[..., None]
    y = y.to(outputs.dtype).expand(outputs.shape)
    return functional.binary_cross_entropy_with_logits(outputs, y, reduction="none").mean(-1)


@dataclass(frozen=True)
class NamedLoss:
    """A loss that has a name: row losses of outputs (..., B, K), the tasks it is for, and the numbers it takes."""

    rows: Callable[..., Tensor]
    tasks: tuple[Task, ...]
    arguments: Mapping[str, LossNumber]


_CLASSES: tuple[Task, ...] = ("binary", "multiclass")
LOSSES: Mapping[str, NamedLoss] = {
    "cross_entropy": NamedLoss(
        _cross_entropy, _CLASSES, {"label_smoothing": LossNumber(0.0, 0, 1, closed=True)}
    ),
    "mse": NamedLoss(_mse, ("regression",), {}),
    "mae": NamedLoss(_mae, ("regression",), {}),
    "huber": NamedLoss(_huber, ("regression",), {"delta": LossNumber(1.0, 0, torch.inf)}),
    "quantile": NamedLoss(_quantile, ("regression",), {"q": LossNumber(0.5, 0, 1)}),
    "bce": NamedLoss(_bce, ("multilabel", "binary"), {}),
}
LOSS_OF_TASK: Mapping[Task, str] = {
    "binary": "cross_entropy",
    "multiclass": "cross_entropy",
    "regression": "mse",
    "multilabel": "bce",
}
"""The loss that a module is trained on where none is given; a custom target has none."""
