"""What is drawn of a study's scores and curves: their sign, order and range; several metrics, and the Pareto front."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from gputune.study.rows import Curve
from gputune.study.study import Study, Trial, check_metric, curves_of_all
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
    """The scores of all trials."""

    measure: Measure
    values: NDArray[np.float64]  # (C,) a neg_log_loss of -0.3 as the log_loss 0.3; NaN where there is none
    late: NDArray[np.bool_]  # (C,) whether no rung of halving pruned the trial
    order: list[int]  # the rows of the trials with a score, best first

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


def score_view(study: Study) -> Scores:
    """Return the scores of a study's trials."""
    scores, finite = study.scores, np.isfinite(study.scores)
    measure = study.record.measure(float(scores[finite].max()) if finite.any() else math.nan)
    late = np.array([trial.state != "pruned" for trial in study.trials], dtype=bool)
    order = [row for row in study.order if finite[row]]
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
class LearningCurves:
    """Scores after each epoch, in the sign of their name; NaN where a trial did not train that long."""

    measure: Measure
    mean: NDArray[np.float64]  # (C, epochs) mean over the folds; NaN where one fold is
    spread: NDArray[np.float64]  # (C, epochs) standard deviation over the folds, ddof=1; NaN for one fold
    order: list[int]  # the rows of the trials with a score after some epoch, best first

    @property
    def epochs(self) -> NDArray[np.int64]:
        """(epochs,): 1, 2, ..."""
        return np.arange(1, self.mean.shape[1] + 1)


def curve_view(study: Study) -> LearningCurves:
    """Return the curves of a study's trials."""
    measure, curves = score_view(study).measure, study.curves
    folds = curves.shape[2]
    with np.errstate(invalid="ignore", over="ignore"):
        mean = curves.mean(2) if folds else np.empty(curves.shape[:2])
        spread = curves.std(2, ddof=1) if folds > 1 else np.full(curves.shape[:2], np.nan)
    mean = np.where(np.isfinite(mean), mean, np.nan)
    order = [row for row in study.order if np.isfinite(mean[row]).any()]
    return LearningCurves(measure, _in_sign(measure, mean), spread, order)


AnyStudy = TypeVar("AnyStudy", bound=Study)

_EPOCHS_BY = "epochs_by"
"""The option of a study that ``ranked_by`` made; none of a file."""


def metric_scores(study: Study) -> NDArray[np.float64]:
    """Return the scores (C, M) of the trials by each metric at their best epoch; NaN where there is none."""
    none = [math.nan] * len(study.metrics)
    return np.array([list(trial.scores.values()) or none for trial in study.trials]).reshape(
        len(study.trials), len(none)
    )


def measures(study: Study) -> dict[str, Measure]:
    """Return how the scores by each metric are shown, by its name, with decimals for the best; {} for one metric."""
    best = np.where(np.isfinite(table := metric_scores(study)), table, -np.inf).max(0, initial=-np.inf)
    return study.record.measures(best.tolist())


def pareto_trials(study: Study) -> tuple[Trial, ...]:
    """Return the trials that no other one equals in all metrics and beats in one: the best by the first metric first.

    Scores are those at a trial's best epoch by the first metric. Trials without a finite score by each metric are left
    out; pruned ones too, which were scored early, unless all are. With one metric it is the best trial.
    """
    if not study.metrics:
        return tuple(trial for trial in study.ranking()[:1] if math.isfinite(trial.score))
    return tuple(study.trials[row] for row in _front(study, metric_scores(study)))


def _front(study: Study, table: NDArray[np.float64]) -> list[int]:
    """Return the rows of a table of scores (C, M) that no other one beats."""
    scored = np.flatnonzero(np.isfinite(table).all(1)).tolist()
    rows = [row for row in scored if study.trials[row].state != "pruned"]
    rows = rows or scored
    front: list[int] = []
    # None is beaten by one that comes after it in this order.
    for row in sorted(rows, key=lambda row: (*(-table[row]).tolist(), row)):
        others, scores = table[front], table[row]
        if not ((others >= scores).all(1) & (others > scores).any(1)).any():
            front.append(row)
    return front


def other_measures(study: Study) -> dict[str, Measure]:
    """Return how the metrics beside the one that ranks are shown, by name."""
    return dict(list(measures(study).items())[1:])


@dataclass(frozen=True, eq=False)
class ParetoFront:
    """Two metrics of all trials, in the sign of their names."""

    measures: tuple[Measure, Measure]
    values: NDArray[np.float64]  # (C, 2); NaN for a trial that has one of them not
    order: list[int]  # the rows of the trials that no other one beats in both, best by the first metric first


def pareto_front(study: Study, x: str, y: str) -> ParetoFront:
    """Return what is drawn of two metrics of a study."""
    pair = [study.metrics.index(x), study.metrics.index(y)]
    table, shown = metric_scores(study)[:, pair], measures(study)
    order = _front(study, table)
    table = np.where(np.isfinite(table).all(1, keepdims=True), table, np.nan)
    signs = [-1.0 if shown[name].lower_is_better else 1.0 for name in (x, y)]
    return ParetoFront((shown[x], shown[y]), 0.0 + table * signs, order)


def epochs_by(study: Study) -> str:
    """Return the metric that chose the epochs of the trials, where another one ranks them; "" where it is the same."""
    return str(study.meta.get(_EPOCHS_BY, ""))


def ranked_by(study: AnyStudy, metric: str) -> AnyStudy:
    """The study by another of several metrics: its scores, order, curves, plots and page are those of that metric.

    A trial's epoch stays the one that the first metric chose. Raises InputError for a name that is none of ``metrics``.
    """
    metric = check_metric(study, metric, "ranked_by")
    place = study.metrics.index(metric)
    if place == 0:
        return study
    order = [place, *(other for other in range(len(study.metrics)) if other != place)]
    metrics = [study.record.metrics[other] for other in order]
    by = epochs_by(study) or study.metrics[0]
    own = {"metrics": metrics, "scoring": metrics[0]["scorer"], "baseline": None}
    meta = {**study.meta, **own, _EPOCHS_BY: "" if by == metric else by}
    trials = tuple(
        replace(
            trial,
            score=trial.scores[metric],
            fold_scores=trial.metrics[metric],
            metrics={one["name"]: trial.metrics[one["name"]] for one in metrics},
        )
        if trial.metrics
        else trial
        for trial in study.trials
    )
    none = np.empty((len(trials), 0, 0))
    ranked = type(study)(meta=meta, trials=trials, curves=none, data=study.data, file=study.file)
    vars(ranked)["curves"] = partial(_reorder, study, order)  # they are made when they are asked for
    return ranked


def _reorder(study: Study, order: list[int]) -> Curve:
    """Return the curves of all metrics in another order; without a result there are none of several."""
    curves = curves_of_all(study)
    return curves[..., order] if curves.ndim == 4 else curves
