"""The optimizer of a chunk: it clips the gradient, updates the parameters and averages the weights.

A chunk holds trials of one tensor shape that train together. A member is one trial on one fold.
Tables (F, C) have one value for each member: F folds, C trials.

All updates happen in place. Each member has its own gradient clipping (``clip_norm``) and averaging
(``ema``). If no member uses clipping or averaging, it costs nothing. The step counts each member's
steps on the device. From the count it computes schedule factors and Adam's bias corrections, in
double precision. The reason is that a recorded step (its operations are recorded once and replayed)
receives no values from Python. Members that take no step now (``active`` is False) keep their
parameters and moments.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gputune.optimizers.blocks import Blocks
from gputune.optimizers.classes import NORM_EPS
from gputune.optimizers.rules import (
    BETA1,
    BETA2,
    EPS,
    SCHEDULES,
    Schedule,
    n_moments,
    schedule_free_average,
)
from gputune.types import DEFAULTS, Config


def number_of(config: Config, key: str) -> float:
    """Return a hyperparameter of a configuration, or its default if the configuration does not have
    it.
    """
    return float(config[key] if key in config else DEFAULTS[key])


class Clock:
    """Counts the training steps of each member and computes the factors of the schedules.

    ``done`` (F, C) is the count of finished steps. A schedule runs over ``horizon`` epochs of
    ``steps`` (F, C) steps each.
    """

    def __init__(self, configs: Sequence[Config], steps: Tensor, horizon: int) -> None:
        self.steps = steps
        self.done = torch.zeros_like(steps, dtype=torch.float64)
        self.total = (steps * horizon).double()
        # schedule -> the trials (C,) that use it; the constant schedule is left out
        self.schedules: dict[str, dict[Schedule, Tensor]] = {}
        for key in ("schedule", "weight_decay_schedule", "dropout_schedule"):
            names = np.array([config.get(key, "constant") for config in configs])
            self.schedules[key] = {}
            for name in sorted({*names.tolist()} - {"constant"}):
                members = torch.tensor(names == name, device=steps.device)
                self.schedules[key][SCHEDULES[name]] = members

    def begin(self, epoch: int) -> None:
        """Set the count of finished steps to the start of an epoch."""
        torch.mul(self.steps, epoch, out=self.done)

    def factor(self, key: str = "schedule") -> Tensor:
        """Return the current factor of each member's schedule, (F, C).

        ``key`` is the hyperparameter that names the schedule. By default it is the schedule of the
        learning rate.
        """
        factor = torch.ones_like(self.done)
        for schedule, members in self.schedules[key].items():
            factor = torch.where(members, schedule(self.done, self.total), factor)
        return factor

    def advance(self, keep: Tensor | None) -> None:
        """Count one step of the members with 1 in ``keep`` (F, C), or of all members if None."""
        self.done.add_(1.0 if keep is None else keep)

    def table(self, configs: Sequence[Config], key: str) -> Tensor:
        """Return a table (F, C) with each member's value of one hyperparameter, in double
        precision."""
        return self.per_trial([number_of(config, key) for config in configs])

    def per_trial(self, numbers: Sequence[float]) -> Tensor:
        """Expand one value per trial to a table of all members, (F, C), in double precision."""
        values = torch.tensor(numbers, dtype=torch.float64)
        return values.expand(self.steps.shape).contiguous().to(self.steps.device)


class Optimizer:
    """Base class of the optimizers of a chunk.

    The optimizer changes the parameters in place and holds all optimizer state. A subclass
    implements the step of its update rule. ``steps`` (F, C) is the number of steps of each member
    in an epoch. A schedule runs over ``horizon`` epochs.
    """

    def __init__(
        self,
        configs: Sequence[Config],
        blocks: Blocks,
        flat: Tensor,
        *,
        steps: Tensor,
        horizon: int,
    ) -> None:
        self.horizon = horizon
        self.optimizer = configs[0]["optimizer"]
        moments = n_moments(self.optimizer, (config["momentum"] for config in configs))
        self.moments = [torch.zeros_like(flat) for _ in range(moments)]
        averages = any(number_of(config, "ema") for config in configs)
        self.average = torch.zeros_like(flat) if averages else None
        self._set_trials(configs, blocks, flat, steps)

    def _set_trials(
        self, configs: Sequence[Config], blocks: Blocks, flat: Tensor, steps: Tensor
    ) -> None:
        """Compute everything that depends on the trials of the chunk, except the moments."""
        self.blocks = blocks
        self.dtype = flat.dtype
        self.clock = Clock(configs, steps, self.horizon)
        clips = any(number_of(config, "clip_norm") < math.inf for config in configs)
        self.clip_norm = self.clock.table(configs, "clip_norm") if clips else None
        self.squares = torch.empty_like(flat) if clips else None
        self.ema = self.clock.table(configs, "ema")

    def _buffers(self) -> list[Tensor]:
        """Return the flat buffers that the update rule keeps between steps."""
        return self.moments

    def state(self) -> list[Tensor]:
        """Return the flat buffers that a later step depends on; ``resume`` fills them again."""
        buffers = self._buffers()
        return buffers if self.average is None else [*buffers, self.average]

    def resume(self, buffers: Sequence[Tensor]) -> None:
        """Continue from the buffers that ``state`` returned."""
        for buffer, stored in zip(self.state(), buffers, strict=True):
            buffer.copy_(stored)

    def select(
        self,
        configs: Sequence[Config],
        blocks: Blocks,
        keep: Tensor,
        flat: Tensor,
        *,
        steps: Tensor,
    ) -> None:
        """Keep only the trials at the positions ``keep``.

        The other arguments describe the remaining trials.
        """
        self.moments = [self.blocks.select(moment, keep) for moment in self.moments]
        self.average = None if self.average is None else self.blocks.select(self.average, keep)
        self._set_trials(configs, blocks, flat, steps)

    def prepare(self) -> None:
        """Prepare for steps that will be recorded and replayed. By default nothing is needed."""

    def begin(self, epoch: int) -> None:
        """Start an epoch: count from its first step."""
        self.clock.begin(epoch)

    def step(self, theta: Tensor, grad: Tensor, active: Tensor | None = None) -> None:
        """Take one step of the members that are ``active`` (F, C), or of all members if it is None.

        ``grad`` is overwritten: its values after the step have no meaning. The host does not wait
        for the device.
        """
        if self.clip_norm is not None and self.squares is not None:
            norm = self.blocks.total(torch.mul(grad, grad, out=self.squares)).double().sqrt()
            scale = (self.clip_norm / (norm + NORM_EPS)).clamp(max=1.0)
            scale = scale.masked_fill(self.clip_norm == math.inf, 1.0).to(self.dtype)
            for value, part in self.blocks.by_block(scale, grad):
                part.mul_(value)
        first = None if self.average is None else self.clock.done == 0
        keep = None if active is None else active.double()
        self._take(theta, grad, active, keep)
        self.clock.advance(keep)
        if self.average is not None and first is not None:
            # After a member's first step, its average equals its weights.
            share = (1 - self.ema).masked_fill(first, 1.0)
            share = share if active is None else share * active
            self.blocks.lerp_(self.average, self._evaluate(theta), share.to(self.dtype))

    def _take(
        self, theta: Tensor, grad: Tensor, active: Tensor | None, keep: Tensor | None
    ) -> None:
        """Take the step of the update rule. ``keep`` is ``active`` in double precision."""
        raise NotImplementedError

    def scored(self, theta: Tensor) -> Tensor:
        """Return the weights to score and save: the average if there is one, otherwise the weights
        themselves.
        """
        return self._evaluate(theta) if self.average is None else self.average

    def _evaluate(self, theta: Tensor) -> Tensor:
        """Return the weights to evaluate: the average of schedule-free training, otherwise
        ``theta``.
        """
        if self.optimizer == "schedulefree":
            return schedule_free_average(theta, self.moments[0])
        return theta

    def _move(self, flat: Tensor, end: Tensor, weight: float, on: Tensor | None) -> None:
        """Move ``flat`` by the fraction ``weight`` towards ``end``, in place. Only members with
        1 in ``on`` (F, C) move, or all members if it is None."""
        if on is None:
            flat.lerp_(end, weight)
        else:
            self.blocks.lerp_(flat, end, on * weight)


class OnlineUpdate(Optimizer):
    """The optimizer of one chunk in which each member adapts its learning rate.

    ``rate`` (F, C) is on the device. In every step, a member's rate changes according to the
    current gradient g and the direction u of the member's last step. The rules are the same as in
    ``gputune.optim``; the docstrings of its classes describe their use and limits. The factor of a
    schedule scales the rate within a step, but does not change the stored rate.
    """

    def __init__(
        self,
        configs: Sequence[Config],
        blocks: Blocks,
        flat: Tensor,
        *,
        steps: Tensor,
        horizon: int,
    ) -> None:
        super().__init__(configs, blocks, flat, steps=steps, horizon=horizon)
        self.rule = configs[0]["hypergrad_rule"]
        self.last = torch.zeros_like(flat)  # each member's direction u of its last step
        self.rate = self.clock.table(configs, "lr").to(self.dtype)
        self.norm = torch.zeros_like(self.rate)  # |g| of each member's last step

    def _set_trials(
        self, configs: Sequence[Config], blocks: Blocks, flat: Tensor, steps: Tensor
    ) -> None:
        super()._set_trials(configs, blocks, flat, steps)
        self.scratch = torch.empty_like(flat)
        self.decays = any(config["weight_decay"] for config in configs)
        self.hypergrad_lr = self.clock.table(configs, "hypergrad_lr").to(self.dtype)
        self.decay = self.clock.table(configs, "weight_decay").to(self.dtype)
        self.mu = self.clock.table(configs, "momentum").to(self.dtype)

    def _buffers(self) -> list[Tensor]:
        """Return the flat buffers that the update rule keeps. The last two hold each member's
        rate and gradient norm |g|."""
        return [
            *self.moments,
            self.last,
            self.blocks.expand(self.rate),
            self.blocks.expand(self.norm),
        ]

    def resume(self, buffers: Sequence[Tensor]) -> None:
        super().resume(buffers)
        rate, norm = buffers[len(self.moments) + 1 :][:2]
        self.rate.copy_(self.blocks.first(rate))
        self.norm.copy_(self.blocks.first(norm))

    def select(
        self,
        configs: Sequence[Config],
        blocks: Blocks,
        keep: Tensor,
        flat: Tensor,
        *,
        steps: Tensor,
    ) -> None:
        self.last = self.blocks.select(self.last, keep)
        self.rate = self.rate[:, keep]
        self.norm = self.norm[:, keep]
        super().select(configs, blocks, keep, flat, steps=steps)

    def _take(
        self, theta: Tensor, grad: Tensor, active: Tensor | None, keep: Tensor | None
    ) -> None:
        on = None if keep is None else keep.to(self.dtype)
        if self.optimizer != "adamwhd":
            self._decay(grad, theta)
        self._adapt(grad, on)
        if len(self.moments) == 2:
            direction = self._adam_direction(theta, grad, on)
        else:
            direction = self._sgd_direction(grad, on)
        scale = self.clock.factor() if keep is None else self.clock.factor() * keep
        self.blocks.add_product_(theta, direction, -self.rate * scale.to(self.dtype))
        self._move(self.last, direction, 1.0, on)

    def _decay(self, total: Tensor, theta: Tensor) -> None:
        """Add weight decay times the parameters to a buffer."""
        if self.decays:
            self.blocks.add_product_(total, theta, self.decay)

    def _adapt(self, grad: Tensor, on: Tensor | None) -> None:
        """Change each member's rate by its rule.

        A rate does not change if the rule has no finite result, for example if a norm is zero.
        """
        h = self._dot(grad, self.last)
        norm = self._dot(grad, grad).sqrt()
        direction_norm = self._dot(self.last, self.last).sqrt()
        change = h
        if self.rule == "multiplicative":
            change = h / (norm * direction_norm) * self.rate
        elif self.rule == "normalized":
            change = h / (self.norm * direction_norm)
        change = self.hypergrad_lr * torch.where(change.isfinite(), change, 0.0)
        if on is not None:
            change = change * on
            norm = torch.where(on > 0, norm, self.norm)
        self.rate.add_(change).clamp_min_(0.0)
        self.norm.copy_(norm)

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the inner product of each member's parts of two buffers, (F, C)."""
        return self.blocks.total(torch.mul(a, b, out=self.scratch))

    def _adam_direction(self, theta: Tensor, grad: Tensor, on: Tensor | None) -> Tensor:
        """Return the direction of Adam's step, and update the moments."""
        m, v = self.moments
        self._move(m, grad, 1 - BETA1, on)
        self._move(v, grad.mul_(grad), 1 - BETA2, on)
        # Direction: m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps). Both corrections are computed
        # per member and applied to the denominator.
        count = self.clock.done + 1
        start = 1 - BETA1**count
        denominator = torch.sqrt(v, out=self.scratch)
        correction = (start / (1 - BETA2**count).sqrt()).to(self.dtype)
        for scale, part in self.blocks.by_block(correction, denominator):
            part.mul_(scale)
        for eps, part in self.blocks.by_block((EPS * start).to(self.dtype), denominator):
            part.add_(eps)
        direction = torch.div(m, denominator, out=denominator)
        if self.optimizer == "adamwhd":
            self._decay(direction, theta)
        return direction

    def _sgd_direction(self, grad: Tensor, on: Tensor | None) -> Tensor:
        """Return the direction of gradient descent with momentum, and update the buffer."""
        if not self.moments:
            return grad
        (buffer,) = self.moments
        ahead = self.scratch.copy_(grad)
        self.blocks.add_product_(ahead, buffer, self.mu)  # mu b + g
        self._move(buffer, ahead, 1.0, on)
        if self.optimizer == "nesterovhd":
            self.blocks.add_product_(grad, ahead, self.mu)
            return grad
        return ahead
