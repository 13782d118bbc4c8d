"""Training that ends where its loss stalls: each member by itself, while those beside it in its chunk go on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gputune.data.dataset import Dataset
from gputune.engine.job import Job
from gputune.engine.train import Trained
from gputune.scoring.losses import row_losses
from gputune.scoring.scoring import Member, Scoring

LARGEST = float(np.finfo(np.float64).max)
"""In place of a loss that is no number: a member that diverges leaves its trial in the other folds alone."""


@dataclass(frozen=True)
class Patience:
    """When training has converged, in scikit-learn's words.

    It ends after more than ``epochs`` epochs one after another whose loss was not below the least by ``tol``.
    """

    tol: float
    epochs: int


class TrainingLoss(Scoring):
    """Minus the loss on the training rows, which are a dataset's validation rows here, by their weights."""

    def __init__(self) -> None:
        super().__init__("neg_loss", None, None, None)

    def __call__(self, data: Dataset, fold: int, outputs: Tensor, member: Member | None = None) -> Tensor:
        """Return the scores (C,), float64, of outputs (C, m, K); of numbers half the squared error, standardised."""
        del member
        rows = data.folds[fold].valid
        outputs = outputs.double()
        if data.present is not None:
            outputs = outputs.masked_fill(~data.present[fold], -torch.inf)
        y = data.y[rows] if data.y.dim() == 1 else data.y[fold, rows].double()
        losses = row_losses(outputs, y.expand(outputs.shape[:2])) / (1 if data.y.dim() == 1 else 2)
        weights = torch.ones(len(rows), dtype=torch.float64, device=losses.device)
        if data.weights is not None:
            weights = data.weights[fold, rows].double()
        mean = (losses * weights).sum(1) / weights.sum()
        return -mean.nan_to_num(LARGEST, LARGEST).clamp(max=LARGEST)


class Stopping:
    """What happens after every epoch of a chunk: members whose loss stalls end, and their parameters are kept.

    patiences  of the trials (C)
    epochs     (C, F) that each member has trained
    rows       (C, F, N) its parameters at its end
    stalled    (C, F) epochs without an improvement
    """

    def __init__(self, job: Job, patiences: Sequence[Patience], folds: int) -> None:
        self.job = job
        self.tol = np.array([p.tol for p in patiences])[:, None]
        self.most = np.array([p.epochs for p in patiences])[:, None]
        self.best = np.full((len(patiences), folds), np.inf)
        self.stalled = np.zeros((len(patiences), folds), dtype=int)
        self.epochs = np.zeros((len(patiences), folds), dtype=int)
        self.rows: Tensor | None = None

    def __call__(self, trained: Trained) -> bool | np.ndarray:
        """Return which of the trials that are still there have a member that goes on; True where time is over."""
        alive = np.array(trained.alive)
        loss = -trained.curves[alive, trained.epochs - 1]
        goes_on = self.epochs[alive] == 0
        best, stalled = self.best[alive], self.stalled[alive]
        stalled = np.where(goes_on, np.where(loss > best - self.tol[alive], stalled + 1, 0), stalled)
        self.stalled[alive], self.best[alive] = stalled, np.where(goes_on, np.fmin(best, loss), best)
        ends = goes_on & ((stalled > self.most[alive]) | (trained.epochs == self.job.epochs))
        if ends.any():
            self._keep(trained, alive, ends)
        return self.job.is_over() or (self.epochs[alive] == 0).any(1)

    def _keep(self, trained: Trained, alive: np.ndarray, ends: np.ndarray) -> None:
        rows = trained.network.blocks.to_rows(trained.scored).cpu()
        if self.rows is None:
            self.rows = rows.new_empty((*self.best.shape, rows.shape[2]))
        self.epochs[alive] = np.where(ends, trained.epochs, self.epochs[alive])
        for c, f in np.argwhere(ends):
            self.rows[alive[c], f] = rows[c, f]
