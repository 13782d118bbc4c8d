"""What is drawn of a study's scores and curves: their sign, order and range; several metrics; the
scales of axes."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gputune.study.rows import Curve
from gputune.study.study import Study, Trial, check_metric, curves_of_all
from gputune.text import Measure, count

AnyStudy = TypeVar("AnyStudy", bound=Study)

BEST = 5  # trials, and starts of a descent, that have a colour of their own
# scores worse than the lower quartile by so many interquartile ranges lie beyond the axis, as in a
# box plot
_FAR = 1.5
# share of the trials that must have been trained to the end for their scores alone to make the axis
_ENOUGH = 0.25
# a loss whose largest value is so many times its smallest one is read on a logarithm
_DECADE = 30.0
# share of the axis of scores below and above them: room for the marks of diverged trials
_PAD = 0.06

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """``low`` and ``high`` are its ends; a value beyond them has a place beyond 0 or 1."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def __call__(self, values: ArrayLike) -> NDArray[np.float64]:
        """Return places, 0 at ``low`` and 1 at ``high``; NaN for NaN, and for what has no
        logarithm."""
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
    """Return a number in few characters: 0.001, 20000, 1e-5."""
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return f"{value:.6g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def linear_scale(
    low: float, high: float, *, most: int = 6, pad: float = 0.0, whole: bool = False
) -> Scale:
    """Return a scale with at most so many ticks, ``whole`` or not; ``pad`` is a share of its length
    on both sides."""
    if not high > low:
        half = abs(low) * 0.05 or 0.5
        low = low - half
        high = high + half
    margin = pad * (high - low)
    low = low - margin
    high = high + margin
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * part for part in _STEPS if power * part >= rough * (1 - 1e-9))
    step = math.ceil(step) if whole else step
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9) + (step / power == 2.5))
    plain = max(abs(low), abs(high)) < 1e6 and decimals <= 6
    marks = [k * step for k in range(first, last + 1)]
    return Scale(
        low, high, tuple((m, f"{m + 0.0:.{decimals}f}" if plain else number_text(m)) for m in marks)
    )


def log_scale(low: float, high: float, *, most: int = 6, pad: float = 0.0) -> Scale:
    """Return a scale of positive numbers, its ticks at powers of ten, or at 1, 2 and 5 of them
    where they are few."""
    if not high > low:
        low = low / 2
        high = high * 2
    margin = pad * (math.log(high) - math.log(low))
    low = math.exp(math.log(low) - margin)
    high = math.exp(math.log(high) + margin)
    begin = math.floor(math.log10(low))
    end = math.ceil(math.log10(high))
    for digits in ((1, 2, 5), (1, 3), (1,)):
        marks = [float(f"{d}e{e}") for e in range(begin, end + 1) for d in digits]
        inside = [m for m in marks if low * (1 - 1e-9) <= m <= high * (1 + 1e-9)]
        if 2 <= len(inside) <= most:
            break
    else:
        inside = inside[:: max(1, math.ceil(len(inside) / most))] if len(inside) > 1 else []
    # Less than a decade may lie between the marks.
    ticks = tuple((m, number_text(m)) for m in inside) or linear_scale(low, high, most=most).ticks
    return Scale(low, high, ticks, log=True)


def value_scale(low: float, high: float, measure: Measure, *, pad: float = _PAD) -> Scale:
    """Return the scale of scores between two ends, of a loss that spans decades a logarithm."""
    is_wide = measure.lower_is_better and low > 0 and high > _DECADE * low
    return (log_scale if is_wide else linear_scale)(low, high, pad=pad)


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of all trials."""

    study: Study
    measure: Measure
    # (C,) a neg_log_loss of -0.3 as the log_loss 0.3; NaN where there is none
    values: NDArray[np.float64]
    late: NDArray[np.bool_]  # (C,) whether no rung of halving pruned the trial
    order: list[int]  # the rows of the trials with a score, best first

    @property
    def eligible(self) -> NDArray[np.bool_]:
        """(C,): whether a trial can be the best one. A pruned trial can only if every trial with a
        score was pruned."""
        scored = np.isfinite(self.values)
        finished = scored & self.late
        return finished if finished.any() else scored

    @property
    def range(self) -> tuple[float, float]:
        """The ends of an axis of scores. Pruned trials were scored early, and stretch no axis of
        others."""
        late = np.isfinite(self.values) & self.late
        few = late.sum() < _ENOUGH * np.isfinite(self.values).sum()
        return score_range(self.values if few else self.values[late], self.measure)

    @property
    def best_so_far(self) -> NDArray[np.float64]:
        """(C,): the best of the eligible values up to each trial, in order of the trials; NaN
        before the first one."""
        better = np.fmin if self.measure.lower_is_better else np.fmax
        return better.accumulate(np.where(self.eligible, self.values, np.nan))

    def scale(self, *, pad: float = _PAD) -> Scale:
        """Return the scale of all scores: the best one, and all that are not far off."""
        return value_scale(*self.range, self.measure, pad=pad)

    @property
    def notes(self) -> tuple[str, ...]:
        """What must be said of scores beyond the ends of their axis."""
        low, high = self.range
        beyond = int(
            (self.values > high if self.measure.lower_is_better else self.values < low).sum()
        )
        lie, stand = ("lies", "stands") if beyond == 1 else ("lie", "stand")
        return (
            (f"{count(beyond, 'score')} {lie} beyond the axis and {stand} at its edge.",)
            if beyond
            else ()
        )


def score_view(study: Study) -> Scores:
    scores = study.scores
    finite = np.isfinite(study.scores)
    measure = study.record.measure(float(scores[finite].max()) if finite.any() else math.nan)
    late = np.array([trial.state != "pruned" for trial in study.trials], dtype=bool)
    order = [row for row in study.order if finite[row]]
    return Scores(study, measure, _in_sign(measure, np.where(finite, scores, np.nan)), late, order)


def order_by_score(study: Study) -> list[int]:
    """Return the rows of the trials by their score alone, best first; those without a finite score
    last.

    Unlike ``study.order`` it does not put pruned trials behind the others.
    """
    scores = np.where(np.isfinite(study.scores), study.scores, -np.inf)
    return sorted(study.order, key=lambda row: -scores[row])


def _in_sign(measure: Measure, scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return scores of scikit-learn's sign in that of their name."""
    return 0.0 - scores if measure.lower_is_better else scores


def score_range(values: NDArray[np.float64], measure: Measure) -> tuple[float, float]:
    """Return the ends (low, high) of an axis for finite values: the best one, and the worst that is
    not far off."""
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
    """Scores after each epoch, in the sign of their name; NaN where a trial did not train that
    long."""

    study: Study
    measure: Measure
    mean: NDArray[np.float64]  # (C, epochs) mean over the folds; NaN where one fold is
    # (C, epochs) standard deviation over the folds, ddof=1; NaN for one fold
    spread: NDArray[np.float64]
    order: list[int]  # the rows of the trials with a score after some epoch, best first

    @property
    def epochs(self) -> NDArray[np.int64]:
        """(epochs,): 1, 2, ..."""
        return np.arange(1, self.mean.shape[1] + 1)

    def scale(self) -> Scale:
        """Return an axis that holds the best curves whole, and of the others what is not far off
        where they ended."""
        late = [row for row in self.order if self.study.trials[row].state != "pruned"] or self.order
        ends = [self.mean[row][np.isfinite(self.mean[row])][-1] for row in late]
        low, high = score_range(np.array(ends), self.measure)
        best = self.order[:BEST]
        whole = self.mean[best]
        spread = np.nan_to_num(self.spread[best])
        low = min(low, float(np.nanmin(whole)))
        high = max(high, float(np.nanmax(whole)))
        # The bands too, on the good side; a logarithm has no room for all of one.
        if self.measure.lower_is_better:
            low = max(min(low, float(np.nanmin(whole - spread))), low / 2 if low > 0 else -np.inf)
        else:
            high = max(high, float(np.nanmax(whole + spread)))
        return value_scale(low, high, self.measure, pad=0.03)


def curve_view(study: Study) -> LearningCurves:
    measure = score_view(study).measure
    curves = study.curves
    folds = curves.shape[2]
    with np.errstate(invalid="ignore", over="ignore"):
        mean = curves.mean(2) if folds else np.empty(curves.shape[:2])
        spread = curves.std(2, ddof=1) if folds > 1 else np.full(curves.shape[:2], np.nan)
    mean = np.where(np.isfinite(mean), mean, np.nan)
    order = [row for row in study.order if np.isfinite(mean[row]).any()]
    return LearningCurves(study, measure, _in_sign(measure, mean), spread, order)


def metric_scores(study: Study) -> NDArray[np.float64]:
    """Return the scores (C, M) of the trials by each metric at their best epoch; NaN where there is
    none."""
    none = [math.nan] * len(study.metrics)
    shape = (len(study.trials), len(study.metrics))
    return np.array([list(trial.scores.values()) or none for trial in study.trials]).reshape(shape)


def measures(study: Study) -> dict[str, Measure]:
    """Return how the scores by each metric are shown, by its name, with decimals for the best; {}
    for one metric."""
    best = np.where(np.isfinite(table := metric_scores(study)), table, -np.inf).max(
        0, initial=-np.inf
    )
    return study.record.measures(best.tolist())


def pareto_trials(study: Study) -> tuple[Trial, ...]:
    """Return the trials that no other one equals in all metrics and beats in one: the best by the
    first metric first.

    Scores are those at a trial's best epoch by the first metric. Trials without a finite score by
    each metric are left out; pruned ones too, which were scored early, unless all are. With one
    metric it is the best trial.
    """
    if not study.metrics:
        return tuple(trial for trial in study.ranking()[:1] if math.isfinite(trial.score))
    return tuple(study.trials[row] for row in _front(study, metric_scores(study)))


def _front(study: Study, table: NDArray[np.float64]) -> list[int]:
    """Return the rows of a table of scores (C, M) that no other one beats."""
    scored = np.flatnonzero(np.isfinite(table).all(1)).tolist()
    rows = [row for row in scored if study.trials[row].state != "pruned"] or scored
    front: list[int] = []
    # None is beaten by one that comes after it in this order.
    for row in sorted(rows, key=lambda row: (*(-table[row]).tolist(), row)):
        others = table[front]
        scores = table[row]
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
    # the rows of the trials that no other one beats in both, best by the first metric first
    order: list[int]


def pareto_front(study: Study, x: str, y: str) -> ParetoFront:
    pair = [study.metrics.index(x), study.metrics.index(y)]
    table = metric_scores(study)[:, pair]
    shown = measures(study)
    order = _front(study, table)
    table = np.where(np.isfinite(table).all(1, keepdims=True), table, np.nan)
    signs = [-1.0 if shown[name].lower_is_better else 1.0 for name in (x, y)]
    return ParetoFront((shown[x], shown[y]), 0.0 + table * signs, order)


def epochs_by(study: Study) -> str:
    """Return the metric that chose the epochs of the trials, where another one ranks them; "" where
    it is the same."""
    # an option of what ``ranked_by`` made, and of no file
    return str(study.meta.get("epochs_by", ""))


def ranked_by(study: AnyStudy, metric: str) -> AnyStudy:
    """The study by another of several metrics: its scores, order, curves, plots and page are those
    of that metric.

    A trial's epoch stays the one that the first metric chose. Raises InputError for a name that is
    none of ``metrics``.
    """
    metric = check_metric(study, metric, "ranked_by")
    place = study.metrics.index(metric)
    if place == 0:
        return study
    order = [place, *(other for other in range(len(study.metrics)) if other != place)]
    metrics = [study.record.metrics[other] for other in order]
    by = epochs_by(study) or study.metrics[0]
    changed = {"metrics": metrics, "scoring": metrics[0]["scorer"], "baseline": None}
    meta = {**study.meta, **changed, "epochs_by": "" if by == metric else by}
    trials = []
    for trial in study.trials:
        if trial.metrics:
            scores = {one["name"]: trial.metrics[one["name"]] for one in metrics}
            trial = replace(
                trial, score=trial.scores[metric], fold_scores=scores[metric], metrics=scores
            )
        trials.append(trial)
    none = np.empty((len(trials), 0, 0))
    ranked = type(study)(
        meta=meta, trials=tuple(trials), curves=none, data=study.data, file=study.file
    )
    # they are made when they are asked for
    vars(ranked)["curves"] = partial(_reorder, study, order)
    return ranked


def _reorder(study: Study, order: list[int]) -> Curve:
    """Return the curves of all metrics in another order; without a result there are none of
    several."""
    curves = curves_of_all(study)
    return curves[..., order] if curves.ndim == 4 else curves
