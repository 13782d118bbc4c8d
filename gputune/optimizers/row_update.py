"""The optimizer of one member, over its row, whose hyperparameters are numbers of the host.

The few passes over the row are all that a step costs: ``update.py`` computes each member's rate on the device, which is
dozens of small operations a step, nothing beside many members and half of the step beside one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gputune.optimizers.classes import ClassRule
from gputune.optimizers.rules import (
    BETA1,
    EPS,
    MOMENTS,
    RULES,
    Rates,
    n_moments,
    schedule_factor,
    schedule_free_average,
)
from gputune.types import Config, Params

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


class _Moments:
    """The moments of a rule, a row (N,) each."""

    def __init__(self, config: Config, theta: Tensor) -> None:
        self.optimizer = config["optimizer"]
        n = n_moments(self.optimizer, [float(config["momentum"])])
        self.moments = [torch.zeros_like(theta) for _ in range(n)]

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


class InPlaceRule(_Moments):
    """The rules of ``rules.py`` that ``update.py`` has in place, of numbers of the host."""

    def __init__(self, config: Config, theta: Tensor) -> None:
        super().__init__(config, theta)
        self.momentum, self.beta2 = float(config["momentum"]), float(config["beta2"])
        self.decay = min(float(config["weight_decay"]), torch.finfo(theta.dtype).max)
        self.scratch = torch.empty_like(theta)

    def step(self, theta: Tensor, grad: Tensor, rate: float, count: int) -> None:
        """Take one step."""
        if self.decay and self.optimizer == "adamw":
            theta.mul_(1 - rate * self.decay)
        elif self.decay:
            grad.add_(theta, alpha=self.decay)
        if self.optimizer in ("adam", "adamw"):
            # rate / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps), with the corrections moved to numbers
            (m, v), root = self.moments, math.sqrt(1 - self.beta2**count)
            m.lerp_(grad, 1 - BETA1)
            v.mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
            scratch = torch.sqrt(v, out=self.scratch).add_(EPS * root)
            theta.addcdiv_(m, scratch, value=-rate * root / (1 - BETA1**count))
            return
        if self.moments:
            buffer = self.moments[0].mul_(self.momentum).add_(grad)
            grad = grad.add_(buffer, alpha=self.momentum) if self.optimizer == "nesterov" else buffer
        theta.add_(grad, alpha=-rate)


class PureRule(_Moments):
    """A rule as ``rules.py`` has it, of the ``parts`` of a row (N,); ``sides`` are those of muon's hidden matrices."""

    def __init__(
        self, config: Config, theta: Tensor, parts: Callable[[Tensor], Params], sides: Mapping[str, int]
    ) -> None:
        super().__init__(config, theta)
        self.parts = parts
        lr, decay, momentum = (_number(config[key], theta) for key in ("lr", "weight_decay", "momentum"))
        longer = {name: _number(side, theta) for name, side in sides.items()}
        self.rates = Rates(lr, decay, momentum, count=lr, beta2=float(config["beta2"]), sides=longer)

    def step(self, theta: Tensor, grad: Tensor, rate: float, count: int) -> None:
        """Take one step."""
        rates = replace(self.rates, lr=_number(rate, theta), count=_number(count, theta))
        w, g, *moments = (
            {name: part[None] for name, part in self.parts(row).items()}
            for row in (theta, grad, *self.moments)
        )
        before = dict(zip(MOMENTS[self.optimizer], moments))
        new, after = RULES[self.optimizer](w, g, before, rates)
        for old, values in ((w, new), *((before[name], after[name]) for name in before)):
            for name, part in old.items():
                part.copy_(values[name])


def _number(value: float, like: Tensor) -> Tensor:
    return torch.full((1,), float(value), dtype=torch.float64, device=like.device)


RowRule = InPlaceRule | PureRule | ClassRule
"""What changes a row (N,) by its gradient, which is used up, and the rows that it keeps for that."""
