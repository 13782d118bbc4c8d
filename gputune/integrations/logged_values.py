"""Values of a search in a form that loggers accept."""

import math
from collections.abc import Iterator, Mapping

import numpy as np

from gputune.ground.types import Json
from gputune.spaces.distributions import label
from gputune.study.record import RECORD_FIELDS
from gputune.study.study import Study, Trial


def plain_params(params: Mapping[str, object]) -> dict[str, bool | int | float | str]:
    """Return hyperparameters in a form that loggers accept: numbers, booleans and strings.

    Other values, and None, become strings.
    """
    plain = {}
    for key, value in params.items():
        text = label(value)
        plain[key] = "None" if text is None else text
    return plain


def trial_numbers(trial: Trial) -> dict[str, float]:
    """Return the numeric results and hyperparameters of a trial as a dict, for loggers.

    Values that are not finite are left out. The keys are score, std_error, best_epoch, seconds and
    ``params/...`` for numeric hyperparameters. With several metrics there is also ``metrics/NAME``,
    the mean of each metric over the folds.
    """
    numbers: dict[str, float] = {
        "score": trial.score,
        "std_error": trial.std_error,
        "best_epoch": trial.best_epoch,
        "seconds": trial.seconds,
    }
    numbers |= {f"metrics/{name}": score for name, score in trial.scores.items()}
    for name, value in trial.params.items():
        if isinstance(value, bool | int | float):
            numbers[f"params/{name}"] = value
    return _finite(numbers)


def epochs_by_trial(trials: Study) -> Iterator[tuple[Trial, list[dict[str, float]]]]:
    """Yield each trial with the values of its epochs, for loggers.

    The values are the means over the folds: score and, with several metrics, ``metrics/...``. With
    several folds, std_error is the standard error of the score. Values that are not finite are left
    out.
    """
    n_folds = trials.curves.shape[2]
    curves = {"score": trials.curves.mean(2)}
    if n_folds > 1:
        curves["std_error"] = trials.curves.std(2, ddof=1) / math.sqrt(n_folds)
    for name in trials.metrics:
        curves[f"metrics/{name}"] = trials.curves_of(name).mean(2)
    for row, trial in enumerate(trials.trials):
        epochs = []
        for epoch in range(int(np.isfinite(curves["score"][row]).sum())):
            values = {name: float(curve[row, epoch]) for name, curve in curves.items()}
            epochs.append(_finite(values))
        yield trial, epochs


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def best_score(study: Study) -> float:
    """Return the best finite score of a study.

    Pruned trials do not count. Without a finite score, return -inf.
    """
    scores = [trial.score for trial in study.trials if trial.state != "pruned"]
    return max(filter(math.isfinite, scores), default=-math.inf)


def study_options(study: Study) -> Json:
    """Return the options of a search that loggers record, so that users can compare searches."""
    record = study.record
    options = {}
    for name, part in RECORD_FIELDS.items():
        if part.logged and name not in record.absent:
            value = getattr(record, name)
            if value is not None:
                options[name] = value
    return options
