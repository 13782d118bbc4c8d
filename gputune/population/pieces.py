"""The minibatches of trials with different batch sizes that train in one chunk.

A member is one trial on one fold. A chunk holds trials of one tensor shape that train together.
Shape letters: F folds, C configurations (trials), S different batch sizes, B rows of a piece.

All members of a fold read the same order of an epoch. The epoch is cut at the border of every
member's minibatches. Each piece is one forward pass of all members on common rows. A row counts
1 / (rows of the member's own minibatch) in the member's loss, and the gradients of the pieces add
up. A member takes its optimizer step at its own border:

    order of 16 rows, batch sizes 4 and 6
    pieces          0-4   4-6   6-8   8-12  12-16
    steps of size 4  x           x     x     x
    steps of size 6        x           x     x

The result is exact for modules whose rows do not affect each other and that draw nothing. Each row
passes once per member and epoch, as in a loop over the member's own minibatches.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from gputune.data.dataset import Dataset
from gputune.population.batches import Batches, HostRows, Part, StepShape, steps_of


def make_batches(
    data: Dataset,
    sizes: Sequence[int],
    target: Tensor,
    *,
    seed: int,
    exact: bool,
    least_rows: int = 1,
) -> Batches:
    """Return the minibatches of a chunk: ``PiecedBatches`` if unpadded batch sizes differ.

    The arguments are those of ``Batches``.
    """
    longest = max(data.train_lengths)
    differ = len({min(size, longest) for size in sizes}) > 1
    kind = PiecedBatches if exact and differ else Batches
    return kind(data, sizes, target, seed=seed, exact=exact, least_rows=least_rows)


class PiecedBatches(Batches):
    """The pieces of an epoch for trials with different batch sizes.

    A step of the training loop is a piece. ``steps`` (F, C) counts the optimizer steps of each
    member, as in ``Batches``.
    """

    is_pieced = True

    def _set_sizes(self, sizes: np.ndarray) -> None:
        device = self.data.device
        self.sizes = sizes
        self.steps = steps_of(self.lengths, sizes, self.least_rows)
        self.active_until = torch.as_tensor(self.steps).contiguous().to(device)
        # (F, S): the different batch sizes, and the place of each trial's size among them
        columns, places = np.unique(sizes, axis=1, return_inverse=True)
        self.places = torch.as_tensor(places.ravel()).to(device)
        self.member_sizes = torch.as_tensor(sizes).contiguous().to(device)
        self.ends_of_folds = torch.as_tensor(self.lengths).to(device)
        self.borders = borders_of(self.lengths, columns)
        self.begins = torch.as_tensor(self.borders[:-1]).to(device)
        self.ends = torch.as_tensor(self.borders[1:]).to(device)
        self.positions = torch.arange(int(np.diff(self.borders).max()), device=device)
        rows = torch.arange(self.order.shape[-1], device=device)
        # (F, S, n): the minibatch of each row in the order of an epoch
        of_columns = torch.as_tensor(columns).to(device)[..., None]
        self.minibatches = rows // of_columns
        counts = (self.ends_of_folds[..., None] - self.minibatches * of_columns).clamp_min(1)
        # (F, S, n): the share of each row in the loss of its minibatch
        self.shares = (1 / counts.minimum(of_columns).double()).to(self.data.dtype)
        self.shapes = [self._shape(piece) for piece in range(len(self.borders) - 1)]

    def _shape(self, step: int) -> StepShape:
        begin, end = map(int, self.borders[step : step + 2])
        # A fold has all rows of a piece or none, because its length is a border.
        has_rows = self.lengths[:, 0] >= end
        bounds = [0, *(np.flatnonzero(np.diff(has_rows)) + 1).tolist(), len(has_rows)]
        parts = [Part(a, b, end - begin, True) for a, b in pairwise(bounds) if has_rows[a]]
        is_border = (end % self.sizes == 0) | (end == self.lengths)
        all_active = bool((is_border & has_rows[:, None]).all())
        all_begin = bool((begin % self.sizes == 0).all())
        return StepShape(tuple(parts), all_active, all_begin)

    def prepare(self) -> None:
        """Do nothing: plain operations compute the positions of the rows of a piece."""

    def begin(self, epoch: int) -> None:
        """Shuffle the rows for an epoch, set the step counter to 0, and compute the rows' shares of
        the weights."""
        super().begin(epoch)
        if self.weights is None:
            return
        # Positions in the weights, (F, n). Places behind the end of a short fold count nothing.
        order = self.order[0]
        is_row = torch.arange(order.shape[1], device=order.device) < self.ends_of_folds
        weights = self.weights.gather(1, order) * is_row
        weights = weights[:, None].expand(self.minibatches.shape)
        totals = torch.zeros_like(weights).scatter_add_(2, self.minibatches, weights)
        # A minibatch with only zero weights gets a zero slope instead of 0/0.
        totals = totals.gather(2, self.minibatches).clamp_min(torch.finfo(totals.dtype).tiny)
        self.shares.copy_(weights / totals)

    def active(self) -> Tensor:
        """Return a mask (F, C). True: the member takes a step after the current piece."""
        end = self.ends.index_select(0, self.step[None])
        at_end = end == self.ends_of_folds
        return at_end | ((end % self.member_sizes == 0) & (end < self.ends_of_folds))

    def continuing(self) -> Tensor:
        """Return a mask (F, C). True: the member's minibatch began before the current piece."""
        begin = self.begins.index_select(0, self.step[None])
        return begin % self.member_sizes != 0

    def _from_host(self, host: HostRows, part: Part, step: int) -> list[Tensor]:
        begin, end = self.borders[step : step + 2]
        return host.at(host.order[part.folds, begin:end])

    def _rows(self, part: Part) -> tuple[Tensor, Tensor | float]:
        places = self.begins.index_select(0, self.step[None]) + self.positions[: part.rows]
        rows = self.order[:, part.folds].index_select(2, places)  # (3, F, B)
        shares = self.shares[part.folds].index_select(2, places)  # (F, S, B)
        shares = shares.index_select(1, self.places)  # (F, C, B)
        return rows[:, :, None], shares[..., None]


def borders_of(lengths: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the borders of all minibatches of an epoch, from 0 to the longest fold, in order.

    ``lengths`` (F, 1) are the rows of the folds, and ``sizes`` (F, S) the batch sizes.
    """
    borders = {0}
    for length, of_fold in zip(lengths[:, 0].tolist(), sizes.tolist()):
        borders.add(length)
        for size in of_fold:
            borders.update(range(size, length, size))
    return np.array(sorted(borders))
