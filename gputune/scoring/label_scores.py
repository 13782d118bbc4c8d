"""Scores of predicted labels for many models at once, under scikit-learn's names: greater is
better.

Each function takes outputs (C, m, K) of C models on the same m rows and the rows' targets, class
codes (m,) or labels (m, K) of 0 and 1, and returns (C,). A share without rows is 0, as with
``zero_division="warn"`` in scikit-learn.
Source: sklearn.metrics, precision_recall_fscore_support, jaccard_score, matthews_corrcoef,
    average_precision_score.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gputune.scoring.scores import Score
from gputune.types import Task


class Counts(NamedTuple):
    """Rows of each class, or labels of each row, as float64 of one shape."""

    hits: Tensor  # predicted rightly
    guessed: Tensor
    true: Tensor

    def summed(self) -> "Counts":
        """Return the sums over the last axis, which is kept with length 1."""
        return Counts(*(part.sum(-1, keepdim=True) for part in self))


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Return part / whole, 0 where the whole is 0."""
    return torch.where(whole > 0, part / whole.clamp_min(1), torch.zeros_like(part))


_MEASURES: Mapping[str, Callable[[Counts], Tensor]] = {
    "precision": lambda n: _share(n.hits, n.guessed),
    "recall": lambda n: _share(n.hits, n.true),
    "f1": lambda n: _share(2 * n.hits, n.guessed + n.true),
    "jaccard": lambda n: _share(n.hits, n.guessed + n.true - n.hits),
}


def _count_classes(outputs: Tensor, y: Tensor) -> Counts:
    """Return the counts (C, K) of each class."""
    models, _, classes = outputs.shape
    guess = outputs.argmax(-1)  # (C, m)
    place = guess + classes * torch.arange(models, device=y.device)[:, None]
    guessed = torch.bincount(place.flatten(), minlength=models * classes)
    hits = torch.bincount(place[guess == y], minlength=models * classes)
    true = torch.bincount(y, minlength=classes).expand(models, classes)
    return Counts(
        hits.view(models, classes).double(), guessed.view(models, classes).double(), true.double()
    )


def _count_labels(outputs: Tensor, y: Tensor, axis: int) -> Counts:
    """Return the counts of each label, (C, K), for ``axis=-2``, or of each row, (C, m), for
    ``axis=-1``."""
    guess = outputs > 0
    truth = y > 0
    true = truth.sum(axis).expand(len(outputs), -1)
    return Counts((guess & truth).sum(axis).double(), guess.sum(axis).double(), true.double())


def of_positive_class(outputs: Tensor, y: Tensor, *, measure: str) -> Tensor:
    """Return a measure of class 1 of two."""
    return _MEASURES[measure](_count_classes(outputs, y))[:, 1]


def averaged(outputs: Tensor, y: Tensor, *, measure: str, average: str) -> Tensor:
    """Return a measure averaged over classes, labels or rows ("samples"), as scikit-learn's
    ``average`` says.

    Classes that occur neither among the targets nor among the predictions of a model have no part
    in its average.
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
    """Return the Matthews correlation coefficient, in [-1, 1]; 0 if all labels or all predictions
    are equal."""
    counts = _count_classes(outputs, y)
    rows = len(y)
    covariance = counts.hits.sum(-1) * rows - (counts.guessed * counts.true).sum(-1)
    of_guesses = rows**2 - counts.guessed.square().sum(-1)
    of_truth = rows**2 - counts.true.square().sum(-1)
    product = of_guesses * of_truth
    return torch.where(
        product > 0, covariance / product.clamp_min(1).sqrt(), torch.zeros_like(covariance)
    )


def average_precision(outputs: Tensor, y: Tensor) -> Tensor:
    """Return the average precision of class 1 of two, or its mean over labels (m, K); 0 without a
    positive row."""
    if y.dim() == 1:
        return _average_precision(outputs.softmax(-1)[..., 1], y == 1)
    p = outputs.sigmoid()
    return torch.stack(
        [_average_precision(p[..., k], y[:, k] > 0) for k in range(y.shape[1])]
    ).mean(0)


def _average_precision(p: Tensor, positive: Tensor) -> Tensor:
    """Return the mean over positive rows of the precision among the rows that score at least as
    high, p (C, m)."""
    of_positive = p[:, positive].contiguous()  # (C, P)
    n_positive = of_positive.shape[1]
    if n_positive == 0:
        return torch.zeros_like(p[:, 0])
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
"""By task and scikit-learn's name; a score of one class is of class 1."""
