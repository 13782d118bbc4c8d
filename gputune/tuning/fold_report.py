"""The best trial, trained on its folds once more: the classes that it confuses, and the columns that it needs."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gputune.data.dataset import Dataset, Fold
from gputune.data.encode import Layout
from gputune.engine.entry import entry
from gputune.errors import InputError
from gputune.scoring.scoring import Scoring
from gputune.seeding import stream
from gputune.study.curves import FoldReport
from gputune.study.study import Study
from gputune.tuning.ensemble import Predictions, means_of_rows, members_of, recalled_for, values_of
from gputune.tuning.out_of_fold import check_folds_train
from gputune.tuning.progress import Progress

_SHUFFLES, _ROWS = 5, 10_000
"""Shuffles of a column, and rows of a fold at most that are shuffled."""


@entry
def fold_report(
    study: Study,
    X: object = None,
    y: object = None,
    *,
    confusion: bool = False,
    importance: bool = False,
    trust_code: bool = False,
) -> FoldReport:
    """Return the confusion matrix and the importance of the columns that were asked for; see ``Study.report``.

    Raises InputError where there are no classes, no columns, or no folds to train on.
    """
    check_fold_report(study, confusion=confusion)
    search, one = recalled_for("report", study, X, y, trust_code), study.best_trial
    layout = search.problem.layout
    if importance and not isinstance(layout, Layout):
        raise InputError(
            f"report(importance=True) is of the columns of a table, and X is {layout}; leave importance out."
        )
    (members,), data, scoring = members_of(search, [one], Progress(0))
    matrix = _confusion(members, data, scoring) if confusion else np.zeros((0, 0), np.int64)
    if not importance or not isinstance(layout, Layout):
        return FoldReport(one.number, matrix, (), np.zeros(0), np.zeros(0))
    drops = _drops(members, data, scoring, layout.widths(search.problem.numbers))
    order = np.argsort(-drops.mean(1), kind="stable")
    names = tuple(layout.columns[place].name for place in order)
    return FoldReport(one.number, matrix, names, drops.mean(1)[order], drops.std(1)[order])


def check_fold_report(study: Study, *, confusion: bool) -> None:
    """Raise InputError for a study without folds to train on, and for a ``confusion`` where there are no classes."""
    check_folds_train(study, f"report({'confusion' if confusion else 'importance'}=True)")
    if confusion and (study.record.classes is None or study.record.task == "multilabel"):
        what = "several labels" if study.record.task == "multilabel" else "numbers"
        raise InputError(
            f"report(confusion=True) is of classes, and the study predicts {what}; leave confusion out."
        )


def _confusion(members: list[nn.Module], data: Dataset, scoring: Scoring) -> NDArray[np.int64]:
    """Return how many rows of each true class are predicted as each, (K, K)."""
    predictions = Predictions.of([members], data, scoring)
    means = means_of_rows(data, [value[0].cpu() for value in predictions.values])
    known = np.isfinite(means).all(1)
    K, true = means.shape[1], data.target.cpu().numpy()[known]
    counts = np.bincount(true * K + means[known].argmax(1), minlength=K * K)
    return counts.reshape(K, K).astype(np.int64)


def _drops(
    members: list[nn.Module], data: Dataset, scoring: Scoring, sizes: list[int]
) -> NDArray[np.float64]:
    """Return how much the score falls when a column of so many features is shuffled, (columns, shuffles of folds).

    Source: Breiman (2001), Random forests; as sklearn.inspection.permutation_importance, on the rows of each fold.
    """
    few = [fold.valid[:: -(-len(fold.valid) // _ROWS) or 1] for fold in data.folds]
    data = replace(data, folds=tuple(Fold(fold.train, rows) for fold, rows in zip(data.folds, few)))
    scored, parts = Predictions((), data, scoring), []
    for f, (module, rows) in enumerate(zip(members, few)):
        (x,) = data.rows(f, rows)
        whole = float(scored.scores(f, values_of(module, [x.cpu()], data)[None])[0, 0])
        for shuffle in range(_SHUFFLES):
            order = torch.randperm(len(rows), generator=stream(0, "importance", f, shuffle))
            scores = [
                float(scored.scores(f, values_of(module, [shuffled], data)[None])[0, 0])
                for shuffled in _shuffled(x.cpu(), order, sizes)
            ]
            parts.append(whole - np.array(scores))
    return np.stack(parts, 1)


def _shuffled(x: Tensor, order: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    """Yield rows (m, D) with the features of one column in another order, for each column."""
    start = 0
    for size in sizes:
        table = x.clone()
        table[:, start : start + size] = x[order, start : start + size]
        yield table
        start += size
