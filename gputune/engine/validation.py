"""The scores of a chunk: all members on the validation rows of their folds, and one wait for the device."""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from gputune.data.dataset import Dataset
from gputune.engine.network import Network
from gputune.engine.scoring import Scoring
from gputune.types import Params

_BLOCK_BYTES = 4 << 20  # of one layer's validation outputs: what stays in a core's cache


class Validation:
    """The validation rows of every fold, gathered once; of none where nothing is scored (``scoring`` None)."""

    def __init__(self, data: Dataset, scoring: Scoring | None) -> None:
        self.data, self.scoring = data, scoring
        copies = zip(data.copies, data.folds) if scoring is not None else ()
        self.rows = [data.x[copy].index_select(0, fold.valid) for copy, fold in copies]

    def scores(self, network: Network, params: Params, trials: int) -> np.ndarray:
        """Return the scores (C, F) of all members of a network of so many trials."""
        assert self.scoring is not None
        columns = []
        for fold, x in enumerate(self.rows):
            parts = torch.split(x, _block_rows(x, network, trials))
            blocks = [network.outputs(params, fold, part) for part in parts]
            outputs = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
            columns.append(self.scoring(self.data, fold, outputs, partial(network.member, params, fold)))
        return torch.stack(columns, 1).cpu().numpy()  # the only device sync of an epoch


def _block_rows(x: Tensor, network: Network, trials: int) -> int:
    """Rows to evaluate at a time, so that one layer's outputs of all trials stay within the block."""
    widest = max([x.shape[1], *(block.shape[-1] for block in network.blocks.blocks)])
    return max(64, _BLOCK_BYTES // (trials * widest * x.element_size()))
