"""The optimizer of a chunk: a gradient is clipped, a rule takes its step, the weights are averaged.

Clipping (``clip_norm``) and averaging (``ema``) are each member's own, and nothing where no member asks for them.
Of steps that are recorded on a GPU each is two or three launches, of ``update.cu``.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gputune.native.cuda import Kernel, kernels, launch
from gputune.optimizers.blocks import Blocks
from gputune.optimizers.classes import NORM_EPS
from gputune.optimizers.rules import BETA1, EPS, LION_BETA2, RMSPROP_ALPHA, Schedule, schedule_free_average
from gputune.optimizers.update import OnlineUpdate, Update
from gputune.types import ONLINE, Config

SOURCE = Path(__file__).with_name("update.cu")
NAMES = ("sum_squares", "step_rates", "take_step")

_RULES = {"adam": 0, "adamw": 0, "sgd": 1, "nesterov": 3, "rmsprop": 4, "lion": 5}
_HEAVY_BALL = 2
_DECOUPLED = ("adamw", "lion")
_LANES, _RATES = 32, 9


class UpdateKernel:
    """The optimizer of one chunk by these kernels: what they read, and how they are launched.

    ``clip_norm`` and ``ema`` (F, C) are each member's, None where nobody clips or averages.
    """

    def __init__(
        self, compiled: Sequence[Kernel], update: Update, *, clip_norm: Tensor | None, ema: Tensor | None
    ) -> None:
        self.compiled = tuple(compiled)
        blocks, device = update.blocks, update.lr.device
        members, trials = update.lr.numel(), update.lr.shape[1]
        self.members, self.entries, self.clips = members, blocks.size, clip_norm is not None
        none = torch.zeros_like(update.lr)
        decays = [update.decay, none] if update.optimizer in _DECOUPLED else [none, update.decay]
        clip_norm = none + torch.inf if clip_norm is None else clip_norm
        beta2, average = none + update.beta2, none if ema is None else ema
        self.hyperparameters = torch.stack([update.lr, *decays, beta2, update.mu, clip_norm, average])
        rule = _RULES[update.optimizer]
        rule = _HEAVY_BALL if update.optimizer == "sgd" and update.moments else rule
        self.schedules = _FactorTable(update)
        of_blocks = [update.lr_factors, update.decay_factors]
        head = [members, trials, blocks.size, len(blocks.blocks), rule, any(of_blocks), ema is not None]
        sizes = [*head, self.schedules.table.shape[1], *_layout(blocks)]
        self.sizes = torch.tensor(sizes, dtype=torch.int64).to(device)
        numbers = [BETA1, EPS, RMSPROP_ALPHA, LION_BETA2, NORM_EPS]
        self.numbers = torch.tensor(numbers, dtype=torch.float64).to(device)
        self.all = torch.ones_like(update.lr, dtype=torch.bool)
        lanes = _LANES if self.clips else 1
        self.sums = torch.empty((lanes, members), dtype=torch.float64, device=device)
        self.rates = torch.empty((_RATES, members), dtype=update.dtype, device=device)
        self.factors = self.rates
        if any(of_blocks):
            ones = torch.ones_like(none, dtype=update.dtype)
            self.factors = torch.stack([of.get(block.name, ones) for of in of_blocks for block in blocks.blocks])

    def step(
        self, theta: Tensor, grad: Tensor, update: Update, *, average: Tensor | None, active: Tensor | None
    ) -> None:
        """Take a step of the members that are ``active`` (F, C), None: of all, and count it."""
        m, v = (*update.moments, grad, grad)[:2]  # a rule reads only those that it has
        sum_squares, step_rates, take_step = self.compiled
        if self.clips:
            launch(sum_squares, _LANES * self.members, [self.sizes, grad, self.sums])
        tables = [update.clock.steps, self.schedules.rows, self.schedules.table, self.sums]
        who = self.all if active is None else active
        first = [self.sizes, self.numbers, self.hyperparameters, *tables, who, update.clock.done, self.rates]
        launch(step_rates, self.members, first)
        second = [self.sizes, self.numbers, self.rates, self.factors, grad, m, v, theta]
        launch(take_step, self.entries, [*second, theta if average is None else average])


class _FactorTable:
    """The factors of the schedules in one epoch: ``table`` has a row for each schedule and length that occur.

    ``rows`` (2, F, C) says in which each member's factors of its rate and of its decay are, -1: they are always 1.
    """

    def __init__(self, update: Update) -> None:
        clock, self.horizon = update.clock, update.horizon
        steps = clock.steps.cpu()
        rows = torch.full((2, *steps.shape), -1)
        self.runs: list[tuple[Schedule, int, int]] = []  # rows that have one schedule
        lengths: list[int] = []
        for own, key in zip(rows, ("schedule", "weight_decay_schedule")):
            for schedule, members in clock.schedules[key].items():
                having, begin = members.cpu().expand(steps.shape), len(lengths)
                for length in sorted(set(steps[having].tolist())):
                    own[having & (steps == length)] = len(lengths)
                    lengths.append(length)
                self.runs.append((schedule, begin, len(lengths)))
        device = clock.steps.device
        self.rows = rows.to(device)
        self.lengths = torch.tensor(lengths or [1], dtype=torch.float64).to(device)[:, None]
        self.step = torch.arange(max(1, int(steps.max())), dtype=torch.float64).to(device)
        self.table = torch.ones((len(self.lengths), len(self.step)), dtype=torch.float64).to(device)

    def begin(self, epoch: int) -> None:
        """Fill the table for an epoch."""
        done = self.lengths * epoch + self.step
        total = (self.lengths * self.horizon).expand_as(done)
        for schedule, begin, end in self.runs:
            self.table[begin:end] = schedule(done[begin:end], total[begin:end])


def _layout(blocks: Blocks) -> list[int]:
    """Return for each block where it begins, the entries of a fold, and how many neighbours belong to one trial."""
    layout, begin = [], 0
    for block, size in zip(blocks.blocks, blocks.sizes):
        layout += [begin, size // block.shape[0], math.prod(block.shape[block.trial_axis + 1 :])]
        begin += size
    return layout


class Optimizer:
    """What changes the parameters of one chunk in place, and holds all state of it."""

    def __init__(self, configs: Sequence[Config], blocks: Blocks, flat: Tensor, *, steps: Tensor, horizon: int) -> None:
        make: type[Update] = OnlineUpdate if configs[0]["optimizer"] in ONLINE else Update
        self.update = make(configs, blocks, flat, steps=steps, horizon=horizon)
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

    def select(self, configs: Sequence[Config], blocks: Blocks, keep: Tensor, flat: Tensor, *, steps: Tensor) -> None:
        """Go on with the trials ``keep`` alone, of which all else is given."""
        if self.average is not None:
            self.average = self.blocks.select(self.average, keep)
        self.update.select(configs, blocks, keep, flat, steps=steps)
        self._set_trials(configs, blocks, flat)

    def prepare(self) -> None:
        """Make ready for steps that are recorded: on a GPU kernels take the place of the operations that are here."""
        update, ema = self.update, None if self.average is None else self.ema
        if update.optimizer in _RULES and update.lr.device.type == "cuda":
            compiled = kernels(SOURCE, NAMES, update.lr.device, update.dtype)
            if compiled is not None:
                self.kernel = UpdateKernel(compiled, update, clip_norm=self.clip_norm, ema=ema)

    def begin(self, epoch: int) -> None:
        """Count from the first step of an epoch."""
        self.update.clock.begin(epoch)
        if self.kernel is not None:
            self.kernel.schedules.begin(epoch)

    def step(self, theta: Tensor, grad: Tensor, active: Tensor | None = None) -> None:
        """Take one step of the members that are ``active`` (F, C), None: of all. ``grad`` is used up."""
        # Only where it is recorded: a step as it is then checks the kernels, before the first replay.
        if self.kernel is not None and torch.cuda.is_current_stream_capturing():
            self.kernel.step(theta, grad, self.update, average=self.average, active=active)
            return
        if self.clip_norm is not None and self.squares is not None:
            norm = self.blocks.total(torch.mul(grad, grad, out=self.squares)).double().sqrt()
            scale = (self.clip_norm / (norm + NORM_EPS)).clamp(max=1.0)
            scale = scale.masked_fill(self.clip_norm == math.inf, 1.0).to(self.dtype)
            for value, part in self.blocks.by_block(scale, grad):
                part.mul_(value)
        first = None if self.average is None else self.update.clock.done == 0
        self.update.step(theta, grad, active)
        if self.average is not None and first is not None:
            share = (1 - self.ema).masked_fill(first, 1.0)  # the first weights are the average of themselves
            share = share if active is None else share * active
            self.blocks.lerp_(self.average, self._evaluate(theta), share.to(self.dtype))

    def scored(self, theta: Tensor) -> Tensor:
        """Return the weights that are scored and saved: an average where there is one, else ``theta`` itself."""
        return self._evaluate(theta) if self.average is None else self.average

    def _evaluate(self, theta: Tensor) -> Tensor:
        is_average = self.update.optimizer == "schedulefree"
        return schedule_free_average(theta, self.update.moments[0]) if is_average else theta
