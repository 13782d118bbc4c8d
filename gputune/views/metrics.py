"""Several metrics of a study: how each is shown, the study by another of them, the trials that none beats in all."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from gputune.study.curves import Curves
from gputune.study.rows import Curve
from gputune.study.study import Study, Trial, check_metric
from gputune.text import Measure

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
    """Two metrics of all trials, in the sign of their names.

    measures   of the two
    values     (C, 2); NaN for a trial that has one of them not
    order      the rows of the trials that no other one beats in both, best by the first metric first
    """

    measures: tuple[Measure, Measure]
    values: NDArray[np.float64]
    order: list[int]


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
    """Return the study with its trials scored and ranked by another of its metrics, at the same epochs.

    Its curves, plots, page and tables are by that metric. Raises InputError for a name that is none of ``metrics``.
    """
    place = study.metrics.index(check_metric(study, metric, "ranked_by"))
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
    make = partial(_ordered, study, order)
    return type(study)(meta=meta, trials=trials, curves=make, data=study.data, file=study.file)


def _ordered(study: Study, order: list[int]) -> Curve:
    """Return the curves of all metrics in another order; without a result there are none of several."""
    curves = Curves.of_all(study)
    return curves[..., order] if curves.ndim == 4 else curves
