"""The learning curves of a study as they are shown: the mean over the folds, and its spread."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gputune.analysis.scores import in_sign, shown_scores
from gputune.report.text import Measure
from gputune.study.study import Study


@dataclass(frozen=True, eq=False)
class Curves:
    """Scores after each epoch, in the sign of their name; NaN where a trial did not train that long.

    mean     (C, epochs) mean over the folds; NaN where one fold is
    spread   (C, epochs) standard deviation over the folds, ddof=1; NaN for one fold
    """

    measure: Measure
    mean: NDArray[np.float64]
    spread: NDArray[np.float64]

    @property
    def epochs(self) -> NDArray[np.int64]:
        """(epochs,): 1, 2, ..."""
        return np.arange(1, self.mean.shape[1] + 1)

    @property
    def drawable(self) -> bool:
        """Whether some trial was scored at two epochs, which makes a line."""
        return bool((np.isfinite(self.mean).sum(1) > 1).any())


def shown_curves(study: Study) -> Curves:
    """Return the curves of a study's trials, in their order."""
    measure, curves = shown_scores(study).measure, study.curves
    folds = curves.shape[2]
    with np.errstate(invalid="ignore", over="ignore"):
        mean = curves.mean(2) if folds else np.empty(curves.shape[:2])
        spread = curves.std(2, ddof=1) if folds > 1 else np.full(curves.shape[:2], np.nan)
    mean = np.where(np.isfinite(mean), mean, np.nan)
    return Curves(measure, in_sign(measure, mean), spread)
