"""Training losses, such as "huber", and their gradients, computed for all members at once.

A member is one trial on one fold.

The loss of a minibatch is ``sum(weight * loss) / sum(weight)`` over its rows. The loss of a row is
the cross-entropy for classes and the squared error for regression. Both are defined as in
``torch.nn.functional.cross_entropy`` and ``mse_loss``.

In shapes, B counts the rows of a minibatch, K the outputs per row, and C the trials.

Temperature scaling divides all logits by one value, the temperature, so that the probabilities are
calibrated.
Source: Guo et al. (2017), On calibration of modern neural networks, arXiv:1706.04599, section 4.2.
The temperature is found with the method of scikit-learn's
CalibratedClassifierCV(method="temperature").
"""

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from gputune.ground.errors import InputError, Verbatim, option, per_interface
from gputune.ground.seeding import keyed_draws
from gputune.ground.types import Task
from gputune.scoring.scores import neg_cross_entropy

_CLASS_OF_NAME = {name.lower(): kind for name, kind in vars(nn).items() if name.endswith("Loss")}
_KINDS: dict[Callable[..., object], type[nn.Module]] = {
    functional.binary_cross_entropy: nn.BCELoss,
    functional.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    functional.cross_entropy: nn.CrossEntropyLoss,
    functional.kl_div: nn.KLDivLoss,
}
for _name, _function in vars(functional).items():
    # The other functions are named like their class: smooth_l1_loss and SmoothL1Loss.
    _class_name = _name.replace("_", "")
    if _class_name in _CLASS_OF_NAME:
        _KINDS[_function] = _CLASS_OF_NAME[_class_name]

OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss)
OF_NUMBERS = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.PoissonNLLLoss)

_TASK = f"with {option('task', 'custom')} and"
_CUSTOM = per_interface(
    f"{_TASK} scoring=callable(outputs, y)",
    f"{_TASK} scoring=callable(outputs, y)",
    "in gputune.sklearn.NeuralNet",
)
_CUSTOM_BY_LOSS = per_interface(
    f"{_TASK} {option('scoring', 'neg_loss')}",
    f"{_TASK} {option('scoring', 'neg_loss')}",
    "in gputune.sklearn.NeuralNet",
)
_FUNCTION = (
    f"Call this loss in your own function loss(outputs, y), {_CUSTOM}, or in a training_step"
)
# The second one is new in PyTorch 2.13.
_WITH_WEIGHTS: list[type[nn.Module]] = [
    getattr(nn, name)
    for name in ("AdaptiveLogSoftmaxWithLoss", "LinearCrossEntropyLoss")
    if hasattr(nn, name)
]
_MORE_ARGUMENTS: Mapping[type[nn.Module], tuple[str, str]] = {
    nn.GaussianNLLLoss: (
        "means, y and variances",
        "Return the mean and the log variance as two columns of the module's outputs. Then pass a "
        "function loss(outputs, y) that calls this loss with outputs[:, 0], y and "
        "outputs[:, 1].exp(), "
        f"{_CUSTOM_BY_LOSS}",
    ),
    nn.CosineEmbeddingLoss: ("two embeddings and y", _FUNCTION),
    nn.MarginRankingLoss: ("the scores of two rows and y", _FUNCTION),
    nn.TripletMarginLoss: ("an anchor, a positive and a negative row", _FUNCTION),
    nn.TripletMarginWithDistanceLoss: ("an anchor, a positive and a negative row", _FUNCTION),
    nn.CTCLoss: ("outputs, y and their lengths", _FUNCTION),
    **dict.fromkeys(
        _WITH_WEIGHTS,
        (
            "hidden features and has weights to train",
            "Make this loss a submodule of your module, and return its value from a training_step",
        ),
    ),
}
"""Losses that need more than outputs and y, each with its arguments and the remedy in the error."""


def kind_of(loss: object) -> type:
    """Return the class of a loss, which may be given as a class, an instance, or a function.

    The class of ``functional.mse_loss``, and of a ``functools.partial`` of it, is ``nn.MSELoss``.
    """
    if isinstance(loss, partial):
        loss = loss.func
    if isinstance(loss, type):
        return loss
    if isinstance(loss, Hashable) and callable(loss):
        return _KINDS.get(loss, type(loss))
    return type(loss)


def name_of_loss(loss: object) -> str:
    """Return the full name of a PyTorch loss, such as "torch.nn.MSELoss"."""
    if isinstance(loss, partial):
        loss = loss.func
    if isinstance(loss, Hashable) and loss in _KINDS:
        return f"torch.nn.functional.{getattr(loss, '__name__', '')}"
    return f"torch.nn.{kind_of(loss).__name__}"


def refuse_other_arguments(loss: object) -> None:
    """Raise InputError for a PyTorch loss that needs more arguments than outputs and y."""
    kind = kind_of(loss)
    base = base_of(kind, tuple(_MORE_ARGUMENTS))
    if base is None or (isinstance(loss, partial) and _n_required(loss) == 2):
        return
    takes, remedy = _MORE_ARGUMENTS[base]
    raise InputError(
        f"loss={name_of_loss(loss)}",
        f"takes {takes}, but gputune calls loss(outputs, y)",
        remedy=f"{remedy}.",
    )


def base_of(kind: type, bases: tuple[type[nn.Module], ...]) -> type[nn.Module] | None:
    """Return the PyTorch loss class with the same ``forward`` as a class, or None for a custom
    forward."""
    for base in bases:
        if issubclass(kind, base) and getattr(kind, "forward", None) is base.forward:
            return base
    return None


def _n_required(function: Callable[..., object]) -> int:
    """Count the arguments of a function that have no default."""
    return sum(p.default is Parameter.empty for p in signature(function).parameters.values())


def refuse_other_targets(loss: object, task: Task) -> None:
    """Raise InputError for a PyTorch loss that expects the target in another form, such as -1 and
    1."""
    base = base_of(
        kind_of(loss), (nn.SoftMarginLoss, nn.HingeEmbeddingLoss, nn.MultiLabelMarginLoss)
    )
    if base is None or task == "custom":
        return
    positions = base is nn.MultiLabelMarginLoss
    if task == "regression" and not positions:
        return
    gets = {
        "regression": "floats",
        "multilabel": "a 0 or a 1 for each label",
    }.get(task, "the positions of the classes, from 0")
    takes = "the positions of each row's labels" if positions else "-1 and 1"
    as_given = f"pass y in that form {_CUSTOM}"
    bce = option("loss", "bce")
    if base is nn.SoftMarginLoss and task != "multiclass":
        remedy = f"Give {bce}, which is the same loss for 0 and 1."
    elif task == "multilabel":
        remedy = f"Give {bce}, or {as_given}."
    elif task in ("binary", "multiclass"):
        remedy = f"Give {option('loss', 'cross_entropy')}, or {as_given}."
    else:
        remedy = f"Instead, {as_given}."
    raise InputError(
        f"loss={name_of_loss(loss)}",
        f"takes {takes} as y, but gputune passes {gets}",
        remedy=remedy,
    )


_SIGMOID = (
    f"End the module with sigmoid() and pass {option('loss', Verbatim('torch.nn.BCELoss()'))}"
)
_UNITS: Mapping[type[nn.Module], tuple[str, str]] = {
    nn.PoissonNLLLoss: ("log rates", "End the module with exp() and pass {} with log_input=False"),
    nn.BCEWithLogitsLoss: ("logits", _SIGMOID),
    nn.MultiLabelSoftMarginLoss: ("logits", _SIGMOID),
    nn.CrossEntropyLoss: ("logits", ""),
    nn.KLDivLoss: ("log-probabilities", ""),
    nn.SoftMarginLoss: ("margins", ""),
    nn.HingeEmbeddingLoss: ("distances", ""),
}
"""Losses whose outputs have another unit than a numeric y, each with this unit and the remedy."""


def other_units(loss: object, arguments: Mapping[str, object]) -> str:
    """Return the unit of the outputs of a PyTorch loss, if it is not the unit of a numeric y.

    Args:
        loss: any loss.
        arguments: the values of its ``loss__*`` in all trials.

    Returns:
        A text such as "log rates", or "" for outputs in the units of y, and for any other loss.
    """
    base = base_of(kind_of(loss), tuple(_UNITS))
    if base is None:
        return ""
    if base is nn.PoissonNLLLoss:
        given = loss.keywords if isinstance(loss, partial) else arguments
        if not getattr(loss, "log_input", given.get("log_input", True)):
            return ""
    return _UNITS[base][0]


def remedy_for_units(loss: object) -> str:
    """Return advice for an error: how to get outputs in the units of y, or "" if that is
    impossible."""
    base = base_of(kind_of(loss), tuple(_UNITS))
    return "" if base is None else _UNITS[base][1].format(name_of_loss(loss))


_ORDERS = 12  # of the target, for which a score must be equal to count as one of all pairs of rows


def pairs_all_rows(
    function: Callable[[Tensor, Tensor], object], outputs: Tensor, y: Tensor
) -> bool:
    """Return True if a custom loss or score compares each output with all targets by mistake.

    The cause is that torch broadcasts (B, 1) and (B,) for B rows to (B, B). The result then does
    not change with the order of y. It also differs from the result for outputs and y of the same
    shape.
    """
    rows = len(y)
    shapes = {tuple(outputs.shape), tuple(y.shape)}
    if shapes != {(rows,), (rows, 1)} or rows < 2:
        return False
    # Rows that are all equal would pass for any order, so they are made different.
    steps = torch.arange(rows, device=y.device) % 2
    outputs = outputs.double()
    if bool((outputs == outputs[:1]).all()):
        outputs = outputs + 0.01 * steps.view(outputs.shape)
    if bool((y == y[:1]).all()):
        y = steps.view(y.shape).to(y.dtype)
    if y.is_floating_point():
        y = y.double()

    def mean(outputs: Tensor, y: Tensor) -> Tensor | None:
        with (
            contextlib.suppress(Exception),
            torch.no_grad(),
            warnings.catch_warnings(action="ignore"),
            keyed_draws(torch.device("cpu"), 0, "check"),
        ):
            return torch.as_tensor(function(outputs.clone(), y.clone())).double().mean()
        return None  # the function does not accept these shapes

    def same(other: Tensor | None) -> bool:
        if paired is None or other is None:
            return False
        return torch.allclose(paired, other, rtol=1e-12, atol=1e-14)

    # Paired with all rows, the mean ignores the order of y and differs from both aligned shapes.
    paired = mean(outputs, y)
    aligned = [mean(outputs.view(shape), y.view(shape)) for shape in ((rows,), (rows, 1))]
    # An accuracy may be equal for one other order by chance.
    orders = (y.roll(shift, 0) for shift in range(1, min(rows, _ORDERS)))
    return all(same(mean(outputs, order)) for order in orders) and not any(map(same, aligned))


# With fewer classes than a vector register holds, torch's softmax on a CPU computes one number at a
# time and is 7x slower.
_FULL_REGISTER = 16
_FEW = 4096  # numbers; below this, one slow operation costs less than five fast ones


def cross_entropy_slope_(logits: Tensor, onehot: Tensor, share: Tensor | float) -> Tensor:
    """Overwrite logits with the gradient of the cross-entropy with respect to the logits.

    Source: the derivative of -log softmax(z)[y] with respect to z is softmax(z) - onehot(y).

    Args:
        logits: The logits, (..., B, K). An absent class has the logit -inf, and its gradient is 0.
        onehot: The one-hot target, (..., B, K).
        share: The weight of each row divided by the sum of weights, (..., B, 1). A float if all
            weights are equal.
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
    """Overwrite outputs with the gradient of a regression loss with respect to the outputs.

    If an output equals the target, the gradient is the same as in PyTorch's autograd.

    Args:
        outputs: The outputs, (..., B, 1).
        y: The targets, in the same shape.
        share: The weight of each row divided by the sum of weights, (..., B, 1), or a float.
        loss: "mse", "huber", "mae" or "quantile", as in ``LOSSES``.
        number: The delta of the Huber loss, or the level of the quantile loss.
    """
    gap = outputs.sub_(y)
    if loss == "mse":
        return gap.mul_(share).mul_(2)
    if loss == "huber":
        return gap.clamp_(-number, number).mul_(share)
    sign = gap.sign_()
    if loss == "mae":
        return sign.mul_(share)
    # Quantile: 1 - q above the target, -q below it, 1/2 - q at the target.
    return sign.add_(1).mul_(0.5).sub_(number).mul_(share)


def row_losses(outputs: Tensor, y: Tensor) -> Tensor:
    """Return the default loss of each row, (..., B): cross-entropy for classes, squared error for
    numbers.

    The losses can be differentiated twice. ``outputs`` is (..., B, K). ``y`` (..., B) holds class
    codes or numeric values. A class that is absent from the training rows has the output -inf.
    """
    if y.is_floating_point():
        return (outputs.squeeze(-1) - y) ** 2
    y = y.expand(outputs.shape[:-1])
    if (
        outputs.device.type != "cpu"
        or outputs.shape[-1] >= _FULL_REGISTER
        or outputs.numel() < _FEW
    ):
        if outputs.dim() == 2:
            return functional.cross_entropy(outputs, y, reduction="none")
        flat = functional.cross_entropy(outputs.flatten(0, -2), y.flatten(), reduction="none")
        return flat.view(y.shape)
    # log(sum(exp(z))) - z[y] from plain operations, which are faster here: see _FULL_REGISTER
    shifted = outputs - outputs.detach().amax(-1, keepdim=True)
    picked = shifted.gather(-1, y[..., None]).squeeze(-1)
    return shifted.exp().sum(-1).log() - picked


class LossParameter(NamedTuple):
    """The parameter of a named loss, such as delta: its default and the open interval of valid
    values.

    If ``closed``, ``low`` is a valid value too.
    """

    default: float
    low: float
    high: float
    closed: bool = False

    def rule(self) -> str:
        """Return the valid values of the parameter as text for an error, such as "a number in (0,
        1)"."""
        return f"a number in {'[' if self.closed else '('}{self.low:g}, {self.high:g})"

    def includes(self, value: object) -> bool:
        """Return True if a value is valid for the parameter of the loss."""
        if isinstance(value, bool) or not isinstance(value, Real):
            return False
        return self.low < float(value) < self.high or (self.closed and float(value) == self.low)


def _cross_entropy(outputs: Tensor, y: Tensor, *, label_smoothing: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of each row, (..., B), with label smoothing s.

    The loss is (1 - s) * -log p(label) + s * the mean of -log p over the classes. Absent classes,
    with outputs of -inf, are left out of the mean.

    Source: Szegedy et al. (2016), section 7, as in ``torch.nn.functional.cross_entropy``.
    """
    of_label = row_losses(outputs, y)
    if label_smoothing is None:
        return of_label
    log_p = outputs.log_softmax(-1)
    absent = outputs == -torch.inf
    others = -log_p.masked_fill(absent, 0).sum(-1) / (~absent).sum(-1)
    return (1 - label_smoothing) * of_label + label_smoothing * others


def _gap(outputs: Tensor, y: Tensor) -> Tensor:
    """Return the errors y - outputs, (..., B, K), after giving y the shape of the outputs."""
    return (y if y.dim() == outputs.dim() else y[..., None]) - outputs


def _huber(outputs: Tensor, y: Tensor, *, delta: Tensor) -> Tensor:
    """Return the Huber loss of each row, (..., B).

    With gap = y - output, the loss is half the squared gap up to ``delta``, and linear beyond.
    ``delta`` is in standard deviations of y. Source: Huber (1964).
    """
    # delta: (C, 1) -> (C, 1, 1), to broadcast with the gaps (..., C, B, K)
    gap = _gap(outputs, y).abs()
    delta = delta[..., None]
    return torch.where(gap <= delta, gap.square() / 2, delta * (gap - delta / 2)).mean(-1)


def _quantile(outputs: Tensor, y: Tensor, *, q: Tensor) -> Tensor:
    """Return the quantile (pinball) loss of each row, (..., B).

    With gap = y - output, the loss is q * gap for a positive gap, and (q - 1) * gap for a negative
    gap. Source: Koenker and Bassett (1978).
    """
    gap = _gap(outputs, y)
    q = q[..., None]
    return torch.maximum(q * gap, (q - 1) * gap).mean(-1)


def _bce(outputs: Tensor, y: Tensor) -> Tensor:
    """Return the binary cross-entropy of each row, (..., B), as a mean over its labels."""
    y = (y if y.dim() == outputs.dim() else y[..., None]).to(outputs.dtype).expand(outputs.shape)
    return functional.binary_cross_entropy_with_logits(outputs, y, reduction="none").mean(-1)


@dataclass(frozen=True)
class NamedLoss:
    """A loss that the user can choose by name, such as "mse" or "huber".

    Attributes:
        rows: Returns the row losses (..., B) of outputs (..., B, K).
        tasks: The tasks that the loss is for.
        arguments: The parameters of the loss, by name.
    """

    rows: Callable[..., Tensor]
    tasks: tuple[Task, ...]
    arguments: Mapping[str, LossParameter]


_CLASSES: tuple[Task, ...] = ("binary", "multiclass")
LOSSES: Mapping[str, NamedLoss] = {
    "cross_entropy": NamedLoss(
        _cross_entropy, _CLASSES, {"label_smoothing": LossParameter(0.0, 0, 1, closed=True)}
    ),
    "mse": NamedLoss(lambda outputs, y: _gap(outputs, y).square().mean(-1), ("regression",), {}),
    "mae": NamedLoss(lambda outputs, y: _gap(outputs, y).abs().mean(-1), ("regression",), {}),
    "huber": NamedLoss(_huber, ("regression",), {"delta": LossParameter(1.0, 0, torch.inf)}),
    "quantile": NamedLoss(_quantile, ("regression",), {"q": LossParameter(0.5, 0, 1)}),
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
"""Other names that the user may write for a loss, as in scikit-learn and elsewhere."""


def parse_loss(word: str) -> tuple[str, dict[str, float]]:
    """Split the user's text for a loss, such as "quantile:0.9", into its name and parameters.

    The example returns ``("quantile", {"q": 0.9})``. A text that names no loss stays unchanged.
    Raises InputError for a parameter value that the loss does not accept.
    """
    name, colon, text = word.partition(":")
    name = LOSS_ALIASES.get(name, name)
    if not colon or name not in LOSSES:
        return (name if name in LOSSES else word), {}
    if not (arguments := LOSSES[name].arguments):
        raise InputError(
            f"loss={word!r}",
            f"has a number, but {name!r} takes no number",
            remedy=f"Say {option('loss', name)}.",
        )
    ((argument, rule),) = arguments.items()
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not rule.includes(number):
        raise InputError(
            None,
            f"In {option('loss', word)}, the {argument} of {name!r} must be {rule.rule()}",
            got=text,
        )
    return name, {argument: number}


LOSS_OF_TASK: Mapping[Task, str] = {
    "binary": "cross_entropy",
    "multiclass": "cross_entropy",
    "regression": "mse",
    "multilabel": "bce",
}
"""The default loss of a module for each task. A custom target has no default loss."""


NUMBERS_INSTEAD: tuple[Task, ...] = ("binary", "multiclass", "multilabel")
"""Tasks for which the user may have meant a regression, although y looks like classes or labels."""
_TASK = option("task", "regression")
_INSTEAD = per_interface(f"say {_TASK}", f"say {_TASK}", "use NeuralNetRegressor")
SAY_REGRESSION = f"If the values of y are numbers, {_INSTEAD}."


_CLASS_LOSSES: Mapping[Task, str] = {
    "binary": f"{option('loss', 'cross_entropy')} or 'bce'",
    "multiclass": option("loss", "cross_entropy"),
    "multilabel": option("loss", "bce"),
}
"""The losses that error messages recommend for each task with classes or labels."""


def only_classifies(loss: object) -> bool:
    """Return True if a loss is only for targets with one class per row, such as the
    cross-entropy."""
    if isinstance(loss, str):
        return LOSS_ALIASES.get(loss, loss) == "cross_entropy"
    return issubclass(kind_of(loss), OF_CLASSES)


def takes_probabilities(loss: object) -> bool:
    """Return True if a loss accepts class probabilities (soft labels) as the target.

    The outputs for such a loss are logits or log-probabilities.
    """
    return issubclass(kind_of(loss), (nn.CrossEntropyLoss, nn.KLDivLoss))


def is_absolute(loss: object) -> bool:
    """Return True if a loss grows linearly with the error, at least for large errors, like the
    Huber loss."""
    kind = loss if isinstance(loss, type) else type(loss)  # a loss may be given as its class
    absolute = (nn.L1Loss, nn.HuberLoss, nn.SmoothL1Loss)
    return loss in ("mae", "huber") or issubclass(kind, absolute)


def refuse_parameters(argument: str, function: object) -> None:
    """Raise InputError if a loss or a training step has parameters to train.

    gputune trains only the parameters of the module.
    """
    if not isinstance(function, nn.Module):
        return
    for name, parameter in function.named_parameters():
        if parameter.requires_grad:
            raise InputError(
                argument,
                f"has the parameter {name!r}, but gputune trains only the parameters of the module",
                remedy="Put the parameter into the module, and compute the loss in a "
                "training_step. If it stays fixed, call requires_grad_(False).",
            )


def loss_fitting(loss: object, task: Task) -> object:
    """Check that a loss fits the target, and return the loss.

    The result is "bce" for torch's default binary cross-entropy, because gputune computes that loss
    for all members at once.

    Raises InputError for a loss that does not fit the target: a regression loss for classes, a loss
    of one class per row for labels, or nn.BCELoss.
    """
    kind = kind_of(loss)
    argument = f"loss={name_of_loss(loss)}"
    refuse_other_arguments(loss)
    refuse_other_targets(loss, task)
    # A subclass with a forward of its own may compare outputs with labels in any way.
    is_of_numbers = issubclass(kind, OF_NUMBERS) and (
        task != "multilabel" or base_of(kind, OF_NUMBERS) is not None
    )
    if task in NUMBERS_INSTEAD and is_of_numbers:
        form = "labels" if task == "multilabel" else "classes"
        remedy = f"{SAY_REGRESSION} Otherwise choose {_CLASS_LOSSES[task]}."
        raise InputError(argument, f"is a loss for numbers, but y holds {form}", remedy=remedy)
    if task == "multilabel" and issubclass(kind, OF_CLASSES):
        labels_loss = option("loss", Verbatim("torch.nn.BCEWithLogitsLoss"))
        raise InputError(
            argument,
            "is a loss for one class per row, but y holds labels, and a row may have several labels",
            remedy=f"Give {labels_loss}, or y.argmax(1) as y if each row has one label.",
        )
    if task not in ("binary", "multilabel"):
        return loss
    if issubclass(kind, nn.BCELoss):
        raise InputError(
            argument,
            "expects probabilities, but gputune computes predictions and scores from logits",
            remedy=f"Give {option('loss', 'bce')}, which is torch.nn.BCEWithLogitsLoss, and leave "
            "out the sigmoid at the end of the module.",
        )
    plain = ("mean", None, None)
    is_default = (
        isinstance(loss, nn.BCEWithLogitsLoss)
        and (loss.reduction, loss.weight, loss.pos_weight) == plain
    )
    return "bce" if is_default or loss is nn.BCEWithLogitsLoss else loss


def refuse_one_number(loss: object, y: Tensor) -> None:
    """Raise InputError if a classification loss is used with y (B,) or (B, 1) of floats.

    With one class such a loss is always 0.
    """
    if issubclass(kind_of(loss), OF_CLASSES) and y.is_floating_point() and y.numel() == len(y):
        task = f"say {option('task', 'classification')}"
        say_classification = per_interface(task, task, "use NeuralNetClassifier")
        raise InputError(
            f"loss={name_of_loss(loss)}",
            "is a loss for classes, but y has one number per row",
            remedy=f"If they are classes, {say_classification}. Otherwise choose a loss for "
            "numbers, such as 'mse'.",
        )


def takes_log_probabilities(loss: object) -> bool:
    """Return True if a PyTorch loss expects log-probabilities: NLLLoss, KLDivLoss or their
    functions."""
    return issubclass(kind_of(loss), nn.NLLLoss | nn.KLDivLoss)


def is_divergence(loss: object) -> bool:
    """Return True if a loss is PyTorch's Kullback-Leibler divergence, KLDivLoss.

    The outputs for this loss may have the classes in any dimension.
    """
    return issubclass(kind_of(loss), nn.KLDivLoss)


def is_cross_entropy(loss: object) -> bool:
    """Return True if a loss is the cross-entropy: the name, or PyTorch's class or function."""
    is_named = isinstance(loss, str) and loss == "cross_entropy"
    return is_named or issubclass(kind_of(loss), nn.CrossEntropyLoss)


def by_rows(loss: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function that computes a PyTorch loss for each row instead of the mean over the
    rows.

    The mean of the row losses equals the original loss. A loss without mean reduction, or with
    class weights, stays unchanged.
    """
    if getattr(loss, "reduction", None) != "mean" or getattr(loss, "weight", None) is not None:
        return loss
    # A step that copies the loss's tensors cannot be recorded, so they are shared.
    rows: Any = copy.copy(loss)
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
"""The tolerance in the search for the best logarithm of a temperature, as in scikit-learn."""


def best_temperature(logits: Tensor, target: Tensor) -> float:
    """Return the temperature for calibrating probabilities: the divisor of the logits with the
    least log loss.

    Args:
        logits: The logits, (n, K), which are divided by the temperature.
        target: The class codes, (n,).

    Returns:
        The temperature. It is 1.0 if all rows are predicted correctly.
    """
    from scipy.optimize import minimize_scalar

    if bool((logits.argmax(1) == target).all()):
        return 1.0  # no minimum: the loss would fall with the temperature without end

    def loss(log_inverse: float) -> float:
        return -float(neg_cross_entropy(logits * math.exp(log_inverse), target))

    bounds = (-_LOG_RANGE, _LOG_RANGE)
    # The variable is the logarithm of 1 / temperature, so that the temperature stays positive.
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": _TOLERANCE})
    return math.exp(-found.x)
