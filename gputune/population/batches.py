"""The minibatches of every step: consecutive slices of each fold's keyed order, for all members at
once.

The order of an epoch is a permutation of the positions 0..n-1 within a fold's own training rows,
keyed by (seed, n, epoch) alone, so a member reads the same rows alone as in any company. The last
short minibatch counts. Where all trials have one batch size, one fold's members share their rows;
otherwise each trial reads its own slice, and rows beyond its batch size have weight zero.

A step finds its rows on the device, by a counter there, and reads nothing that the host knows only
while it trains: so it may be recorded once and replayed. Steps differ in what is fixed when they
are recorded, their ``StepShape``, and there are few of those.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gputune.data.dataset import Dataset, stage_rows
from gputune.native.cuda import Kernel, kernels, launch
from gputune.seeding import stream

SOURCE = Path(__file__).with_name("minibatch.cu")


class HostRows:
    """Gathers the rows of steps: ``order`` (F, longest fold) are positions in ``inputs``, each
    (V*n, ...).

    ``taken`` (F, 1 or C) are the rows of a member's minibatch. While a step trains, the rows of the
    next are gathered and sent by a thread of their own; of a CUDA device they are in pinned memory
    before.
    """

    def __init__(self, inputs: Sequence[Tensor], device: torch.device) -> None:
        self.inputs = inputs
        self.device = device
        self.order = np.empty((0, 0), dtype=np.int64)
        self.ahead: dict[tuple[int, int, int], Future[list[Tensor]]] = {}

    def begin(self, order: Tensor) -> None:
        """Take the order of an epoch."""
        self.order = order.cpu().numpy()
        self.ahead.clear()

    def take(
        self, folds: slice, step: int, rows: int, taken: np.ndarray, *, last: bool
    ) -> list[Tensor]:
        """Return rows (F * (1 or C) * B, ...) of each input on the device; unless ``last`` the next
        step's are begun.

        The step after this one is taken to have as many rows; where it has not, it is gathered when
        it is asked for.
        """
        future = self.ahead.pop((folds.start, step, rows), None)
        result = self._gather(folds, step, rows, taken) if future is None else future.result()
        if not last:
            self.ahead[folds.start, step + 1, rows] = _thread().submit(
                self._gather, folds, step + 1, rows, taken
            )
        return result

    def _gather(self, folds: slice, step: int, rows: int, taken: np.ndarray) -> list[Tensor]:
        asked = (step * taken[folds])[..., None] + np.arange(rows)  # (F, 1 or C, B)
        asked = np.minimum(asked, self.order.shape[1] - 1).reshape(len(asked), -1)
        positions = torch.from_numpy(np.take_along_axis(self.order[folds], asked, 1).ravel())
        return [stage_rows(x.index_select(0, positions), self.device) for x in self.inputs]


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="gputune-rows")


@dataclass(frozen=True)
class Batch:
    """What the members of the folds in ``folds`` read in one step.

    ``inputs`` are each (F, B, ...) where a fold's members share their rows, otherwise (P, B, ...);
    ``y`` likewise, with the target's own last axis; ``share`` is each row's weight over the
    minibatch's sum of weights, (F, 1 or C, B, 1), or one float where all are equal. ``key`` is
    (epoch, step). ``draws`` (layers, B, H) are the step's uniform draws for dropout, where the
    model has its own, or a module's own draws in their order.
    """

    inputs: tuple[Tensor, ...]
    y: Tensor
    share: Tensor | float
    folds: slice
    key: tuple[int, int]
    draws: Tensor | tuple[Tensor, ...] | None = None

    @property
    def x(self) -> Tensor:
        """The rows of a table, (F or P, B, D)."""
        (x,) = self.inputs
        return x


@dataclass(frozen=True)
class Part:
    """Folds ``begin`` to ``end`` of a step: the rows of their minibatches, and whether all of these
    count."""

    begin: int
    end: int
    rows: int
    full: bool

    @property
    def folds(self) -> slice:
        return slice(self.begin, self.end)


@dataclass(frozen=True)
class StepShape:
    """What is fixed in a recorded step: its parts, one a run of folds with equally many rows, and
    who takes it."""

    parts: tuple[Part, ...]
    all_active: bool


class Batches:
    """The minibatches of a chunk: F folds of ``data`` x C trials with their ``sizes`` (C,), in
    rows.

    ``target`` (V, n, ...) is the training target with one row per data row, of which fold f reads
    copy
    ``f % V``. With ``exact`` no minibatch is ever padded: one size for all trials, and folds whose
    last minibatches differ come in parts of their own (for models in which rows may interact). A
    last minibatch of less than ``least_rows`` is left out.
    """

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
        self.lengths = np.array([[len(fold.train)] for fold in data.folds])  # (F, 1)
        longest = int(self.lengths.max())
        # first: a size may be larger than an int64
        capped = np.array([min(size, longest) for size in sizes])
        self.shared = bool((capped == capped[0]).all())
        # Where a fold's rows begin in data rows, in x and in the target: (3, F, 1)
        copies = [0] * data.n_folds, data.copies, [f % len(target) for f in range(data.n_folds)]
        device = data.device
        self.start = torch.tensor(
            [[copy * data.n_rows for copy in own] for own in copies], device=device
        )[..., None]
        self.order = torch.empty((3, data.n_folds, longest), dtype=torch.int64, device=device)
        self.counted = torch.as_tensor(self.lengths).to(device, torch.float64)
        self.weights = None if data.weights is None else data.weights.double().contiguous()
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.epoch: int | None = None
        self.host = HostRows(self.inputs, device) if data.on_host else None
        self.kernel: Kernel | None = None
        self._set_sizes(np.minimum(capped, self.lengths))

    def _set_sizes(self, sizes: np.ndarray) -> None:
        """Take the members' batch sizes (F, C), held to their rows, and move to the device what
        follows."""
        self.sizes = sizes
        self.steps = steps_of(self.lengths, sizes, self.least_rows)  # (F, C) steps an epoch
        self.active_until = torch.as_tensor(self.steps).contiguous().to(self.data.device)
        taken = np.full_like(self.lengths, sizes.max()) if self.shared else sizes  # (F, 1 or C)
        self.host_taken = taken
        self.taken = torch.as_tensor(taken).contiguous().to(self.data.device)
        self.positions = torch.arange(int(sizes.max()), device=self.data.device)
        self.shapes = [self._shape(taken, step) for step in range(int(self.steps.max()))]

    def _shape(self, taken: np.ndarray, step: int) -> StepShape:
        counts = np.clip(self.lengths - step * taken, 0, taken)  # (F, 1 or C) rows that count
        if self.exact:
            counts[step >= self.steps[:, :1]] = 0
        ends = np.flatnonzero(np.diff(counts[:, 0])) + 1  # of runs of equally many rows
        parts = []
        for begin, end in pairwise([0, *(ends.tolist() if self.exact else ()), len(counts)]):
            rows = int((counts[begin:end] if self.shared else taken).max())
            if rows > 0:
                parts.append(Part(begin, end, rows, bool((counts[begin:end] == rows).all())))
        return StepShape(tuple(parts), bool((step < self.steps).all()))

    def prepare(self) -> None:
        """Make ready for steps that are recorded: on a GPU a kernel takes the place of the
        operations that are here."""
        if self.data.device.type == "cuda" and self.host is None:
            compiled = kernels(SOURCE, ("minibatch",), self.data.device, self.data.dtype)
            self.kernel = None if compiled is None else compiled[0]

    def select(self, keep: np.ndarray) -> None:
        """Go on with the trials ``keep`` alone."""
        self._set_sizes(self.sizes[:, keep])

    def begin(self, epoch: int) -> None:
        """Draw the order of an epoch, and start at its first step."""
        self.order.copy_(row_order(self.data, self.seed, epoch) + self.start)
        self.step.zero_()
        self.epoch = epoch
        if self.host is not None:
            self.host.begin(self.order[1])

    def at(self, epoch: int, step: int) -> tuple[Batch, ...]:
        """Return the minibatches of one step, in whatever order steps are asked for."""
        if self.epoch != epoch:
            self.begin(epoch)
        self.step.fill_(step)
        return self.parts(self.shapes[step], (epoch, step))

    def active(self) -> Tensor:
        """Return who takes the step that the counter says, (F, C) bool."""
        return self.step < self.active_until

    def parts(self, shape: StepShape, key: tuple[int, int]) -> tuple[Batch, ...]:
        """Return the minibatches of the step that the counter says."""
        return tuple(self._batch(part, key) for part in shape.parts)

    def _batch(self, part: Part, key: tuple[int, int]) -> Batch:
        # Only where it is recorded: a step as it is then checks the kernel, before the first
        # replay.
        if self.kernel is not None and torch.cuda.is_current_stream_capturing():
            (_, of_x, of_y), share = self._by_kernel(self.kernel, part)
        else:
            (_, of_x, of_y), share = self._rows(part)
        if self.host is not None:
            last = key[1] + 1 == len(self.shapes)
            gathered = self.host.take(part.folds, key[1], part.rows, self.host_taken, last=last)
        else:
            gathered = [x.index_select(0, of_x.flatten()) for x in self.inputs]
        inputs = (x.view(*of_x.shape, *x.shape[1:]) for x in gathered)  # as their folds read them
        read = tuple(self.data.read(i, x, part.folds).flatten(0, 1) for i, x in enumerate(inputs))
        y = self.target.index_select(0, of_y.flatten())
        return Batch(
            read, y.view(of_x.shape[:2].numel(), part.rows, *y.shape[1:]), share, part.folds, key
        )

    def _rows(self, part: Part) -> tuple[Tensor, Tensor | float]:
        """Return where the rows of a minibatch are in weights, inputs and target, (3, F, 1 or C,
        B), and shares."""
        begin = self.step * self.taken[part.folds]  # (F, 1 or C)
        last = self.order.shape[-1] - 1
        asked = (begin[..., None] + self.positions[: part.rows]).clamp_max(last)  # (F, 1 or C, B)
        rows = (
            self.order[:, part.folds]
            .gather(2, asked.flatten(1).expand(3, -1, -1))
            .view(3, *asked.shape)
        )
        if self.weights is None and part.full:
            return rows, 1 / part.rows
        # In double precision: sums of weights may leave the range of single precision, their shares
        # do not.
        counts = (
            (self.counted[part.folds] - begin)
            .clamp_min(0)
            .minimum(self.taken[part.folds])[..., None]
        )
        weights = self.positions[: part.rows] < counts
        total = counts
        if self.weights is not None:
            weights = weights * self.weights[part.folds, None].expand(-1, rows.shape[2], -1).gather(
                2, rows[0]
            )
            total = weights.sum(2, keepdim=True)
        # A minibatch whose weights are all zero has no slope rather than 0/0.
        total = total.clamp_min(torch.finfo(total.dtype).tiny)
        return rows, (weights / total).to(self.data.dtype)[..., None]

    def _by_kernel(self, kernel: Kernel, part: Part) -> tuple[Tensor, Tensor | float]:
        """Return what ``_rows`` does, in one launch."""
        size = (part.end - part.begin, self.taken.shape[1], part.rows)
        rows = self.order.new_empty((3, *size))
        share = self.order.new_empty((*size, 1), dtype=self.data.dtype)
        weighted, (_, folds, length) = self.weights is not None, self.order.shape
        shares = weighted or not part.full
        numbers = [*size, part.begin, folds, length, self.data.n_rows, int(shares), int(weighted)]
        weights = self.counted if self.weights is None else self.weights
        tensors = [self.step, self.order, self.taken, self.counted, weights, rows, share]
        launch(kernel, rows[0].numel(), [*numbers, *tensors])
        return rows, share if shares else 1 / part.rows


def for_members(x: Tensor, trials: int) -> Tensor:
    """Return the rows (F, B, ...) that a fold's members share once a member, (P, B, ...)."""
    return x[:, None].expand(-1, trials, *x.shape[1:]).flatten(0, 1)


def steps_of(lengths: np.ndarray, sizes: np.ndarray, least_rows: int = 1) -> np.ndarray:
    """Return the steps of an epoch of so many rows, in minibatches of so many of which each has
    ``least_rows``."""
    left_out = (lengths % sizes > 0) & (lengths % sizes < least_rows)
    steps: np.ndarray = -(-lengths // sizes) - left_out
    return steps


def row_order(data: Dataset, seed: int, epoch: int) -> Tensor:
    """Return each fold's training rows in the order of an epoch, (F, longest fold), as positions in
    the data.

    A shorter fold repeats its first row at its end.
    """
    lengths = [len(fold.train) for fold in data.folds]
    drawn = {
        n: torch.randperm(n, generator=stream(seed, "rows", n, epoch), device="cpu")
        for n in set(lengths)
    }
    order = torch.stack([fold.train[:1].expand(max(lengths)) for fold in data.folds])
    for f, (fold, n) in enumerate(zip(data.folds, lengths)):
        order[f, :n] = fold.train[drawn[n].to(data.device)]
    return order
