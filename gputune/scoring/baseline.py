"""The baseline of a search: the best constant prediction for all rows.

A search has to beat the score of this constant. gputune fits the constant on training rows. The
best constant depends on the score: the mean minimizes the squared error, the median the absolute
error, and the share of each class the log loss. If several constants may be best, gputune fits and
scores all of them. The baseline is the constant with the best mean score over the folds.

In shapes, n counts rows and K counts the outputs per row: classes, labels, or columns of a numeric
target.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gputune.data.dataset import Dataset
from gputune.ground.types import Task
from gputune.scoring import scores
from gputune.scoring.scoring import Scoring, outputs_of

MOST_FREQUENT = "the most frequent class of the training rows"
_SHARES = "the share of each class in the training rows"
_LOPSIDED = 0.8  # above this share of one class, an accuracy says little
_MOST_CONSTANTS = 20  # at most this number of classes or labels is tried as constants

ConstantFit = Callable[[Tensor, Tensor | None], Tensor]
"""A function that fits one constant prediction and returns its outputs (K,).

The function takes targets (n,) or (n, K) and weights (n,) or None.
"""


@dataclass(frozen=True)
class Constant:
    """A kind of constant prediction, such as the mean, and the function that fits it to rows."""

    answer: str
    fit: ConstantFit


@dataclass(frozen=True)
class FittedConstant:
    """A constant prediction after fitting: its description ``answer`` and its outputs (K,)."""

    answer: str
    outputs: Tensor


def baseline(
    data: Dataset, scoring: Scoring, classes: np.ndarray | None
) -> Mapping[str, str | float] | None:
    """Return the best constant prediction of a search, as text, and its mean score over the folds.

    The constant of each fold is fitted on the fold's training rows, with their weights if there are
    any.

    Args:
        data: The dataset.
        scoring: The score in use.
        classes: The class labels, or None.

    Returns:
        A mapping with the description ``answer`` and the mean ``score``. None if the best constant
        is unknown, for example for a custom scoring function.
    """
    # The constant is in the target's own units.
    zeros = torch.zeros_like(data.center)
    ones = torch.ones_like(data.scale)
    data = replace(data, center=zeros, scale=ones, transforms=(), scorer_rows=None)
    best: dict[str, str | float] | None = None
    for constant in _constants(scoring, data.task, classes, data.n_outputs):
        for weights in [None] if data.weights is None else [None, data.weights]:
            outputs = [_fit_fold(constant, data, weights, fold) for fold in range(data.n_folds)]
            score = _mean_score(data, scoring, outputs)
            if math.isfinite(score) and (best is None or score > best["score"]):  # type: ignore[operator]
                best = {
                    "answer": _in_words(constant, scoring, classes, outputs, weights),
                    "score": score,
                }
    return best


def best_constant(
    scoring: Scoring, task: Task, y: Tensor, *, classes: np.ndarray | None = None
) -> FittedConstant | None:
    """Fit constant predictions to training rows, and return the constant with the best score on
    them.

    Score the constant on other rows with ``scoring.on_rows(constant.outputs.expand(m, -1),
    y_of_other_rows)``.

    Args:
        scoring: The score in use.
        task: The task of the search.
        y: The targets of the training rows: class codes (n,), labels (n, K), or a numeric target
            (n,) or (n, K) in its own units.
        classes: The labels of the classes, or None for a numeric target.

    Returns:
        The fitted constant. None if the best constant is unknown, for example for a custom scoring
        function.
    """
    n_outputs = len(classes) if classes is not None else y[0].numel()
    best = None
    best_score = -math.inf
    for constant in _constants(scoring, task, classes, n_outputs):
        outputs = constant.fit(y, None)
        with warnings.catch_warnings(action="ignore"):  # scores that a constant leaves undefined
            score = scoring.on_rows(outputs.expand(len(y), -1), y)
        if best is None or score > best_score:
            answer = _in_words(constant, scoring, classes, [outputs], None)
            best = FittedConstant(answer, outputs)
            best_score = score
    return best


def remark_on_accuracy(
    baseline: Mapping[str, str | float] | None, scoring: Scoring
) -> tuple[str, ...]:
    """Return a remark if always predicting one frequent class has a high accuracy, else no
    remark."""
    if (
        baseline is None
        or scoring.score is not scores.accuracy
        or float(baseline["score"]) < _LOPSIDED
    ):
        return ()
    answer = str(baseline["answer"])
    score = f"{baseline['score']:.4f}"
    two = scoring.classes is not None and len(scoring.classes) == 2
    others = "roc_auc, average_precision" if two else "f1_macro, roc_auc_ovr"
    tell = f"balanced_accuracy, {others} or neg_log_loss as scoring tell more about a model"
    # No remark if the folds differ in their most frequent class.
    return (f"{answer} has an accuracy of {score} already: {tell}",) * answer.startswith("always")


def _fit_fold(constant: Constant, data: Dataset, weights: Tensor | None, fold: int) -> Tensor:
    train = data.folds[fold].train
    return constant.fit(data.target[train], None if weights is None else weights[fold, train])


def _mean_score(data: Dataset, scoring: Scoring, outputs: Sequence[Tensor]) -> float:
    """Return the mean validation score over the folds. ``outputs`` holds one constant (K,) per
    fold."""
    values = []
    for f, fold in enumerate(data.folds):
        with warnings.catch_warnings(action="ignore"):  # scores that a constant leaves undefined
            values.append(scoring(data, f, outputs[f].expand(1, len(fold.valid), -1))[0])
    return float(torch.stack(values).mean())


def _in_words(
    constant: Constant,
    scoring: Scoring,
    classes: np.ndarray | None,
    outputs: Sequence[Tensor],
    weights: Tensor | None,
) -> str:
    """Return the description of a constant for the user, such as "always 'cat'".

    For an accuracy, only the most frequent class matters, so the description names this class.
    """
    if constant.answer == _SHARES and scoring.score is scores.accuracy and classes is not None:
        most = {int(one.argmax()) for one in outputs}
        # The folds may have different shares, and near balance different classes.
        return f"always {classes[most.pop()].item()!r}" if len(most) == 1 else MOST_FREQUENT
    if weights is None or constant.answer.startswith("always"):
        return constant.answer
    return f"{constant.answer}, by their weights"


def _constants(
    scoring: Scoring, task: Task, classes: np.ndarray | None, n_outputs: int
) -> list[Constant]:
    """Return the constant predictions that may be best for a score, or [] if none are known.

    If several constants have the same score, the first one is chosen.
    """
    metric = _metric_of(scoring)
    if metric is None or task == "custom":
        return []
    if task == "regression":
        if metric.name in _PINBALL:
            return [_quantile_constant(metric.arguments.get("alpha", 0.5))]
        return list(_REGRESSION.get(metric.name, ()))
    if task == "multilabel":
        shares = Constant("the share of each label in the training rows", _label_shares)
        sets = _label_sets(n_outputs)
    else:
        assert classes is not None
        shares = Constant(_SHARES, partial(_class_shares, n_classes=len(classes)))
        # The best f1 without a model comes from predicting the positive class for all rows.
        of_one_class = scoring.positive is not None or (
            ":" in scoring.name and len(classes) <= _MOST_CONSTANTS
        )
        sets = _single_classes(classes) if of_one_class else []
    return [*sets, shares] if metric.of_labels else [shares, *sets]


class _Metric(NamedTuple):
    """The scikit-learn metric that a score computes, with its name and arguments."""

    name: str
    arguments: Mapping[str, Any]
    of_labels: bool  # whether it compares labels, not probabilities


def _metric_of(scoring: Scoring) -> _Metric | None:
    """Return the scikit-learn metric that a score computes, or None for a custom function."""
    if scoring.of_outputs is not None:
        return None
    if scoring.name == scores.PINBALL and isinstance(scoring.score, partial):
        return _Metric(scoring.score.func.__name__, scoring.score.keywords, of_labels=False)
    scorer: Any = scoring.scorer
    if scorer is None:
        from sklearn.metrics import get_scorer

        scorer = get_scorer(scoring.name)
    function = getattr(scorer, "_score_func", None)
    if function is None or not function.__module__.startswith("sklearn.metrics"):
        return None
    return _Metric(
        function.__name__, scorer._kwargs, of_labels=scorer._response_method == "predict"
    )


def _class_shares(codes: Tensor, weights: Tensor | None, *, n_classes: int) -> Tensor:
    counts = torch.bincount(codes, weights, minlength=n_classes).double()
    return outputs_of(counts / counts.sum(), "multiclass")


def _single_classes(classes: np.ndarray) -> list[Constant]:
    """Return the constants that predict one class for all rows, one constant for each class."""

    def always(code: int, codes: Tensor, weights: Tensor | None) -> Tensor:
        del weights
        share = torch.zeros(len(classes), dtype=torch.float64, device=codes.device)
        share[code] = 1.0
        return outputs_of(share, "multiclass")

    labels = classes.tolist()
    return [
        Constant(f"always {label!r}", partial(always, code)) for code, label in enumerate(labels)
    ]


def _label_shares(y: Tensor, weights: Tensor | None) -> Tensor:
    return outputs_of(_weighted_mean(y.double(), weights), "multilabel")


def _label_sets(n_labels: int) -> list[Constant]:
    """Return constants for a multilabel target, which predict the same set of labels for all rows.

    The sets are the most frequent set, the most frequent label, the two most frequent labels, and
    so on.
    """

    def most_frequent_set(y: Tensor, weights: Tensor | None) -> Tensor:
        sets, places = torch.unique(y, dim=0, return_inverse=True)
        return outputs_of(sets[torch.bincount(places, weights).argmax()].double(), "multilabel")

    def most_frequent(number: int, y: Tensor, weights: Tensor | None) -> Tensor:
        share = _weighted_mean(y.double(), weights)
        chosen = torch.zeros_like(share)
        chosen[share.argsort(descending=True, stable=True)[:number]] = 1.0
        return outputs_of(chosen, "multilabel")

    constants = [
        Constant("the most frequent set of labels in the training rows", most_frequent_set)
    ]
    for number in range(1, min(n_labels, _MOST_CONSTANTS) + 1):
        labels = f"the {number} most frequent labels" if number > 1 else "the most frequent label"
        constants.append(
            Constant(f"always {labels} of the training rows", partial(most_frequent, number))
        )
    return constants


def _weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Return the weighted mean of values (n, ...) over the rows, which is the best constant for the
    squared error."""
    if weights is None:
        return values.mean(0)
    total: Tensor = torch.tensordot(weights, values, 1)
    return total / weights.sum()


def weighted_quantile(values: Tensor, weights: Tensor | None, level: float) -> Tensor:
    """Return the weighted quantile of values (n,), which is the best constant for the pinball loss.

    If several values minimize the loss, the result is the middle between them. With level 0.5 and
    equal weights the result is the median. The quantile is defined as in
    ``numpy.quantile(method="averaged_inverted_cdf")``.
    """
    weights = torch.ones_like(values) if weights is None else weights
    values = values[weights > 0]
    weights = weights[weights > 0]
    values, order = values.sort()
    below = weights[order].cumsum(0)
    # The tolerance keeps rounding errors of the sums from hiding a tie.
    place = level * below[-1]
    tolerance = 1e-12 * below[-1]
    low = torch.searchsorted(below, place - tolerance)
    high = torch.searchsorted(below, place + tolerance, right=True)
    last = len(values) - 1
    return (values[low.clamp(max=last)] + values[high.clamp(max=last)]) / 2


def _median_by_size(values: Tensor, weights: Tensor | None) -> Tensor:
    """Return the best constant for the absolute percentage error: the median with weights 1/|y|."""
    # scikit-learn uses the same lower limit for |y|
    inverse = 1 / values.abs().clamp_min(torch.finfo(torch.float64).eps)
    return weighted_quantile(values, inverse if weights is None else inverse * weights, 0.5)


def _shortest_half(values: Tensor, weights: Tensor | None) -> Tensor:
    """Return the best constant for the median absolute error of values (n,).

    The constant is the middle of the shortest interval that holds more than half of the values.
    Source: Rousseeuw (1984), Least median of squares regression, theorem 2.
    """
    weights = torch.ones_like(values) if weights is None else weights
    values, order = values.sort()
    through = weights[order].cumsum(0)
    before = through - weights[order]
    # For each value as the start: the first end with more than half of the weight in between.
    ends = torch.searchsorted(through, before + through[-1] / 2, right=True)
    first = ends < len(values)
    starts = values[first]
    ends = values[ends[first]]
    shortest = (ends - starts).argmin()
    return (starts[shortest] + ends[shortest]) / 2


def _by_column(fit: ConstantFit) -> ConstantFit:
    """Extend a function that fits one constant to targets with several columns, (n, K).

    The new function fits one constant per column of the target.
    """

    def fit_columns(y: Tensor, weights: Tensor | None) -> Tensor:
        columns = y.double().view(len(y), -1).T
        return torch.stack([fit(column.contiguous(), weights) for column in columns])

    return fit_columns


def _quantile_constant(level: float) -> Constant:
    answer = "the median" if level == 0.5 else f"the {level:g} quantile"
    fit = partial(weighted_quantile, level=level)
    return Constant(f"{answer} of the training rows", _by_column(fit))


_MEAN = Constant("the mean of the training rows", _by_column(_weighted_mean))
_MEDIAN = _quantile_constant(0.5)
_MEDIAN_BY_SIZE = Constant(
    "the median of the training rows weighted by 1/|y|", _by_column(_median_by_size)
)
_SHORTEST_HALF = Constant(
    "the middle of the shortest interval with half of the training rows", _by_column(_shortest_half)
)
_MEAN_LOG = Constant(
    "exp(mean(log(1 + y))) - 1 of the training rows",
    _by_column(lambda values, weights: _weighted_mean(values.log1p(), weights).expm1()),
)
_MIDDLE = Constant(
    "the middle between the smallest and the largest of the training rows",
    _by_column(lambda values, weights: (values.min() + values.max()) / 2),
)


_REGRESSION: Mapping[str, tuple[Constant, ...]] = {
    **dict.fromkeys(
        (
            "r2_score",
            "explained_variance_score",
            "mean_squared_error",
            "root_mean_squared_error",
            "mean_poisson_deviance",
            "mean_gamma_deviance",
            "mean_tweedie_deviance",
            "d2_tweedie_score",
        ),
        (_MEAN,),
    ),
    **dict.fromkeys(("mean_absolute_error", "d2_absolute_error_score"), (_MEDIAN,)),
    # Folds are small samples, in which the median may be better although the other is the
    # minimizer.
    "median_absolute_error": (_MEDIAN, _SHORTEST_HALF),
    "mean_absolute_percentage_error": (_MEDIAN_BY_SIZE,),
    **dict.fromkeys(("mean_squared_log_error", "root_mean_squared_log_error"), (_MEAN_LOG,)),
    "max_error": (_MIDDLE,),
}
"""The constants that may be best for each scikit-learn metric without arguments."""
_PINBALL = ("mean_pinball_loss", "neg_mean_pinball_loss", "d2_pinball_score")
"""The metrics with an argument ``alpha`` that is the level of the best constant quantile."""
