"""The outputs of a chunk's members on validation rows while it trains, of each trial those of its best epoch so far."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gputune.scoring.outputs import Outputs


class BestOutputs:
    """The outputs of each trial of a chunk at its best epoch, of at most ``limit`` bytes: those of the best trials.

    ``means`` (C,) are the best fold means so far, of epochs whose outputs are not known; -inf where there are none.
    """

    def __init__(self, limit: int, means: NDArray[np.float64]) -> None:
        self.limit, self.means = limit, means
        self.epochs = np.zeros(len(means), dtype=np.int64)
        self.places: dict[int, int] = {}
        self.values: Tensor | None = None

    def take(self, epoch: int, trials: Sequence[int], means: NDArray[np.float64], outputs: Sequence[Tensor]) -> None:
        """Take the outputs (T, m, K) of each fold, of those ``trials`` whose fold means (T,) are better than before."""
        rows = np.flatnonzero(means > self.means[list(trials)])
        if not rows.size:
            return
        better = np.asarray(trials)[rows]
        self.means[better], self.epochs[better] = means[rows], epoch
        index = torch.from_numpy(rows).to(outputs[0].device)
        parts = [one.index_select(0, index).reshape(len(rows), one.shape[1], -1) for one in outputs]
        values = torch.cat(parts, 1).float()
        if self.values is None:
            most = min(len(self.means), self.limit // max(1, values[0].nbytes))
            self.values = values.new_empty(most, *values.shape[1:])
        most = len(self.values)
        best = set(np.argsort(-self.means, kind="stable")[:most].tolist())
        self.places = {trial: place for trial, place in self.places.items() if trial in best}
        free = iter(sorted(set(range(most)) - set(self.places.values())))
        kept = [row for row, trial in enumerate(better.tolist()) if trial in best]
        for trial in better[kept].tolist():
            if trial not in self.places:
                self.places[trial] = next(free)
        self.values[[self.places[trial] for trial in better[kept].tolist()]] = values[kept]

    def of_trials(self, index: Sequence[int]) -> dict[int, Outputs]:
        """Return what is kept, each trial by its entry of ``index`` (C,)."""
        if self.values is None:
            return {}
        values = self.values.cpu().numpy()
        places = self.places.items()
        return {index[c]: Outputs(int(self.epochs[c]), values[place].copy()) for c, place in places}
