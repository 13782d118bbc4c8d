"""The only loop over epochs and batches: a chunk of members trains in lock step and is scored at every epoch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gputune.data.dataset import Dataset
from gputune.engine.batches import Batches, Step
from gputune.engine.blocks import Blocks
from gputune.engine.network import Network
from gputune.engine.online import OnlineHyper, OnlineUpdate
from gputune.engine.scoring import Scoring
from gputune.engine.update import Hyper, Update, schedule_factor
from gputune.types import ONLINE, Config

_BLOCK_BYTES = 4 << 20  # of one layer's validation outputs: what stays in a core's cache


@dataclass(frozen=True)
class State:
    """Members in the middle of their training: ``buffers`` (C, F, N), parameters first, after ``epoch`` epochs.

    A row holds all that is known of a trial, so that trials may be parked, sent and grouped anew.
    """

    epoch: int
    buffers: tuple[Tensor, ...]

    def select(self, keep: Sequence[int]) -> "State":
        """Return the state of some trials."""
        return State(self.epoch, tuple(buffer[list(keep)] for buffer in self.buffers))

    @staticmethod
    def stack(states: "Sequence[State]") -> "State":
        """Return several states of one epoch and one shape as one."""
        parts = zip(*(state.buffers for state in states))
        return State(states[0].epoch, tuple(torch.cat(buffers) for buffers in parts))


@dataclass(frozen=True)
class Trained:
    """A chunk after its training: ``curves`` (C, epochs, F), NaN from the epoch on at which a trial diverged.

    ``epochs`` is the number of epochs done. The members of trials that did not diverge are ``member(fold, trial)``,
    and ``state`` is theirs. ``moments`` are the optimizer's flat buffers.
    """

    curves: np.ndarray
    epochs: int
    alive: tuple[int, ...]
    network: Network
    flat: Tensor
    moments: tuple[Tensor, ...]

    @property
    def state(self) -> State:
        """The state of the trials ``alive``, for ``train(begin=...)``."""
        blocks, count = self.network.blocks, len(self.alive)
        return State(
            self.epochs, tuple(blocks.to_rows(buffer)[:count] for buffer in (self.flat, *self.moments))
        )

    def member(self, fold: int, trial: int) -> nn.Module:
        """Return one member as a plain module on the CPU; ``trial`` counts as it did before any diverged."""
        return self.network.member(self.network.blocks.views(self.flat), fold, self.alive.index(trial))


AfterEpoch = Callable[[Trained], bool]
"""Called with the chunk as it is, of which nothing was copied; returns whether to stop."""


@torch.no_grad()
def train(
    network: Network,
    data: Dataset,
    configs: Sequence[Config],
    *,
    seed: int,
    epochs: int,
    horizon: int,
    scoring: Scoring | None = None,
    after_epoch: AfterEpoch | None = None,
    begin: State | None = None,
    alive: Sequence[int] | None = None,
    before: np.ndarray | None = None,
) -> Trained:
    """Train the F x C members of one chunk for ``epochs`` epochs and return their curves.

    A schedule runs over ``horizon`` epochs. Without ``scoring`` nothing is evaluated (a refit). Trials that
    diverge in any fold leave the chunk after the epoch, and cost nothing from then on. Training goes on from ``begin``
    where it is given, up to the same ``epochs``: the state of the trials ``alive``, all unless others have left before.
    The curves are then what they were ``before`` it (C, epochs, F), NaN where that is not given.
    """
    chunk = _Chunk(network, data, configs, seed=seed, horizon=horizon)
    if alive is not None:
        chunk.keep(np.isin(np.arange(len(configs)), alive))
    if begin is not None and chunk.alive:
        chunk.resume(begin)
    validation = _validation_rows(data) if scoring is not None else []
    curves = np.full((len(configs), epochs, data.n_folds), np.nan)
    epoch = 0 if begin is None else begin.epoch
    if before is not None:
        curves[:, :epoch] = before

    def so_far() -> Trained:
        moments = tuple(chunk.update.state())
        return Trained(curves, epoch, tuple(chunk.alive), chunk.network, chunk.flat, moments)

    while epoch < epochs and chunk.alive:
        chunk.advance(epoch)
        epoch += 1
        if scoring is not None:
            scores = _evaluate(chunk, data, validation, scoring)
            curves[chunk.alive, epoch - 1] = scores
            chunk.keep(np.isfinite(scores).all(1))
        if after_epoch is not None and after_epoch(so_far()):
            break
    return so_far()


class _Chunk:
    """The state of a chunk: parameters, gradient and moments in flat buffers, and each member's step count."""

    def __init__(
        self, network: Network, data: Dataset, configs: Sequence[Config], *, seed: int, horizon: int
    ) -> None:
        self.network = network
        self.alive = list(range(len(configs)))
        self.schedules = [config["schedule"] for config in configs]
        longest = max(len(fold.train) for fold in data.folds)
        sizes = np.array([min(config["batch_size"], longest) for config in configs])
        target = network.targets(data.y)
        self.batches = Batches(data, sizes, target, seed=seed, exact=network.exact)
        self.flat = network.start()
        self.horizon = horizon
        self.update = _make_update(configs, data.n_folds, network.blocks, self.flat)
        self._settle()

    def _settle(self) -> None:
        self.grad = torch.zeros_like(self.flat)
        self.params = self.network.blocks.views(self.flat)
        self.grads = self.network.blocks.views(self.grad)

    def resume(self, state: State) -> None:
        """Go on from a state of these trials."""
        flat, *rest = (self.network.blocks.from_rows(rows.to(self.flat.device)) for rows in state.buffers)
        self.flat.copy_(flat)
        self.update.resume(rest)

    def advance(self, epoch: int) -> None:
        """Train for one epoch."""
        before = epoch * self.batches.steps  # (F, C) steps done by each member
        total = self.horizon * self.batches.steps
        for step in self.batches.epoch(epoch):
            self._step(step, before + step.done, total)

    def _step(self, step: Step, done: np.ndarray, total: np.ndarray) -> None:
        if step.active is not None and self.network.exact:
            self.grad.zero_()  # folds without a part would keep the last step's gradient, or what became of it
        for part in step.parts:
            self.network.gradient(self.params, part, self.grads)
        factor = self._factor(done, total)
        self.update.step(self.flat, self.grad, count=done + 1, factor=factor, active=step.active)

    def _factor(self, done: np.ndarray, total: np.ndarray) -> np.ndarray:
        names = set(self.schedules)
        if len(names) == 1:
            return schedule_factor(self.schedules[0], done, total)
        columns = [schedule_factor(s, done[:, c], total[:, c]) for c, s in enumerate(self.schedules)]
        return np.stack(columns, 1)

    def keep(self, stays: np.ndarray) -> None:
        """Go on with the trials of ``stays`` (C,) alone."""
        if stays.all():
            return
        places = np.flatnonzero(stays)
        self.alive = [self.alive[i] for i in places]
        if not self.alive:
            return
        on_device = torch.as_tensor(places).to(self.flat.device)
        flat = self.network.blocks.select(self.flat, on_device)
        self.network = self.network.subset(places.tolist())
        self.update.select(self.network.blocks, on_device, flat)
        self.batches.select(places)
        self.schedules = [self.schedules[i] for i in places]
        self.flat = flat
        self._settle()


def _make_update(
    configs: Sequence[Config], folds: int, blocks: Blocks, flat: Tensor
) -> Update | OnlineUpdate:
    optimizer = configs[0]["optimizer"]
    lr, weight_decay, momentum, hypergrad_lr = (
        np.tile([float(config[key]) for config in configs], (folds, 1))
        for key in ("lr", "weight_decay", "momentum", "hypergrad_lr")
    )
    if optimizer in ONLINE:
        hyper = OnlineHyper(lr, weight_decay, momentum, hypergrad_lr)
        return OnlineUpdate(optimizer, blocks, hyper, flat, rule=configs[0]["hypergrad_rule"])
    return Update(optimizer, blocks, Hyper(lr, weight_decay, momentum), flat)


def _validation_rows(data: Dataset) -> list[Tensor]:
    return [data.x[copy].index_select(0, fold.valid) for copy, fold in zip(data.copies, data.folds)]


def _evaluate(chunk: _Chunk, data: Dataset, validation: list[Tensor], scoring: Scoring) -> np.ndarray:
    """Return the scores (C, F) of all members, each on the validation rows of its fold."""
    columns = []
    for fold, x in enumerate(validation):
        rows = _block_rows(chunk, x.shape[1], x.element_size())
        blocks = [chunk.network.outputs(chunk.params, fold, part) for part in torch.split(x, rows)]
        outputs = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
        columns.append(scoring(data, fold, outputs))
    return torch.stack(columns, 1).cpu().numpy()  # the only device sync of an epoch


def _block_rows(chunk: _Chunk, n_features: int, item_bytes: int) -> int:
    """Rows to evaluate at a time, so that one layer's outputs of all trials stay within the block."""
    members = len(chunk.alive)
    widest = max([n_features, *(block.shape[-1] for block in chunk.network.blocks.blocks)])
    return max(64, _BLOCK_BYTES // (members * widest * item_bytes))
