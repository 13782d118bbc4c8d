"""The update rules in place, over the flat buffers of a chunk, with a learning rate that each member adapts.

Every step of a member moves its rate by what its gradient g now and the direction u of its last step say: the rules of
``gputune.optim``, whose classes say what they are and what they are not.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gputune.optimizers.blocks import Blocks
from gputune.optimizers.rules import BETA1, BETA2, EPS
from gputune.optimizers.update import Clock, Update
from gputune.types import Config


class OnlineUpdate(Update):
    """The optimizer of one chunk, as ``Update`` is; ``rate`` (F, C) holds the members' rates, on the device."""

    def __init__(self, configs: Sequence[Config], blocks: Blocks, flat: Tensor, *, steps: Tensor, horizon: int) -> None:
        super().__init__(configs, blocks, flat, steps=steps, horizon=horizon)
        self.rule = configs[0]["hypergrad_rule"]
        self.last = torch.zeros_like(flat)  # each member's direction u of its last step
        self.rate = self._table(configs, "lr")
        self.norm = torch.zeros_like(self.rate)  # |g| of each member's last step

    def _set_trials(self, configs: Sequence[Config], blocks: Blocks, flat: Tensor, steps: Tensor) -> None:
        self.blocks, self.dtype, self.room = blocks, flat.dtype, torch.empty_like(flat)
        self.clock = Clock(configs, steps, self.horizon)
        self.decays = any(config["weight_decay"] for config in configs)
        names = ("hypergrad_lr", "weight_decay", "momentum")
        self.hypergrad_lr, self.decay, self.mu = (self._table(configs, name) for name in names)

    def _table(self, configs: Sequence[Config], key: str) -> Tensor:
        return self.clock.table(configs, key).to(self.dtype)

    def state(self) -> list[Tensor]:
        """Return the flat buffers that a later step depends on, for ``resume``; the last two have the rate and |g|."""
        return [*self.moments, self.last, self.blocks.expand(self.rate), self.blocks.expand(self.norm)]

    def resume(self, buffers: Sequence[Tensor]) -> None:
        *flats, rate, norm = buffers
        for buffer, kept in zip([*self.moments, self.last], flats, strict=True):
            buffer.copy_(kept)
        self.rate.copy_(self.blocks.first(rate))
        self.norm.copy_(self.blocks.first(norm))

    def select(self, configs: Sequence[Config], blocks: Blocks, keep: Tensor, flat: Tensor, *, steps: Tensor) -> None:
        self.last = self.blocks.select(self.last, keep)
        self.rate, self.norm = self.rate[:, keep], self.norm[:, keep]
        super().select(configs, blocks, keep, flat, steps=steps)

    def step(self, theta: Tensor, grad: Tensor, active: Tensor | None = None) -> None:
        """Adapt the rates and take one step of the members that are ``active`` (F, C), None: of all.

        The factor of a schedule scales the rate in this step and is not remembered. ``grad`` is used up. Members that
        are not active keep their parameters, moments, direction and rate. Nothing waits for the device.
        """
        keep = None if active is None else active.double()
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
        self.clock.advance(keep)

    def _decay(self, total: Tensor, theta: Tensor) -> None:
        if self.decays:
            self.blocks.add_product_(total, theta, self.decay)

    def _move(self, flat: Tensor, end: Tensor, weight: float, on: Tensor | None) -> None:
        """Move a buffer by ``weight`` of the way towards another, of the members that are ``on`` (F, C)."""
        if on is None:
            flat.lerp_(end, weight)
        else:
            self.blocks.lerp_(flat, end, on * weight)

    def _adapt(self, grad: Tensor, on: Tensor | None) -> None:
        """Move each rate by its rule, or not at all where that says nothing (a norm of zero)."""
        pairs = ((grad, self.last), (grad, grad), (self.last, self.last))
        h, gg, uu = (self.blocks.total(torch.mul(a, b, out=self.room)) for a, b in pairs)
        norm = gg.sqrt()
        if self.rule == "multiplicative":
            change = h / (norm * uu.sqrt()) * self.rate
        elif self.rule == "normalized":
            change = h / (self.norm * uu.sqrt())
        else:
            change = h
        change = self.hypergrad_lr * torch.where(change.isfinite(), change, 0.0)
        if on is not None:
            change, norm = change * on, torch.where(on > 0, norm, self.norm)
        self.rate.add_(change).clamp_min_(0.0)
        self.norm.copy_(norm)

    def _adam_direction(self, theta: Tensor, grad: Tensor, on: Tensor | None) -> Tensor:
        (m, v), below = self.moments, self.room
        self._move(m, grad, 1 - BETA1, on)
        self._move(v, grad.mul_(grad), 1 - BETA2, on)
        # m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
        count = self.clock.done + 1
        start = 1 - BETA1**count
        torch.sqrt(v, out=below)
        correction = (start / (1 - BETA2**count).sqrt()).to(self.dtype)
        for scale, part in self.blocks.by_block(correction, below):
            part.mul_(scale)
        for eps, part in self.blocks.by_block((EPS * start).to(self.dtype), below):
            part.add_(eps)
        direction = torch.div(m, below, out=below)
        if self.optimizer == "adamwhd":
            self._decay(direction, theta)
        return direction

    def _sgd_direction(self, grad: Tensor, on: Tensor | None) -> Tensor:
        if not self.moments:
            return grad
        (buffer,) = self.moments
        ahead = self.room.copy_(grad)
        self.blocks.add_product_(ahead, buffer, self.mu)  # mu b + g
        self._move(buffer, ahead, 1.0, on)
        if self.optimizer == "nesterovhd":
            self.blocks.add_product_(grad, ahead, self.mu)
            return grad
        return ahead
