"""The update rules in place, over the flat buffers of a chunk, with a learning rate that each member adapts.

Every step of a member moves its rate by what its gradient g now and the direction u of its last step say: the rules of
``gputune.optim``, whose classes say what they are and what they are not.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gputune.engine.blocks import Blocks
from gputune.engine.rules import BETA1, BETA2, EPS, n_moments
from gputune.engine.update import Amount, Array, Hyper


@dataclass(frozen=True)
class OnlineHyper(Hyper):
    """Hyperparameters of the members, each (F, C), on the host; ``lr`` is where the rates begin."""

    hypergrad_lr: Array


class OnlineUpdate:
    """The optimizer of one chunk, as ``Update`` is; ``rate`` (F, C) holds the members' rates, on the device."""

    def __init__(
        self,
        optimizer: str,
        blocks: Blocks,
        hyper: OnlineHyper,
        flat: Tensor,
        *,
        rule: str = "multiplicative",
    ) -> None:
        self.optimizer, self.blocks, self.like, self.rule = optimizer, blocks, flat, rule
        self.moments = [torch.zeros_like(flat) for _ in range(n_moments(optimizer, hyper.momentum.flat))]
        self.last = torch.zeros_like(flat)  # each member's direction u of its last step
        self.scratch = torch.empty_like(flat)
        self.decays = bool(hyper.weight_decay.any())
        tables = (hyper.lr, hyper.hypergrad_lr, hyper.weight_decay, hyper.momentum)
        self.rate, self.hypergrad_lr, self.decay, self.momentum = map(self._table, tables)
        self.norm = torch.zeros_like(self.rate)  # |g| of each member's last step

    def _table(self, values: Array) -> Tensor:
        return torch.as_tensor(values, dtype=self.like.dtype).to(self.like.device)

    def _amount(self, values: Array) -> Amount:
        """Return a float where all members have one value, otherwise the expanded buffer."""
        first = float(values.flat[0])
        return first if (values == first).all() else self.blocks.expand(self._table(values))

    def state(self) -> list[Tensor]:
        """Return the flat buffers that a later step depends on, for ``resume``; the last two have the rate and |g|."""
        return [*self.moments, self.last, self.blocks.expand(self.rate), self.blocks.expand(self.norm)]

    def resume(self, buffers: list[Tensor]) -> None:
        """Go on from what ``state`` returned."""
        *flats, rate, norm = buffers
        for buffer, kept in zip([*self.moments, self.last], flats, strict=True):
            buffer.copy_(kept)
        self.rate, self.norm = self.blocks.first(rate), self.blocks.first(norm)

    def select(self, blocks: Blocks, keep: Tensor, flat: Tensor) -> None:
        """Go on with the trials ``keep`` alone; ``flat`` is their parameter buffer, ``blocks`` its blocks."""
        self.moments = [self.blocks.select(moment, keep) for moment in self.moments]
        self.last = self.blocks.select(self.last, keep)
        self.blocks, self.like, self.scratch = blocks, flat, torch.empty_like(flat)
        tables = (self.rate, self.hypergrad_lr, self.decay, self.momentum, self.norm)
        self.rate, self.hypergrad_lr, self.decay, self.momentum, self.norm = (t[:, keep] for t in tables)

    def step(self, theta: Tensor, grad: Tensor, *, count: Array, factor: Array, active: Array | None) -> None:
        """Adapt the rates and take one step: ``count`` (F, C) numbers each member's step from 1.

        ``factor`` scales the rate in this step and is not remembered. ``grad`` is used up. Members that are not
        ``active`` keep their parameters, moments, direction and rate. Nothing waits for the device.
        """
        on = np.ones_like(factor) if active is None else active.astype(float)
        keep = self._amount(on)
        if self.optimizer != "adamwhd":
            self._decay(grad, theta)
        self._adapt(grad, None if isinstance(keep, float) else self._table(on))
        if len(self.moments) == 2:
            direction = self._adam(theta, grad, count, keep)
        else:
            direction = self._sgd(grad, keep)
        scale = factor * on
        rate = self.rate if (scale == 1).all() else self.rate * self._table(scale)
        self.blocks.add_product_(theta, direction, -rate)
        self.last.lerp_(direction, keep)

    def _decay(self, total: Tensor, theta: Tensor) -> None:
        if self.decays:
            self.blocks.add_product_(total, theta, self.decay)

    def _adapt(self, grad: Tensor, on: Tensor | None) -> None:
        """Move each rate by its rule, or not at all where that says nothing (a norm of zero)."""
        pairs = ((grad, self.last), (grad, grad), (self.last, self.last))
        h, gg, uu = (self.blocks.total(torch.mul(a, b, out=self.scratch)) for a, b in pairs)
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
        self.rate, self.norm = (self.rate + change).clamp_min(0.0), norm

    def _adam(self, theta: Tensor, grad: Tensor, count: Array, keep: Amount) -> Tensor:
        (m, v), below = self.moments, self.scratch
        m.lerp_(grad, keep * (1 - BETA1))
        v.lerp_(grad.mul_(grad), keep * (1 - BETA2))
        # m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
        start = 1 - BETA1**count
        torch.sqrt(v, out=below).mul_(self._amount(start / np.sqrt(1 - BETA2**count)))
        direction = torch.div(m, below.add_(self._amount(EPS * start)), out=below)
        if self.optimizer == "adamwhd":
            self._decay(direction, theta)
        return direction

    def _sgd(self, grad: Tensor, keep: Amount) -> Tensor:
        if not self.moments:
            return grad
        (buffer,) = self.moments
        ahead = self.scratch.copy_(grad)
        self.blocks.add_product_(ahead, buffer, self.momentum)  # mu b + g
        buffer.lerp_(ahead, keep)
        if self.optimizer == "nesterovhd":
            self.blocks.add_product_(grad, ahead, self.momentum)
            return grad
        return ahead
