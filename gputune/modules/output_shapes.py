"""Describe the outputs and inputs of a module for messages about their shapes."""

from torch import Tensor

from gputune.data.table import quoted
from gputune.ground.errors import InputError, option


def check_fields(name: str, outputs: object) -> None:
    """Raise InputError for an output of transformers without logits.

    ``name`` is the name of the module. Any other output passes.
    """
    # A model output of transformers is a dict with a class of its own.
    if not isinstance(outputs, dict) or type(outputs) is dict:
        return
    missing = "no logits" if "loss" in outputs else "neither logits nor a loss"
    raise InputError(
        None,
        f"{name} returns {type(outputs).__name__} with {quoted(list(outputs))}, but {missing}",
        remedy="Use a model with a head, such as AutoModelForSequenceClassification, or put a head "
        "on this model with gputune.frozen(...).",
    )


def shape_hint(shape: tuple[int, ...] | str, n_outputs: int, *, binary: bool) -> str:
    """Return a sentence on how to correct outputs of a wrong shape or type, or "" if none fits."""
    if shape in ("tuple", "list", "dict"):
        step = option("training_step")
        return f" If there are several outputs, return only the first, or pass a {step}."
    if isinstance(shape, str):
        return ""
    if binary and n_outputs == 2 and (len(shape) == 1 or shape[1:] == (1,)):
        loss = option("loss", "bce")
        return f" For two classes return two logits per row, or one logit with {loss}."
    if binary and n_outputs == 1 and shape[1:] == (2,):
        return f" For two logits per row and two classes pass {option('loss', 'cross_entropy')}."
    return " Pool or flatten the axes after the rows." if len(shape) > 2 else ""


def shape_of(value: object) -> tuple[int, ...] | str:
    """Return the shape of a tensor, or the name of the type of another value."""
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def describe_tensor(x: Tensor) -> str:
    """Describe the type and shape of an input for messages. For integers, also their range."""
    name = str(x.dtype).removeprefix("torch.")
    shape = ", ".join(["rows", *map(str, x.shape[1:])])
    if x.is_floating_point():
        return f"a float tensor of shape ({shape})"
    kind = f"{'an' if name.startswith('i') else 'a'} {name} tensor of shape ({shape})"
    return f"{kind} of values from {int(x.min())} to {int(x.max())}"
