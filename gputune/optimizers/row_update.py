"""The update rules of ``rules.py`` in place over the row of one member, whose hyperparameters are numbers of the host.

The few passes over the row are all that a step costs: ``update.py`` computes each member's rate on the device, which is
dozens of small operations a step, nothing beside many members and half of the step beside one.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gputune.optimizers.rules import BETA1, BETA2, EPS, n_moments
from gputune.optimizers.schedules import schedule_factor
from gputune.types import Config


class RowUpdate:
    """The optimizer of one member: owns the moments, changes the row ``theta`` (N,) in place.

    A schedule runs over ``horizon`` epochs of ``steps`` steps.
    """

    def __init__(self, config: Config, theta: Tensor, *, steps: int, horizon: int) -> None:
        self.optimizer, self.steps, self.total = config["optimizer"], steps, steps * horizon
        largest = torch.finfo(theta.dtype).max
        self.lr, self.momentum = float(config["lr"]), float(config["momentum"])
        self.decay = min(float(config["weight_decay"]), largest)
        self.schedule = config["schedule"]
        self.factors: list[float] = []  # of an epoch
        moments = n_moments(self.optimizer, [self.momentum])
        self.moments = [torch.zeros_like(theta) for _ in range(moments)]
        self.scratch = torch.empty_like(theta)
        self.done = 0

    def state(self) -> list[Tensor]:
        """Return the rows that a later step depends on, to be filled again by ``resume``."""
        return self.moments

    def resume(self, rows: Sequence[Tensor]) -> None:
        """Go on from what ``state`` returned."""
        for moment, kept in zip(self.moments, rows, strict=True):
            moment.copy_(kept)

    def begin(self, epoch: int) -> None:
        """Count from the first step of an epoch."""
        self.done = epoch * self.steps
        done = np.arange(self.done, self.done + self.steps)
        self.factors = schedule_factor(self.schedule, done, np.full(self.steps, self.total)).tolist()

    def step(self, theta: Tensor, grad: Tensor) -> None:
        """Take one step. ``grad`` is used up: what it holds afterwards means nothing."""
        rate = self.lr * self.factors[self.done % self.steps]
        self.done += 1
        if self.decay and self.optimizer != "adamw":
            grad.add_(theta, alpha=self.decay)
        if self.optimizer in ("adam", "adamw"):
            self._adam(theta, grad, rate)
        else:
            theta.add_(self._direction(grad), alpha=-rate)

    def scored(self, theta: Tensor) -> Tensor:
        """Return what is scored and saved: the row itself."""
        return theta

    def _adam(self, theta: Tensor, grad: Tensor, rate: float) -> None:
        m, v = self.moments
        m.lerp_(grad, 1 - BETA1)
        v.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
        # rate / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps), with the corrections moved to numbers
        root = math.sqrt(1 - BETA2**self.done)
        torch.sqrt(v, out=self.scratch).add_(EPS * root)
        if self.decay and self.optimizer == "adamw":
            theta.mul_(1 - rate * self.decay)
        theta.addcdiv_(m, self.scratch, value=-rate * root / (1 - BETA1**self.done))

    def _direction(self, grad: Tensor) -> Tensor:
        if not self.moments:
            return grad
        (buffer,) = self.moments
        buffer.mul_(self.momentum).add_(grad)
        return grad.add_(buffer, alpha=self.momentum) if self.optimizer == "nesterov" else buffer
