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

from gputune.ground.types import DEFAULTS, Config
from gputune.optimizers.blocks import Blocks
from gputune.optimizers.classes import NORM_EPS
from gputune.optimizers.rules import SCHEDULES, Schedule, n_moments, schedule_free_average


def number_of(config: Config, key: str) -> float:
    """Return a numeric hyperparameter of a configuration, or its default if the key is missing."""
    return float(config[key] if key in config else DEFAULTS[key])


class Clock:
    """Counts the training steps of each member and computes the factors of the schedules.

    A schedule runs over ``horizon`` epochs of ``steps`` (F folds, C trials) steps each. ``done``
    (F, C) is the member's position in its schedule: its finished epochs and steps, in steps at its
    present batch size. A member whose batch size has changed has taken another number of steps.
    ``shift`` (F, C) is the difference: ``done + shift`` is the index of the next step, starting at
    1.
    """

    def __init__(self, configs: Sequence[Config], steps: Tensor, horizon: int) -> None:
        self.steps = steps
        self.done = torch.zeros_like(steps, dtype=torch.float64)
        self.shift = torch.ones_like(self.done)
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
        """Set the step counter of each member (one trial on one fold) at the start of an epoch.

        ``epoch`` is the count of finished epochs. The counter becomes the number of steps that the
        member takes in these epochs.
        """
        torch.mul(self.steps, epoch, out=self.done)

    def set_lag(self, lag: np.ndarray) -> None:
        """Set how many steps each member would have taken more at its present batch size, (F folds,
        C trials)."""
        self.shift.copy_(torch.from_numpy(1.0 - lag))

    def count(self) -> Tensor:
        """Return the index of each member's next step, starting at 1, (F folds, C trials)."""
        return self.done + self.shift

    def factor(self, key: str = "schedule") -> Tensor:
        """Return the factor by which each member's schedule currently scales a rate.

        The factors are (F folds, C trials). ``key`` is the hyperparameter that names the schedule.
        By default it is the schedule of the learning rate.
        """
        factor = torch.ones_like(self.done)
        for schedule, members in self.schedules[key].items():
            factor = torch.where(members, schedule(self.done, self.total), factor)
        return factor

    def advance(self, active: Tensor | None) -> None:
        """Add one to the step counters of the members with 1 in ``active`` (F folds, C trials).

        If ``active`` is None, the function adds one to all counters.
        """
        self.done.add_(1.0 if active is None else active)

    def table(self, configs: Sequence[Config], key: str) -> Tensor:
        """Return each member's value of one hyperparameter, (F folds, C trials), in double
        precision."""
        return self.per_trial([number_of(config, key) for config in configs])

    def per_trial(self, numbers: Sequence[float]) -> Tensor:
        """Repeat one value per trial for all folds, (F folds, C trials), in double precision."""
        values = torch.tensor(numbers, dtype=torch.float64)
        return values.expand(self.steps.shape).contiguous().to(self.steps.device)


class Optimizer:
    """Base class of the optimizer for trials that train together (a chunk).

    The optimizer changes the parameters in place and holds all optimizer state. A subclass
    implements the step of its update rule. ``steps`` (F folds, C trials) is the number of steps of
    each member in an epoch. A schedule runs over ``horizon`` epochs.
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
        self._set_trials(configs, blocks, flat, steps)
        self._start(configs, flat)

    def _start(self, configs: Sequence[Config], flat: Tensor) -> None:
        """Create the initial optimizer state (moments and averages)."""
        moments = n_moments(self.optimizer, (config["momentum"] for config in configs))
        self.moments = [torch.zeros_like(flat) for _ in range(moments)]
        averages = any(number_of(config, "ema") for config in configs)
        self.average = torch.zeros_like(flat) if averages else None

    def _set_trials(
        self, configs: Sequence[Config], blocks: Blocks, flat: Tensor, steps: Tensor
    ) -> None:
        """Compute all values that depend on the chunk's trials, except the optimizer state."""
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
        """Return the flat buffers of optimizer state that a later step depends on. ``resume`` fills
        them again."""
        buffers = self._buffers()
        return buffers if self.average is None else [*buffers, self.average]

    def resume(self, buffers: Sequence[Tensor]) -> None:
        """Restore the optimizer's state from the flat buffers that ``state`` returned."""
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
        """Keep the optimizer state of only the trials at the positions ``keep``, which may repeat.

        The other arguments describe these trials. Their configurations may be new.
        """
        self._select_state(keep)
        self._set_trials(configs, blocks, flat, steps)

    def _select_state(self, keep: Tensor) -> None:
        """Drop the moments and averages of all trials except the trials at the positions
        ``keep``."""
        self.moments = [self.blocks.select(moment, keep) for moment in self.moments]
        self.average = None if self.average is None else self.blocks.select(self.average, keep)

    def prepare(self) -> None:
        """Prepare the optimizer for steps that are recorded and replayed. By default, this does
        nothing."""

    def begin(self, epoch: int) -> None:
        """Start an epoch: set the step counters to the epoch's first step."""
        self.clock.begin(epoch)

    def step(self, theta: Tensor, grad: Tensor, active: Tensor | None = None) -> None:
        """Take one optimizer step of the members that are active.

        ``active`` (F folds, C trials) is None if all members take the step. ``grad`` is
        overwritten: its values after the step have no meaning. Python does not wait for the device.
        """
        if self.clip_norm is not None and self.squares is not None:
            norm = self.blocks.total(torch.mul(grad, grad, out=self.squares)).double().sqrt()
            scale = (self.clip_norm / (norm + NORM_EPS)).clamp(max=1.0)
            scale = scale.masked_fill(self.clip_norm == math.inf, 1.0).to(self.dtype)
            for value, part in self.blocks.by_block(scale, grad):
                part.mul_(value)
        first = None if self.average is None else self.clock.count() == 1
        # From here on, 1 for a member that takes the step and 0 for the others.
        active = None if active is None else active.double()
        self._take(theta, grad, active)
        self.clock.advance(active)
        if self.average is not None and first is not None:
            # After a member's first step, its average equals its weights.
            share = (1 - self.ema).masked_fill(first, 1.0)
            share = share if active is None else share * active
            self.blocks.lerp_(self.average, self._evaluate(theta), share.to(self.dtype))

    def _take(self, theta: Tensor, grad: Tensor, active: Tensor | None) -> None:
        """Take a step of the update rule, for members with 1 in ``active`` (F folds, C trials)."""
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
