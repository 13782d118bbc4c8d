"""Values of a search in a form that loggers accept."""

import math
from collections.abc import Mapping

from gputune.annotations import FloatArray
from gputune.spaces.distributions import label
from gputune.study.record import RECORD_FIELDS
from gputune.study.study import Study, Trial
from gputune.types import Json


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
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


def curves_by_name(study: Study) -> dict[str, FloatArray]:
    """Return the learning curves of all trials of a study, (C, epochs), keyed by the logged name.

    The names are score, std_error with several folds, and ``metrics/...`` with several metrics.
    Each value is a mean or a standard error over the folds. NaN marks an epoch without a score.
    """
    n_folds = study.curves.shape[2]
    curves = {"score": study.curves.mean(2)}
    if n_folds > 1:
        curves["std_error"] = study.curves.std(2, ddof=1) / math.sqrt(n_folds)
    for name in study.metrics:
        curves[f"metrics/{name}"] = study.curves_of(name).mean(2)
    return curves


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
