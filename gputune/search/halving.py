"""Successive halving: its options, when it decides, and who stays.

All trials of a bracket train together; at each rung the fold mean of the score at that epoch decides which of them
go on. Sources: Jamieson and Talwalkar (2016), arXiv:1502.07943; brackets: Li et al. (2018), arXiv:1603.06560.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gputune.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Halving:
    """Options of ``tune(method=...)``: at each rung the best 1/``factor`` of the trials go on.

    factor       what the number of trials is divided by, and the epochs multiplied by, from rung to rung
    min_epochs   epochs before the first rung; None: max(1, max_epochs // 27)
    brackets     bracket s has its first rung at min_epochs * factor**s, so that some trials are not judged early;
                 every bracket gets about the same number of epochs to spend

    Early rungs favour what learns fast at first: small batches, which take more steps an epoch, and large rates.
    """

    factor: float = 3
    min_epochs: int | None = None
    brackets: int = 1

    def __post_init__(self) -> None:
        if not _is_number(self.factor) or not 1 < self.factor < math.inf:
            raise InputError(f"Halving(factor=...) must be a finite number > 1, got {self.factor!r}.")
        for name in ("min_epochs", "brackets"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"Halving({name}=...) must be an integer >= 1, got {value!r}.")

    def rungs(self, max_epochs: int) -> list[list[int]]:
        """Return the epochs of each bracket's rungs, all below ``max_epochs``; the last brackets may have none.

        Raises InputError where ``min_epochs`` leaves no room, or there are more brackets than rungs.
        """
        first = self.min_epochs or max(1, max_epochs // 27)
        if first >= max_epochs > 1:
            raise InputError(
                f"Halving(min_epochs=...) must be below max_epochs={max_epochs}, got {first}; lower it, or "
                "train longer."
            )
        epochs: list[int] = []
        rung = float(first)
        while rung < max_epochs:
            if not epochs or int(rung) > epochs[-1]:
                epochs.append(int(rung))
            rung *= self.factor
        if self.brackets > len(epochs) + 1:
            raise InputError(
                f"Halving(brackets=...) must be at most {len(epochs) + 1} for max_epochs={max_epochs}, which has rungs "
                f"at {epochs}, got {self.brackets}; ask for fewer, or train longer."
            )
        return [epochs[s:] for s in range(self.brackets)]

    def brackets_of(self, n_trials: int, max_epochs: int) -> list[int]:
        """Return the bracket of each trial, by its number: every bracket gets about the same number of epochs."""
        costs = [self._cost(rungs, max_epochs) for rungs in self.rungs(max_epochs)]
        shares = np.cumsum([1 / cost for cost in costs])
        # Of every run of trials, however long, about its share goes to each bracket: more trials move no other.
        places = (np.arange(n_trials) * (math.sqrt(5) - 1) / 2) % 1
        found: list[int] = np.searchsorted(shares / shares[-1], places, side="right").tolist()
        return found

    def _cost(self, rungs: Sequence[int], max_epochs: int) -> float:
        """Epochs that one trial of a bracket takes on average."""
        edges = [0, *rungs, max_epochs]
        return sum((b - a) / self.factor**i for i, (a, b) in enumerate(zip(edges[:-1], edges[1:])))


def survivors(means: np.ndarray, factor: float) -> np.ndarray:
    """Return which trials (C,) go on, by their fold means at a rung: the best 1/factor, one at least.

    NaN is never among them; the earlier trial wins a tie.
    """
    finite = int(np.isfinite(means).sum())
    count = min(finite, max(1, int(len(means) / factor)))
    order = np.argsort(np.where(np.isfinite(means), -means, np.inf), kind="stable")
    stays = np.zeros(len(means), bool)
    stays[order[:count]] = True
    return stays


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
