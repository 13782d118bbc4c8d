"""The optimizer of a chunk: a gradient is clipped, a rule takes its step, the weights are averaged.

Clipping (``clip_norm``) and averaging (``ema``) are each member's own, and nothing where no member asks for them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gputune.optimizers.blocks import Blocks
from gputune.optimizers.online import OnlineUpdate
from gputune.optimizers.row_update import NORM_EPS
from gputune.optimizers.rules import schedule_free_average
from gputune.optimizers.update import Update
from gputune.optimizers.update_kernel import UpdateKernel, make_kernel
from gputune.types import ONLINE, Config


class Optimizer:
    """What changes the parameters of one chunk in place, and holds all state of it."""

    def __init__(
        self, configs: Sequence[Config], blocks: Blocks, flat: Tensor, *, steps: Tensor, horizon: int
    ) -> None:
        make = OnlineUpdate if configs[0]["optimizer"] in ONLINE else Update
        self.update: Update | OnlineUpdate = make(configs, blocks, flat, steps=steps, horizon=horizon)
        self.average = torch.zeros_like(flat) if any(config["ema"] for config in configs) else None
        self._set_trials(configs, blocks, flat)

    def _set_trials(self, configs: Sequence[Config], blocks: Blocks, flat: Tensor) -> None:
        self.blocks, self.dtype, clock = blocks, flat.dtype, self.update.clock
        clips = any(config["clip_norm"] < math.inf for config in configs)
        self.clip_norm = clock.table(configs, "clip_norm") if clips else None
        self.squares = torch.empty_like(flat) if clips else None
        self.ema = clock.table(configs, "ema")
        self.kernel: UpdateKernel | None = None

    def state(self) -> list[Tensor]:
        """Return the flat buffers that a later step depends on, to be filled again by ``resume``."""
        return [*self.update.state(), *([] if self.average is None else [self.average])]

    def resume(self, buffers: Sequence[Tensor]) -> None:
        """Go on from what ``state`` returned."""
        if self.average is not None:
            *buffers, average = buffers
            self.average.copy_(average)
        self.update.resume(buffers)

    def select(
        self, configs: Sequence[Config], blocks: Blocks, keep: Tensor, flat: Tensor, *, steps: Tensor
    ) -> None:
        """Go on with the trials ``keep`` alone, of which all else is given."""
        if self.average is not None:
            self.average = self.blocks.select(self.average, keep)
        self.update.select(configs, blocks, keep, flat, steps=steps)
        self._set_trials(configs, blocks, flat)

    def prepare(self) -> None:
        """Make ready for steps that are recorded: on a GPU kernels take the place of the operations that are here."""
        if isinstance(self.update, Update):
            ema = None if self.average is None else self.ema
            self.kernel = make_kernel(self.update, clip_norm=self.clip_norm, ema=ema)

    def begin(self, epoch: int) -> None:
        """Count from the first step of an epoch."""
        self.update.begin(epoch)
        if self.kernel is not None:
            self.kernel.begin(epoch)

    def step(self, theta: Tensor, grad: Tensor, active: Tensor | None = None) -> None:
        """Take one step of the members that are ``active`` (F, C), None: of all. ``grad`` is used up."""
        # Only where it is recorded: a step as it is then checks the kernels, before the first replay.
        if self.kernel is not None and torch.cuda.is_current_stream_capturing():
            assert isinstance(self.update, Update)
            self.kernel.step(theta, grad, self.update, average=self.average, active=active)
            return
        self._clip(grad)
        first = None if self.average is None else self.update.clock.done == 0
        self.update.step(theta, grad, active)
        if self.average is not None and first is not None:
            share = (1 - self.ema).masked_fill(first, 1.0)  # the first weights are the average of themselves
            share = share if active is None else share * active
            self.blocks.lerp_(self.average, self._evaluated(theta), share.to(self.dtype))

    def _clip(self, grad: Tensor) -> None:
        if self.clip_norm is None or self.squares is None:
            return
        norm = self.blocks.total(torch.mul(grad, grad, out=self.squares)).double().sqrt()
        scale = (self.clip_norm / (norm + NORM_EPS)).clamp(max=1.0)
        scale = scale.masked_fill(self.clip_norm == math.inf, 1.0).to(self.dtype)
        for value, part in self.blocks.by_block(scale, grad):
            part.mul_(value)

    def scored(self, theta: Tensor) -> Tensor:
        """Return the weights that are scored and saved: an average where there is one, else ``theta`` itself."""
        return self._evaluated(theta) if self.average is None else self.average

    def _evaluated(self, theta: Tensor) -> Tensor:
        if isinstance(self.update, Update) and self.update.optimizer == "schedulefree":
            return schedule_free_average(theta, self.update.moments[0])
        return theta
