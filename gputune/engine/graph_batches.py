"""The minibatches of every step, chosen on the device: by a counter there, out of the epoch's order.

They are those of ``batches.py``. A step reads nothing that the host knows only while it trains, so that it may be
recorded once and replayed. Steps differ in what is fixed when they are recorded, their ``StepShape``, and there are few
of those.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gputune.data.dataset import Dataset
from gputune.engine.batches import Batch, Batches
from gputune.engine.mlp import StackedMLP, dropout_draw

_DRAW_BYTES = 64 << 20  # of dropout's draws that are made ahead; a buffer of them waits for the device once


@dataclass(frozen=True)
class StepShape:
    """What is fixed in a recorded step: the rows of its minibatches, whether all of them count, and who takes it."""

    rows: int
    full: bool
    all_active: bool


class GraphBatches:
    """The minibatches of a chunk on the device; ``steps`` (F, C) are those of an epoch, on the device too."""

    def __init__(self, network: StackedMLP, data: Dataset, batch_sizes: list[int], *, seed: int) -> None:
        self.network, self.data, self.seed = network, data, seed
        target = network.targets(data.y)
        self.host = Batches(data, batch_sizes, target, seed=seed, exact=False)
        longest = int(self.host.lengths.max())
        self.order = torch.empty((3, data.n_folds, longest), dtype=torch.int64, device=data.device)
        self.weights = None if data.weights is None else data.weights.double()
        self.lengths = torch.as_tensor(self.host.lengths[:, None]).to(data.device)  # (F, 1)
        self.step = torch.zeros((), dtype=torch.int64, device=data.device)
        self._settle()

    def _settle(self) -> None:
        """Move to the device what stays as it is until trials leave."""
        host, device = self.host, self.data.device
        sizes = np.full((len(host.sizes), 1), host.sizes.max()) if host.shared else host.sizes
        self.sizes = torch.as_tensor(sizes).to(device)  # (F, 1), or (F, C) where trials differ
        self.steps = torch.as_tensor(host.steps).to(device)
        self.positions = torch.arange(int(sizes.max()), device=device)
        self.shapes = [_shape(sizes, host, step) for step in range(int(host.steps.max()))]
        self.draws = None
        if self.network.rates is not None:
            self.draws = _Draws(self.network, [shape.rows for shape in self.shapes], self.seed)

    def select(self, network: StackedMLP, keep: np.ndarray) -> None:
        """Go on with the trials ``keep`` alone, whose network is given."""
        self.network = network
        self.host.select(keep)
        self._settle()

    def begin(self, epoch: int) -> None:
        """Draw the order of an epoch, and start at its first step."""
        self.order.copy_(self.host.order(epoch))
        self.step.zero_()

    def draw(self, epoch: int, step: int) -> None:
        """See that the draws for dropout are there before a step is taken."""
        if self.draws is not None:
            self.draws.fill(epoch, step)

    def active(self) -> Tensor:
        """Return who takes the step, (F, C) bool."""
        return self.step < self.steps

    def batch(self, shape: StepShape) -> Batch:
        """Return the minibatches of the step."""
        begin = self.step * self.sizes  # (F, 1 or C)
        positions = self.positions[: shape.rows]
        wanted = (begin[..., None] + positions).clamp_max(self.order.shape[-1] - 1)  # (F, 1 or C, B)
        rows = self.order.gather(2, wanted.flatten(1).expand(3, -1, -1)).view(3, *wanted.shape)
        share = self._share(rows[0], begin, shape)
        draws = None if self.draws is None else self.draws.at(self.step, shape.rows)
        return Batch(*self.host.gather(rows), share, slice(0, len(begin)), (0, 0), draws)

    def _share(self, own: Tensor, begin: Tensor, shape: StepShape) -> Tensor | float:
        """Each row's weight over the minibatch's sum of weights, as ``Batches`` has it."""
        if self.weights is None and shape.full:
            return 1 / shape.rows
        counts = (self.lengths - begin).clamp_min(0).minimum(self.sizes)[..., None]
        weights = (self.positions[: shape.rows] < counts).double()
        if self.weights is not None:
            weights = weights * self.weights[:, None].expand(-1, own.shape[1], -1).gather(2, own)
        total = weights.sum(2, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        return (weights / total).to(self.data.dtype)[..., None]


def _shape(sizes: np.ndarray, host: Batches, step: int) -> StepShape:
    counts = np.clip(host.lengths[:, None] - step * sizes, 0, sizes)
    rows = int(counts.max()) if host.shared else int(sizes.max())
    return StepShape(rows, bool((counts == rows).all()), bool((step < host.steps).all()))


class _Draws:
    """The uniform draws of dropout of some steps ahead, (steps, layers, B, H) on the device."""

    def __init__(self, network: StackedMLP, rows: list[int], seed: int) -> None:
        self.rows, self.seed = rows, seed
        shape = (network.depth, max(rows), network.hidden)
        self.ahead = max(1, min(len(rows), _DRAW_BYTES // (4 * int(np.prod(shape)))))
        self.buffer = torch.empty((self.ahead, *shape), dtype=torch.float32, device=network.shape.device)

    def fill(self, epoch: int, step: int) -> None:
        """Draw for this step and those ahead, where the buffer ends before it."""
        if step % self.ahead:
            return
        _, layers, _, width = self.buffer.shape
        drawn = torch.zeros(self.buffer.shape)
        for slot, rows in enumerate(self.rows[step : step + self.ahead]):
            for layer in range(layers):
                drawn[slot, layer, :rows] = dropout_draw(self.seed, (epoch, step + slot), layer, rows, width)
        self.buffer.copy_(drawn)

    def at(self, step: Tensor, rows: int) -> Tensor:
        """Return the draws (layers, B, H) of the step that a counter on the device says."""
        slot = torch.remainder(step, self.ahead).view(1)
        return self.buffer.index_select(0, slot)[0, :, :rows]
