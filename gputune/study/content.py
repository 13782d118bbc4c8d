"""What a tuned model consists of: the values that a folder keeps and an export writes."""

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from gputune.data.encode import Layout, Statistics
from gputune.types import Task


@dataclass(frozen=True, eq=False, repr=False)
class ModelContent:
    """A trained module and its preprocessing.

    module    plain ``nn.Module``, returning logits (n, K), or values (n, 1) or (n,) of a standardised target
    classes   (K,) the labels, in their own type; None for regression
    center, scale   the regression target is ``value * scale + center``; 0 and 1 for classes
    target    name of the target's column
    spec      how the module is built again: {"kind": "mlp" or "logistic", "kwargs": {...}}, or for a class of
              the user {"kind": "module", "kwargs": {...}} with what module_source.py writes about the class;
              ``n_features`` and ``n_outputs`` follow from layout and classes and need not be in ``kwargs``
    info      what is worth knowing later: score, held-out score, parameters, versions
    """

    module: nn.Module
    layout: Layout
    statistics: Statistics
    task: Task
    classes: NDArray[Any] | None
    center: float
    scale: float
    dtype: torch.dtype
    target: str
    spec: dict[str, Any]
    info: dict[str, Any]
