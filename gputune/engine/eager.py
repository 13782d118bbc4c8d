"""A chunk whose members take each step together, as operations on stacked tensors: any model, any device."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gputune.data.dataset import Dataset
from gputune.engine.batches import Batches, Step
from gputune.engine.blocks import Blocks
from gputune.engine.network import Network
from gputune.engine.online import OnlineHyper, OnlineUpdate
from gputune.engine.scoring import Scoring, Validation
from gputune.engine.update import Hyper, Update, schedule_factor
from gputune.types import ONLINE, Config


class EagerChunk:
    """The state of a chunk: parameters, gradient and moments in flat buffers, and each member's step count."""

    def __init__(
        self,
        network: Network,
        data: Dataset,
        configs: Sequence[Config],
        *,
        seed: int,
        horizon: int,
        scoring: Scoring | None,
    ) -> None:
        self.network, self.data = network, data
        self.validation = Validation(data, scoring)
        self.alive = list(range(len(configs)))
        self.schedules = [config["schedule"] for config in configs]
        sizes = [config["batch_size"] for config in configs]
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

    scoring_share = 0.0

    @property
    def moments(self) -> tuple[Tensor, ...]:
        """The optimizer's flat buffers."""
        return tuple(self.update.state())

    def resume(self, buffers: Sequence[Tensor]) -> None:
        """Go on from flat buffers: of the parameters, then of the moments."""
        self.flat.copy_(buffers[0])
        self.update.resume(list(buffers[1:]))

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

    def scores(self) -> np.ndarray:
        """Return the scores (C, F) of all members, each on the validation rows of its fold."""
        return self.validation.scores(self.network, self.params, len(self.alive))

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
