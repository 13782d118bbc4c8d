"""What the trials of a study do on the rows that its folds validate on, by members that train again as in the search.

Predictions, residuals and a temperature of one trial; of the best one the classes that it confuses, and the columns
that it needs.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gputune.data.dataset import Dataset, Fold
from gputune.data.encode import Layout
from gputune.engine.stop import entry
from gputune.errors import InputError
from gputune.scoring.scoring import Scoring
from gputune.seeding import stream
from gputune.study.curves import FoldReport
from gputune.study.model import TunedModel
from gputune.study.study import Study, Trial
from gputune.tuning.predictions import (
    Predictions,
    check_folds_train,
    is_calibrated,
    means_of_rows,
    members_of,
    predictions_of,
    search_for,
    values_of,
    why_no_folds,
)
from gputune.tuning.progress import Progress
from gputune.tuning.refit import refit_trial, search_of


@entry
def oof_predictions(
    study: Study, X: object = None, y: object = None, *, trial: int | None = None, trust_code: bool = False
) -> NDArray[np.float64]:
    """Return what a trial predicts of rows that it was not trained on; see ``Study.oof_predictions``."""
    check_folds_train(study, "oof_predictions()")
    one = _trial_of_number(study, trial, "oof_predictions")
    search = search_for("oof_predictions", study, X, y, trust_code)
    predictions = predictions_of(search, [one], Progress(0))
    data = predictions.data
    values = [data.in_units(f, of_one).cpu() for f, (of_one,) in enumerate(predictions.values)]
    means = means_of_rows(data, values)
    return means[:, 0] if data.task == "regression" and means.shape[1] == 1 else means


@entry
def refit_with_folds(
    study: Study,
    X: object = None,
    y: object = None,
    *,
    trial: int | None = None,
    intervals: bool = False,
    calibrate: bool | None = None,
    check: bool = True,
    trust_code: bool = False,
) -> TunedModel:
    """Return the best trial of a study, or one of a number, trained on all rows; see ``Study.best_model``.

    It trains for as many epochs as its best score took, and its members on the folds tell the rest.
    """
    if calibrate is None and (not check or why_no_folds(study)):
        calibrate = False
    calibrated = is_calibrated(study, calibrate, "best_model")
    called, on_folds = f"best_model({'intervals' if intervals else 'calibrate'}=True)", intervals or calibrated
    if on_folds:
        check_folds_train(study, called)
    if intervals and study.record.task != "regression":
        raise InputError(f"{called} is for a number to be predicted, and the study is of classes; leave it out.")
    one = _trial_of_number(study, trial, "best_model")
    search = search_of(study, X, y, check=check, trust_code=trust_code)
    if not on_folds:
        return refit_trial(search, one)
    if search.rows != study.record.fingerprint:
        raise InputError(f"{called} needs the rows of the search, whose folds it trains on; leave out check=False.")
    if intervals and search.problem.target.n_outputs > 1:
        raise InputError(f"{called} is for one number a row, and the target has several; search for one at a time.")
    predictions, alone = predictions_of(search, [one], Progress(0)), torch.ones(1)
    model = refit_trial(search, one)
    temperature = predictions.temperature(alone) if calibrated else 1.0
    return replace(model, residuals=predictions.residuals(alone), temperature=temperature)


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
    search, one = search_for("report", study, X, y, trust_code), study.best_trial
    layout = search.problem.layout
    if importance and not isinstance(layout, Layout):
        raise InputError(
            f"report(importance=True) is of the columns of a table, and X is {layout}; leave importance out."
        )
    matrix = np.zeros((0, 0), np.int64)
    if confusion:
        matrix = _confusion(predictions_of(search, [one], Progress(0)))
    if not importance or not isinstance(layout, Layout):
        return FoldReport(one.number, matrix, (), np.zeros(0), np.zeros(0))
    (members,), data, scoring = members_of(search, [one], Progress(0))
    drops = _drops(members, data, scoring, layout.widths(search.config(one)["numbers"]))
    order = np.argsort(-drops.mean(1), kind="stable")
    names = tuple(layout.columns[place].name for place in order)
    return FoldReport(one.number, matrix, names, drops.mean(1)[order], drops.std(1)[order])


def check_fold_report(study: Study, *, confusion: bool) -> None:
    """Raise InputError for a study without folds to train on, and for a ``confusion`` where there are no classes."""
    check_folds_train(study, f"report({'confusion' if confusion else 'importance'}=True)")
    if confusion and (study.record.classes is None or study.record.task == "multilabel"):
        what = "several labels" if study.record.task == "multilabel" else "numbers"
        raise InputError(f"report(confusion=True) is of classes, and the study predicts {what}; leave confusion out.")


def _confusion(predictions: Predictions) -> NDArray[np.int64]:
    """Return how many rows of each true class are predicted as each, (K, K)."""
    data = predictions.data
    means = means_of_rows(data, [value[0].cpu() for value in predictions.values])
    known = np.isfinite(means).all(1)
    K, true = means.shape[1], data.target.cpu().numpy()[known]
    counts = np.bincount(true * K + means[known].argmax(1), minlength=K * K)
    return counts.reshape(K, K).astype(np.int64)


def _drops(members: list[nn.Module], data: Dataset, scoring: Scoring, sizes: list[int]) -> NDArray[np.float64]:
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
                for shuffled in _shuffle(x.cpu(), order, sizes)
            ]
            parts.append(whole - np.array(scores))
    return np.stack(parts, 1)


def _shuffle(x: Tensor, order: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    """Yield rows (m, D) with the features of one column in another order, for each column."""
    start = 0
    for size in sizes:
        table = x.clone()
        table[:, start : start + size] = x[order, start : start + size]
        yield table
        start += size


def _trial_of_number(study: Study, number: object, caller: str) -> Trial:
    """Return the trial of a number, None: the best; InputError, in a caller's words, where none of it has a score."""
    if number is None:
        return study.best_trial
    scored = {trial.number: trial for trial in study.trials if math.isfinite(trial.score)}
    if not isinstance(number, int | np.integer) or isinstance(number, bool) or int(number) not in scored:
        raise InputError(
            f"{caller}(trial={number!r}) must be the number of a trial that has a score, for example "
            f"{study.best_trial.number}; study.trials lists them."
        )
    return scored[int(number)]
