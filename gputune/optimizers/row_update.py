"""The optimizer of one member, over its row, whose hyperparameters are numbers of the host.

The few passes over the row are all that a step costs: ``update.py`` computes each member's rate on the device, which is
dozens of small operations a step, nothing beside many members and half of the step beside one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gputune.optimizers.classes import ClassRule
from gputune.optimizers.rules import (
    BETA1,
    EPS,
    LION_BETA2,
    MUON_SCALE,
    RMSPROP_ALPHA,
    n_moments,
    orthogonal,
    schedule_factor,
    schedule_free_average,
)
from gputune.types import Config

NORM_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_ has it


class RowUpdate:
    """The optimizer of one member: a gradient is clipped, a rule takes its step, the weights are averaged.

    A schedule runs over ``horizon`` epochs of ``steps`` steps.
    """

    def __init__(self, config: Config, theta: Tensor, rule: "RowRule", *, steps: int, horizon: int) -> None:
        self.rule, self.steps, self.total = rule, steps, steps * horizon
        self.lr, self.schedule = float(config["lr"]), config["schedule"]
        self.clip_norm, self.ema = float(config["clip_norm"]), float(config["ema"])
        self.average = torch.zeros_like(theta) if self.ema else None
        self.factors: list[float] = []  # of an epoch
        self.done = 0

    def state(self) -> list[Tensor]:
        """Return the rows that a later step depends on, to be filled again by ``resume``."""
        return [*self.rule.state(), *([] if self.average is None else [self.average])]

    def resume(self, rows: Sequence[Tensor]) -> None:
        """Go on from what ``state`` returned."""
        if self.average is not None:
            *rows, average = rows
            self.average.copy_(average)
        self.rule.resume(rows)

    def begin(self, epoch: int) -> None:
        """Count from the first step of an epoch."""
        self.done = epoch * self.steps
        done = np.arange(self.done, self.done + self.steps)
        self.factors = schedule_factor(self.schedule, done, np.full(self.steps, self.total)).tolist()

    def step(self, theta: Tensor, grad: Tensor) -> None:
        """Take one step. ``grad`` is used up: what it holds afterwards means nothing."""
        if self.clip_norm < math.inf:
            grad.mul_((self.clip_norm / (grad.norm() + NORM_EPS)).clamp(max=1.0))
        rate = self.lr * self.factors[self.done % self.steps]
        self.done += 1
        self.rule.step(theta, grad, rate, self.done)
        if self.average is not None:  # the first weights are the average of themselves
            self.average.lerp_(self.rule.scored(theta), 1.0 if self.done == 1 else 1 - self.ema)

    def scored(self, theta: Tensor) -> Tensor:
        """Return what is scored and saved: an average where there is one, else what the rule has it."""
        return self.rule.scored(theta) if self.average is None else self.average


@dataclass(frozen=True)
class Matrix:
    """A hidden matrix in a row, which muon makes its steps of: its entries, its number of rows, its longer side."""

    place: slice
    rows: int
    side: int


class InPlaceRule:
    """The rules of ``rules.py`` in place over a row (N,), of which ``matrices`` are those that muon is for."""

    def __init__(self, config: Config, theta: Tensor, matrices: Sequence[Matrix] = ()) -> None:
        self.optimizer = config["optimizer"]
        self.momentum, self.beta2 = float(config["momentum"]), float(config["beta2"])
        self.decay = min(float(config["weight_decay"]), torch.finfo(theta.dtype).max)
        self.moments = [torch.zeros_like(theta) for _ in range(n_moments(self.optimizer, [self.momentum]))]
        self.scratch = torch.empty_like(theta)
        self.matrices = matrices
        ends = [
            0,
            *(end for matrix in matrices for end in (matrix.place.start, matrix.place.stop)),
            len(theta),
        ]
        self.rest = [slice(a, b) for a, b in zip(ends[::2], ends[1::2]) if a < b]

    def state(self) -> list[Tensor]:
        """Return the moments."""
        return self.moments

    def resume(self, rows: Sequence[Tensor]) -> None:
        """Go on from what ``state`` returned."""
        for moment, kept in zip(self.moments, rows, strict=True):
            moment.copy_(kept)

    def scored(self, theta: Tensor) -> Tensor:
        """Return the row itself, but for the average of schedulefree."""
        return schedule_free_average(theta, self.moments[0]) if self.optimizer == "schedulefree" else theta

    def step(self, theta: Tensor, grad: Tensor, rate: float, count: int) -> None:
        """Take one step."""
        match self.optimizer:
            case "adam" | "adamw" | "muon":
                self._adam(theta, grad, rate, count)
            case "lion":
                self._lion(theta, grad, rate)
            case "schedulefree":
                self._schedulefree(theta, grad, rate, count)
            case _:
                if self.decay:
                    grad.add_(theta, alpha=self.decay)
                theta.add_(self._direction(grad), alpha=-rate)

    def _shrink(self, theta: Tensor, rate: float) -> None:
        if self.decay:
            theta.mul_(1 - rate * self.decay)

    def _adam(self, theta: Tensor, grad: Tensor, rate: float, count: int) -> None:
        """Adam of all that is in no matrix, and muon of those."""
        if self.optimizer == "adam":
            if self.decay:
                grad.add_(theta, alpha=self.decay)
        else:
            self._shrink(theta, rate)
        # rate / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps), with the corrections moved to numbers
        root = math.sqrt(1 - self.beta2**count)
        for place in self.rest:
            (m, v), g = (moment[place] for moment in self.moments), grad[place]
            m.lerp_(g, 1 - BETA1)
            v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
            scratch = torch.sqrt(v, out=self.scratch[place]).add_(EPS * root)
            theta[place].addcdiv_(m, scratch, value=-rate * root / (1 - BETA1**count))
        for matrix in self.matrices:
            m, g = self.moments[0][matrix.place], grad[matrix.place]
            m.lerp_(g, 1 - self.momentum)
            step = orthogonal(torch.lerp(g, m, self.momentum).view(matrix.rows, -1))
            theta[matrix.place].add_(step.flatten(), alpha=-rate * MUON_SCALE * math.sqrt(matrix.side))

    def _lion(self, theta: Tensor, grad: Tensor, rate: float) -> None:
        (m,) = self.moments
        self._shrink(theta, rate)
        theta.add_(torch.lerp(m, grad, 1 - BETA1, out=self.scratch).sign_(), alpha=-rate)
        m.lerp_(grad, 1 - LION_BETA2)

    def _schedulefree(self, theta: Tensor, grad: Tensor, rate: float, count: int) -> None:
        (z, v), corrected = self.moments, 1 - self.beta2**count
        share = corrected / (count - self.beta2 * corrected / (1 - self.beta2))
        if count == 1:
            z.copy_(theta)
        v.mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        step = grad.div_(torch.sqrt(v, out=self.scratch).add_(EPS))
        if self.decay:
            step.add_(theta, alpha=self.decay)
        rate *= math.sqrt(corrected)
        theta.lerp_(z, share).add_(step, alpha=rate * (BETA1 * (1 - share) - 1))
        z.add_(step, alpha=-rate)

    def _direction(self, grad: Tensor) -> Tensor:
        if self.optimizer == "rmsprop":
            v = self.moments[0]
            v.mul_(RMSPROP_ALPHA).addcmul_(grad, grad, value=1 - RMSPROP_ALPHA)
            grad.div_(torch.sqrt(v, out=self.scratch).add_(EPS))
        if not self.moments:
            return grad
        buffer = self.moments[-1]
        buffer.mul_(self.momentum).add_(grad)
        return grad.add_(buffer, alpha=self.momentum) if self.optimizer == "nesterov" else buffer


RowRule = InPlaceRule | ClassRule
"""What changes a row (N,) by its gradient, which is used up, and the rows that it keeps for that."""
