"""What is drawn of a study's scores and learning curves: their sign, their order, and the range of an axis."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gputune.study.study import Study
from gputune.text import Measure, count

BEST = 5
"""Trials, and starts of a descent, that have a colour of their own."""

_FAR = 1.5
"""Scores worse than the lower quartile by so many interquartile ranges lie beyond the axis, as in a box plot."""

_ENOUGH = 0.25
"""Share of the trials that must have been trained to the end for their scores alone to make the axis."""

_DECADE = 30.0
"""A loss whose largest value is so many times its smallest one is read on a logarithm."""


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of all trials.

    values   (C,) what the study measured, a neg_log_loss of -0.3 as the log_loss 0.3; NaN where there is none
    late     (C,) whether no rung of halving pruned the trial
    order    the rows of the trials with a score, best first
    """

    measure: Measure
    values: NDArray[np.float64]
    late: NDArray[np.bool_]
    order: list[int]

    @property
    def range(self) -> tuple[float, float]:
        """The ends of an axis of scores. Pruned trials were scored early, and stretch no axis of others."""
        late = np.isfinite(self.values) & self.late
        few = late.sum() < _ENOUGH * np.isfinite(self.values).sum()
        return score_range(self.values if few else self.values[late], self.measure)

    @property
    def best_so_far(self) -> NDArray[np.float64]:
        """(C,): the best of the values up to each trial, in order of the trials; NaN before the first one."""
        better = np.fmin if self.measure.lower_is_better else np.fmax
        return better.accumulate(self.values)

    def on_axis(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return values, those beyond the axis at its edge."""
        return np.clip(values, *self.range)

    @property
    def notes(self) -> tuple[str, ...]:
        """What must be said of scores beyond the ends of their axis."""
        low, high = self.range
        beyond = int((self.values > high if self.measure.lower_is_better else self.values < low).sum())
        lie, stand = ("lies", "stands") if beyond == 1 else ("lie", "stand")
        return (f"{count(beyond, 'score')} {lie} beyond the axis and {stand} at its edge.",) if beyond else ()


def ranked_rows(study: Study) -> list[int]:
    """Return the rows of all trials in ``study.trials``, best first."""
    row = {trial.number: place for place, trial in enumerate(study.trials)}
    return [row[trial.number] for trial in study.ranking()]


def shown_scores(study: Study) -> Scores:
    """Return the scores of a study's trials."""
    scores = np.array([trial.score for trial in study.trials], dtype=np.float64)
    finite = np.isfinite(scores)
    measure = study.record.measure(float(scores[finite].max()) if finite.any() else math.nan)
    late = np.array([trial.state != "pruned" for trial in study.trials], dtype=bool)
    order = [row for row in ranked_rows(study) if finite[row]]
    return Scores(measure, _in_sign(measure, np.where(finite, scores, np.nan)), late, order)


def _in_sign(measure: Measure, scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return scores of scikit-learn's sign in that of their name."""
    return 0.0 - scores if measure.lower_is_better else scores


def score_range(values: NDArray[np.float64], measure: Measure) -> tuple[float, float]:
    """Return the ends (low, high) of an axis for finite values: the best one, and the worst that is not far off."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, quartile, other, high = np.quantile(finite, [0, 0.25, 0.75, 1])
    reach = _FAR * (other - quartile)
    if measure.lower_is_better:
        return float(low), float(max(min(high, other + reach), quartile))
    return float(min(max(low, quartile - reach), other)), float(high)


def is_wide(low: float, high: float, measure: Measure) -> bool:
    """Whether a loss between these ends is read on a logarithm."""
    return measure.lower_is_better and low > 0 and high > _DECADE * low


@dataclass(frozen=True, eq=False)
class Curves:
    """Scores after each epoch, in the sign of their name; NaN where a trial did not train that long.

    mean     (C, epochs) mean over the folds; NaN where one fold is
    spread   (C, epochs) standard deviation over the folds, ddof=1; NaN for one fold
    order    the rows of the trials with a score after some epoch, best first
    """

    measure: Measure
    mean: NDArray[np.float64]
    spread: NDArray[np.float64]
    order: list[int]

    @property
    def epochs(self) -> NDArray[np.int64]:
        """(epochs,): 1, 2, ..."""
        return np.arange(1, self.mean.shape[1] + 1)

    @property
    def drawable(self) -> bool:
        """Whether some trial was scored at two epochs, which makes a line."""
        return bool((np.isfinite(self.mean).sum(1) > 1).any())


def shown_curves(study: Study) -> Curves:
    """Return the curves of a study's trials."""
    measure, curves = shown_scores(study).measure, study.curves
    folds = curves.shape[2]
    with np.errstate(invalid="ignore", over="ignore"):
        mean = curves.mean(2) if folds else np.empty(curves.shape[:2])
        spread = curves.std(2, ddof=1) if folds > 1 else np.full(curves.shape[:2], np.nan)
    mean = np.where(np.isfinite(mean), mean, np.nan)
    order = [row for row in ranked_rows(study) if np.isfinite(mean[row]).any()]
    return Curves(measure, _in_sign(measure, mean), spread, order)
