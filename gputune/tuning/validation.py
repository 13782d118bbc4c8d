"""Results of trials on the validation rows of their folds: predictions, ensembles and reports.

The study has stored the predictions, or the members train again as in the search.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix
from torch import Tensor, nn

from gputune.data.columns import Layout
from gputune.data.dataset import Dataset, Fold
from gputune.data.encode import Statistics
from gputune.data.folds import unpack_folds
from gputune.data.scaling import joined_statistics
from gputune.engine.stop import entry
from gputune.errors import InputError, check_count
from gputune.population.population import Ensemble
from gputune.scoring.evaluation_draws import EvaluationDraws
from gputune.scoring.scoring import Scoring
from gputune.seeding import stream, stream_seed
from gputune.study.model import TunedModel
from gputune.study.rows import FoldReport
from gputune.study.study import Study, Trial
from gputune.tuning.predictions import (
    Predictions,
    means_of_rows,
    members_of,
    predictions_of,
    values_of,
)
from gputune.tuning.progress import Progress
from gputune.tuning.refit import Access, Search, refit_trial, search_of
from gputune.types import Config

Refit: TypeAlias = int | Literal["all", "folds"]

# The number of shuffles of a column, and the largest number of rows of a fold that are used.
_SHUFFLES = 5
_ROWS = 10_000


def _check_folds_train(study: Study, called: str) -> None:
    """Raise InputError if the trials of a study cannot train again on their folds."""
    if why := _why_no_folds(study):
        raise InputError(f"{called} trains a trial again on its folds, and this study is {why}.")


def _why_no_folds(study: Study) -> str:
    """Return the reason why trials of a study do not train again on its folds, or "" if they do."""
    if study.record.face == "loop":
        return (
            "of search(), whose training loop is your own: keep what your objective predicts in "
            "a file"
        )
    if isinstance(study.record.method, dict) and study.record.is_hypergradient:
        return (
            "of a hypergradient search, whose points have schedules of their own; use a study of "
            "another method"
        )
    if study.record.task == "custom":
        return (
            "of a custom target, of which there is no probability and no mean; train the module "
            "on your own folds"
        )
    return ""


def _is_calibrated(access: Access, calibrate: bool | None) -> bool:
    """Return True if probabilities are calibrated.

    ``calibrate=None`` calibrates if the trials are ranked by the log loss.
    """
    record = access.study.record
    if calibrate not in (None, True, False):
        raise InputError(
            f"{access.called}(calibrate=...) must be True, False or None, got {calibrate!r}."
        )
    is_of_classes = record.task in ("binary", "multiclass")
    if calibrate and not is_of_classes:
        what = {"multilabel": "several labels", "custom": "a custom target"}.get(
            record.task, "numbers"
        )
        is_for = f"{access.called}(calibrate=True) is for one class a row to be predicted"
        raise InputError(f"{is_for}, and the study is of {what}; leave it out.")
    return is_of_classes and record.scoring == "neg_log_loss" if calibrate is None else calibrate


@entry
def oof_predictions(access: Access, trial: int | None) -> NDArray[np.float64]:
    """Return the predictions of a trial for rows that it was not trained on.

    See ``Study.oof_predictions``.
    """
    _check_folds_train(access.study, "oof_predictions()")
    one = _trial_of_number(access, trial)
    predictions = predictions_of(search_of(access), [one], Progress(0))
    data = predictions.data
    means = means_of_rows(
        data, [data.in_units(f, of_one).cpu() for f, (of_one,) in enumerate(predictions.values)]
    )
    return means[:, 0] if data.task == "regression" and means.shape[1] == 1 else means


@entry
def refit_with_folds(
    access: Access, *, trial: int | None, intervals: bool, calibrate: bool | None
) -> TunedModel:
    """Return the tuned model of the best trial, or of a given trial, trained on all rows.

    See ``Study.best_model``.
    """
    study = access.study
    if calibrate is None and (not access.check or _why_no_folds(study)):
        calibrate = False
    calibrated = _is_calibrated(access, calibrate)
    called = f"best_model({'intervals' if intervals else 'calibrate'}=True)"
    on_folds = intervals or calibrated
    if on_folds:
        _check_folds_train(study, called)
    if intervals and study.record.task != "regression":
        raise InputError(
            f"{called} is for a number to be predicted, and the study is of classes; leave it out."
        )
    one = _trial_of_number(access, trial)
    search = search_of(access)
    if not on_folds:
        return refit_trial(search, one)
    if search.rows != study.record.fingerprint:
        raise InputError(
            f"{called} needs the rows of the search, whose folds it trains on; leave out "
            "check=False."
        )
    if intervals and search.problem.target.n_outputs > 1:
        raise InputError(
            f"{called} is for one number a row, and the target has several; search for one at a "
            "time."
        )
    predictions = predictions_of(search, [one], Progress(0))
    return predictions.complete(refit_trial(search, one), torch.ones(1), calibrated=calibrated)


def _trial_of_number(access: Access, number: object) -> Trial:
    """Return the trial with a given number. None means the best trial.

    Raises InputError if no trial with a score has this number.
    """
    study = access.study
    if number is None:
        return study.best_trial
    scored = {trial.number: trial for trial in study.trials if math.isfinite(trial.score)}
    if (
        not isinstance(number, int | np.integer)
        or isinstance(number, bool)
        or int(number) not in scored
    ):
        must = (
            f"must be the number of a trial that has a score, for example {study.best_trial.number}"
        )
        raise InputError(f"{access.called}(trial={number!r}) {must}; study.trials lists them.")
    return scored[int(number)]


@entry
def ensemble(
    access: Access,
    *,
    size: int,
    candidates: int,
    refit: Refit,
    calibrate: bool | None,
    verbose: int,
) -> TunedModel:
    """Choose and train an ensemble of the trials of a study. See ``Study.ensemble``.

    Source: Caruana et al. (2004), Ensemble selection from libraries of models: with repetition, and
    beginning with the best model.
    """
    study = access.study
    check_count(size, "ensemble(size=...)")
    check_count(candidates, "ensemble(candidates=...)", least=2)
    starts = 1 if isinstance(refit, str) and refit in ("all", "folds") else refit
    check_count(starts, "ensemble(refit=...), unless it is 'all' or 'folds',")
    _check_folds_train(study, "ensemble()")
    trials = [t for t in study.ranking() if t.state == "complete" and math.isfinite(t.score)][
        :candidates
    ]
    if len(trials) < 2:
        has = f"ensemble() needs two finished trials, and the study has {len(trials)}"
        raise InputError(f"{has}; search on, or use best_model().")
    calibrated = _is_calibrated(access, calibrate)
    search = search_of(access)
    predictions = predictions_of(search, trials, Progress(verbose))
    chosen = predictions.choose(size)
    scores = predictions.nested_scores(size)
    weights = [chosen[place] / chosen.total() for place in range(len(trials))]
    shares = [(trial, weight) for trial, weight in zip(trials, weights) if weight]
    info = {"ensemble": {str(trial.number): weight for trial, weight in shares}, "refit": refit}
    info |= search.score(
        float(np.mean(scores)), float(np.std(scores, ddof=1)) / math.sqrt(len(scores))
    )
    model = _mean_model(search, shares, None if refit == "folds" else int(starts), info)
    return predictions.complete(model, torch.tensor(weights), calibrated=calibrated)


def _mean_model(
    search: Search, shares: Sequence[tuple[Trial, float]], starts: int | None, info: Config
) -> TunedModel:
    """Return the weighted mean of trials as one model.

    Each trial is trained on all rows from ``starts`` different seeds. ``starts=None`` trains it on
    the training rows of each fold.
    """
    trials = [trial for trial, _ in shares]
    seed = search.options.random_state
    whole = search.dataset(None, trials)
    # the preparation of all rows is used, so that all members read the same inputs
    if starts is None:
        (every,) = whole.folds
        folds = unpack_folds(search.study.record.arguments.folds)
        rows = [torch.as_tensor(train, device=whole.device) for train, _ in folds]
        parts = [(replace(whole, folds=(replace(every, train=train),)), seed) for train in rows]
    else:
        seeds = [seed, *(stream_seed(seed, "ensemble", number) for number in range(1, starts))]
        parts = [(whole, one) for one in seeds]
    modules = [module for data, one in parts for (module,) in search.train(data, trials, seed=one)]
    info = info | search.note_on_draws(parts[0][0], trials)
    columns, statistics = _columns([whole.of(search.config(trial)) for trial in trials])
    columns *= len(parts)
    # Each trial is trained len(parts) times, and its weight is split over these modules.
    weights = [weight / len(parts) for _, weight in shares] * len(parts)
    network = Ensemble(modules, weights, search.problem.target.task, columns)
    arguments = [search.arguments(trial, whole) for trial in trials] * len(parts)
    spec = {
        "kwargs": arguments[0],
        "ensemble": arguments,
        **({"columns": columns} if columns else {}),
    }
    spec |= search.seeds([one for _, one in parts for _ in trials])
    return search.model(network.eval(), whole, spec, info, statistics)


def _columns(own: Sequence[Dataset]) -> tuple[list[list[int]], Statistics | None]:
    """Return the columns of an ensemble's inputs that each trial reads, and their statistics.

    The columns of a trial are given by the first column and the end.
    """
    distinct = {one.numbers: one for one in own}
    if len(distinct) == 1:
        return [], None  # all columns of the data itself
    ends = np.cumsum([one.n_features for one in distinct.values()]).tolist()
    columns = {
        word: [end - one.n_features, end] for end, (word, one) in zip(ends, distinct.items())
    }
    parts = [
        part for one in distinct.values() for part in one.statistics if isinstance(part, Statistics)
    ]
    return [columns[one.numbers] for one in own], joined_statistics(parts)


@entry
def fold_report(access: Access, *, confusion: bool = False, importance: bool = False) -> FoldReport:
    """Return the confusion matrix and the importance of columns, if they were asked for.

    See ``Study.report``.
    """
    study = access.study
    check_fold_report(study, confusion=confusion)
    search = search_of(access)
    one = study.best_trial
    layout = search.problem.layout
    matrix = np.zeros((0, 0), np.int64)
    if importance and not isinstance(layout, Layout):
        why = f"report(importance=True) is of the columns of a table, and X is {layout}"
        raise InputError(f"{why}; leave importance out.")
    if confusion:
        predictions = predictions_of(search, [one], Progress(0))
        data = predictions.data
        means = means_of_rows(data, [value[0].cpu() for value in predictions.values])
        known = np.isfinite(means).all(1)
        true = data.target.cpu().numpy()[known]
        matrix = confusion_matrix(true, means[known].argmax(1), labels=range(means.shape[1]))
    if not importance or not isinstance(layout, Layout):
        return FoldReport(one.number, matrix, (), np.zeros(0), np.zeros(0))
    (members,), data, scoring = members_of(search, [one], Progress(0))
    draws = search.evaluation_draws(data, one)
    drops = _drops(members, data, scoring, layout.widths(search.config(one)["numbers"]), draws)
    order = np.argsort(-drops.mean(1), kind="stable")
    names = tuple(layout.columns[place].name for place in order)
    return FoldReport(one.number, matrix, names, drops.mean(1)[order], drops.std(1)[order])


def check_fold_report(study: Study, *, confusion: bool) -> None:
    """Raise InputError if a study cannot have a report on its folds.

    The trials must be able to train on their folds. ``confusion`` needs a target of classes.
    """
    _check_folds_train(study, f"report({'confusion' if confusion else 'importance'}=True)")
    if confusion and (study.record.classes is None or study.record.task == "multilabel"):
        what = "several labels" if study.record.task == "multilabel" else "numbers"
        raise InputError(
            f"report(confusion=True) is of classes, and the study predicts {what}; leave "
            "confusion out."
        )


def _drops(
    members: list[nn.Module],
    data: Dataset,
    scoring: Scoring,
    sizes: list[int],
    draws: EvaluationDraws | None,
) -> NDArray[np.float64]:
    """Return the decrease of the score after shuffling each column, (columns, shuffles * folds).

    ``sizes`` holds the number of features of each column. Source: Breiman (2001), Random forests;
    computed as in sklearn.inspection.permutation_importance, on the rows of each fold.
    """
    # Every k-th row of a fold, at most _ROWS rows.
    few = [fold.valid[:: -(-len(fold.valid) // _ROWS) or 1] for fold in data.folds]
    data = replace(data, folds=tuple(Fold(fold.train, rows) for fold, rows in zip(data.folds, few)))
    scored = Predictions((), data, scoring)
    drops = []
    ends = np.cumsum(sizes).tolist()
    for f, (module, rows) in enumerate(zip(members, few)):
        x = data.rows(f, rows)[0].cpu()

        def score(inputs: Tensor, f: int = f, module: nn.Module = module) -> float:
            with nullcontext() if draws is None else draws.seeded(f, 0):
                values = values_of(module, [inputs], data)
            return float(scored.scores(f, values[None])[0, 0])

        whole = score(x)
        for shuffle in range(_SHUFFLES):
            order = torch.randperm(len(rows), generator=stream(0, "importance", f, shuffle))
            fallen = []
            for end, size in zip(ends, sizes):
                table = x.clone()
                # All features of a column are shuffled together.
                table[:, end - size : end] = x[order, end - size : end]
                fallen.append(whole - score(table))
            drops.append(fallen)
    # shuffles * folds lists of one decrease per column -> (columns, shuffles * folds)
    return np.stack(drops, 1)
