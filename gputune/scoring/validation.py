"""Run all members on the validation rows of their folds, block by block, and score the outputs.

A member is one trial on one fold. In shapes, C counts trials, F folds, M metrics, m validation rows
of a fold, and K outputs per row.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from gputune.data.dataset import Dataset
from gputune.ground.annotations import FloatArray
from gputune.ground.device import SMALL_LOSS, free_of_gpu, on_one_thread
from gputune.ground.seeding import keyed_draws
from gputune.ground.types import EvaluationKey, Outputs, Params, Task
from gputune.population.outputs import is_one_logit, mean_outputs
from gputune.population.population import Ensemble, Network
from gputune.scoring.scoring import Scoring, TrialModel

# Limits of one layer's validation outputs. On a CPU a block stays in the cache of a core. On a GPU
# a small block would cost launches and do little work. At most 1/32 of the free memory is used,
# because the outputs of several layers exist at the same time.
_BLOCK_BYTES = 4 << 20
# A call on fewer than 64 rows costs more than its work, unless large frozen layers make the rows wide:
# 11 trials of a BERT's last layer take 20% less time in blocks of 8 texts than of 32.
_SHARED_BLOCK_BYTES = 8 << 20
_GPU_BLOCK_BYTES = 256 << 20
_GPU_SHARE = 32
_RELEASED_BYTES = 16 << 20  # kept rows beyond this are freed when a training ends
_KEPT_NUMBERS = 1 << 25  # larger inputs are gathered again at every epoch instead of kept


class Validation:
    """Runs the members (one trial on one fold each) on their validation rows, and scores them.

    Validation rows that are small enough stay in memory for the next epoch.
    """

    def __init__(self, data: Dataset, scoring: Scoring | None) -> None:
        self.data = data
        self.scoring = scoring
        self.block_bytes = _BLOCK_BYTES
        # A power of two, so that small changes of the free memory do not change the bits.
        if data.device.type == "cuda":
            share = max(_BLOCK_BYTES, free_of_gpu(data.device) // _GPU_SHARE)
            self.block_bytes = min(_GPU_BLOCK_BYTES, 1 << (share.bit_length() - 1))
        self.kept: dict[tuple[int, int], tuple[tuple[Tensor, ...], ...]] = {}
        self.outputs: Sequence[Tensor] = []
        """The last scored outputs by fold, each (C, m, K). An empty list if no outputs are
        stored."""

    def release(self) -> None:
        """Free the kept validation rows if they are large. The next scores read them again."""
        kept = (x for blocks in self.kept.values() for block in blocks for x in block)
        if sum(x.nbytes for x in kept) > _RELEASED_BYTES:
            self.kept.clear()

    def scores(
        self,
        network: Network,
        params: Params,
        trials: int,
        computed: Sequence[Tensor] | None = None,
        *,
        epoch: int = 0,
    ) -> np.ndarray:
        """Evaluate all members, and return their scores (C, F), or (C, F, M) for M metrics.

        Args:
            network: The network of the members.
            params: The parameters of the members.
            trials: The number of trials, C.
            computed: The outputs (C, m, K) of each fold if they are already computed. F counts the
                folds of the study: with replicas, the outputs of S * R folds become those of F = S.
            epoch: The number of epochs that the members have trained. This number seeds the random
                numbers that the modules draw.
        """
        assert self.scoring is not None
        columns = []
        kept = []
        block = self._block_rows(network, trials)
        for split in range(self.data.n_splits):
            folds = range(split, self.data.n_folds, self.data.n_splits)
            of_replicas = []
            for fold in folds:
                if computed is not None:
                    of_replicas.append(computed[fold])
                else:
                    of_replicas.append(self._outputs_of(network, params, fold, epoch, block))
            outputs = of_replicas[0]
            member: TrialModel = partial(network.member, params, split)
            if len(folds) > 1:
                outputs = self._mean(of_replicas, split)
                member = partial(_mean_member, network, params, folds, self.data.task)
            with on_one_thread(if_small=outputs.numel() <= SMALL_LOSS):
                columns.append(self.scoring.metrics(self.data, split, outputs, member))
            if self.scoring.kept_bytes:
                kept.append(outputs)
        self.outputs = kept
        return torch.stack(columns, 1).cpu().numpy()  # the only device sync of an epoch

    def _outputs_of(
        self, network: Network, params: Params, fold: int, epoch: int, block: int
    ) -> Tensor:
        """Return the outputs (C, m, K) on the validation rows of a fold, computed in blocks of
        ``block`` rows."""
        outputs = [
            self._outputs(network, params, part, (epoch, fold, number * block), block)
            for number, part in enumerate(self.blocks(fold, block))
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def _mean(self, outputs: Sequence[Tensor], split: int) -> Tensor:
        """Return outputs for the mean prediction of the replicas, (C, m, K), from the outputs of
        each replica."""
        stacked = torch.stack(list(outputs))  # (R, C, m, K)
        if self.data.present is not None and not is_one_logit(stacked, self.data.task, 3):
            stacked = stacked.masked_fill(~self.data.present[split], -torch.inf)
        weights = torch.ones(len(stacked), dtype=torch.float64, device=stacked.device)
        weights /= len(stacked)
        return mean_outputs(stacked, weights, self.data.task, 3)

    def _outputs(
        self,
        network: Network,
        params: Params,
        part: Sequence[Tensor],
        key: EvaluationKey,
        block: int,
    ) -> Tensor:
        """Run the network on a block of a fold's validation rows, and return its outputs (C, m, K).

        A module that is known to write into its inputs receives copies of the rows. If a module
        writes into the rows for the first time, the method reads the rows again and calls the
        network a second time.
        """
        _, fold, start = key
        before = _versions(part)
        outputs = network.outputs(params, fold, part, key)
        if _versions(part) == before:
            return outputs
        self.kept.pop((self.data.split_of(fold), block), None)
        rows = self.data.folds[fold].valid[start : start + block]
        return network.outputs(params, fold, self.data.rows(fold, rows), key)

    def blocks(self, fold: int, rows: int) -> Iterable[tuple[Tensor, ...]]:
        """Return the validation rows of a fold in blocks of at most ``rows`` rows."""
        fold = self.data.split_of(fold)  # replicas share their rows
        valid = self.data.folds[fold].valid
        parts = (self.data.rows(fold, part) for part in torch.split(valid, rows))
        if self.data.n_rows * self.data.row_numbers > _KEPT_NUMBERS:
            return parts
        if (fold, rows) not in self.kept:
            self.kept[fold, rows] = tuple(parts)
        return self.kept[fold, rows]

    def _block_rows(self, network: Network, trials: int) -> int:
        """Return the number of validation rows that the network evaluates at a time.

        One layer's outputs of all trials then stay within ``block_bytes``, if the rows are narrow.
        """
        if not network.alone:
            return self.data.n_rows
        row_numbers = self.data.row_numbers
        shares_rows = network.traits is not None and network.traits.common_rows
        if shares_rows:
            row_numbers = -(-row_numbers // trials)  # one copy for all trials
        widest = max(row_numbers, network.widest)
        if network.evaluation_draws:
            return drawing_rows(widest)
        row_bytes = trials * widest * self.data.dtype.itemsize
        least = min(64, max(4, _SHARED_BLOCK_BYTES // row_bytes)) if shares_rows else 64
        return max(least, self.block_bytes // row_bytes)


def _mean_member(
    network: Network, params: Params, folds: Sequence[int], task: Task, trial: int
) -> nn.Module:
    """Return one trial's model that predicts the mean of its replicas, one on each of ``folds``."""
    members = [network.member(params, fold, trial) for fold in folds]
    return Ensemble(members, [1 / len(folds)] * len(folds), task)


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """Return the version counters of tensors (0 without a counter), which reveal writes to them."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


class BestOutputs:
    """The validation outputs of each trial's best epoch so far, for trials that train together.

    The outputs cover the validation rows of all folds.

    If the outputs need more than ``limit`` bytes, only the outputs of the best trials are stored.
    ``means`` (C,) are the best mean validation scores of earlier epochs whose outputs are unknown,
    or -inf without such epochs.
    """

    def __init__(self, limit: int, means: FloatArray) -> None:
        self.limit = limit
        self.means = means
        self.kept: dict[int, tuple[int, Tensor]] = {}  # of each trial: epoch and outputs

    def take(
        self,
        epoch: int,
        trials: Sequence[int],
        means: FloatArray,
        outputs: Sequence[Tensor],
    ) -> None:
        """Store the outputs of trials that have reached their best mean validation score so far.

        Args:
            epoch: The epoch in which the outputs were scored.
            trials: The indexes of T trials among the trials that train together.
            means: Their mean validation scores, (T,).
            outputs: Their outputs for each fold, (T, m, K).
        """
        rows = np.flatnonzero(means > self.means[list(trials)]).tolist()
        for row in rows:
            self.means[trials[row]] = means[row]
        row_bytes = sum(part[0].numel() for part in outputs) * 4  # as float32
        best = set(np.argsort(-self.means, kind="stable")[: self.limit // max(1, row_bytes)])
        self.kept = {trial: kept for trial, kept in self.kept.items() if trial in best}
        for row in rows:
            if trials[row] in best:
                # F parts (m, K) -> (rows of all folds, K)
                parts = [part[row].reshape(part.shape[1], -1) for part in outputs]
                self.kept[trials[row]] = epoch, torch.cat(parts).float()

    def of_trials(self, index: Sequence[int]) -> dict[int, Outputs]:
        """Return the stored outputs by trial number. ``index`` (C,) holds the trial numbers."""
        return {
            index[trial]: Outputs(epoch, values.cpu().numpy())
            for trial, (epoch, values) in self.kept.items()
        }


def drawing_rows(widest: int) -> int:
    """Return the number of rows to evaluate at a time if a forward pass draws random numbers.

    Each block of rows has its own random numbers. Therefore the size of a block must not depend on
    the device, or on the number of trials that train together. ``widest`` is the largest number of
    values that a layer has for one row.
    """
    return max(64, min(256, (1 << 18) // widest))


@dataclass(frozen=True)
class EvaluationDraws:
    """Seeds for evaluating plain modules on the CPU with the same random numbers as during their
    search.

    So an evaluation repeats the scores that the search computed for its members (one trial on one
    fold each).

    Attributes:
        seed: The seed of the search.
        epoch: The number of epochs that the members have trained.
        rows: The number of rows that are evaluated at a time.
        host: If True, the modules also draw from the generators of Python and NumPy.
    """

    seed: int
    epoch: int
    rows: int
    host: bool

    def seeded(self, fold: int, start: int) -> AbstractContextManager[None]:
        """Seed the random number generators for one block of rows, inside a ``with`` block.

        ``start`` is the position of the first row of the block among the validation rows of the
        fold.
        """
        key = self.epoch, fold, start
        return keyed_draws(torch.device("cpu"), self.seed, "evaluation", *key, host=self.host)
