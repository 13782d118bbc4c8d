"""Minibatches of inputs that lie in main memory while members train on a device: gathered one step ahead."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from torch import Tensor

from gputune.data.dataset import staged


class HostRows:
    """Gathers the rows of steps: ``order`` (F, longest fold) are positions in ``inputs``, each (V*n, ...).

    ``taken`` (F, 1 or C) are the rows of a member's minibatch. While a step trains, the rows of the next are gathered
    and sent by a thread of their own; of a CUDA device they are in pinned memory before.
    """

    def __init__(self, inputs: Sequence[Tensor], device: torch.device) -> None:
        self.inputs, self.device = inputs, device
        self.order = np.empty((0, 0), dtype=np.int64)
        self.ahead: dict[tuple[int, int, int], Future[list[Tensor]]] = {}

    def begin(self, order: Tensor) -> None:
        """Take the order of an epoch."""
        self.order = order.cpu().numpy()
        self.ahead.clear()

    def take(self, folds: slice, step: int, rows: int, taken: np.ndarray, *, last: bool) -> list[Tensor]:
        """Return rows (F * (1 or C) * B, ...) of each input on the device; unless ``last`` the next step's are begun.

        The step after this one is taken to have as many rows; where it has not, it is gathered when it is asked for.
        """
        future = self.ahead.pop((folds.start, step, rows), None)
        result = self._gather(folds, step, rows, taken) if future is None else future.result()
        if not last:
            future = _thread().submit(self._gather, folds, step + 1, rows, taken)
            self.ahead[folds.start, step + 1, rows] = future
        return result

    def _gather(self, folds: slice, step: int, rows: int, taken: np.ndarray) -> list[Tensor]:
        asked = (step * taken[folds])[..., None] + np.arange(rows)  # (F, 1 or C, B)
        asked = np.minimum(asked, self.order.shape[1] - 1).reshape(len(asked), -1)
        positions = torch.from_numpy(np.take_along_axis(self.order[folds], asked, 1).ravel())
        return [staged(x.index_select(0, positions), self.device) for x in self.inputs]


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="gputune-rows")
