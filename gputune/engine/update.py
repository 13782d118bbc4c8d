"""The update rules of ``optim.py`` in place, over the flat buffers of a chunk.

A hyperparameter is a float where all members agree, otherwise a flat buffer with each member's value at its
entries: one pass over the state either way. Members without a step now (``active`` false) keep their
parameters and their moments.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gputune.engine.blocks import Blocks
from gputune.engine.rules import BETA1, BETA2, EPS, n_moments

# Entries from which torch's fused Adam beats nine passes: 1.2 times the speed of training at width 256, 1.5 at 1024.
_FUSED_PAYS = 100_000

Array = np.ndarray
Amount = float | Tensor


@dataclass(frozen=True)
class Hyper:
    """Hyperparameters of the members, each (F, C), on the host; they stay as they are through the training."""

    lr: Array
    weight_decay: Array
    momentum: Array


class Update:
    """The optimizer of one chunk: owns the moments, changes parameters in place."""

    def __init__(self, optimizer: str, blocks: Blocks, hyper: Hyper, flat: Tensor) -> None:
        self.optimizer, self.blocks, self.hyper = optimizer, blocks, hyper
        self.like = flat
        self.moments = [torch.zeros_like(flat) for _ in range(n_moments(optimizer, hyper.momentum.flat))]
        self.scratch = torch.empty_like(flat) if optimizer in ("adam", "adamw") else None
        self._settle()

    def _settle(self) -> None:
        h = self.hyper
        decoupled = self.optimizer == "adamw"
        pays = self.scratch is not None and self.like.numel() >= _FUSED_PAYS
        self.fused = _Fused(self.optimizer, self.like, self.moments) if pays else None
        self.lr = self.amount(h.lr)
        self.shrink = self.amount(h.lr * h.weight_decay) if decoupled else 0.0
        self.l2 = 0.0 if decoupled else self.amount(h.weight_decay)
        self.momentum = self.amount(h.momentum) if self.optimizer in ("sgd", "nesterov") else 0.0

    def amount(self, values: Array) -> Amount:
        """Return a float where all members have one value, otherwise the expanded buffer."""
        first = float(values.flat[0])
        if (values == first).all():
            return self._held(first)
        return self.blocks.expand(torch.as_tensor(values, dtype=self.like.dtype).to(self.like.device))

    def _held(self, value: float) -> float:
        """The value, held to what the dtype can say: a larger one makes members diverge all the same."""
        largest = torch.finfo(self.like.dtype).max
        return min(max(value, -largest), largest)

    def state(self) -> list[Tensor]:
        """Return the flat buffers that a later step depends on, to be filled again by ``resume``."""
        return self.moments

    def resume(self, buffers: list[Tensor]) -> None:
        """Go on from what ``state`` returned."""
        for moment, kept in zip(self.moments, buffers, strict=True):
            moment.copy_(kept)

    def select(self, blocks: Blocks, keep: Tensor, flat: Tensor) -> None:
        """Go on with the trials ``keep`` alone; ``flat`` is their parameter buffer, ``blocks`` its blocks."""
        host = keep.cpu().numpy()
        self.moments = [self.blocks.select(moment, keep) for moment in self.moments]
        self.hyper = Hyper(
            *(v[:, host] for v in (self.hyper.lr, self.hyper.weight_decay, self.hyper.momentum))
        )
        self.blocks, self.like = blocks, flat
        self.scratch = None if self.scratch is None else torch.empty_like(flat)
        self._settle()

    def step(self, theta: Tensor, grad: Tensor, *, count: Array, factor: Array, active: Array | None) -> None:
        """Take one step: ``count`` (F, C) numbers each member's step from 1, ``factor`` scales its lr.

        ``grad`` is used up: what it holds afterwards means nothing.
        """
        keep = None if active is None else self.amount(active.astype(float))
        if isinstance(keep, float):
            keep = None
        if self.fused is not None and keep is None and self._alike(count, factor):
            decay, lr = float(self.hyper.weight_decay.flat[0]), float(self.hyper.lr.flat[0] * factor.flat[0])
            self.fused.step(theta, grad, lr=self._held(lr), weight_decay=decay, count=float(count.flat[0]))
        elif self.optimizer in ("adam", "adamw"):
            self._adam(theta, grad, count, factor, active, keep)
        else:
            self._sgd(theta, grad, factor, active, keep)

    def _alike(self, count: Array, factor: Array) -> bool:
        """Whether one step with one set of numbers serves all members."""
        tables = (self.hyper.lr, self.hyper.weight_decay, count, factor)
        return all(bool((table == table.flat[0]).all()) for table in tables)

    def _adam(
        self,
        theta: Tensor,
        grad: Tensor,
        count: Array,
        factor: Array,
        active: Array | None,
        keep: Tensor | None,
    ) -> None:
        (m, v), scratch = self.moments, self.scratch
        assert scratch is not None
        _add_product_(grad, theta, self.l2)
        if keep is None:
            m.lerp_(grad, 1 - BETA1)
            v.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
        else:
            m.lerp_(grad, keep * (1 - BETA1))
            v.lerp_(grad.mul_(grad), keep * (1 - BETA2))
        # lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps), with the corrections moved out of the long pass
        root = np.sqrt(1 - BETA2**count)
        torch.sqrt(v, out=scratch)
        scratch.add_(self.amount(EPS * root))
        torch.div(m, scratch, out=scratch)
        self._descend(theta, theta, self.shrink, self.hyper.lr * self.hyper.weight_decay, factor, active)
        self._descend(theta, scratch, self.lr, self.hyper.lr, factor * root / (1 - BETA1**count), active)

    def _sgd(
        self, theta: Tensor, grad: Tensor, factor: Array, active: Array | None, keep: Tensor | None
    ) -> None:
        _add_product_(grad, theta, self.l2)
        if keep is not None:
            grad.mul_(keep)
        direction = grad
        if self.moments:
            (buffer,) = self.moments
            mu = self.momentum
            buffer.mul_(mu if keep is None else 1 + keep * (mu - 1)).add_(grad)
            direction = buffer
            if self.optimizer == "nesterov":
                direction = _add_product_(grad, buffer, mu)
        self._descend(theta, direction, self.lr, self.hyper.lr, factor, active)

    def _descend(
        self,
        theta: Tensor,
        direction: Tensor,
        rate: Amount,
        values: Array,
        factor: Array,
        active: Array | None,
    ) -> None:
        """theta -= rate * factor * direction, for active members; ``values`` is rate before its expansion."""
        if isinstance(rate, float) and rate == 0.0:
            return
        first = float(factor.flat[0])
        if active is not None or (factor != first).any():
            rate = self.amount(values * factor * (1.0 if active is None else active))
            first = 1.0
        if isinstance(rate, float):
            theta.sub_(direction, alpha=self._held(rate * first))
        else:
            theta.addcmul_(direction, rate, value=-first)


class _Fused:
    """torch's own fused Adam over the flat buffers, for members that are all alike: one pass instead of nine.

    A chunk of one trial is such a case, which is how wide networks train on a CPU: there the update was most of a
    step. The moments are the caller's, so that a step may be taken by either form.
    """

    def __init__(self, optimizer: str, theta: Tensor, moments: list[Tensor]) -> None:
        rule = torch.optim.AdamW if optimizer == "adamw" else torch.optim.Adam
        self.optimizer = rule([theta], lr=1.0, betas=(BETA1, BETA2), eps=EPS, fused=True)
        self.count = torch.zeros((), dtype=torch.float32, device=theta.device)
        self.optimizer.state[theta] = {"step": self.count, "exp_avg": moments[0], "exp_avg_sq": moments[1]}

    def step(self, theta: Tensor, grad: Tensor, *, lr: float, weight_decay: float, count: float) -> None:
        """Take step number ``count``, from 1."""
        group = self.optimizer.param_groups[0]
        group["lr"], group["weight_decay"] = lr, weight_decay
        self.count.fill_(count - 1)
        theta.grad = grad
        self.optimizer.step()
        theta.grad = None


def _add_product_(total: Tensor, tensor: Tensor, amount: Amount) -> Tensor:
    """total += amount * tensor, in place."""
    if isinstance(amount, Tensor):
        return total.addcmul_(tensor, amount)
    return total if amount == 0.0 else total.add_(tensor, alpha=amount)


def schedule_factor(name: str, done: Array, total: Array) -> Array:
    """Return the factor on lr of a step after ``done`` of ``total`` steps: 1, or half a cosine from 1 to 0.

    Source of the cosine: Loshchilov and Hutter (2017), without restarts, per step.
    """
    if name == "cosine":
        return np.asarray(0.5 * (1 + np.cos(math.pi * done / total)))
    return np.ones_like(done, dtype=float)
