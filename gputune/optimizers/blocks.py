"""Flat buffers for the parameters, gradients and moments of a chunk, with a view of each parameter.

A chunk holds trials of one tensor shape that train together, and a member is one trial on one fold.
There is one flat buffer for the parameters, one for the gradient and one for each moment. A block
is one parameter of all members. Its first axis has the F folds. Another axis has the C trials; the
model chooses its position so that its matrix products are fast. Elementwise work such as the
optimizer runs over the flat buffer in one pass and ignores the axes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gputune.ground.types import Params


@dataclass(frozen=True)
class Block:
    """One parameter of all members: ``shape[0]`` counts the folds, ``shape[trial_axis]`` the
    trials."""

    name: str
    shape: tuple[int, ...]
    trial_axis: int
    sides: tuple[int, ...] | None = None
    """Length of the longer side of each trial's matrix, without padding. It is set only for the
    hidden matrices that muon updates."""


class Blocks:
    """The layout of a flat buffer, which stores all parameters of all members one after the other.

    A block is one parameter of all members that train together.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = tuple(blocks)
        self.sizes = [math.prod(block.shape) for block in self.blocks]
        self.size = sum(self.sizes)

    def views(self, flat: Tensor) -> Params:
        """Return the parameters in a flat buffer, each in its own shape, as views of the buffer's
        memory."""
        parts = zip(self.blocks, torch.split(flat, self.sizes))
        return {block.name: part.view(block.shape) for block, part in parts}

    def by_member(self, flat: Tensor) -> Params:
        """Return the parameters in a flat buffer by name, as views of the buffer's memory.

        A view is (F, C, ...): F folds, C trials, then the axes of one member's parameter.
        """
        views = self.views(flat)
        return {b.name: views[b.name].movedim(b.trial_axis, 1) for b in self.blocks}

    def to_rows(self, flat: Tensor, trials: Sequence[int] | None = None) -> Tensor:
        """Return a copy of a flat buffer as (C trials, F folds, N): the N values of each trial on
        each fold. ``trials`` has the positions of the trials to copy, or is None for all."""
        views = self._pairs(flat)
        if trials is not None:
            views = [view[:, list(trials)] for view in views]
        return torch.cat([view.transpose(0, 1).flatten(2) for view in views], 2)

    def from_rows(self, rows: Tensor) -> Tensor:
        """Return a flat buffer with the values of ``rows`` (C trials, F folds, N values).

        This is the inverse of ``to_rows``.
        """
        flat = rows.new_empty(self.size)
        self.put_rows(flat, rows)
        return flat

    def put_rows(self, flat: Tensor, rows: Tensor) -> None:
        """Write the values ``rows`` (C trials, F folds, N values) into a flat buffer, in place."""
        views = self._pairs(flat)
        sizes = [view[0, 0].numel() for view in views]
        for view, part in zip(views, torch.split(rows, sizes, 2)):
            view.copy_(part.transpose(0, 1).view(view.shape))

    def _pairs(self, flat: Tensor) -> list[Tensor]:
        """Return the parameters in a flat buffer as views with at least three axes.

        The first axis has the F folds, and the second axis has the C trials. The other axes belong
        to one trial's parameter on one fold. A parameter of one value has one such axis of size 1.
        """
        views = self.by_member(flat).values()
        return [view if view.dim() > 2 else view[..., None] for view in views]

    def expand(self, values: Tensor) -> Tensor:
        """Return a flat buffer in which all entries of a member have the member's value.

        ``values`` (F folds, C trials) has one value for each member.
        """
        flat = values.new_empty(self.size)
        for value, part in self.by_block(values, flat):
            part.copy_(value)
        return flat

    def first(self, flat: Tensor) -> Tensor:
        """Return the first entry of each member in a flat buffer, (F folds, C trials).

        This is the inverse of ``expand``.
        """
        return self._pairs(flat)[0].flatten(2)[..., 0].clone()

    def total(self, flat: Tensor) -> Tensor:
        """Return the sum of each member's entries in a flat buffer, (F folds, C trials)."""
        sums = []
        for block, view in zip(self.blocks, self.views(flat).values()):
            inner = [axis for axis in range(1, len(block.shape)) if axis != block.trial_axis]
            # In torch, a sum over an empty list of axes is a sum over all axes.
            sums.append(view.sum(inner) if inner else view)
        return torch.stack(sums).sum(0)

    def add_product_(
        self,
        total: Tensor,
        flat: Tensor,
        values: Tensor,
        factors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Compute total += value * flat in place, with a separate value for each member.

        ``values`` (F folds, C trials) has the members' values. If ``factors`` has a table of the
        same shape for a block (a parameter), the values are multiplied by this table there.
        """
        factors = factors or {}
        if values.numel() == 1 and not factors:
            total.addcmul_(flat, values.view(1))
            return
        for block, a, b in zip(self.blocks, self.views(total).values(), self.views(flat).values()):
            scaled = values * factors[block.name] if block.name in factors else values
            a.addcmul_(b, with_axes_of(block, scaled))

    def lerp_(self, flat: Tensor, end: Tensor, values: Tensor) -> None:
        """Interpolate the flat buffer ``flat`` towards the buffer ``end``, in place.

        ``values`` (F folds, C trials) has each member's fraction: 0 changes nothing, and 1 copies
        ``end``.
        """
        for value, part, toward in self.by_block(values, flat, end):
            part.lerp_(toward, value)

    def by_block(self, values: Tensor, *flats: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield, for each block (a parameter), the ``values`` reshaped to broadcast, and the
        block's view of each buffer.

        ``values`` (F folds, C trials) has one value for each member. With a single member, the
        function yields the complete buffers at once.
        """
        if values.numel() == 1:
            yield (values.view(1), *flats)
            return
        for block, *parts in zip(self.blocks, *(self.views(flat).values() for flat in flats)):
            yield (with_axes_of(block, values), *parts)

    def select(self, flat: Tensor, keep: Tensor) -> Tensor:
        """Return a flat buffer with only the trials at the positions ``keep``."""
        views = self.views(flat)
        parts = []
        for block in self.blocks:
            parts.append(views[block.name].index_select(block.trial_axis, keep).flatten())
        return torch.cat(parts)

    def copy_trials_(self, flat: Tensor, to: Tensor, source: Tensor) -> None:
        """Overwrite the trials at the positions ``to`` with the trials at the positions ``source``,
        in place in a flat buffer. All values are read before any is overwritten."""
        views = self.views(flat)
        if flat.device.type == "cpu":
            # NumPy copies contiguous rows at once, and index_copy_ copies value by value.
            to_rows = to.numpy()
            source_rows = source.numpy()
            for block in self.blocks:
                n_before = math.prod(block.shape[: block.trial_axis])
                view = views[block.name]
                rows = view.view(n_before, block.shape[block.trial_axis], -1).numpy()
                rows[:, to_rows] = rows[:, source_rows]
            return
        for block in self.blocks:
            view = views[block.name]
            view.index_copy_(block.trial_axis, to, view.index_select(block.trial_axis, source))

    def put(self, flat: Tensor, keep: Tensor, part: Tensor) -> None:
        """Write the flat buffer ``part`` of the trials ``keep`` into the flat buffer of all trials,
        in place.

        This is the inverse of ``select``.
        """
        views = self.views(flat)
        parts = self.subset(len(keep)).views(part)
        for block in self.blocks:
            views[block.name].index_copy_(block.trial_axis, keep, parts[block.name])

    def subset(self, trials: int) -> "Blocks":
        """Return the same layout of a flat buffer for a different number of trials."""
        blocks = []
        for block in self.blocks:
            shape = list(block.shape)
            shape[block.trial_axis] = trials
            blocks.append(replace(block, shape=tuple(shape)))
        return Blocks(blocks)


def with_axes_of(block: Block, values: Tensor) -> Tensor:
    """Reshape one value per member, (F folds, C trials), to broadcast against a block (a
    parameter)."""
    shape = [1] * len(block.shape)
    shape[0], shape[block.trial_axis] = values.shape
    return values.reshape(shape)
