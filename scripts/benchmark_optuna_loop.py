"""Optuna with the plain PyTorch loop: one process a core, all of them in one study, which holds the shared list."""

import functools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import joblib
import numpy as np
import optuna
from benchmark_cores import longest_first, one_thread_each, processes, read_folds, write_folds
from benchmark_torch import fit
from benchmark_work import BATCH_SIZES, LEARNING_RATES, Outcome, Trial, Work
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

Objective = Callable[[optuna.Trial, Trial], float]
"""Optuna's trial and its parameters -> its score; it raises ``TrialPruned`` to end early."""


def train_with_optuna(work: Work, cores: int) -> Outcome:
    """Train the work: the processes take trials from the study's list, longest first."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        objective = functools.partial(train_all_folds, write_folds(work, folder), work.epochs)
        order = longest_first(work.trials)
        study, began = share(work, order, objective, None, processes(work, cores), folder)
        scores = np.full((len(work.trials), len(work.folds)), np.nan)
        for trial in study.trials[: len(work.trials)]:
            scores[trial.user_attrs["position"]] = trial.user_attrs["scores"]
    return Outcome(scores, began - begin)


def train_all_folds(path: str, epochs: int, trial: optuna.Trial, params: Trial) -> float:
    """Train one trial on one fold after the other."""
    scores = [fit(fold, params, epochs) for fold in read_folds(path)]
    trial.set_user_attr("scores", scores)
    return float(np.mean(scores))


def share(
    work: Work,
    order: Sequence[int],
    objective: Objective,
    pruner: optuna.pruners.BasePruner | None,
    cores: int,
    folder: str,
) -> tuple[optuna.Study, float]:
    """Let processes optimize one study of the work's trials in this order; it is kept in the folder.

    Returns the study, its first trials being those of the list with their "position" in the work, and when the last
    process began.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal, widths = str(Path(folder) / "journal.log"), sorted({trial["width"] for trial in work.trials})
    study = optuna.create_study(storage=_storage(journal), study_name="work", direction="maximize")
    for position in order:
        study.enqueue_trial(work.trials[position], user_attrs={"position": position})
    with one_thread_each(cores):
        began = joblib.Parallel(batch_size=1)(
            joblib.delayed(_optimize)(journal, widths, len(order), objective, pruner) for _ in range(cores)
        )
    return study, max(began)


def _optimize(
    journal: str,
    widths: list[int],
    n_trials: int,
    objective: Objective,
    pruner: optuna.pruners.BasePruner | None,
) -> float:
    """Take trials of the study until its list has ended; return when this process began."""
    begin = time.monotonic()
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def train(trial: optuna.Trial) -> float:
        if trial.number >= n_trials:  # asked for after the last one of the list
            trial.study.stop()
            raise optuna.TrialPruned
        params = {
            "lr": trial.suggest_float("lr", *LEARNING_RATES, log=True),
            "batch_size": trial.suggest_categorical("batch_size", BATCH_SIZES),
            "width": trial.suggest_categorical("width", widths),
        }
        return objective(trial, params)

    sampler = optuna.samplers.RandomSampler(seed=os.getpid())  # TPE would compute what nobody asks for
    pruner = pruner or optuna.pruners.NopPruner()
    storage = _storage(journal)
    optuna.load_study(storage=storage, study_name="work", sampler=sampler, pruner=pruner).optimize(train)
    return begin


def _storage(journal: str) -> JournalStorage:
    return JournalStorage(JournalFileBackend(journal))
