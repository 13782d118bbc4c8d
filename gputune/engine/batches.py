"""The minibatches of every step: consecutive slices of each fold's keyed order, for all members at once.

The order of an epoch is a permutation of the positions 0..n-1 within a fold's own training rows, keyed by
(seed, n, epoch) alone, so a member reads the same rows alone as in any company. The last short minibatch
counts. Where all trials have one batch size, one fold's members share their rows; otherwise each trial reads
its own slice, and rows beyond its batch size have weight zero.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gputune.data.dataset import Dataset
from gputune.seeding import stream


@dataclass(frozen=True)
class Batch:
    """What the members of the folds in ``folds`` read in one step.

    ``x`` is (F, B, D) where a fold's members share their rows, otherwise (P, B, D); ``y`` likewise, with the
    target's own last axis; ``share`` is each row's weight over the minibatch's sum of weights, (F, 1 or C, B, 1),
    or one float where all are equal. ``key`` is (epoch, step). ``draws`` (layers, B, H) are the step's uniform draws
    for dropout where they were made before it; None: they are drawn by their key.
    """

    x: Tensor
    y: Tensor
    share: Tensor | float
    folds: slice
    key: tuple[int, int]
    draws: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """One step of a chunk: its minibatches (one, or one per run of folds with equally many rows) and who takes it.

    ``done`` (F, C) counts each member's steps within this epoch so far; ``active`` (F, C) is None where every
    member has a step now.
    """

    parts: tuple[Batch, ...]
    done: np.ndarray
    active: np.ndarray | None


class Batches:
    """The minibatches of a chunk: F folds of ``data`` x C trials with their ``sizes`` (C,), in rows.

    ``target`` (V, n, ...) is the training target with one row per data row, of which fold f reads copy
    ``f % V``. With ``exact`` no minibatch is ever padded: one size for all trials, and folds whose
    last minibatches differ come in parts of their own (for models in which rows may interact).
    """

    def __init__(
        self, data: Dataset, sizes: Sequence[int], target: Tensor, *, seed: int, exact: bool
    ) -> None:
        self.data, self.seed, self.exact = data, seed, exact
        self.target = target.flatten(0, 1)
        self.lengths = np.array([len(fold.train) for fold in data.folds])  # (F,)
        longest = int(self.lengths.max())
        held = np.array([min(size, longest) for size in sizes])  # first: a size may be larger than an int64
        self.shared = bool((held == held[0]).all())
        self.sizes = np.minimum(held, self.lengths[:, None])  # (F, C)
        self.steps = -(-self.lengths[:, None] // self.sizes)  # (F, C) steps an epoch
        device = data.device
        self.x = data.x.flatten(0, 1)  # (V*n, D)
        n = data.n_rows
        x_start = [copy * n for copy in data.copies]
        y_start = [(f % len(target)) * n for f in range(data.n_folds)]
        # Where a fold's rows begin in data rows, in x and in the target: (3, F, 1)
        self.start = torch.tensor([[0] * data.n_folds, x_start, y_start], device=device)[..., None]
        self._drawn: tuple[int, Tensor] | None = None

    def select(self, keep: np.ndarray) -> None:
        """Go on with the trials ``keep`` alone."""
        self.sizes, self.steps = self.sizes[:, keep], self.steps[:, keep]

    def epoch(self, epoch: int) -> Iterator[Step]:
        """Yield the steps of one epoch."""
        for step in range(int(self.steps.max())):
            yield self.at(epoch, step)

    def at(self, epoch: int, step: int) -> Step:
        """Return one step."""
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = (epoch, self.order(epoch))
        order = self._drawn[1]
        parts = self._shared(order, epoch, step) if self.shared else self._own(order, epoch, step)
        active = step < self.steps
        return Step(parts, np.minimum(step, self.steps - 1), None if active.all() else active)

    def order(self, epoch: int) -> Tensor:
        """Return the rows in the order of this epoch, (3, F, longest fold): of the data, of x, of the target."""
        return row_order(self.data, self.seed, epoch) + self.start

    def _shared(self, order: Tensor, epoch: int, step: int) -> tuple[Batch, ...]:
        size = int(self.sizes.max())
        rows = order[..., None, step * size : (step + 1) * size]  # (3, F, 1, B)
        counts = np.clip(self.lengths - step * size, 0, rows.shape[-1])  # rows that count, per fold
        runs = _runs(counts) if self.exact else [slice(0, len(counts))]
        parts = []
        for run in runs:
            length = int(counts[run].max())
            if length > 0:
                parts.append(self._batch(rows[:, run, :, :length], counts[run, None], run, (epoch, step)))
        return tuple(parts)

    def _own(self, order: Tensor, epoch: int, step: int) -> tuple[Batch, ...]:
        width = int(self.sizes.max())
        begin = step * self.sizes  # (F, C)
        counts = np.clip(self.lengths[:, None] - begin, 0, self.sizes)
        position = torch.as_tensor(begin).to(order.device)[..., None] + torch.arange(
            width, device=order.device
        )
        position = position.clamp_max(order.shape[-1] - 1).flatten(1)  # (F, C*B)
        rows = order.gather(2, position.expand(3, -1, -1)).view(3, *begin.shape, width)
        return (self._batch(rows, counts, slice(0, len(counts)), (epoch, step)),)

    def _batch(self, rows: Tensor, counts: np.ndarray, folds: slice, key: tuple[int, int]) -> Batch:
        """Gather rows (3, F, 1 or C, B), of which the first ``counts`` (F, 1 or C) of each minibatch count."""
        return Batch(*self.gather(rows), self._share(rows[0], counts, folds), folds, key)

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs (P, B, D) and the target (P, B, ...) of rows (3, F, 1 or C, B) as ``order`` has them."""
        _, of_x, of_y = rows
        members, length = of_x.shape[0] * of_x.shape[1], of_x.shape[2]
        x = self.x.index_select(0, of_x.flatten()).view(members, length, -1)
        y = self.target.index_select(0, of_y.flatten())
        return x, y.view(members, length, *y.shape[1:])

    def _share(self, rows: Tensor, counts: np.ndarray, folds: slice) -> Tensor | float:
        length = rows.shape[2]
        full = bool((counts == length).all())
        if self.data.weights is None and full:
            return 1 / length
        # In double precision: sums of weights may leave the range of single precision, their shares do not.
        weights = torch.ones(rows.shape, dtype=torch.float64, device=rows.device)
        if self.data.weights is not None:
            own = self.data.weights[folds, None].double().expand(-1, rows.shape[1], -1)
            weights = own.gather(2, rows)
        if not full:
            limit = torch.as_tensor(counts).to(rows.device)
            weights = weights * (torch.arange(length, device=rows.device) < limit[..., None])
        # A minibatch whose weights are all zero has no slope rather than 0/0.
        total = weights.sum(2, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        return (weights / total).to(self.data.dtype)[..., None]


def row_order(data: Dataset, seed: int, epoch: int) -> Tensor:
    """Return each fold's training rows in the order of an epoch, (F, longest fold), as positions in the data.

    A shorter fold repeats its first row at its end.
    """
    lengths = [len(fold.train) for fold in data.folds]
    drawn = {
        n: torch.randperm(n, generator=stream(seed, "rows", n, epoch), device="cpu") for n in set(lengths)
    }
    order = torch.stack([fold.train[:1].expand(max(lengths)) for fold in data.folds])
    for f, (fold, n) in enumerate(zip(data.folds, lengths)):
        order[f, :n] = fold.train[drawn[n].to(data.device)]
    return order


def _runs(values: np.ndarray) -> list[slice]:
    """Return the slices of consecutive equal values."""
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return [slice(a, b) for a, b in zip(edges[:-1], edges[1:])]
