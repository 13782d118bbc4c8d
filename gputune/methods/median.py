"""The median stopping rule: a trial stops if its best score is below the median."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from gputune.ground.errors import check_count
from gputune.methods.stopping import MIN_EPOCHS, Curves, StoppingRule, first_epoch
from gputune.tuning.rules import STOPPING, Rule


@dataclass(frozen=True, kw_only=True)
class Median(StoppingRule):
    """Options of the median stopping rule, for ``tune(method=...)`` and ``search(method=...)``.

    A trial stops if its best mean validation score so far is below the median of all trials.

    Sources: Golovin et al. (2017), "Google Vizier", the median stopping rule; Optuna's
    MedianPruner, which also compares the best score so far with the median at the same step.

    Departure: trials that stopped earlier count in the median with their last mean validation
    score. All trials train at the same time, so there are no completed trials to compare with. A
    median of only the remaining trials would stop half of them each time.

    Early decisions favor trials that learn fast at first: small batches, which take more steps per
    epoch, and large learning rates.

    Args:
        min_epochs: The number of epochs before the first decision, at least 1 and below
            ``max_epochs``. None means max(1, max_epochs // 10).
        every: The number of epochs between two decisions, at least 1. None means the number before
            the first decision.
        min_trials: With fewer trials than this, no trial stops. At least 1 [default: 5].

    Raises:
        InputError: An option is invalid. ``tune`` raises it if ``max_epochs`` is too small.

    Example:
        >>> import gputune
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> median = gputune.Median(min_epochs=1, every=1)
        >>> study = gputune.tune(
        ...     "mlp", X, y, method=median, n_trials=8, max_epochs=4, verbose=0
        ... )
        >>> sorted({trial.state for trial in study.trials})
        ['complete', 'pruned']
    """

    name = "median"
    help = "trials below the median stop"
    flags: ClassVar[Mapping[str, Rule]] = {
        "min_epochs": MIN_EPOCHS,
        "every": Rule(
            "--every <INT>",
            "Epochs between two decisions",
            "For --method median.",
            "--min-epochs",
            "1..",
            group=STOPPING,
        ),
    }

    min_epochs: int | None = None
    every: int | None = None
    min_trials: int = 5

    def __post_init__(self) -> None:
        check_count(self.min_epochs, "Median(min_epochs=...)", none=True)
        check_count(self.every, "Median(every=...)", none=True)
        check_count(self.min_trials, "Median(min_trials=...)")

    def stops(self, max_epochs: int) -> list[int]:
        """Return the epochs after which the median rule compares trials, in order."""
        first = first_epoch("Median", self.min_epochs, max_epochs, 10)
        return list(range(first, max_epochs, self.every or first))

    def trials_to_stop(self, epoch: int, curves: Curves, max_epochs: int) -> set[int]:
        """Return the trial numbers of the trials that the median rule stops, because their best
        mean score is below the median.

        Trials that ended earlier stay ended. NaN, the score of a diverged trial, is worse than any
        finite score.
        """
        import numpy as np

        if len(curves) < self.min_trials:
            return set()
        last = []
        best = {}
        for number in sorted(curves):
            means = curves[number].mean(1)
            # A trial that stopped earlier counts with its last mean.
            last.append(means[:epoch][-1] if len(means) else -np.inf)
            if len(means) >= epoch:
                best[number] = np.max(means[:epoch])
        middle = float(np.median(np.where(np.isfinite(last), last, -np.inf)))
        return {number for number, mean in best.items() if not mean >= middle}
