"""Call a module, and bring its outputs into the form of predictions.

Shape letter: m rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gputune.ground.errors import InputError
from gputune.ground.types import Task


def call_module(
    module: nn.Module, inputs: Sequence[Tensor], names: Sequence[str] | None = None
) -> Tensor:
    """Return the output of a module for its inputs, passed in order or by their names.

    The output of a model of transformers is its logits.
    """
    if names is None:
        outputs = module(*inputs)
    else:
        outputs = module(**dict(zip(names, inputs, strict=True)))
    result: Tensor = logits_of(outputs)
    return result


def in_mode(module: nn.Module, *, training: bool) -> nn.Module:
    """Switch a module to training or evaluation mode, and return it.

    The results of ``train()`` and ``eval()`` are not used, because a user's ``train()`` may return
    nothing.
    """
    if training:
        module.train()
    else:
        module.eval()
    return module


def logits_of(outputs: Any) -> Any:
    """Return the logits in an output of transformers. Any other output is returned unchanged."""
    logits = getattr(outputs, "logits", None) if isinstance(outputs, dict) else None
    return outputs if logits is None else logits


def first_output(outputs: Any) -> Tensor:
    """Return the prediction of a module with several heads.

    It is the first output of a tuple or list, the first value of a dict, and the logits of an
    output of transformers.
    """
    outputs = logits_of(outputs)
    heads = tuple(outputs.values()) if isinstance(outputs, Mapping) else outputs
    first: Tensor = heads[0] if isinstance(heads, tuple | list) and heads else outputs
    return first


def with_columns(outputs: Tensor) -> Tensor:
    """Add a third axis of length 1 to outputs (P, B) with one value per row. Other outputs are
    unchanged."""
    return outputs if outputs.dim() > 2 else outputs[..., None]


def two_logits(outputs: Tensor) -> Tensor:
    """Return two logits (..., m, 2) of two classes, 0 and z, for one logit z (..., m, 1).

    The softmax of the two logits is the sigmoid of -z and of z. Their cross-entropy is the binary
    cross-entropy of z.
    """
    return torch.cat([torch.zeros_like(outputs), outputs], -1)


def one_logit(outputs: Tensor) -> Tensor:
    """Return one logit (..., m, 1) for two logits (..., m, 2) of two classes: their difference."""
    return outputs.diff(dim=-1)


def is_one_logit(outputs: Tensor, task: Task, axes: int) -> bool:
    """Return whether outputs have one logit for each row, for two classes.

    The logit follows ``axes`` axes, as a last axis of length 1 or without an axis.
    """
    return task == "binary" and (outputs.dim() == axes or outputs.shape[-1] == 1)


def class_logits(outputs: Tensor, task: Task, axes: int) -> Tensor:
    """Return outputs with two logits per row if they have one logit for two classes.

    Other outputs are returned unchanged.
    """
    if is_one_logit(outputs, task, axes):
        return two_logits(outputs.reshape(*outputs.shape[:axes], 1))
    return outputs


def only_present(outputs: Tensor, present: Tensor) -> Tensor:
    """Return outputs (..., K) with the logit -inf for each class that is not in ``present``, (K,)
    bool."""
    return outputs.masked_fill(~present.to(outputs.device), -torch.inf)


def mean_outputs(outputs: Tensor, weights: Tensor, task: Task, axes: int = 2) -> Tensor:
    """Return outputs for the weighted mean of the predictions of M networks.

    For classes and labels, the mean is over probabilities, and the result are logits. For numbers,
    it is over the outputs.

    Args:
        outputs: The outputs (M, ..., m) or (M, ..., m, K), with ``axes`` axes before K.
        weights: The weights of the networks, (M,), which add up to 1.
        task: The kind of target.
        axes: The number of axes before K.

    Raises:
        InputError: The target is custom, so its outputs have no known mean.
    """
    if task == "custom":
        raise InputError(None, "The outputs for a custom target have no mean")
    outputs = class_logits(outputs, task, axes)
    weights = weights.to(outputs.dtype).view(-1, *[1] * (outputs.dim() - 1))
    if task == "regression":
        return (weights * outputs).sum(0)
    log_weights = weights.log()
    if task == "multilabel":
        # log p - log (1 - p) of the mean probability p; each of the two as a sum in logarithms.
        log_yes = (log_weights + functional.logsigmoid(outputs)).logsumexp(0)
        log_no = (log_weights + functional.logsigmoid(-outputs)).logsumexp(0)
        return log_yes - log_no
    return (log_weights + outputs.log_softmax(-1)).logsumexp(0)
