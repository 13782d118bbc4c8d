"""Scores of predicted labels, computed for many models at once, under scikit-learn's names.

Greater scores are better. Each function takes outputs (C, m, K) of C models on the same m rows, and
the targets of the rows. The targets are class codes (m,) or labels (m, K) of 0 and 1. The function
returns scores (C,). A ratio with a denominator of 0 is 0, as with ``zero_division="warn"`` in
scikit-learn.

Source: sklearn.metrics, precision_recall_fscore_support, jaccard_score, matthews_corrcoef,
average_precision_score.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gputune.ground.types import Task

Score = Callable[[Tensor, Tensor], Tensor]


class Counts(NamedTuple):
    """The counts from which precision, recall, F1 and Jaccard scores are computed.

    The counts are numbers of rows for each class, or of labels for each row, as float64 tensors of
    the same shape.
    """

    hits: Tensor  # predicted correctly
    guessed: Tensor
    true: Tensor

    def summed(self) -> "Counts":
        """Return the counts summed over all classes or labels, for the "micro" average.

        The last axis stays with length 1.
        """
        return Counts(*(part.sum(-1, keepdim=True) for part in self))


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Return the ratio part / whole, or 0 if the denominator is 0."""
    return torch.where(whole > 0, part / whole.clamp_min(1), torch.zeros_like(part))


_MEASURES: Mapping[str, Callable[[Counts], Tensor]] = {
    "precision": lambda n: _share(n.hits, n.guessed),
    "recall": lambda n: _share(n.hits, n.true),
    "f1": lambda n: _share(2 * n.hits, n.guessed + n.true),
    "jaccard": lambda n: _share(n.hits, n.guessed + n.true - n.hits),
}


def _count_classes(outputs: Tensor, y: Tensor) -> Counts:
    """For each class, count the correct predictions, all predictions and true rows, each (C, K).

    ``outputs`` has the shape (C, m, K), and ``y`` holds class codes (m,).
    """
    models, _, classes = outputs.shape
    guess = outputs.argmax(-1)  # (C, m)
    # Model c counts class k at place c * K + k, so that one bincount counts for all models.
    place = guess + classes * torch.arange(models, device=y.device)[:, None]
    guessed = torch.bincount(place.flatten(), minlength=models * classes)
    hits = torch.bincount(place[guess == y], minlength=models * classes)
    true = torch.bincount(y, minlength=classes).expand(models, classes)
    return Counts(
        hits.view(models, classes).double(), guessed.view(models, classes).double(), true.double()
    )


def _count_labels(outputs: Tensor, y: Tensor, axis: int) -> Counts:
    """Count correct predictions, all predictions and true values of a multilabel target.

    The counts are for each label, (C, K), with ``axis=-2``, and for each row, (C, m), with
    ``axis=-1``.
    """
    guess = outputs > 0
    truth = y > 0
    true = truth.sum(axis).expand(len(outputs), -1)
    return Counts((guess & truth).sum(axis).double(), guess.sum(axis).double(), true.double())


def of_positive_class(outputs: Tensor, y: Tensor, *, measure: str) -> Tensor:
    """Return the precision, recall, F1 or Jaccard score of class 1 for a binary target, (C,)."""
    return _MEASURES[measure](_count_classes(outputs, y))[:, 1]


def averaged(outputs: Tensor, y: Tensor, *, measure: str, average: str) -> Tensor:
    """Return the precision, recall, F1 or Jaccard score averaged over classes, labels or rows,
    (C,).

    ``average`` is "micro", "macro", "weighted" or "samples" (rows), as in scikit-learn. A class
    that occurs neither in the targets nor in the predictions of a model is left out of that model's
    "macro" average.
    """
    several = y.dim() == 2
    counts = (
        _count_labels(outputs, y, -1 if average == "samples" else -2)
        if several
        else _count_classes(outputs, y)
    )
    if average == "micro":
        return _MEASURES[measure](counts.summed())[:, 0]
    values = _MEASURES[measure](counts)
    if average == "weighted":
        return _share((values * counts.true).sum(-1), counts.true.sum(-1))
    if average == "macro" and not several:
        occurs = (counts.guessed + counts.true) > 0
        return (values * occurs).sum(-1) / occurs.sum(-1)
    return values.mean(-1)


def matthews_corrcoef(outputs: Tensor, y: Tensor) -> Tensor:
    """Return the Matthews correlation coefficient, (C,), in [-1, 1].

    The coefficient is 0 if all labels or all predictions are equal.
    """
    counts = _count_classes(outputs, y)
    rows = len(y)
    # The covariances are multiplied by rows**2, so that they stay whole numbers.
    covariance = counts.hits.sum(-1) * rows - (counts.guessed * counts.true).sum(-1)
    of_guesses = rows**2 - counts.guessed.square().sum(-1)
    of_truth = rows**2 - counts.true.square().sum(-1)
    product = of_guesses * of_truth
    return torch.where(
        product > 0, covariance / product.clamp_min(1).sqrt(), torch.zeros_like(covariance)
    )


def average_precision(outputs: Tensor, y: Tensor) -> Tensor:
    """Return the average precision (C,) of class 1 for a binary target, or the mean over labels (m,
    K).

    The average precision is 0 without a positive row.
    """
    if y.dim() == 1:
        return _average_precision(outputs.softmax(-1)[..., 1], y == 1)
    p = outputs.sigmoid()
    return torch.stack(
        [_average_precision(p[..., k], y[:, k] > 0) for k in range(y.shape[1])]
    ).mean(0)


def _average_precision(p: Tensor, positive: Tensor) -> Tensor:
    """Return the average precision (C,) of one class, from its probabilities p (C, m).

    Each positive row has a precision among the rows with at least the same probability. The average
    precision is the mean of these precisions over the positive rows.
    """
    of_positive = p[:, positive].contiguous()  # (C, P)
    n_positive = of_positive.shape[1]
    if n_positive == 0:
        return torch.zeros_like(p[:, 0])
    # (C, P): for each positive row, the rows and the positive rows with a lower probability
    lower = torch.searchsorted(p.sort(-1).values, of_positive)
    lower_positive = torch.searchsorted(of_positive.sort(-1).values, of_positive)
    return ((n_positive - lower_positive).to(p.dtype) / (p.shape[1] - lower)).mean(-1)


def _averages(*averages: str) -> dict[str, Score]:
    return {
        f"{measure}_{average}": partial(averaged, measure=measure, average=average)
        for measure in _MEASURES
        for average in averages
    }


_OF_CLASSES: dict[str, Score] = {
    **_averages("micro", "macro", "weighted"),
    "matthews_corrcoef": matthews_corrcoef,
}
_OF_ONE_CLASS: dict[str, Score] = {
    name: partial(of_positive_class, measure=name) for name in _MEASURES
}
LABEL_SCORES: Mapping[Task, Mapping[str, Score]] = {
    "binary": {**_OF_CLASSES, **_OF_ONE_CLASS, "average_precision": average_precision},
    "multiclass": _OF_CLASSES,
    "multilabel": {
        **_averages("micro", "macro", "weighted", "samples"),
        "average_precision": average_precision,
    },
}
"""The score functions by task and by scikit-learn's name. Scores of one class, such as "f1", are
for class 1."""
