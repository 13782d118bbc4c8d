"""Validation scores of many models at once, on the device, under scikit-learn's names.

Greater scores are better. Each function takes outputs (C, m, K) of C models on the same m rows, and
the targets (m,) of the rows. The targets are class codes, or values of a regression. The function
returns scores (C,).

Source: the definitions of sklearn.metrics, including their edge cases. Scores that rank rows use
probabilities, as scikit-learn does. Logits can differ between rows whose probabilities are equal.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import starmap
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gputune.ground.errors import InputError, Verbatim, option

Score = Callable[[Tensor, Tensor], Tensor]


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the accuracy, in [0, 1]: the share of rows whose largest logit belongs to the
    label."""
    is_hit = logits.argmax(-1) == y
    return is_hit.double().mean(-1)


def balanced_accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean recall over the classes that occur in y, in [0, 1]."""
    member_of = functional.one_hot(y, logits.shape[-1]).to(logits.dtype)  # (m, K)
    count = member_of.sum(0).double()
    is_hit = logits.argmax(-1) == y  # (C, m)
    # (C, m) @ (m, K) -> (C, K)
    hits = is_hit.to(logits.dtype) @ member_of
    recall = hits.double() / count.clamp_min(1)
    return recall.sum(-1) / (count > 0).sum()


def neg_log_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Return minus the log loss: the mean of -log p(label) over the rows.

    The probability p is clipped to [eps, 1 - eps] of the dtype, as in scikit-learn.
    """
    eps = torch.finfo(logits.dtype).eps
    log_p = _log_p(logits, y).clamp(math.log(eps), math.log1p(-eps))
    return log_p.mean(-1)


def neg_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return minus the cross-entropy: the mean of -log p(label) over the rows.

    Unlike the log loss, the probability p is not clipped. The score is minus the training loss
    itself.
    """
    return _log_p(logits, y).mean(-1)


def _log_p(logits: Tensor, y: Tensor) -> Tensor:
    """Return the log-probability of each row's label, (C, m), from logits."""
    log_p = logits.log_softmax(-1)  # (C, m, K)
    labels = y.expand(log_p.shape[:-1])
    return log_p.gather(-1, labels[..., None]).squeeze(-1)


def roc_auc(logits: Tensor, y: Tensor) -> Tensor:
    """Return the ROC AUC: the probability that a row of class 1 ranks above a row of class 0.

    Ties count half. The score is NaN if a class has no rows.
    """
    return _auc(logits.softmax(-1)[..., 1], y == 1)


def roc_auc_ovr(logits: Tensor, y: Tensor) -> Tensor:
    """Return the ROC AUC of each class against the rest, as a mean over the classes.

    The score is NaN if a class has no rows.
    """
    p = logits.softmax(-1).unbind(-1)
    areas = [_auc(of_class, y == k) for k, of_class in enumerate(p)]
    return torch.stack(areas).mean(0)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Return the ratio part / whole, or 0 if the denominator is 0, as scikit-learn does."""
    return torch.where(whole > 0, part / whole.clamp_min(1), torch.zeros_like(part))


_MEASURES: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "precision": lambda hits, guessed, true: _share(hits, guessed),
    "recall": lambda hits, guessed, true: _share(hits, true),
    "f1": lambda hits, guessed, true: _share(2 * hits, guessed + true),
    "jaccard": lambda hits, guessed, true: _share(hits, guessed + true - hits),
}
"""The scores of predicted classes, from three counts of rows for each class: correct predictions,
all predictions, and rows of the class."""


def of_labels(logits: Tensor, y: Tensor, *, measure: str, average: str) -> Tensor:
    """Return the precision, recall, F1 or Jaccard score of the predicted classes, (C,).

    ``average`` is "binary" (the score of class 1), "micro", "macro" or "weighted", as in
    scikit-learn. A class that occurs neither in y nor in the predictions of a model is left out of
    that model's "macro" average.
    """
    models, _, classes = logits.shape
    guess = logits.argmax(-1)  # (C, m)
    # Model c counts class k at place c * K + k, so that one bincount counts for all models.
    place = guess + classes * torch.arange(models, device=y.device)[:, None]
    count = partial(torch.bincount, minlength=models * classes)
    guessed = count(place.flatten()).view(models, classes).double()
    hits = count(place[guess == y]).view(models, classes).double()
    true = torch.bincount(y, minlength=classes).expand(models, classes).double()
    of = _MEASURES[measure]
    if average == "micro":
        return of(hits.sum(-1), guessed.sum(-1), true.sum(-1))
    values = of(hits, guessed, true)
    if average == "binary":
        return values[:, 1]
    weights = true if average == "weighted" else (guessed + true > 0).double()
    return _share((values * weights).sum(-1), weights.sum(-1))


def r2(outputs: Tensor, y: Tensor) -> Tensor:
    """Return R2: 1 - residual sum of squares / total sum of squares. R2 is at most 1.

    For a constant y, R2 is 1 if all outputs are exact, else 0.
    """
    errors = outputs.squeeze(-1) - y
    return _r2((errors**2).sum(-1), y)


def _r2(residual: Tensor, y: Tensor) -> Tensor:
    """Return R2 (C,) from the residual sums of squares (C,), or NaN for fewer than two rows."""
    if len(y) < 2:
        return torch.full_like(residual, math.nan)
    total = ((y - y.mean()) ** 2).sum()
    # The mean of a constant y may be rounded. Its total is then a rounding error instead of 0.
    constant = (total == 0) | (y.min() == y.max())
    is_exact = (residual == 0).to(residual.dtype)
    return torch.where(constant, is_exact, 1 - residual / total)


def neg_mean_squared_error(outputs: Tensor, y: Tensor) -> Tensor:
    """Return minus the mean squared error, in squared units of y."""
    errors = outputs.squeeze(-1) - y
    return -(errors**2).mean(-1)


def neg_root_mean_squared_error(outputs: Tensor, y: Tensor) -> Tensor:
    """Return minus the root of the mean squared error, in units of y."""
    return -(-neg_mean_squared_error(outputs, y)).sqrt()


def neg_mean_absolute_error(outputs: Tensor, y: Tensor) -> Tensor:
    """Return minus the mean absolute error, in units of y."""
    errors = outputs.squeeze(-1) - y
    return -errors.abs().mean(-1)


def neg_mean_pinball_loss(outputs: Tensor, y: Tensor, *, alpha: float) -> Tensor:
    """Return minus the mean pinball loss at the level ``alpha``, in units of y.

    A row may have one target value or several.
    """
    gap = (y[:, None] if y.dim() == 1 else y) - outputs
    losses = torch.maximum(alpha * gap, (alpha - 1) * gap)
    return -losses.flatten(1).mean(-1)


PINBALL = neg_mean_pinball_loss.__name__
"""The name of a score that exists in scikit-learn only as a metric, not as a scorer.

The quantile level of the score is the level of the loss.
"""


def label_accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the share of rows with the right sign of the logits for all K labels, in [0, 1]."""
    is_right = (logits > 0) == (y > 0)
    return is_right.all(-1).double().mean(-1)


def _by_target(score: Score) -> Score:
    """Extend a regression score to targets with several columns, (m, K).

    The new score is the mean of the scores of the K columns, as in scikit-learn.
    """

    def of(outputs: Tensor, y: Tensor) -> Tensor:
        if y.dim() == 1:
            return score(outputs, y)
        pairs = zip(torch.split(outputs, 1, -1), y.unbind(1))
        return torch.stack(list(starmap(score, pairs))).mean(0)

    return of


CLASSIFICATION: Mapping[str, Score] = {
    **{score.__name__: score for score in (accuracy, balanced_accuracy, neg_log_loss, roc_auc_ovr)},
    "f1_macro": partial(of_labels, measure="f1", average="macro"),
}
# For two classes, "roc_auc_ovr" is left to scikit-learn's scorer.
_BINARY = {name.removesuffix("_ovr"): score for name, score in CLASSIFICATION.items()}
_BINARY["roc_auc"] = roc_auc
LABEL_SCORES: Mapping[str, Score] = {
    f"{measure}_{average}".removesuffix("_binary"): partial(
        of_labels, measure=measure, average=average
    )
    for measure in _MEASURES
    for average in ("binary", "micro", "macro", "weighted")
}
"""The scores of predicted classes by scikit-learn's name. Scores of one class, such as "f1", are for
class 1."""
REGRESSION: Mapping[str, Score] = {
    score.__name__: _by_target(score)
    for score in (r2, neg_mean_squared_error, neg_root_mean_squared_error, neg_mean_absolute_error)
}
OF_TASK: Mapping[str, Mapping[str, Score]] = {
    "binary": _BINARY,
    "multiclass": CLASSIFICATION,
    "regression": REGRESSION,
    "multilabel": {"accuracy": label_accuracy},
    "custom": {},
}
"""The names of the scores that gputune computes on the device, by task."""

RANKING: frozenset[Score] = frozenset({roc_auc, roc_auc_ovr})
"""Scores that can change with the last bit of one output.

A tie of two rows counts half, so a rounding error that breaks the tie changes the score.
"""


class RowMean(NamedTuple):
    """A score that gputune's compiled code can compute from one mean, such as the mean squared
    error.

    ``of_row`` is the name of the quantity in ``native/work.h``.
    """

    of_row: str
    score: Callable[[Tensor, Tensor], Tensor]


ROW_MEANS: Mapping[Score, RowMean] = {
    accuracy: RowMean("hit", lambda mean, y: mean),
    neg_log_loss: RowMean("log likelihood", lambda mean, y: mean),
    REGRESSION["r2"]: RowMean("squared error", lambda mean, y: _r2(mean * len(y), y)),
    REGRESSION["neg_mean_squared_error"]: RowMean("squared error", lambda mean, y: -mean),
    REGRESSION["neg_root_mean_squared_error"]: RowMean(
        "squared error", lambda mean, y: -mean.sqrt()
    ),
    REGRESSION["neg_mean_absolute_error"]: RowMean("absolute error", lambda mean, y: -mean),
}


def _auc(p: Tensor, positive: Tensor) -> Tensor:
    """Return the area under the ROC curve, (C,), from probabilities (C, m).

    The function counts the negative rows that rank below each positive row.
    """
    above = p[:, positive].contiguous()
    below = p[:, ~positive].sort(-1).values
    if above.shape[-1] == 0 or below.shape[-1] == 0:
        return torch.full_like(p[:, 0], math.nan)
    # For each positive row, (C, positives): the negative rows below it, and those not above it.
    lower = torch.searchsorted(below, above)
    not_higher = torch.searchsorted(below, above, right=True)
    wins = (lower + not_higher).to(p.dtype).mean(-1) / 2  # ties count half
    return wins / below.shape[-1]


def refuse_metric(scoring: Callable[..., object]) -> None:
    """Raise InputError if ``scoring`` is a metric function of sklearn.metrics, such as
    ``f1_score``.

    A metric function takes (y_true, y_pred), and for some metrics the lowest value is the best.
    """
    metric = scoring.func if isinstance(scoring, partial) else scoring
    if not (inspect.isfunction(metric) and metric.__module__.startswith("sklearn.metrics")):
        return
    from sklearn.metrics import get_scorer, get_scorer_names

    names = []
    for name in get_scorer_names():
        if getattr(get_scorer(name), "_score_func", None) is metric:
            names.append(name)
    scorer: str = Verbatim(f"sklearn.metrics.make_scorer({metric.__name__}, ...)")
    if names and metric is scoring:
        scorer = min(names, key=len)
    raise InputError(
        f"scoring=sklearn.metrics.{metric.__name__}",
        "is a function of (y_true, y_pred), not a scorer",
        remedy=f"Give {option('scoring', scorer)}.",
    )
