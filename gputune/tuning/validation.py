"""Results of trials on the validation rows of their folds: predictions, ensembles and reports.

A member is one trial on one fold.

If the study has not stored the predictions, the members train again as in the search.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Literal, TypeAlias

import numpy as np
import torch
from sklearn.dummy import DummyClassifier
from sklearn.inspection import permutation_importance
from sklearn.metrics import confusion_matrix
from torch import Tensor, nn

from gputune.data.columns import Layout
from gputune.data.dataset import Dataset, Fold, Rows
from gputune.data.encode import Statistics
from gputune.data.folds import check_groups, unpack_folds
from gputune.data.scaling import joined_statistics
from gputune.engine.stop import entry
from gputune.ground.annotations import FloatArray
from gputune.ground.errors import InputError, check_count, per_interface, warn
from gputune.ground.seeding import replica_seed
from gputune.ground.types import Config
from gputune.population.population import Ensemble
from gputune.scoring.scoring import Scoring
from gputune.scoring.validation import EvaluationDraws
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
from gputune.tuning.record import had_groups
from gputune.tuning.refit import Access, ReopenedSearch, refit_trial, refit_trials, search_of

Refit: TypeAlias = int | Literal["all", "folds"]

# The number of shuffles of a column, and the largest number of rows of a fold that are used.
_SHUFFLES = 5
_ROWS = 10_000


def _check_folds_train(study: Study, called: str) -> None:
    """Raise InputError if gputune cannot train the trials of a study again on their folds."""
    obstacle = _obstacle(study)
    if obstacle is not None:
        kind, remedy = obstacle
        rule = f"trains a trial again on its folds, but this is a study of {kind}"
        raise InputError(called, rule, remedy=remedy)


def _obstacle(study: Study) -> tuple[str, str] | None:
    """Return why gputune cannot train the trials of a study again, as the kind of study and a
    remedy.

    Returns None if the trials can train again.
    """
    if study.record.face == "loop":
        return (
            "search(), whose training loop is your own",
            "Keep the predictions of your objective in a file.",
        )
    if isinstance(study.record.method, dict) and study.record.is_hypergradient:
        return (
            "a hypergradient search, and each of its points has its own schedule",
            "Use a study of another method.",
        )
    if study.record.task == "custom":
        return (
            "a custom target, which has no probabilities and no mean",
            "Train the module on your own folds.",
        )
    return None


def _is_calibrated(access: Access, calibrate: bool | None) -> bool:
    """Return True if the model's probabilities are to be calibrated.

    ``calibrate=None`` means True if the log loss ranks the trials of a classification, or if the
    search was called with ``--calibrate`` or with a preset that calibrates.
    """
    record = access.study.record
    if calibrate not in (None, True, False):
        raise InputError(
            f"{access.called}(calibrate=...)", "must be True, False or None", got=calibrate
        )
    is_of_classes = record.task in ("binary", "multiclass")
    if calibrate is None:
        is_chosen = record.arguments.final_model.get("calibrate", False)  # by a preset or a flag
        return is_of_classes and (is_chosen or record.scoring == "neg_log_loss")
    if calibrate and not is_of_classes:
        targets = {"multilabel": "several labels", "custom": "a custom target"}
        target = targets.get(record.task, "numbers")
        raise InputError(
            f"{access.called}(calibrate=True)",
            f"is for studies that predict one class per row, but this study predicts {target}",
            remedy="Leave it out.",
        )
    return calibrate


@entry
def oof_predictions(access: Access, trial: int | None) -> FloatArray:
    """Return the predictions of a trial for rows that were not in its training data.

    See ``Study.oof_predictions``.
    """
    _check_folds_train(access.study, "oof_predictions()")
    selected = _trial_of_number(access, trial)
    predictions = predictions_of(search_of(access), [selected], Progress(0))
    data = predictions.data
    # (M=1, m_f, K) -> (m_f, K) for each fold
    values = [data.in_units(f, value[0]).cpu() for f, value in enumerate(predictions.values)]
    means = means_of_rows(data, values)
    return means[:, 0] if data.task == "regression" and means.shape[1] == 1 else means


@entry
def refit_with_folds(
    access: Access, *, trial: int | None, intervals: bool, calibrate: bool | None
) -> TunedModel:
    """Train the best trial, or the trial with a given number, on all rows.

    Returns the tuned model. See ``Study.best_model``.
    """
    study = access.study
    if calibrate is None and (not access.check or _obstacle(study) is not None):
        calibrate = False
    calibrated = _is_calibrated(access, calibrate)
    argument = f"best_model({'intervals' if intervals else 'calibrate'}=True)"
    on_folds = intervals or calibrated
    if on_folds:
        _check_folds_train(study, argument)
    if intervals and study.record.task != "regression":
        raise InputError(
            argument,
            "is for studies that predict a number, but this study predicts classes",
            remedy="Leave it out.",
        )
    selected = _trial_of_number(access, trial)
    search = search_of(access)
    if not on_folds:
        return refit_trial(search, selected)
    if search.rows != study.record.fingerprint:
        raise InputError(
            argument,
            "needs the rows of the search, because it trains a model on each fold of these rows",
            remedy="Leave check=False out.",
        )
    if intervals and search.problem.target.n_outputs > 1:
        raise InputError(
            argument,
            "supports only one number per row, but the target has several",
            remedy="Run one search for each number.",
        )
    predictions = predictions_of(search, [selected], Progress(0))
    model = refit_trial(search, selected)
    return predictions.complete(model, torch.ones(1), calibrated=calibrated)


@entry
def refit_several(access: Access, numbers: Sequence[int]) -> list[TunedModel]:
    """Train the trials with the given numbers on all rows. See ``Study.best_models``."""
    _check_folds_train(access.study, f"{access.called}()")
    if isinstance(numbers, str) or not isinstance(numbers, Iterable):
        raise InputError(
            f"{access.called}(trials={numbers!r})",
            "must be a list of trial numbers",
            remedy="For a single trial, use best_model(trial=...).",
        )
    trials = [_trial_of_number(access, number) for number in numbers]
    return refit_trials(search_of(access), trials) if trials else []


def _trial_of_number(access: Access, number: object) -> Trial:
    """Return the trial with a given trial number, or the best trial if the number is None.

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
        raise InputError(
            f"{access.called}(trial={number!r})",
            "must be the number of a trial that has a score, for example "
            f"{study.best_trial.number}",
            remedy="study.trials lists the trials.",
        )
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
    n_seeds = 1 if isinstance(refit, str) and refit in ("all", "folds") else refit
    check_count(n_seeds, "ensemble(refit=...)", remedy="Or pass 'all' or 'folds'.")
    _check_folds_train(study, "ensemble()")
    states = ("complete", "stopped")
    scored = [t for t in study.ranking() if t.state in states and math.isfinite(t.score)]
    trials = scored[:candidates]
    if len(trials) < 2:
        raise InputError(
            "ensemble()",
            f"needs two trials with a score, but the study has {len(trials)}",
            remedy="Search on, or use best_model().",
        )
    calibrated = _is_calibrated(access, calibrate)
    search = search_of(access)
    predictions = predictions_of(search, trials, Progress(verbose))
    chosen = predictions.choose(size)
    weights = [chosen[place] / chosen.total() for place in range(len(trials))]
    shares = [(trial, weight) for trial, weight in zip(trials, weights) if weight]
    info = {"ensemble": {str(trial.number): weight for trial, weight in shares}, "refit": refit}
    info |= _nested_score(search, predictions, size)
    present = predictions.data.present if refit == "folds" else None
    model = _mean_model(search, shares, None if refit == "folds" else int(n_seeds), info, present)
    return predictions.complete(model, torch.tensor(weights), calibrated=calibrated)


def _nested_score(search: ReopenedSearch, predictions: Predictions, size: int) -> Config:
    """Return the score of an ensemble on rows that did not choose it, for the ``info`` of a model.

    If there is no such score, return an empty dict and warn the user.
    """
    groups = None
    reason = ""
    if predictions.data.n_folds == 1:
        groups = _groups(search)
        if groups is None and had_groups(search.study.record):
            reason = (
                "the study file does not hold the groups, and gputune must not split a group. Call "
                "ensemble() on the study that tune() returned, in the same process"
            )
    scores = [math.nan] if reason else predictions.nested_scores(size, groups)
    if np.isfinite(scores).all():
        error = float(np.std(scores, ddof=1)) / math.sqrt(len(scores))
        return search.score(float(np.mean(scores)), error)
    reason = reason or (
        "a half has no score, because it has too few rows, groups or classes. Use more validation "
        "rows or more folds"
    )
    warn(
        "The info of the ensemble has no score. With one fold, gputune scores each half of the "
        f"validation rows with trials that were chosen on the other half, but {reason}."
    )
    return {}


def _groups(search: ReopenedSearch) -> np.ndarray | None:
    """Return the group of each row, (n,), or None if the rows have no groups or they are lost."""
    source = search.problem.source
    groups = source.groups
    # The user passed the same rows again, without their groups.
    if groups is None and search.study.data is not None:
        groups = search.study.data.source.groups
    return check_groups(groups, len(source.X))


def _mean_model(
    search: ReopenedSearch,
    shares: Sequence[tuple[Trial, float]],
    n_seeds: int | None,
    info: Config,
    present: Tensor | None,
) -> TunedModel:
    """Train several trials, and return their weighted mean as one model.

    Each trial trains on all rows from ``n_seeds`` different seeds. With ``n_seeds=None``, each
    trial trains on the training rows of each fold. ``present`` (F, K) are the classes in the
    training rows of each fold. None means all classes.
    """
    trials = [trial for trial, _ in shares]
    folds = unpack_folds(search.study.record.arguments.folds) if n_seeds is None else []
    # All networks read the same inputs. They are scaled by all rows, or by the training rows of the
    # only fold.
    rows = folds[0][0] if len(folds) == 1 else None
    all_data = search.dataset(None if rows is None else folds, trials)
    runs = _ensemble_runs(search, all_data, n_seeds, folds, present)
    columns, statistics = _columns([all_data.of(search.config(trial)) for trial in trials])
    arguments = [search.arguments(trial, all_data) for trial in trials]
    modules: list[nn.Module] = []
    places: list[int] = []  # of the trial of each module
    weights: list[float] = []
    seeds: list[int] = []
    for data, seed in runs:
        for place, (module,) in enumerate(search.train(data, trials, seed=seed)):
            # Each trial trains ``n_ens`` networks in each run, and its weight is split over them.
            networks = module.members if isinstance(module, Ensemble) else [module]
            modules.extend(networks)
            places += [place] * len(networks)
            weights += [shares[place][1] / (len(networks) * len(runs))] * len(networks)
            seeds += [seed] * len(networks)
    info = info | search.note_on_draws(runs[0][0], trials)
    spec: Config = {"kwargs": arguments[0], "ensemble": [arguments[place] for place in places]}
    columns = [columns[place] for place in places] if columns else []
    if columns:
        spec["columns"] = columns
    if present is not None:  # (F, K) -> (M, K)
        present = present.cpu().repeat_interleave(len(modules) // len(runs), dim=0)
    network = Ensemble(modules, weights, search.problem.target.task, columns, present)
    spec |= search.seeds(seeds)
    return search.model(network.eval(), all_data, spec, info, statistics, rows=rows)


def _ensemble_runs(
    search: ReopenedSearch,
    data: Dataset,
    n_seeds: int | None,
    folds: Sequence[Rows],
    present: Tensor | None,
) -> list[tuple[Dataset, int]]:
    """Return the data and the random seed for each repeated training of an ensemble's trials.

    With ``n_seeds=None``, there is one training for each of the ``folds``, with the classes in
    ``present`` (F, K).
    """
    seed = search.options.search.random_state
    if n_seeds is not None:
        n_ens = search.options.training.n_ens
        # The networks of a run have the seeds ``first`` and, from it, those of its replicas.
        firsts = range(0, n_seeds * n_ens, n_ens)
        return [(data, replica_seed(seed, first)) for first in firsts]
    (all_rows,) = data.folds
    runs = []
    for f, (train, _) in enumerate(folds):
        rows = torch.as_tensor(train, device=data.device)
        fold_data = replace(data, folds=(replace(all_rows, train=rows),))
        if present is not None:
            fold_data = replace(fold_data, present=present[f : f + 1].to(data.device))
        runs.append((fold_data, seed))
    return runs


def _columns(datasets: Sequence[Dataset]) -> tuple[list[list[int]], Statistics | None]:
    """Return the input columns that each trial of an ensemble reads, and their statistics.

    The columns of a trial are a pair [begin, end]. The list of pairs is empty if all trials read
    the same columns.
    """
    distinct = {data.numbers: data for data in datasets}
    if len(distinct) == 1:
        return [], None  # all columns of the data itself
    columns = {}
    statistics = list[Statistics]()
    begin = 0
    for numbers, data in distinct.items():
        end = begin + data.n_features
        columns[numbers] = [begin, end]
        statistics += [part for part in data.statistics if isinstance(part, Statistics)]
        begin = end
    return [columns[data.numbers] for data in datasets], joined_statistics(statistics)


@entry
def fold_report(access: Access, *, confusion: bool = False, importance: bool = False) -> FoldReport:
    """Return the confusion matrix and the importance of columns for a report, as far as requested.

    See ``Study.report``.
    """
    study = access.study
    check_fold_report(study, confusion=confusion)
    search = search_of(access)
    best = study.best_trial
    layout = search.problem.layout
    matrix = np.zeros((0, 0), np.int64)
    if importance and not isinstance(layout, Layout):
        raise InputError(
            "report(importance=True)",
            f"needs the columns of a table, but X is {layout}",
            remedy=per_interface("Leave importance out.", "Leave --importance out."),
        )
    if confusion:
        predictions = predictions_of(search, [best], Progress(0))
        data = predictions.data
        means = means_of_rows(data, [value[0].cpu() for value in predictions.values])
        known = np.isfinite(means).all(1)
        true = data.target.cpu().numpy()[known]
        matrix = confusion_matrix(true, means[known].argmax(1), labels=range(means.shape[1]))
    if not importance or not isinstance(layout, Layout):
        return FoldReport(best.number, matrix, (), np.zeros(0), np.zeros(0))
    (members,), data, scoring = members_of(search, [best], Progress(0))
    draws = search.evaluation_draws(data, best)
    sizes = layout.widths(search.config(best)["numbers"])
    drops = _drops(members, data, scoring, sizes, draws)
    order = np.argsort(-drops.mean(1), kind="stable")
    names = tuple(layout.columns[place].name for place in order)
    return FoldReport(best.number, matrix, names, drops.mean(1)[order], drops.std(1)[order])


def check_fold_report(study: Study, *, confusion: bool) -> None:
    """Raise InputError if a study cannot have a report on its folds.

    gputune must be able to train the trials on their folds. ``confusion`` needs classes.
    """
    _check_folds_train(study, f"report({'confusion' if confusion else 'importance'}=True)")
    if confusion and (study.record.classes is None or study.record.task == "multilabel"):
        target = "several labels" if study.record.task == "multilabel" else "numbers"
        raise InputError(
            "report(confusion=True)",
            f"needs classes, but the study predicts {target}",
            remedy=per_interface("Leave confusion out.", "Leave --confusion out."),
        )


def _drops(
    members: list[nn.Module],
    data: Dataset,
    scoring: Scoring,
    sizes: list[int],
    draws: EvaluationDraws | None,
) -> FloatArray:
    """Return the decrease of the score when each column is shuffled, (columns, shuffles * folds).

    The decrease shows how important a column is. ``sizes`` holds the number of features of each
    column. Source: Breiman (2001), Random forests.
    """
    folds = []
    for fold in data.folds:
        # Every k-th row of a fold, at most _ROWS rows.
        step = -(-len(fold.valid) // _ROWS) or 1
        folds.append(Fold(fold.train, fold.valid[::step]))
    data = replace(data, folds=tuple(folds))
    scored = Predictions((), data, scoring)
    ends = np.cumsum(sizes).tolist()
    drops = []
    for f, (module, fold) in enumerate(zip(members, folds)):
        x = data.rows(f, fold.valid)[0].cpu()

        def score(
            _model: object,
            rows: np.ndarray,
            _y: object,
            f: int = f,
            module: nn.Module = module,
            x: Tensor = x,
        ) -> float:
            """Return the score of the table, with the rows ``rows[:, c]`` in column c."""
            parts = []
            for column, (end, size) in enumerate(zip(ends, sizes)):
                # All features of a column are shuffled together.
                parts.append(x[rows[:, column], end - size : end])
            with nullcontext() if draws is None else draws.seeded(f, 0):
                values = values_of(module, [torch.cat(parts, 1)], data, f)
            return float(scored.scores(f, values[None])[0, 0])

        rows = np.tile(np.arange(len(x))[:, None], len(sizes))
        result = permutation_importance(
            DummyClassifier(), rows, None, scoring=score, n_repeats=_SHUFFLES, random_state=f
        )
        drops.append(result.importances)
    return np.concatenate(drops, 1)
