"""The update rules in place, over the flat buffers of a chunk: at given rates, or at rates that members adapt.

The number of a member's step and all that follows from it (the factor of a schedule, Adam's corrections) is computed by
the step itself, on the device and in double precision: a recorded step cannot be told anything. Members without a step
now (``active`` false) keep their parameters and their moments.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from gputune.optimizers.blocks import Blocks, with_axes_of
from gputune.optimizers.rules import BETA1, BETA2, EPS, MOMENTS, RULES, SCHEDULES, Rates, Schedule, n_moments
from gputune.types import DECAY_FACTOR, DEFAULTS, LR_FACTOR, Config

Amount: TypeAlias = float | Tensor
"""One value of all members, or each member's own, (F, C)."""

IN_PLACE = ("sgd", "nesterov", "adam", "adamw")
"""Rules that are written here once more, in a few passes; the others are taken as ``rules.py`` has them."""


def number_of(config: Config, key: str) -> float:
    """Return a hyperparameter, its default where the configuration is silent."""
    return float(config[key] if key in config else DEFAULTS[key])


def factor_of(config: Config, prefixes: Sequence[str], parameter: str) -> float:
    """Return the product of all keys with these prefixes whose name is a part of the parameter's path."""
    keys = {prefix + part for prefix in prefixes for part in parameter.split(".")}
    return math.prod(float(config[key]) for key in keys & config.keys())


class Clock:
    """Where the members of a chunk stand: ``done`` (F, C) steps of ``horizon`` epochs of ``steps`` (F, C) each."""

    def __init__(self, configs: Sequence[Config], steps: Tensor, horizon: int) -> None:
        self.steps = steps
        self.done = torch.zeros_like(steps, dtype=torch.float64)
        self.total = (steps * horizon).double()
        self.schedules = {
            key: self._by_schedule([config.get(key, "constant") for config in configs])
            for key in ("schedule", "weight_decay_schedule", "dropout_schedule")
        }

    def _by_schedule(self, words: Sequence[str]) -> dict[Schedule, Tensor]:
        """Return which members have which schedule, but for the constant one."""
        names, device = sorted(set(words) - {"constant"}), self.steps.device
        return {SCHEDULES[name]: torch.tensor([word == name for word in words], device=device) for name in names}

    def begin(self, epoch: int) -> None:
        """Count from the first step of an epoch."""
        torch.mul(self.steps, epoch, out=self.done)

    def factor(self, key: str = "schedule") -> Tensor:
        """Return the factor of each member's schedule, (F, C): of its rate, or what else ``key`` says."""
        factor = torch.ones_like(self.done)
        for schedule, members in self.schedules[key].items():
            factor = torch.where(members, schedule(self.done, self.total), factor)
        return factor

    def advance(self, keep: Tensor | None) -> None:
        """Count a step of the members with ``keep`` 1 (F, C), None: of all."""
        self.done.add_(1.0 if keep is None else keep)

    def table(self, configs: Sequence[Config], key: str) -> Tensor:
        """Return a hyperparameter of all members, (F, C), in double precision."""
        return self.per_trial([number_of(config, key) for config in configs])

    def per_trial(self, numbers: Sequence[float]) -> Tensor:
        """Return a number of each trial for all members, (F, C), in double precision."""
        values = torch.tensor(numbers, dtype=torch.float64)
        return values.expand(self.steps.shape).contiguous().to(self.steps.device)


class Update:
    """The optimizer of one chunk: owns the moments, changes parameters in place.

    ``steps`` (F, C) are those that the members take in an epoch, and a schedule runs over ``horizon`` epochs.
    """

    def __init__(self, configs: Sequence[Config], blocks: Blocks, flat: Tensor, *, steps: Tensor, horizon: int) -> None:
        self.horizon = horizon
        self.optimizer = configs[0]["optimizer"]
        self.adaptive = self.optimizer in ("adam", "adamw")
        moments = n_moments(self.optimizer, (config["momentum"] for config in configs))
        self.moments = [torch.zeros_like(flat) for _ in range(moments)]
        self._set_trials(configs, blocks, flat, steps)

    def _set_trials(self, configs: Sequence[Config], blocks: Blocks, flat: Tensor, steps: Tensor) -> None:
        self.blocks, self.dtype = blocks, flat.dtype
        self.scratch = torch.empty_like(flat) if self.adaptive else None
        self.clock = Clock(configs, steps, self.horizon)
        self.lr = self.clock.table(configs, "lr")
        decoupled = self.optimizer == "adamw"
        decays = any(config["weight_decay"] for config in configs)
        self.decay = self.clock.table(configs, "weight_decay")
        self.shrink = self.lr * self.decay if decoupled and decays else None
        self.l2 = 0.0 if decoupled else self._amount(configs, "weight_decay")
        self.sides = {
            block.name: torch.tensor(block.sides, device=steps.device).repeat(len(steps), 1)
            for block in blocks.blocks
            if block.sides is not None
        }
        self.lr_factors = self._factors(configs, LR_FACTOR)
        self.decay_factors = self._factors(configs, DECAY_FACTOR)
        self.shrink_factors = self._factors(configs, LR_FACTOR, DECAY_FACTOR)
        self.beta2 = self._amount(configs, "beta2", torch.float64)
        self.mu = self.clock.table(configs, "momentum")
        self.momentum = 0.0 if self.adaptive else self._amount(configs, "momentum")

    def _factors(self, configs: Sequence[Config], *prefixes: str) -> dict[str, Tensor]:
        """Return each member's factor (F, C) on a rate, of the blocks that have one."""
        factors = {b.name: [factor_of(config, prefixes, b.name) for config in configs] for b in self.blocks.blocks}
        return {k: self.clock.per_trial(own).to(self.dtype) for k, own in factors.items() if set(own) != {1.0}}

    def _amount(self, configs: Sequence[Config], key: str, dtype: torch.dtype | None = None) -> Amount:
        values = {number_of(config, key) for config in configs}
        if len(values) > 1:
            return self.clock.table(configs, key).to(dtype or self.dtype)
        # Held to what the dtype can say: a larger one makes members diverge all the same.
        return min(values.pop(), torch.finfo(self.dtype).max)

    def state(self) -> list[Tensor]:
        return self.moments

    def resume(self, buffers: Sequence[Tensor]) -> None:
        for moment, kept in zip(self.moments, buffers, strict=True):
            moment.copy_(kept)

    def select(self, configs: Sequence[Config], blocks: Blocks, keep: Tensor, flat: Tensor, *, steps: Tensor) -> None:
        self.moments = [self.blocks.select(moment, keep) for moment in self.moments]
        self._set_trials(configs, blocks, flat, steps)

    def step(self, theta: Tensor, grad: Tensor, active: Tensor | None) -> None:
        """Take one step of the members that are ``active`` (F, C), None: of all.

        ``grad`` is used up: what it holds afterwards means nothing.
        """
        keep = None if active is None else active.double()
        factor = self.clock.factor() if keep is None else self.clock.factor() * keep
        if self.optimizer in IN_PLACE:
            self._add(grad, theta, self._by_schedule(self.l2), self.decay_factors)
        if self.adaptive:
            self._adam(theta, grad, factor, keep)
        elif self.optimizer in ("sgd", "nesterov"):
            self._sgd(theta, grad, factor, keep)
        else:
            self._by_rule(theta, grad, active)
        self.clock.advance(keep)

    def _adam(self, theta: Tensor, grad: Tensor, factor: Tensor, keep: Tensor | None) -> None:
        (m, v), scratch = self.moments, self.scratch
        assert scratch is not None
        self._move(m, grad, 1 - BETA1, None if keep is None else keep.to(self.dtype))
        if keep is None and isinstance(self.beta2, float):
            v.mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        else:
            share = (1 - self.beta2) * (torch.ones_like(factor) if keep is None else keep)
            self.blocks.lerp_(v, grad.mul_(grad), share.to(self.dtype))
        # lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps), with the corrections moved to the members
        count = self.clock.done + 1
        root = (1 - self.beta2**count).sqrt()
        torch.sqrt(v, out=scratch)
        for eps, part in self.blocks.by_block((EPS * root).to(self.dtype), scratch):
            part.add_(eps)
        torch.div(m, scratch, out=scratch)
        if self.shrink is not None:
            shrink = self.shrink * factor * self.clock.factor("weight_decay_schedule")
            self._add(theta, theta, -shrink.to(self.dtype), self.shrink_factors)
        rate = self.lr * factor * root / (1 - BETA1**count)
        self._add(theta, scratch, -rate.to(self.dtype), self.lr_factors)

    def _sgd(self, theta: Tensor, grad: Tensor, factor: Tensor, keep: Tensor | None) -> None:
        direction = grad
        if self.moments:
            (buffer,) = self.moments
            if keep is None:
                self._scale(buffer, self.momentum)
                buffer.add_(grad)
            else:
                stays = keep.to(self.dtype)
                self._scale(buffer, 1 + stays * (self.momentum - 1))
                self._add(buffer, grad, stays)
            direction = buffer
            if self.optimizer == "nesterov":
                direction = grad
                self._add(direction, buffer, self.momentum)
        self._add(theta, direction, -(self.lr * factor).to(self.dtype), self.lr_factors)

    def _by_rule(self, theta: Tensor, grad: Tensor, active: Tensor | None) -> None:
        names = MOMENTS[self.optimizer]
        lr, count = self.lr * self.clock.factor(), self.clock.done + 1
        decay = self.decay * self.clock.factor("weight_decay_schedule")
        views = [self.blocks.views(flat) for flat in (theta, grad, *self.moments)]
        for block in self.blocks.blocks:
            w, g, *moments = (view[block.name] for view in views)
            factors = [of.get(block.name, 1.0) for of in (self.lr_factors, self.decay_factors)]
            tables = (lr * factors[0], decay * factors[1], self.mu, count)
            beta2 = self.beta2 if isinstance(self.beta2, float) else with_axes_of(block, self.beta2)
            sides = {"w": with_axes_of(block, self.sides[block.name])} if block.name in self.sides else {}
            rate, shrink, mu, n = (with_axes_of(block, table) for table in tables)
            rates = Rates(rate, shrink, mu, n, beta2=beta2, sides=sides)
            before = {name: {"w": moment} for name, moment in zip(names, moments)}
            new, after = RULES[self.optimizer]({"w": w}, {"w": g}, before, rates)
            for old, value in zip([w, *moments], [new["w"], *(after[name]["w"] for name in names)]):
                old.copy_(value if active is None else torch.where(with_axes_of(block, active), value, old))

    def _by_schedule(self, amount: Amount) -> Amount:
        """Return a weight decay as its schedule and its factors want it: of each member, where they have any."""
        if not self.clock.schedules["weight_decay_schedule"] and not self.decay_factors:
            return amount
        return (amount * self.clock.factor("weight_decay_schedule")).to(self.dtype)

    def _add(self, total: Tensor, tensor: Tensor, amount: Amount, factors: Mapping[str, Tensor] | None = None) -> None:
        """total += amount * tensor, with ``factors`` on the amount in some blocks."""
        if isinstance(amount, Tensor):
            self.blocks.add_product_(total, tensor, amount, factors)
        elif amount != 0.0:
            total.add_(tensor, alpha=amount)

    def _move(self, flat: Tensor, end: Tensor, weight: float, on: Tensor | None) -> None:
        """Move a buffer by ``weight`` of the way towards another, of the members that are ``on`` (F, C)."""
        if on is None:
            flat.lerp_(end, weight)
        else:
            self.blocks.lerp_(flat, end, on * weight)

    def _scale(self, flat: Tensor, amount: Amount) -> None:
        if isinstance(amount, Tensor):
            for value, part in self.blocks.by_block(amount, flat):
                part.mul_(value)
        else:
            flat.mul_(amount)


class OnlineUpdate(Update):
    """The optimizer of one chunk with a learning rate that each member adapts: ``rate`` (F, C), on the device.

    Every step of a member moves its rate by what its gradient g now and the direction u of its last step say: the rules
    of ``gputune.optim``, whose classes say what they are and what they are not.
    """

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
