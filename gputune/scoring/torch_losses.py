"""Losses of ``torch.nn`` and ``torch.nn.functional``: their arguments, targets and output units.

gputune calls a loss as ``loss(outputs, y)``. gputune passes classes as 0, 1, ... and labels as
columns of 0 and 1, and compares outputs with y in the units of y. Some losses of PyTorch take other
arguments, other targets or outputs in other units.
"""

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from inspect import Parameter, signature

from torch import nn
from torch.nn import functional

from gputune.ground.errors import InputError, Verbatim, option, per_interface
from gputune.ground.types import Task

_CLASSES = {name.lower(): kind for name, kind in vars(nn).items() if name.endswith("Loss")}
_KINDS: dict[Callable[..., object], type[nn.Module]] = {
    functional.binary_cross_entropy: nn.BCELoss,
    functional.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    functional.cross_entropy: nn.CrossEntropyLoss,
    functional.kl_div: nn.KLDivLoss,
}
for _name, _function in vars(functional).items():
    # The other functions are named like their class: smooth_l1_loss and SmoothL1Loss.
    _class_name = _name.replace("_", "")
    if _class_name in _CLASSES:
        _KINDS[_function] = _CLASSES[_class_name]

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
