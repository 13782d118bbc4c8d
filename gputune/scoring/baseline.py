"""The score of the answer that needs no model: what any search has to beat."""

import math
import warnings
from collections.abc import Mapping

import numpy as np
import torch

from gputune.data.dataset import Dataset
from gputune.scoring.scores import accuracy
from gputune.scoring.scoring import Scoring, outputs_of

_LOPSIDED = 0.8
"""Share of one class from which on an accuracy says little."""


def baseline(data: Dataset, scoring: Scoring, classes: np.ndarray | None) -> Mapping[str, str | float] | None:
    """Return the ``answer`` in words and its mean ``score`` over the folds; None for a scorer of the user's own.

    The answer is the share of each class, or the mean of the target, among the training rows of a fold; an accuracy
    sees of it the most frequent class alone. For a score of one class it is one class for all rows where that scores
    more. ``classes`` are the labels.
    """
    if ":" in scoring.name or scoring.of_outputs is not None:
        return None
    answer, score = _words(data, scoring, classes), _mean_score(data, scoring)
    if scoring.positive is not None and classes is not None:
        # The best f1 without a model is that of the positive class for all rows.
        of_class = {
            f"always {label!r}": _mean_score(data, scoring, code)
            for code, label in enumerate(classes.tolist())
        }
        best = max(of_class, key=of_class.__getitem__)
        ranks = len({*of_class.values()}) == 1  # no matter which class: a score of ranks
        if of_class[best] >= score and not ranks:
            answer, score = best, of_class[best]
    return {"answer": answer, "score": score} if math.isfinite(score) else None


def _mean_score(data: Dataset, scoring: Scoring, always: int | None = None) -> float:
    """Return the mean score over the folds of one answer for all rows; ``always`` is the code of a class."""
    scores = []
    for f, fold in enumerate(data.folds):
        target = data.target[fold.train]
        if data.task == "regression":
            answer = (target.view(len(target), -1).mean(0) - data.center[f]) / data.scale[f]
        elif data.task == "multilabel":
            answer = outputs_of(target.double().mean(0), data.task)
        else:
            counts = torch.bincount(target, minlength=max(2, data.n_outputs))
            share = counts.double() / len(target)
            if always is not None:
                share = torch.zeros_like(share).index_fill_(0, torch.tensor(always, device=share.device), 1.0)
            answer = outputs_of(share, data.task)
        with warnings.catch_warnings(
            action="ignore"
        ):  # of scores that one answer for all rows leaves undefined
            scores.append(scoring(data, f, answer.expand(1, len(fold.valid), -1))[0])
    return float(torch.stack(scores).mean())


def _words(data: Dataset, scoring: Scoring, classes: np.ndarray | None) -> str:
    if data.task == "regression":
        return "the mean of the training rows"
    if classes is None or data.task == "multilabel" or scoring.score is not accuracy:
        return "the share of each class in the training rows"
    return f"always {classes[int(torch.bincount(data.target).argmax())].item()!r}"


def remark_on_accuracy(baseline: Mapping[str, str | float] | None, scoring: Scoring) -> tuple[str, ...]:
    """Return what to know of an accuracy that one class makes high."""
    if baseline is None or scoring.score is not accuracy or float(baseline["score"]) < _LOPSIDED:
        return ()
    return (
        f"{baseline['answer']} has an accuracy of {baseline['score']:.4f} already: balanced_accuracy, roc_auc, "
        "average_precision or neg_log_loss as scoring tell more",
    )
