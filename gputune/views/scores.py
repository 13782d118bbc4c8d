"""Prepare scores and learning curves for plots and reports: sign, order, range and axis scales.

"In the sign of their name" means: scikit-learn's neg_log_loss of -0.3 is shown as a log_loss of
0.3. In shapes, C counts trials and M metrics. A row is the index of a trial in the study.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gputune.ground.annotations import FloatArray, IntArray
from gputune.ground.text import Measure, count
from gputune.study.rows import Curve
from gputune.study.study import Study, Trial, check_metric, curves_of_all

AnyStudy = TypeVar("AnyStudy", bound=Study)

BEST = 5  # trials, or starts of a hypergradient search, with their own color
# Scores that are worse than the lower quartile by this many interquartile ranges lie beyond the
# axis, as in a box plot.
_FAR = 1.5
# Only trials that were trained to the end determine the axis, if they are at least this share of
# the trials.
_ENOUGH = 0.25
# A loss has a logarithmic axis if its largest value exceeds its smallest by this factor.
_DECADE = 30.0
# Space below and above the scores, as a share of the axis, for the marks of diverged trials.
_PAD = 0.06

# Shortest axis, as a share of its largest value. Its ticks then differ in four digits.
_SHORTEST = 0.005

DIGITS = 4  # significant digits of a number in a chart or in the report, at most


@dataclass(frozen=True)
class Scale:
    """The scale of an axis, which converts values to positions from 0 (low end) to 1 (high end).

    Attributes:
        low: the lower end. A value below ``low`` has a negative position.
        high: the upper end. A value above ``high`` has a position above 1.
        log: whether the scale is logarithmic.
        ticks: values and texts of the ticks. (): round numbers, which matplotlib chooses.
    """

    low: float
    high: float
    log: bool = False
    ticks: tuple[tuple[float, str], ...] = ()

    def __call__(self, values: ArrayLike) -> FloatArray:
        """Convert values to positions on the axis: 0 at ``low`` and 1 at ``high``.

        The position is NaN for NaN, and on a logarithmic axis for values that are not positive.
        """
        places = np.asarray(values, dtype=np.float64)
        low = self.low
        high = self.high
        if self.log:
            with np.errstate(divide="ignore", invalid="ignore"):
                places = np.where(places > 0, np.log(places), np.nan)
            low = math.log(low)
            high = math.log(high)
        return (places - low) / (high - low)


def number_text(value: float) -> str:
    """Return a number as short text, such as 0.001, 20000 or 1e-5, for tick labels.

    The number has at most four significant digits. A whole number below one million is exact.
    """
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        exact = value if value == int(value) else float(f"{value:.{DIGITS}g}")
        return f"{exact:.7g}"
    mantissa, _, exponent = f"{value:.{DIGITS - 1}e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def limited(value: float, decimals: int) -> str:
    """Return a number as text with ``decimals`` decimals, but with at most four significant digits.

    Examples: 0.98765 with four decimals is 0.9877, 12.3456 is 12.35, and 1 is 1.000.
    """
    text = f"{round(value, decimals) + 0.0:.{decimals}f}"  # adding 0.0 turns -0.0 into 0.0
    while decimals and _n_digits(text) > DIGITS:
        decimals -= 1
        text = f"{value:.{decimals}f}"
    if _n_digits(text) > DIGITS:
        text = f"{float(f'{value:.{DIGITS}g}'):.0f}"
    return text


def _n_digits(text: str) -> int:
    """Count the significant digits in the text of a number without an exponent."""
    digits = text.lstrip("-").replace(".", "").lstrip("0")
    return len(digits if "." in text else digits.rstrip("0"))


def axis_scale(low: float, high: float, *, log: bool = False, pad: float = 0.0) -> Scale:
    """Return an axis scale from ``low`` to ``high`` with a margin on both sides.

    ``pad`` is the margin as a share of the axis. If the ends differ only in their fourth digit, the
    axis is longer, so that its ticks differ in their first four digits.
    """
    least = _SHORTEST * max(abs(low), abs(high)) or 1.0
    missing = max(0.0, least - (high - low))
    low -= missing / 2
    high += missing / 2
    if log:
        ratio = (high / low) ** pad
        return Scale(low / ratio, high * ratio, log=True)
    margin = pad * (high - low)
    return Scale(low - margin, high + margin)


def value_scale(low: float, high: float, measure: Measure, *, pad: float = _PAD) -> Scale:
    """Return the axis scale for scores from ``low`` to ``high``.

    A loss that spans decades has a logarithmic scale.
    """
    is_wide = measure.lower_is_better and low > 0 and high > _DECADE * low
    return axis_scale(low, high, log=is_wide, pad=pad)


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of all trials in the form that plots and the report show, and the order of the
    trials.

    C counts trials.
    """

    study: Study
    measure: Measure
    # (C,) scores in the sign of their name: a neg_log_loss of -0.3 is the log_loss 0.3. NaN without
    # a score.
    values: FloatArray
    late: NDArray[np.bool_]  # (C,) True if the trial was not pruned
    order: list[int]  # the rows of the trials with a score, best first

    @property
    def eligible(self) -> NDArray[np.bool_]:
        """A mask (C,) of the trials that can be the best trial.

        A pruned trial can be the best only if every trial with a score was pruned.
        """
        scored = np.isfinite(self.values)
        finished = scored & self.late
        return finished if finished.any() else scored

    @property
    def range(self) -> tuple[float, float]:
        """The lower and the upper end of an axis for the scores of this study.

        Pruned trials were scored early, so they do not extend the axis of the other trials.
        """
        late = np.isfinite(self.values) & self.late
        few = late.sum() < _ENOUGH * np.isfinite(self.values).sum()
        return score_range(self.values if few else self.values[late], self.measure)

    @property
    def best_so_far(self) -> FloatArray:
        """The best score up to each trial, (C,), in the order of the trials.

        Only scores of eligible trials count. The value is NaN before the first such score.
        """
        better = np.fmin if self.measure.lower_is_better else np.fmax
        return better.accumulate(np.where(self.eligible, self.values, np.nan))

    def scale(self, *, pad: float = _PAD) -> Scale:
        """Return the axis scale of the scores, without scores that are far from the best score."""
        return value_scale(*self.range, self.measure, pad=pad)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the reader about scores that lie beyond the ends of the axis, or ()."""
        low, high = self.range
        is_beyond = self.values > high if self.measure.lower_is_better else self.values < low
        n_beyond = int(is_beyond.sum())
        if not n_beyond:
            return ()
        verbs = (
            "lies beyond the axis and stands" if n_beyond == 1 else "lie beyond the axis and stand"
        )
        return (f"{count(n_beyond, 'score')} {verbs} at its edge.",)


def score_view(study: Study) -> Scores:
    """Return the scores of a study's trials in the form that plots and the report show."""
    scores = np.where(np.isfinite(study.scores), study.scores, np.nan)
    order = [row for row in study.order if not np.isnan(scores[row])]
    measure = study.record.measure(float(np.nanmax(scores)) if order else math.nan)
    late = np.array([trial.state != "pruned" for trial in study.trials], dtype=bool)
    return Scores(study, measure, _in_sign(measure, scores), late, order)


def order_by_score(study: Study) -> list[int]:
    """Return the row indexes of all trials, ordered only by score, best first.

    Trials without a finite score are last. ``study.order`` also puts pruned trials behind the other
    trials, but this function does not.
    """
    scores = np.where(np.isfinite(study.scores), study.scores, -np.inf)
    return sorted(study.order, key=lambda row: -scores[row])


def _in_sign(measure: Measure, scores: FloatArray) -> FloatArray:
    """Convert scores to the sign for display: neg_log_loss -0.3 becomes log_loss 0.3."""
    return 0.0 - scores if measure.lower_is_better else scores


def score_range(values: FloatArray, measure: Measure) -> tuple[float, float]:
    """Return the ends (low, high) of an axis for scores that leaves out scores far from the best.

    One end is the best finite score. The other end is the worst score that is not too far away.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, quartile, other, high = np.quantile(finite, [0, 0.25, 0.75, 1])
    reach = _FAR * (other - quartile)
    if measure.lower_is_better:
        return float(low), float(max(min(high, other + reach), quartile))
    return float(min(max(low, quartile - reach), other)), float(high)


@dataclass(frozen=True, eq=False)
class LearningCurves:
    """The learning curves of all trials: the mean score and its spread over the folds after each
    epoch.

    Scores are in the sign of their name.

    A score is NaN if a trial did not train that long.
    """

    study: Study
    measure: Measure
    mean: FloatArray  # (C, epochs) mean over the folds; NaN if a fold is NaN
    # (C, epochs) standard deviation over the folds, ddof=1; NaN for one fold
    spread: FloatArray
    order: list[int]  # rows of the trials with a score at any epoch, best first

    @property
    def epochs(self) -> IntArray:
        """The epochs 1, 2, ... as an array, for the x axis of the learning curves."""
        return np.arange(1, self.mean.shape[1] + 1)

    def scale(self) -> Scale:
        """Return the axis scale for scores, which covers the best learning curves completely.

        The scale also covers the final scores of the other curves, except scores that are far from
        the best.
        """
        late = [row for row in self.order if self.study.trials[row].state != "pruned"]
        ends = []
        for row in late or self.order:
            curve = self.mean[row]
            ends.append(curve[np.isfinite(curve)][-1])
        low, high = score_range(np.array(ends), self.measure)
        best = self.order[:BEST]
        curves = self.mean[best]
        spread = np.nan_to_num(self.spread[best])
        low = min(low, float(np.nanmin(curves)))
        high = max(high, float(np.nanmax(curves)))
        # The axis also holds the bands on the good side. A logarithmic axis cannot hold a whole
        # band.
        if self.measure.lower_is_better:
            least = low / 2 if low > 0 else -np.inf
            low = max(min(low, float(np.nanmin(curves - spread))), least)
        else:
            high = max(high, float(np.nanmax(curves + spread)))
        return value_scale(low, high, self.measure, pad=0.03)


def curve_view(study: Study) -> LearningCurves:
    """Return the learning curves of a study in the form that plots and the report show."""
    measure = score_view(study).measure
    curves = study.curves
    folds = curves.shape[2]
    with np.errstate(invalid="ignore", over="ignore"):
        mean = curves.mean(2) if folds else np.empty(curves.shape[:2])
        spread = curves.std(2, ddof=1) if folds > 1 else np.full(curves.shape[:2], np.nan)
    mean = np.where(np.isfinite(mean), mean, np.nan)
    order = [row for row in study.order if np.isfinite(mean[row]).any()]
    return LearningCurves(study, measure, _in_sign(measure, mean), spread, order)


def metric_scores(study: Study) -> FloatArray:
    """Return the scores (C, M) of all trials by each metric, at each trial's best epoch.

    A trial without a score has NaN.
    """
    none = [math.nan] * len(study.metrics)
    shape = (len(study.trials), len(study.metrics))
    return np.array([list(trial.scores.values()) or none for trial in study.trials]).reshape(shape)


def measures(study: Study) -> dict[str, Measure]:
    """Return the display name, sign and decimals of each metric of a study, by metric name.

    The dict is empty for a study with one metric.
    """
    table = metric_scores(study)
    best = np.where(np.isfinite(table), table, -np.inf).max(0, initial=-np.inf)
    return study.record.measures(best.tolist())


def pareto_trials(study: Study) -> tuple[Trial, ...]:
    """Return the Pareto-optimal trials of a study, ordered by the first metric, best first.

    A trial is Pareto-optimal if no other trial is at least as good in all metrics and better in
    one. The scores are from each trial's best epoch by the first metric. The result leaves out
    trials without a finite score by each metric. Pruned trials were scored early, so the result
    leaves them out too, unless all trials were pruned. With one metric the result is the best
    trial.
    """
    if not study.metrics:
        return tuple(trial for trial in study.ranking()[:1] if math.isfinite(trial.score))
    return tuple(study.trials[row] for row in _front(study, metric_scores(study)))


def _front(study: Study, table: FloatArray) -> list[int]:
    """Return the row indexes of the Pareto-optimal trials in a table of scores (C, M)."""
    scored = np.flatnonzero(np.isfinite(table).all(1)).tolist()
    late = [row for row in scored if study.trials[row].state != "pruned"]
    front: list[int] = []
    # In this order no row is beaten by a later one.
    for row in sorted(late or scored, key=lambda row: (*(-table[row]).tolist(), row)):
        others = table[front]
        scores = table[row]
        if not ((others >= scores).all(1) & (others > scores).any(1)).any():
            front.append(row)
    return front


def other_measures(study: Study) -> dict[str, Measure]:
    """Return the display name, sign and decimals of each metric except the ranking metric, by
    name."""
    return dict(list(measures(study).items())[1:])


@dataclass(frozen=True, eq=False)
class ParetoFront:
    """The scores of all trials by two metrics, and the Pareto-optimal trials, for a plot."""

    measures: tuple[Measure, Measure]
    values: FloatArray  # (C, 2); NaN for a trial that lacks one of them
    # Rows of the Pareto-optimal trials, best by the first metric first.
    order: list[int]


def pareto_front(study: Study, x: str, y: str) -> ParetoFront:
    """Return the trials' scores by the metrics ``x`` and ``y``, and the Pareto-optimal trials."""
    pair = [study.metrics.index(x), study.metrics.index(y)]
    table = metric_scores(study)[:, pair]
    order = _front(study, table)
    table = np.where(np.isfinite(table).all(1, keepdims=True), table, np.nan)
    by_metric = measures(study)
    x_measure = by_metric[x]
    y_measure = by_metric[y]
    values = np.stack([_in_sign(x_measure, table[:, 0]), _in_sign(y_measure, table[:, 1])], 1)
    return ParetoFront((x_measure, y_measure), values, order)


def epochs_by(study: Study) -> str:
    """Return the name of the metric that chose each trial's best epoch.

    The result is "" if the ranking metric chose the epochs.
    """
    # Only ``ranked_by`` sets this option. No file holds it.
    return str(study.meta.get("epochs_by", ""))


def ranked_by(study: AnyStudy, metric: str) -> AnyStudy:
    """Return a copy of the study that ranks its trials by another of its metrics.

    The scores, order, curves, plots and report of the copy use that metric. Each trial is still
    scored at the epoch that the first metric chose.

    Args:
        metric: name of one of ``metrics``.

    Raises:
        InputError: the study does not have this metric.

    Example:
        >>> study.ranked_by("neg_log_loss")
        Study(mlp, 10 trials, best neg_log_loss -0... in trial ...)
    """
    metric = check_metric(study, metric, "ranked_by(metric={})")
    place = study.metrics.index(metric)
    if place == 0:
        return study
    order = list(range(len(study.metrics)))
    order.insert(0, order.pop(place))
    metrics = [study.record.metrics[position] for position in order]
    by = epochs_by(study) or study.metrics[0]
    meta = {
        **study.meta,
        "metrics": metrics,
        "scoring": metrics[0]["scorer"],
        "baseline": None,
        "epochs_by": "" if by == metric else by,
    }
    trials = []
    for trial in study.trials:
        if trial.metrics:
            folds = {each["name"]: trial.metrics[each["name"]] for each in metrics}
            score = trial.scores[metric]
            trial = replace(trial, score=score, fold_scores=folds[metric], metrics=folds)
        trials.append(trial)
    ranked = type(study)(
        meta=meta,
        trials=tuple(trials),
        curves=np.empty((len(trials), 0, 0)),
        data=study.data,
        file=study.file,
    )
    # The curves are computed on first use.
    vars(ranked)["curves"] = partial(_reorder, study, order)
    return ranked


def _reorder(study: Study, order: list[int]) -> Curve:
    """Return the learning curves of all metrics, with the metrics in the order ``order``.

    Curves without results have no axis for metrics and stay unchanged.
    """
    curves = curves_of_all(study)
    return curves[..., order] if curves.ndim == 4 else curves
