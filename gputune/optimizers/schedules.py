"""Schedules of a rate: the factor on it, from the steps done and the steps in all, as PyTorch has it."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

Schedule = Callable[[Tensor, Tensor], Tensor]
"""(steps done, steps in all), of one shape, in double precision -> the factor on the rate of the next step."""

# Of one_cycle, as torch.optim.lr_scheduler.OneCycleLR has them.
_FIRST, _LAST, _RISING = 1 / 25, 1e-4 / 25, 0.3


def constant(done: Tensor, _total: Tensor) -> Tensor:
    """Always 1."""
    return torch.ones_like(done)


def cosine(done: Tensor, total: Tensor) -> Tensor:
    """Half a cosine from 1 to 0. Source: Loshchilov and Hutter (2017), without restarts, per step."""
    return torch.cos(done / total * math.pi).add(1).mul(0.5)


def linear(done: Tensor, total: Tensor) -> Tensor:
    """A straight line from 1 to 0."""
    return 1 - done / total


def warmup_cosine(done: Tensor, total: Tensor) -> Tensor:
    """A straight line up to 1 over the first tenth of the steps, rounded down, then half a cosine to 0."""
    warmup = torch.floor(total / 10)
    rising = (done + 1) / (warmup + 1)
    return torch.where(done < warmup, rising, cosine(done - warmup, total - warmup))


def one_cycle(done: Tensor, total: Tensor) -> Tensor:
    """Half a cosine from 1/25 up to 1, at three tenths of the steps, and another down to 1/250000 at the last.

    Source: Smith and Topin (2019), as torch has it; momentum stays as it is.
    """
    top = _RISING * total - 1
    falling = _LAST + (1 - _LAST) * cosine(done - top, total - 1 - top)
    return torch.where(done <= top, 1 - (1 - _FIRST) * cosine(done, top), falling)


def coslog4(done: Tensor, total: Tensor) -> Tensor:
    """Four waves from 0 to 1 and back, each twice as long as the one before.

    Source: Holzmueller et al. (2024), arXiv:2407.04491, section 3.
    """
    return 0.5 - torch.cos(torch.log2(1 + 15 * done / total) * (2 * math.pi)) / 2


def flat_cos(done: Tensor, total: Tensor) -> Tensor:
    """1 over the first half of the steps, then half a cosine to 0. Source: that of ``coslog4``."""
    return torch.where(2 * done < total, 1.0, cosine(2 * done - total, total))


SCHEDULES: Mapping[str, Schedule] = {
    "constant": constant,
    "cosine": cosine,
    "linear": linear,
    "warmup+cosine": warmup_cosine,
    "one_cycle": one_cycle,
    "coslog4": coslog4,
    "flat_cos": flat_cos,
}


def schedule_factor(name: str, done: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Return the factors of a schedule, on the host."""
    factors = SCHEDULES[name](*(torch.as_tensor(steps, dtype=torch.float64) for steps in (done, total)))
    return np.asarray(factors)
