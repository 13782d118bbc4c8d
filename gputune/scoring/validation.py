"""The scores of a chunk: all members on the validation rows of their folds, and one wait for the device."""

from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gputune.data.dataset import Dataset
from gputune.memory import free_of_gpu
from gputune.population.network import Network
from gputune.scoring.scoring import Scoring
from gputune.types import Params

_BLOCK_BYTES = 4 << 20  # of one layer's validation outputs: what stays in a core's cache
_GPU_BLOCK_BYTES = 256 << 20  # on a GPU, where a small block is launches and no work
_GPU_SHARE = 32  # that part of its free memory at most: several layers' outputs are there at once
_KEPT_NUMBERS = 1 << 25  # of all validation rows, from which they are gathered anew at every epoch


class Validation:
    """Scores members on the validation rows of their folds, which are kept as they are gathered where they are few."""

    def __init__(self, data: Dataset, scoring: Scoring | None) -> None:
        self.data, self.scoring = data, scoring
        self.block_bytes = _block_bytes(data.device)
        self.kept: dict[tuple[int, int], tuple[tuple[Tensor, ...], ...]] = {}

    def scores(self, network: Network, params: Params, trials: int) -> np.ndarray:
        """Return the scores (C, F) of all members of a network of so many trials."""
        assert self.scoring is not None
        columns = []
        block = _block_rows(self.data, network, trials, self.block_bytes)
        for fold in range(self.data.n_folds):
            blocks = [network.outputs(params, fold, part) for part in self._parts(fold, block)]
            outputs = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
            columns.append(self.scoring(self.data, fold, outputs, partial(network.member, params, fold)))
        return torch.stack(columns, 1).cpu().numpy()  # the only device sync of an epoch

    def _parts(self, fold: int, rows: int) -> Iterable[tuple[Tensor, ...]]:
        """Return the validation rows of a fold, so many at a time."""
        parts = (self.data.rows(fold, part) for part in torch.split(self.data.folds[fold].valid, rows))
        if self.data.n_rows * self.data.row_numbers > _KEPT_NUMBERS:
            return parts
        if (fold, rows) not in self.kept:
            self.kept[fold, rows] = tuple(parts)
        return self.kept[fold, rows]


def _block_rows(data: Dataset, network: Network, trials: int, block_bytes: int) -> int:
    """Rows to evaluate at a time, so that one layer's outputs of all trials stay within the block."""
    if not network.alone:
        return data.n_rows
    widest = max(data.row_numbers, network.widest)
    return max(64, block_bytes // (trials * widest * data.dtype.itemsize))


def _block_bytes(device: torch.device) -> int:
    """Bytes of one layer's outputs that are there at once; a power of two, so that bits do not follow free memory."""
    if device.type != "cuda":
        return _BLOCK_BYTES
    share = max(_BLOCK_BYTES, free_of_gpu(device) // _GPU_SHARE)
    return int(min(_GPU_BLOCK_BYTES, 1 << (share.bit_length() - 1)))
