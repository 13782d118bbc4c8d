"""Store the scored outputs of each trial's best epoch while trials train together.

In shapes, C counts trials, F folds, m validation rows of a fold, and K outputs per row.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gputune.ground.annotations import FloatArray
from gputune.ground.types import Outputs


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
        self.epochs = np.zeros(len(means), dtype=np.int64)
        self.places: dict[int, int] = {}
        self.values: Tensor | None = None

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
        rows = np.flatnonzero(means > self.means[list(trials)])
        if not rows.size:
            return
        better = np.asarray(trials)[rows]
        self.means[better] = means[rows]
        self.epochs[better] = epoch
        index = torch.from_numpy(rows).to(outputs[0].device)
        parts = [one.index_select(0, index).reshape(len(rows), one.shape[1], -1) for one in outputs]
        # F parts (T, m, K) -> (T, rows of all folds, K)
        values = torch.cat(parts, 1).float()
        if self.values is None:
            most = min(len(self.means), self.limit // max(1, values[0].nbytes))
            self.values = values.new_empty(most, *values.shape[1:])
        most = len(self.values)
        best = set(np.argsort(-self.means, kind="stable")[:most].tolist())
        self.places = {trial: place for trial, place in self.places.items() if trial in best}
        # A trial that stays among the best keeps its place. A new one takes a free place.
        free = sorted(set(range(most)) - set(self.places.values()))
        kept = [row for row, trial in enumerate(better.tolist()) if trial in best]
        self.places |= zip(
            [trial for trial in better[kept].tolist() if trial not in self.places], free
        )
        self.values[[self.places[trial] for trial in better[kept].tolist()]] = values[kept]

    def of_trials(self, index: Sequence[int]) -> dict[int, Outputs]:
        """Return the stored outputs by trial number. ``index`` (C,) holds the trial numbers."""
        if self.values is None:
            return {}
        values = self.values.cpu().numpy()
        return {
            index[c]: Outputs(int(self.epochs[c]), values[place].copy())
            for c, place in self.places.items()
        }
