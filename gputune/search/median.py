"""The median rule: its options, when it decides, and who stays. It is milder than successive halving.

All trials train together; one whose best fold mean so far is below the median of the fold means at this epoch leaves.
Sources: Golovin et al. (2017), "Google Vizier", the median stopping rule; Optuna's MedianPruner, which has the best so
far against the median at the same step. Departure: trials that left before count in the median with the last fold mean
they had. There are no earlier, completed trials to compare with where all train at the same time, and a median of those
that are left would send half of them away each time.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gputune.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Median:
    """Options of ``tune(method=...)``: trials whose best fold mean is below the median of all leave.

    min_epochs   epochs before the first decision; None: max(1, max_epochs // 10)
    every        epochs between two decisions; None: as many as before the first
    min_trials   with fewer trials than this nobody leaves

    Early decisions favour what learns fast at first: small batches, which take more steps an epoch, and large rates.
    """

    min_epochs: int | None = None
    every: int | None = None
    min_trials: int = 5

    def __post_init__(self) -> None:
        for name in ("min_epochs", "every", "min_trials"):
            value = getattr(self, name)
            if value is None and name != "min_trials":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"Median({name}=...) must be an integer >= 1, got {value!r}.")

    def stops(self, max_epochs: int) -> list[int]:
        """Return the epochs of the decisions, all below ``max_epochs``.

        Raises InputError where ``min_epochs`` leaves no room.
        """
        first = self.min_epochs or max(1, max_epochs // 10)
        if first >= max_epochs > 1:
            raise InputError(
                f"Median(min_epochs=...) must be below max_epochs={max_epochs}, got {first}; lower it, or train longer."
            )
        return list(range(first, max_epochs, self.every or first))


def below_the_median(epoch: int, means: Mapping[int, np.ndarray], least: int) -> set[int]:
    """Return which trials leave at an epoch, by the curves of their fold means; those that ended earlier stay ended.

    NaN, of trials that have diverged, counts as worse than any number, and ``least`` is the number of trials from which
    there is a decision.
    """
    if len(means) < least:
        return set()
    last = np.array([mean[min(epoch, len(mean)) - 1] if len(mean) else -np.inf for mean in means.values()])
    middle = float(np.median(np.where(np.isfinite(last), last, -np.inf)))
    reached = {number: mean[:epoch] for number, mean in means.items() if len(mean) >= epoch}
    return {number for number, mean in reached.items() if not np.max(mean) >= middle}
