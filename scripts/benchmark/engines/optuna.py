"""Optuna with the plain PyTorch loop: one process per core, all in one study.

The study holds the shared list of trials.
"""

import functools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import joblib
import numpy as np
import optuna
from optuna.pruners import BasePruner, NopPruner
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from benchmark import work as shared
from benchmark.engines.torch import accuracy, denormals_as_zero, fit, trained
from benchmark.work import (
    Event,
    Fit,
    Outcome,
    Trial,
    Work,
    one_thread_each,
    read_folds,
    write_folds,
)

Objective = Callable[[optuna.Trial, Trial], float]
"""Optuna's trial and its parameters -> its score; it raises ``TrialPruned`` to end early."""


def train(work: Work, cores: int, fit: Fit = fit) -> Outcome:
    """Train the work by a loop: the processes take trials from the study's list, longest first."""
    begin = time.monotonic()
    scores = work.no_scores()
    with tempfile.TemporaryDirectory() as folder:
        objective = functools.partial(_train_all_folds, fit, write_folds(work, folder), work.epochs)
        order = shared.longest_first(work.trials)
        cores = shared.processes(work, cores)
        study, began = share(work, order, objective, NopPruner(), cores, folder)
        for trial in study.trials[: len(work.trials)]:
            scores[trial.user_attrs["position"]] = trial.user_attrs["scores"]
    return Outcome(scores, began - begin)


def _train_all_folds(fit: Fit, path: str, epochs: int, trial: optuna.Trial, params: Trial) -> float:
    scores = [fit(fold, params, epochs) for fold in read_folds(path)]
    trial.set_user_attr("scores", scores)
    return float(np.mean(scores))


def search(method: str, work: Work, cores: int) -> list[Event]:
    """Search, "random" or with pruning by "halving"; scores are recorded after every epoch."""
    pruned = method == "halving"
    pruner = (
        optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
        if pruned
        else NopPruner()
    )
    with shared.recorded() as (begin, path), tempfile.TemporaryDirectory() as folder:
        objective = functools.partial(
            _train_together, write_folds(work, folder), path, work.epochs, pruned
        )
        share(work, range(len(work.trials)), objective, pruner, cores, folder)
        return [
            Event(at - begin, candidate, score) for at, candidate, _, score in shared.read(path)
        ]


def _train_together(
    folds: str, path: str, epochs: int, pruned: bool, trial: optuna.Trial, params: Trial
) -> float:
    """Train one candidate on all folds, epoch by epoch, until it ends or is pruned."""
    rows = read_folds(folds)
    runs = [trained(fold, params) for fold in rows]
    score = 0.0
    # The pruner uses only these epochs, and each report is a write to the disk.
    rungs = {3**k for k in range(epochs) if 3**k < epochs} if pruned else set()
    with denormals_as_zero():
        for epoch in range(1, epochs + 1):
            score = float(np.mean([accuracy(next(run), fold) for run, fold in zip(runs, rows)]))
            shared.record(path, trial.user_attrs["position"], epoch, score)
            if epoch in rungs:
                trial.report(score, epoch)
                if trial.should_prune():
                    raise optuna.TrialPruned
    return score


def share(
    work: Work,
    order: Sequence[int],
    objective: Objective,
    pruner: BasePruner,
    cores: int,
    folder: str,
) -> tuple[optuna.Study, float]:
    """Let processes optimize one study of the work's trials in this order.

    The study's file is in the folder. Returns the study and the time when the last process began.
    The study's first trials are those of the list; "position" is their position in the work.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = str(Path(folder) / "journal.log")
    widths = sorted({trial["width"] for trial in work.trials})
    study = optuna.create_study(storage=_storage(journal), study_name="work", direction="maximize")
    for position in order:
        study.enqueue_trial(work.trials[position], user_attrs={"position": position})
    one = joblib.delayed(_optimize)(journal, widths, len(order), objective, pruner)
    with one_thread_each(cores):
        return study, max(joblib.Parallel(batch_size=1)([one] * cores))


def _optimize(
    journal: str, widths: list[int], n_trials: int, objective: Objective, pruner: BasePruner
) -> float:
    """Take trials of the study until its list has ended.

    Returns the time when this process began.
    """
    begin = time.monotonic()
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def take(trial: optuna.Trial) -> float:
        if trial.number >= n_trials:  # asked for after the last one of the list
            trial.study.stop()
            raise optuna.TrialPruned
        params = {
            "lr": trial.suggest_float("lr", *shared.LEARNING_RATES, log=True),
            "batch_size": trial.suggest_categorical("batch_size", shared.BATCH_SIZES),
            "width": trial.suggest_categorical("width", widths),
        }
        return objective(trial, params)

    # TPE would compute a proposal that is not used.
    sampler = optuna.samplers.RandomSampler(seed=os.getpid())
    optuna.load_study(
        study_name="work", storage=_storage(journal), sampler=sampler, pruner=pruner
    ).optimize(take)
    return begin


def _storage(journal: str) -> JournalStorage:
    return JournalStorage(JournalFileBackend(journal))
