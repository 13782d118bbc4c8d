"""The coordinates in which hyperparameters move: the logarithm, or the logit for what lies between 0 and 1.

A step of one size then means the same change at a rate of 1e-5 as at 1, and never leaves the legal range.
"""

import math

import torch
from torch import Tensor

_BETWEEN_0_AND_1 = ("momentum", "beta1", "beta2")


def to_coordinate(name: str, value: Tensor) -> Tensor:
    """Return log(value), or log(value / (1 - value)) for momentum and the betas; -inf at 0."""
    return value.logit() if name in _BETWEEN_0_AND_1 else value.log()


def has_coordinate(name: str, value: float) -> bool:
    """Whether a value has a finite coordinate: 0 and infinity have none."""
    return math.isfinite(float(to_coordinate(name, torch.tensor(float(value), dtype=torch.float64))))


def from_coordinate(name: str, coordinate: Tensor) -> Tensor:
    """Return the value at a coordinate."""
    return coordinate.sigmoid() if name in _BETWEEN_0_AND_1 else coordinate.exp()


def speed(name: str, value: Tensor) -> Tensor:
    """Return d value / d coordinate, by which a derivative is turned into one in the coordinate."""
    return value * (1 - value) if name in _BETWEEN_0_AND_1 else torch.as_tensor(value)
