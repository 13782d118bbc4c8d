"""The minibatches of every training step, for all members of a chunk at once.

A member is one trial on one fold. A chunk holds trials of one tensor shape that train together.
Shape letters: F folds, C configurations (trials), P members, B rows of a minibatch, V copies of the
data.

Minibatches are consecutive slices of each fold's row order. The order of an epoch is a permutation
of the positions 0..n-1 within a fold's training rows. It depends only on (seed, n, epoch), and on
the replica if a trial trains several networks on a fold. A member therefore reads the same rows by
itself and together with others. A short last minibatch is used too.
If all trials have one batch size, the members of a fold share their rows. Otherwise each trial
reads its own slice, and rows beyond its batch size have weight zero.

A step finds its rows through a step counter on the device and reads no values from Python. Its
operations can therefore be recorded once and replayed. One recording serves all steps of the same
``StepShape``, and an epoch has only a few step shapes.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gputune.data.dataset import Dataset, stage_rows
from gputune.ground.seeding import replica_seed, stream
from gputune.ground.types import StepKey
from gputune.native.cuda import Kernel, kernels, launch

SOURCE = Path(__file__).with_name("minibatch.cu")


class HostRows:
    """Copies the rows of each training step from main memory to the device.

    ``order`` (F, longest fold) has positions in ``inputs``, each (V*n, ...). ``taken`` (F, 1 or C)
    is the number of rows in a member's minibatch. While a step trains, a separate thread copies the
    rows of the next step. For a CUDA device, these rows pass through pinned memory.
    """

    def __init__(self, inputs: Sequence[Tensor], device: torch.device) -> None:
        self.inputs = inputs
        self.device = device
        self.order = np.empty((0, 0), dtype=np.int64)
        self.ahead: dict[tuple[int, int, int], Future[list[Tensor]]] = {}

    def begin(self, order: Tensor) -> None:
        """Set the order in which the epoch reads the rows, and drop rows that were gathered in
        advance."""
        self.order = order.cpu().numpy()
        self.ahead.clear()

    def take(
        self,
        folds: slice,
        step: int,
        rows: int,
        taken: np.ndarray,
        *,
        last: bool,
    ) -> list[Tensor]:
        """Return the rows of one step on the device, (F * (1 or C) * B, ...) for each input.

        Unless ``last`` is True, a thread begins to gather the rows of the next step. The next step
        is assumed to have the same number of rows. If it has a different number, its rows are
        gathered when they are requested.
        """
        future = self.ahead.pop((folds.start, step, rows), None)
        if future is None:
            gathered = self._gather(folds, step, rows, taken)
        else:
            gathered = future.result()
        if not last:
            following = step + 1
            future = _thread().submit(self._gather, folds, following, rows, taken)
            self.ahead[folds.start, following, rows] = future
        return gathered

    def _gather(self, folds: slice, step: int, rows: int, taken: np.ndarray) -> list[Tensor]:
        """Copy the rows of one step to the device, and return one tensor for each input."""
        begin = step * taken[folds]  # (F, 1 or C)
        # (F, 1 or C, B) -> (F, (1 or C) * B)
        places = (begin[..., None] + np.arange(rows)).reshape(len(begin), -1)
        # Places beyond the end repeat the last one. Such rows have weight zero, or are not used.
        places = places.clip(max=self.order.shape[1] - 1)
        return self.at(np.take_along_axis(self.order[folds], places, 1))

    def at(self, positions: np.ndarray) -> list[Tensor]:
        """Copy the rows at these positions to the device, and return one tensor for each input."""
        index = torch.from_numpy(positions.ravel())
        gathered = []
        for x in self.inputs:
            chosen = x.index_select(0, index)
            gathered.append(stage_rows(chosen, self.device))
        return gathered


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="gputune-rows")


class StepDraws(NamedTuple):
    """Random tensors of one training step of a user's module.

    ``augment`` and ``module`` (the forward pass and the loss) each have their tensors in the order
    of the draws.
    """

    augment: tuple[Tensor, ...]
    module: tuple[Tensor, ...]


@dataclass(frozen=True)
class Batch:
    """The rows that the members of some folds read in one step.

    Args:
        inputs: One tensor per input, (F, B, ...) if the members of a fold share their rows,
            otherwise (P, B, ...).
        y: Targets, with the same first axes and the target's own last axis.
        share: Weight of each row divided by the minibatch's sum of weights, (F, 1 or C, B, 1), or
            one float if all shares are equal.
        folds: The folds.
        key: (epoch, step).
        draws: Uniform draws of the step for dropout, (layers, B, H), if the model has its own
            dropout; or the draws of a user's module.
    """

    inputs: tuple[Tensor, ...]
    y: Tensor
    share: Tensor | float
    folds: slice
    key: StepKey
    draws: Tensor | StepDraws | None = None

    @property
    def x(self) -> Tensor:
        """The rows of a table, (F or P, B, D), for a model with this single input."""
        (x,) = self.inputs
        return x

    def by_fold(self) -> list["Batch"]:
        """Split a minibatch with common rows by its folds: one minibatch (1, B, ...) for each."""
        batches = []
        for place, fold in enumerate(range(self.folds.start, self.folds.stop)):
            part = slice(place, place + 1)
            share = self.share[part] if isinstance(self.share, Tensor) else self.share
            inputs = tuple(x[part] for x in self.inputs)
            y = self.y[part]
            folds = slice(fold, fold + 1)
            batches.append(replace(self, inputs=inputs, y=y, share=share, folds=folds))
        return batches


@dataclass(frozen=True)
class Part:
    """A group of neighboring folds, ``begin`` to ``end - 1``, with equally long minibatches in a
    step.

    Their minibatches have ``rows`` rows. ``full`` says that they contain no padded rows.
    """

    begin: int
    end: int
    rows: int
    full: bool

    @property
    def folds(self) -> slice:
        return slice(self.begin, self.end)


@dataclass(frozen=True)
class StepShape:
    """The properties of a training step that are constant in its recording. Steps with equal
    properties share a recording.

    ``parts`` has one entry for each group of neighboring folds with equally long minibatches.
    ``all_active`` says that all members take the step. ``all_begin`` says that the minibatches of
    all members begin with this step. It is False only for pieces of minibatches (``pieces.py``).
    """

    parts: tuple[Part, ...]
    all_active: bool
    all_begin: bool = True


class Batches:
    """The minibatches of trials that train together (a chunk): C trials on F folds.

    Args:
        data: The rows and the folds.
        sizes: Batch size of each trial, (C,), in rows.
        target: Training target (V, n, ...), with one row per data row. Fold f reads copy ``f % V``.
        seed: Random seed of the order.
        exact: Whether minibatches are never padded, for models in which rows may interact. All
            trials then have one size. Folds with last minibatches of different lengths become
            separate parts.
        least_rows: A last minibatch of fewer rows is left out.
    """

    is_pieced = False  # whether a step is only a piece of some members' minibatches

    def __init__(
        self,
        data: Dataset,
        sizes: Sequence[int],
        target: Tensor,
        *,
        seed: int,
        exact: bool,
        least_rows: int = 1,
    ) -> None:
        self.data = data
        self.seed = seed
        self.exact = exact
        self.least_rows = least_rows
        self.inputs = tuple(x.flatten(0, 1) for x in data.inputs)  # (V*n, ...)
        self.target = target.flatten(0, 1)
        self.lengths = np.array(data.train_lengths)[:, None]  # (F, 1)
        longest = int(self.lengths.max())
        device = data.device
        folds = np.arange(data.n_folds)
        # (3, F): the copy that a fold reads, of the data rows, of x and of the target
        copies = np.stack([0 * folds, data.copies, folds % len(target)])
        first_rows = torch.from_numpy(copies * data.n_rows)
        # (3, F, 1): position of the first row of the copy
        self.start = first_rows.to(device)[..., None]
        self.order = torch.empty((3, data.n_folds, longest), dtype=torch.int64, device=device)
        self.counted = torch.as_tensor(self.lengths).to(device, torch.float64)
        self.weights = None
        if data.weights is not None:
            self.weights = data.weights.double().contiguous()
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.epoch: int | None = None
        self.host: HostRows | None = None
        if data.on_host:
            self.host = HostRows(self.inputs, device)
        self.kernel: Kernel | None = None
        self._set_sizes(self._capped(sizes))

    def _set_sizes(self, sizes: np.ndarray) -> None:
        """Set the members' batch sizes (F, C), which are at most the fold's length, and compute
        all values that depend on the sizes."""
        device = self.data.device
        largest = int(sizes.max())
        self.sizes = sizes
        self.steps = steps_of(self.lengths, sizes, self.least_rows)  # (F, C) steps an epoch
        self.active_until = torch.as_tensor(self.steps).contiguous().to(device)
        self.host_taken = sizes  # (F, 1 or C)
        if self.shared:
            self.host_taken = np.full_like(self.lengths, largest)
        self.taken = torch.as_tensor(self.host_taken).contiguous().to(device)
        self.positions = torch.arange(largest, device=device)
        self.shapes = [self._shape(step) for step in range(self.steps.max())]

    def _shape(self, step: int) -> StepShape:
        """Return the ``StepShape`` of a step: the properties on which its recording depends.
        ``step`` is the step's index in an epoch."""
        taken = self.host_taken
        counts = np.clip(self.lengths - step * taken, 0, taken)  # (F, 1 or C) rows that count
        bounds = [0, len(counts)]
        if self.exact:
            counts[step >= self.steps[:, :1]] = 0
            # Each run of folds with equally many rows is a part.
            ends = np.flatnonzero(np.diff(counts[:, 0])) + 1
            bounds[1:1] = ends.tolist()
        parts = []
        for begin, end in pairwise(bounds):
            of_part = counts[begin:end]
            rows = int((of_part if self.shared else taken).max())
            if rows > 0:
                full = bool((of_part == rows).all())
                parts.append(Part(begin, end, rows, full))
        all_active = bool((step < self.steps).all())
        return StepShape(tuple(parts), all_active)

    def prepare(self) -> None:
        """Prepare for steps that are recorded and replayed.

        On a GPU, the method compiles a kernel that computes the positions of a minibatch's rows.
        """
        if self.data.device.type == "cuda" and self.host is None:
            compiled = kernels(SOURCE, ("minibatch",), self.data.device, self.data.dtype)
            self.kernel = None if compiled is None else compiled[0]

    def _capped(self, sizes: Sequence[int]) -> np.ndarray:
        """Return batch sizes (F, C) that are at most the fold's length, and note whether all trials
        share their minibatches."""
        longest = int(self.lengths.max())
        # Capped before an array is made, because a size may be larger than an int64.
        capped = [min(size, longest) for size in sizes]
        self.shared = len(set(capped)) == 1
        of_folds: np.ndarray = np.minimum(capped, self.lengths)
        return of_folds

    def begin(self, epoch: int) -> None:
        """Shuffle the rows for an epoch, and set the step counter to 0."""
        order = row_order(self.data, self.seed, epoch)
        self.order.copy_(order + self.start)
        self.step.zero_()
        self.epoch = epoch
        if self.host is not None:
            self.host.begin(self.order[1])

    def at(self, epoch: int, step: int) -> tuple[Batch, ...]:
        """Return the minibatches of one step. Steps may be requested in any order."""
        if self.epoch != epoch:
            self.begin(epoch)
        self.step.fill_(step)
        return self.parts(self.shapes[step], (epoch, step))

    def active(self) -> Tensor:
        """Return a mask (F, C) of the members that take the current step. A member with fewer
        steps is False at the end of an epoch."""
        return self.step < self.active_until

    def continuing(self) -> Tensor:
        """Return a mask (F, C). True: the member's minibatch began before the current step, which
        happens only in ``pieces.py``."""
        return torch.zeros_like(self.active_until, dtype=torch.bool)

    def parts(self, shape: StepShape, key: StepKey) -> tuple[Batch, ...]:
        """Return the minibatches of the current step, one for each group of neighboring folds. The
        step counter on the device gives the step."""
        return tuple(self._batch(part, key) for part in shape.parts)

    def _batch(self, part: Part, key: StepKey) -> Batch:
        """Return the minibatch of a group of neighboring folds in the current step."""
        # The kernel runs only while a step is recorded. The first replay is checked against a step
        # by the plain operations.
        if self.kernel is not None and torch.cuda.is_current_stream_capturing():
            rows, share = self._by_kernel(self.kernel, part)
        else:
            rows, share = self._rows(part)
        _, input_rows, target_rows = rows  # (F, 1 or C, B)
        shape = input_rows.shape
        if self.host is not None:
            gathered = self._from_host(self.host, part, key[1])
        else:
            positions = input_rows.flatten()
            gathered = [x.index_select(0, positions) for x in self.inputs]
        inputs = []
        for number, x in enumerate(gathered):
            x = x.view(*shape, *x.shape[1:])  # (F, 1 or C, B, ...)
            x = self.data.read(number, x, part.folds)
            inputs.append(x.flatten(0, 1))
        y = self.target.index_select(0, target_rows.flatten())
        y = y.view(-1, part.rows, *y.shape[1:])
        return Batch(tuple(inputs), y, share, part.folds, key)

    def _from_host(self, host: HostRows, part: Part, step: int) -> list[Tensor]:
        """Return the rows of one step from main memory, one tensor for each input."""
        last = step + 1 == len(self.shapes)
        return host.take(part.folds, step, part.rows, self.host_taken, last=last)

    def _rows(self, part: Part) -> tuple[Tensor, Tensor | float]:
        """Return the positions of a minibatch's rows in weights, inputs and target, and the rows'
        shares of the weight.

        The positions are (3, F folds, 1 or C trials, B rows).
        """
        taken = self.taken[part.folds]  # (F, 1 or C)
        positions = self.positions[: part.rows]
        begin = self.step * taken
        last = self.order.shape[-1] - 1
        places = (begin[..., None] + positions).clamp_max(last)
        shape = places.shape  # (F, 1 or C, B)
        index = places.flatten(1).expand(3, -1, -1)
        rows = self.order[:, part.folds].gather(2, index)
        rows = rows.view(3, *shape)
        if self.weights is None and part.full:
            return rows, 1 / part.rows
        # Double precision, because sums of weights may leave the range of single precision. Their
        # shares do not.
        remaining = (self.counted[part.folds] - begin).clamp_min(0)
        counts = remaining.minimum(taken)[..., None]  # (F, 1 or C, 1)
        weights = positions < counts
        total = counts
        if self.weights is not None:
            of_fold = self.weights[part.folds, None].expand(-1, shape[1], -1)
            weights = weights * of_fold.gather(2, rows[0])
            total = weights.sum(2, keepdim=True)
        # A minibatch with only zero weights gets a zero slope instead of 0/0.
        total = total.clamp_min(torch.finfo(total.dtype).tiny)
        share = (weights / total).to(self.data.dtype)
        return rows, share[..., None]

    def _by_kernel(self, kernel: Kernel, part: Part) -> tuple[Tensor, Tensor | float]:
        """Return the positions of a minibatch's rows and the rows' shares of the weight.

        One launch of a GPU kernel computes both.
        """
        shape = (part.end - part.begin, self.taken.shape[1], part.rows)
        rows = self.order.new_empty((3, *shape))
        share = self.order.new_empty((*shape, 1), dtype=self.data.dtype)
        _, folds, length = self.order.shape
        weighted = self.weights is not None
        shared = part.full and not weighted  # equally, so that the kernel writes no shares
        weights = self.counted if self.weights is None else self.weights
        flags = [int(not shared), int(weighted)]
        numbers = [*shape, part.begin, folds, length, self.data.n_rows, *flags]
        tensors = [self.step, self.order, self.taken, self.counted, weights, rows, share]
        launch(kernel, rows[0].numel(), [*numbers, *tensors])
        return rows, 1 / part.rows if shared else share


def for_members(x: Tensor, trials: int) -> Tensor:
    """Repeat the rows of each fold (F, B, ...) for each of its members. The result is (P, B,
    ...)."""
    repeated = x[:, None].expand(-1, trials, *x.shape[1:])
    return repeated.flatten(0, 1)


def steps_of(lengths: np.ndarray, sizes: np.ndarray, least_rows: int) -> np.ndarray:
    """Return the number of training steps in an epoch, for folds of ``lengths`` rows and batch
    sizes ``sizes``.

    A last minibatch of fewer than ``least_rows`` rows is left out.
    """
    remainder = lengths % sizes
    left_out = (remainder > 0) & (remainder < least_rows)
    steps: np.ndarray = -(-lengths // sizes) - left_out
    return steps


def row_order(data: Dataset, seed: int, epoch: int) -> Tensor:
    """Return each fold's training rows in the order of an epoch, (F, longest fold).

    The rows are positions in the data. A shorter fold repeats its first row at its end.
    """
    longest = max(data.train_lengths)
    permutations: dict[tuple[int, int], Tensor] = {}
    order = []
    for number, fold in enumerate(data.folds):
        n = len(fold.train)
        # Folds of equal length share one permutation.
        key = n, data.replica_of(number)
        if key not in permutations:
            generator = stream(replica_seed(seed, key[1]), "rows", n, epoch)
            permutation = torch.randperm(n, generator=generator, device="cpu")
            permutations[key] = permutation.to(data.device)
        shuffled = fold.train[permutations[key]]
        padding = fold.train[:1].expand(longest - n)
        order.append(torch.cat([shuffled, padding]))
    return torch.stack(order)
