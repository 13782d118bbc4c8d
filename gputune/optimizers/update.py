"""The update rules in place, over the flat buffers of a chunk.

A chunk holds trials of one tensor shape that train together. A member is one trial on one fold. A
step runs as PyTorch operations. On a GPU, a recorded step (recorded once and replayed) can instead
run the kernels in ``update.cu``, which takes two or three launches.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from gputune.ground.types import DECAY_FACTOR, LR_FACTOR, ONLINE, Config
from gputune.native.cuda import Kernel, kernels, launch
from gputune.optimizers.blocks import Blocks, with_axes_of
from gputune.optimizers.classes import NORM_EPS
from gputune.optimizers.optimizer import Optimizer, number_of
from gputune.optimizers.rules import (
    BETA1,
    EPS,
    LION_BETA2,
    MOMENTS,
    RMSPROP_ALPHA,
    RULES,
    Rates,
    Schedule,
)

Amount: TypeAlias = float | Tensor
"""A hyperparameter value for all members, or one value for each member, (F, C)."""

IN_PLACE = ("sgd", "nesterov", "adam", "adamw")
"""The update rules with a second version in this file, which makes only a few passes over the
buffers.

For the other rules, the functions of ``rules.py`` run.
"""

SOURCE = Path(__file__).with_name("update.cu")
NAMES = ("sum_squares", "step_rates", "take_step")

# These numbers are the enums of ``update.cu``.
_RULES = {"adam": 0, "adamw": 0, "sgd": 1, "nesterov": 3, "rmsprop": 4, "lion": 5}
_HEAVY_BALL = 2
_LANES = 32  # threads that sum the squares of one member's gradient
_RATES = 9  # values that the kernel computes for each member's step
_DECOUPLED = ("adamw", "lion")


def optimizer_of(
    configs: Sequence[Config], blocks: Blocks, flat: Tensor, *, steps: Tensor, horizon: int
) -> Optimizer:
    """Return the optimizer, before its first step, for trials that train together (a chunk).

    ``configs`` are the trials' complete configurations.
    """
    kind = OnlineUpdate if configs[0]["optimizer"] in ONLINE else Update
    return kind(configs, blocks, flat, steps=steps, horizon=horizon)


def factor_of(config: Config, prefixes: Sequence[str], parameter: str) -> float:
    """Return the factor by which a configuration scales the rate of one parameter.

    A configuration may have keys that consist of one of the ``prefixes`` and a name. The value
    applies if the name is a part of the parameter's dotted path. All values that apply are
    multiplied.
    """
    keys = {prefix + part for prefix in prefixes for part in parameter.split(".")}
    return math.prod(float(config[key]) for key in keys & config.keys())


class Update(Optimizer):
    """An optimizer that applies an update rule at given learning rates to a chunk.

    A chunk holds trials that train together.
    """

    def _set_trials(
        self, configs: Sequence[Config], blocks: Blocks, flat: Tensor, steps: Tensor
    ) -> None:
        super()._set_trials(configs, blocks, flat, steps)
        # "adam" for "adamhd". ``optimizer`` stays "adamhd", which has no kernel: see ``prepare``.
        self.rule = self.optimizer.removesuffix("hd")
        self.adaptive = self.rule in ("adam", "adamw")
        self.scratch = torch.empty_like(flat) if self.adaptive else None
        self.lr = self.clock.table(configs, "lr")
        self.decay = self.clock.table(configs, "weight_decay")
        self.mu = self.clock.table(configs, "momentum")
        decoupled = self.rule == "adamw"
        decays = any(config["weight_decay"] for config in configs)
        self.shrink = self.lr * self.decay if decoupled and decays else None
        self.l2 = 0.0 if decoupled else self._amount(configs, "weight_decay")
        # (F, C): the longer side of each trial's matrix, for the length of muon's steps
        self.sides = {}
        for block in blocks.blocks:
            if block.sides is not None:
                sides = torch.tensor(block.sides, device=steps.device)
                self.sides[block.name] = sides.repeat(len(steps), 1)
        self.lr_factors = self._factors(configs, LR_FACTOR)
        self.decay_factors = self._factors(configs, DECAY_FACTOR)
        self.shrink_factors = self._factors(configs, LR_FACTOR, DECAY_FACTOR)
        self.beta2 = self._amount(configs, "beta2", torch.float64)
        self.momentum = 0.0 if self.adaptive else self._amount(configs, "momentum")
        self.kernel: UpdateKernel | None = None

    def _factors(self, configs: Sequence[Config], *prefixes: str) -> dict[str, Tensor]:
        """Return tables (F, C) of the factors that scale each member's rate, for blocks
        (parameters) with a factor other than 1."""
        tables = {}
        for block in self.blocks.blocks:
            factors = [factor_of(config, prefixes, block.name) for config in configs]
            if set(factors) != {1.0}:
                tables[block.name] = self.clock.per_trial(factors).to(self.dtype)
        return tables

    def _amount(
        self, configs: Sequence[Config], key: str, dtype: torch.dtype | None = None
    ) -> Amount:
        """Return a hyperparameter as a float if all trials have the same value, otherwise as a
        table (F, C)."""
        values = {number_of(config, key) for config in configs}
        if len(values) > 1:
            return self.clock.table(configs, key).to(dtype or self.dtype)
        # Limited to the largest number of the dtype. Members diverge with any such value anyway.
        return min(values.pop(), torch.finfo(self.dtype).max)

    def prepare(self) -> None:
        """Prepare for steps that are recorded and replayed: on a GPU, kernels replace the PyTorch
        operations."""
        if self.optimizer in _RULES and self.lr.device.type == "cuda":
            compiled = kernels(SOURCE, NAMES, self.lr.device, self.dtype)
            self.kernel = None if compiled is None else UpdateKernel(compiled, self)

    def begin(self, epoch: int) -> None:
        super().begin(epoch)
        if self.kernel is not None:
            self.kernel.begin(epoch)

    def step(self, theta: Tensor, grad: Tensor, active: Tensor | None = None) -> None:
        # The kernels run only in a recorded step. A step by operations then checks the kernels
        # before the first replay.
        if self.kernel is not None and torch.cuda.is_current_stream_capturing():
            self.kernel.step(self, theta, grad, active)
        else:
            super().step(theta, grad, active)

    def _take(self, theta: Tensor, grad: Tensor, active: Tensor | None) -> None:
        # ``active`` has the doubles 1 and 0 here, but is bool in ``UpdateKernel``.
        if self.rule in IN_PLACE:
            factor = self.clock.factor() if active is None else self.clock.factor() * active
            self._add_l2(grad, theta)
            self._take_in_place(theta, grad, factor, active)
        else:
            self._by_rule(theta, grad, active)

    def _add_l2(self, grad: Tensor, theta: Tensor) -> None:
        """Add L2 weight decay to the members' gradients, in place."""
        l2 = self.l2
        if not isinstance(l2, Tensor) and l2 == 0.0:
            return  # as in adamw, which decays in its step: a factor would make a tensor of zeros
        # the decay then differs between members: (F, C)
        if self.clock.schedules["weight_decay_schedule"] or self.decay_factors:
            l2 = (l2 * self.clock.factor("weight_decay_schedule")).to(self.dtype)
        self._add(grad, theta, l2, self.decay_factors)

    def _take_in_place(
        self, theta: Tensor, grad: Tensor, factor: Tensor, active: Tensor | None
    ) -> None:
        """Take a step of SGD, Nesterov, Adam or AdamW in place, at ``factor`` (F, C) times the
        learning rate.

        ``factor`` is 0 for members that take no step.
        """
        if self.adaptive:
            self._adam(theta, grad, factor, active)
        else:
            self._sgd(theta, grad, factor, active)

    def _adam(self, theta: Tensor, grad: Tensor, factor: Tensor, active: Tensor | None) -> None:
        """Take a step of Adam or AdamW for all members, in place in the flat buffers."""
        m, v = self.moments
        scratch = self.scratch
        assert scratch is not None
        if active is None:
            m.lerp_(grad, 1 - BETA1)
        else:
            self.blocks.lerp_(m, grad, active.to(self.dtype) * (1 - BETA1))
        if active is None and isinstance(self.beta2, float):
            v.mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        else:
            share = (1 - self.beta2) * (torch.ones_like(factor) if active is None else active)
            self.blocks.lerp_(v, grad.mul_(grad), share.to(self.dtype))
        # The step is lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps). The corrections are
        # computed per member, (F, C), and not per entry.
        count = self.clock.count()
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

    def _sgd(self, theta: Tensor, grad: Tensor, factor: Tensor, active: Tensor | None) -> None:
        """Take a step of gradient descent, with or without momentum, in place in the flat
        buffers."""
        direction = grad
        for buffer in self.moments:
            if active is None:
                self._scale(buffer, self.momentum)
                buffer.add_(grad)
            else:
                moves = active.to(self.dtype)
                self._scale(buffer, 1 + moves * (self.momentum - 1))
                self._add(buffer, grad, moves)
            if self.rule == "nesterov":
                self._add(grad, buffer, self.momentum)
            else:
                direction = buffer
        self._add(theta, direction, -(self.lr * factor).to(self.dtype), self.lr_factors)

    def _by_rule(self, theta: Tensor, grad: Tensor, active: Tensor | None) -> None:
        """Take a step with the pure function of ``rules.py``, one block (a parameter) at a time."""
        names = MOMENTS[self.optimizer]
        lr = self.lr * self.clock.factor()
        count = self.clock.count()
        decay = self.decay * self.clock.factor("weight_decay_schedule")
        views = [self.blocks.views(flat) for flat in (theta, grad, *self.moments)]
        for block in self.blocks.blocks:
            name = block.name
            w, g, *moments = (view[name] for view in views)
            beta2 = self.beta2 if isinstance(self.beta2, float) else with_axes_of(block, self.beta2)
            sides = {}
            if name in self.sides:
                sides["w"] = with_axes_of(block, self.sides[name])
            rates = Rates(
                with_axes_of(block, lr * self.lr_factors.get(name, 1.0)),
                with_axes_of(block, decay * self.decay_factors.get(name, 1.0)),
                with_axes_of(block, self.mu),
                with_axes_of(block, count),
                beta2=beta2,
                sides=sides,
            )
            before = {key: {"w": moment} for key, moment in zip(names, moments)}
            new, after = RULES[self.optimizer]({"w": w}, {"w": g}, before, rates)
            for old, value in zip([w, *moments], [new["w"], *(after[key]["w"] for key in names)]):
                if active is not None:
                    value = torch.where(with_axes_of(block, active) > 0, value, old)
                old.copy_(value)

    def _add(
        self,
        total: Tensor,
        tensor: Tensor,
        amount: Amount,
        factors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Compute total += amount * tensor in place. For blocks (parameters) in ``factors``, the
        amount is multiplied by their factors."""
        if isinstance(amount, Tensor):
            self.blocks.add_product_(total, tensor, amount, factors)
        elif amount != 0.0:
            total.add_(tensor, alpha=amount)

    def _scale(self, flat: Tensor, amount: Amount) -> None:
        """Multiply a flat buffer in place by one value for all members, or by one value for each
        member."""
        if isinstance(amount, Tensor):
            for value, part in self.blocks.by_block(amount, flat):
                part.mul_(value)
        else:
            flat.mul_(amount)


class OnlineUpdate(Update):
    """An update rule with a learning rate that each member adapts.

    The rule gives the direction u of a step, and ``rate`` (F, C) its length. In every step, a
    member's rate first changes according to the current gradient g and the direction of the
    member's last step. The rules for the rate are the same as in ``gputune.optim``; the docstrings
    of its classes describe their use and limits. The factor of a schedule scales the rate within a
    step, but does not change the stored rate.
    """

    def _set_trials(
        self, configs: Sequence[Config], blocks: Blocks, flat: Tensor, steps: Tensor
    ) -> None:
        super()._set_trials(configs, blocks, flat, steps)
        self.rate_rule = configs[0]["hypergrad_rule"]
        self.hypergrad_lr = self.clock.table(configs, "hypergrad_lr").to(self.dtype)
        self.products = torch.empty_like(flat)
        # The rule gives directions: it takes steps at the rate 1. Decoupled weight decay is a part
        # of the direction.
        self.lr = torch.ones_like(self.lr)
        self.direction_decay = None if self.shrink is None else self.decay
        self.shrink = None

    def _start(self, configs: Sequence[Config], flat: Tensor) -> None:
        super()._start(configs, flat)
        self.direction = torch.zeros_like(flat)  # each member's direction u of its last step
        self.rate = self.clock.table(configs, "lr").to(self.dtype)
        self.norm = torch.zeros_like(self.rate)  # |g| of each member's last step

    def _buffers(self) -> list[Tensor]:
        """Return the flat buffers that the update rule keeps. The last two hold each member's
        rate and gradient norm |g|."""
        rate = self.blocks.expand(self.rate)
        return [*self.moments, self.direction, rate, self.blocks.expand(self.norm)]

    def resume(self, buffers: Sequence[Tensor]) -> None:
        super().resume(buffers)
        rate, norm = buffers[len(self.moments) + 1 :][:2]
        self.rate.copy_(self.blocks.first(rate))
        self.norm.copy_(self.blocks.first(norm))

    def _select_state(self, keep: Tensor) -> None:
        super()._select_state(keep)
        self.direction = self.blocks.select(self.direction, keep)
        self.rate = self.rate[:, keep]
        self.norm = self.norm[:, keep]

    def _take(self, theta: Tensor, grad: Tensor, active: Tensor | None) -> None:
        moves = torch.ones_like(self.clock.done) if active is None else active
        self._add_l2(grad, theta)
        self._adapt(grad, moves.to(self.dtype))
        # A step of the rule from 0 against the descent is the direction. Members that take no step
        # keep their direction.
        self._scale(self.direction, (1 - moves).to(self.dtype))
        self._take_in_place(self.direction, grad, -moves, active)
        # Without a schedule of the decay and factors: ``population.complete`` refuses both for
        # these optimizers.
        if self.direction_decay is not None:
            self._add(self.direction, theta, (moves * self.direction_decay).to(self.dtype))
        rate = self.rate * (self.clock.factor() * moves).to(self.dtype)
        self._add(theta, self.direction, -rate)

    def _adapt(self, grad: Tensor, moves: Tensor) -> None:
        """Adapt the learning rate of each member with 1 in ``moves`` (F, C).

        A rate does not change if its rule has no finite result, for example if a norm is zero.
        """
        h = self._dot(grad, self.direction)
        norm = self._dot(grad, grad).sqrt()
        direction_norm = self._dot(self.direction, self.direction).sqrt()
        change = h
        if self.rate_rule == "multiplicative":
            change = h / (norm * direction_norm) * self.rate
        elif self.rate_rule == "normalized":
            change = h / (self.norm * direction_norm)  # ``self.norm``: |g| of the last step
        change = self.hypergrad_lr * torch.where(change.isfinite(), change, 0.0)
        self.rate.add_(change * moves).clamp_min_(0.0)
        self.norm.copy_(torch.where(moves > 0, norm, self.norm))

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the inner product of each member's parts of two buffers, (F, C)."""
        return self.blocks.total(torch.mul(a, b, out=self.products))


class UpdateKernel:
    """Launches the GPU kernels of an optimizer step, and holds their input tables.

    ``table`` has the schedules' factors of one epoch. It has one row for each pair (schedule, steps
    per epoch) that occurs. ``rows`` (2, F, C) has two row indices for each member: for the factors
    on its learning rate, and for the factors on its weight decay. -1 means that all factors are 1.
    """

    def __init__(self, compiled: Sequence[Kernel], update: Update) -> None:
        self.compiled = tuple(compiled)
        self.horizon = update.horizon
        device = update.lr.device
        self.members = update.lr.numel()
        self.entries = update.blocks.size
        self.clips = update.clip_norm is not None
        self.hyperparameters = self._hyperparameters(update)
        self._make_schedules(update)
        self.sizes = torch.tensor(self._sizes(update), dtype=torch.int64).to(device)
        numbers = [BETA1, EPS, RMSPROP_ALPHA, LION_BETA2, NORM_EPS]
        self.numbers = torch.tensor(numbers, dtype=torch.float64).to(device)
        self.all = torch.ones_like(update.lr, dtype=torch.bool)
        lanes = _LANES if self.clips else 1
        self.sums = torch.empty((lanes, self.members), dtype=torch.float64, device=device)
        self.rates = torch.empty((_RATES, self.members), dtype=update.dtype, device=device)
        self.factors = self.rates  # a placeholder, which the kernel does not read
        if update.lr_factors or update.decay_factors:
            ones = torch.ones_like(update.lr, dtype=update.dtype)
            factors = []
            for tables in (update.lr_factors, update.decay_factors):
                factors += [tables.get(block.name, ones) for block in update.blocks.blocks]
            self.factors = torch.stack(factors)

    def _hyperparameters(self, update: Update) -> Tensor:
        """Return the members' hyperparameters as a table (7, F, C), in the order that the GPU
        kernels read."""
        zero = torch.zeros_like(update.lr)
        decoupled = update.optimizer in _DECOUPLED
        return torch.stack(
            [
                update.lr,
                update.decay if decoupled else zero,
                zero if decoupled else update.decay,
                zero + update.beta2,
                update.mu,
                zero + torch.inf if update.clip_norm is None else update.clip_norm,
                zero if update.average is None else update.ema,
            ]
        )

    def _make_schedules(self, update: Update) -> None:
        """Create the table of schedule factors, and each member's row indices in the table."""
        device = update.lr.device
        steps = update.clock.steps.cpu()
        rows = torch.full((2, *update.lr.shape), -1)
        self.runs: list[tuple[Schedule, int, int]] = []  # schedule, its first row, end of its rows
        lengths: list[int] = []
        for numbers, key in zip(rows, ("schedule", "weight_decay_schedule")):
            for schedule, members in update.clock.schedules[key].items():
                on = members.cpu().expand(steps.shape)
                begin = len(lengths)
                for length in sorted(set(steps[on].tolist())):
                    numbers[on & (steps == length)] = len(lengths)
                    lengths.append(length)
                self.runs.append((schedule, begin, len(lengths)))
        self.rows = rows.to(device)
        self.lengths = torch.tensor(lengths or [1], dtype=torch.float64).to(device)[:, None]
        self.within = torch.arange(max(1, int(steps.max())), dtype=torch.float64).to(device)
        shape = (len(self.lengths), len(self.within))
        self.table = torch.ones(shape, dtype=torch.float64).to(device)

    def _sizes(self, update: Update) -> list[int]:
        """Return the sizes and flags that the GPU kernels read, in the kernels' order."""
        blocks = update.blocks
        heavy_ball = update.optimizer == "sgd" and update.moments
        sizes = [
            self.members,
            update.lr.shape[1],
            blocks.size,
            len(blocks.blocks),
            _HEAVY_BALL if heavy_ball else _RULES[update.optimizer],
            bool(update.lr_factors or update.decay_factors),
            update.average is not None,
            len(self.within),
        ]
        begin = 0
        for block, size in zip(blocks.blocks, blocks.sizes):
            # The block's first entry, its entries per fold, and neighboring entries of one trial
            sizes += [begin, size // block.shape[0], math.prod(block.shape[block.trial_axis + 1 :])]
            begin += size
        return sizes

    def begin(self, epoch: int) -> None:
        """Fill the table of schedule factors for an epoch."""
        done = self.lengths * epoch + self.within
        total = (self.lengths * self.horizon).expand_as(done)
        for schedule, begin, end in self.runs:
            self.table[begin:end] = schedule(done[begin:end], total[begin:end])

    def step(self, update: Update, theta: Tensor, grad: Tensor, active: Tensor | None) -> None:
        """Launch the kernels of one step for the members that are ``active`` (F, C), and count the
        step.

        If ``active`` is None, all members take the step.
        """
        # The kernel needs two pointers. A rule with fewer moments does not read the placeholders.
        m, v = (*update.moments, grad, grad)[:2]
        sum_squares, step_rates, take_step = self.compiled
        if self.clips:
            launch(sum_squares, _LANES * self.members, [self.sizes, grad, self.sums])
        constants = [self.sizes, self.numbers]
        tables = [self.hyperparameters, update.clock.steps, self.rows, self.table, self.sums]
        members = self.all if active is None else active
        changing = [members, update.clock.shift, update.clock.done, self.rates]
        launch(step_rates, self.members, [*constants, *tables, *changing])
        average = theta if update.average is None else update.average
        buffers = [self.rates, self.factors, grad, m, v, theta, average]
        launch(take_step, self.entries, [*constants, *buffers])
