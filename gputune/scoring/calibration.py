"""Temperature scaling: one number by which all logits are divided, so that probabilities are as sure as they are right.

Source: Guo et al. (2017), On calibration of modern neural networks, arXiv:1706.04599, section 4.2; it is found as
scikit-learn's CalibratedClassifierCV(method="temperature") finds it.
"""

import math

import torch
from torch import Tensor

from gputune.scoring.scores import neg_cross_entropy

_LOG_RANGE, _TOLERANCE = 10.0, 64 * torch.finfo(torch.float64).eps
"""Of the logarithm of a temperature, as in scikit-learn."""


def best_temperature(logits: Tensor, target: Tensor) -> float:
    """Return the temperature at which logits (n, K), divided by it, have the least log loss on class codes (n,).

    It is 1 where every row's class has the largest logit: the loss would then fall for ever as the temperature does.
    """
    from scipy.optimize import minimize_scalar

    if bool((logits.argmax(1) == target).all()):
        return 1.0

    def loss(log_inverse: float) -> float:
        return -float(neg_cross_entropy(logits * math.exp(log_inverse), target))

    bounds = (-_LOG_RANGE, _LOG_RANGE)
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": _TOLERANCE})
    return math.exp(-found.x)
