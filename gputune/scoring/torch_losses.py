"""The losses of torch.nn: which fit a target, and how one gives a number a row."""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gputune.errors import InputError
from gputune.types import Task

_OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss)
_OF_NUMBERS = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.PoissonNLLLoss)


def _kind(loss: Any) -> type:
    """Return the class of a loss, which may be the class itself."""
    return loss if isinstance(loss, type) else type(loss)


def loss_fitting(loss: Any, task: Task) -> Any:
    """Return the name of torch's binary cross-entropy for classes and labels, any other loss as it is.

    Raises InputError for a loss of numbers where the target is classes, of one class for labels, and for nn.BCELoss.
    """
    kind = _kind(loss)
    if task in ("binary", "multiclass") and issubclass(kind, _OF_NUMBERS):
        other = "'cross_entropy' or 'bce'" if task == "binary" else "'cross_entropy'"
        raise InputError(
            f"loss=torch.nn.{kind.__name__} is of numbers, and y is classes: say task='regression' where they are "
            f"numbers, or choose loss={other}."
        )
    if task == "multilabel" and issubclass(kind, _OF_CLASSES):
        raise InputError(
            f"loss=torch.nn.{kind.__name__} is of one class a row, and y is labels, of which a row may have several: "
            "give loss=torch.nn.BCEWithLogitsLoss, or y.argmax(1) as y where each row has one."
        )
    if task not in ("binary", "multilabel"):
        return loss
    if issubclass(kind, nn.BCELoss):
        raise InputError(
            "loss=torch.nn.BCELoss takes probabilities, and predictions and scores are made of logits: give "
            "loss='bce', which is torch.nn.BCEWithLogitsLoss, and leave out the sigmoid at the end of the module."
        )
    is_default = isinstance(loss, nn.BCEWithLogitsLoss) and (
        loss.reduction,
        loss.weight,
        loss.pos_weight,
    ) == ("mean", None, None)
    return "bce" if is_default or loss is nn.BCEWithLogitsLoss else loss


def refuse_one_number(loss: Any, y: Tensor) -> None:
    """Raise InputError for a loss of classes where y (B,) or (B, 1) is floats: of one class it is always 0."""
    kind = _kind(loss)
    if issubclass(kind, _OF_CLASSES) and y.is_floating_point() and y.numel() == len(y):
        raise InputError(
            f"loss=torch.nn.{kind.__name__} is of classes, and y is one number a row: say task='classification' where "
            "they are classes, or choose a loss of numbers, such as 'mse'."
        )


def wants_log_probabilities(loss: Any, outputs: Tensor) -> bool:
    """Whether outputs (B, K) are of no log_softmax, and the loss is torch's of log-probabilities."""
    kind = _kind(loss)
    if outputs.dim() < 2 or not issubclass(kind, nn.NLLLoss):
        return False
    return bool(((outputs.exp().sum(1) - 1).abs() > 0.01).any())


def by_rows(loss: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Let a loss of torch's give a number a row, of which the mean is what it gives otherwise, where it can."""
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
