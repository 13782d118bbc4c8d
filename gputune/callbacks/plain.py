"""A trial in the plain numbers and words that loggers take."""

import math
from typing import Any

from gputune.search.distributions import label
from gputune.study.record import PARTS
from gputune.study.study import Study, Trial


def plain_params(params: dict[str, Any]) -> dict[str, bool | int | float | str]:
    """Return hyperparameters as numbers and words; other values, and None, as text."""
    return {key: "None" if (short := label(value)) is None else short for key, value in params.items()}


def trial_numbers(trial: Trial) -> dict[str, float]:
    """Return what is a finite number of a trial: score, std_error, best_epoch, seconds, numeric ``params/...``."""
    found = {
        "score": trial.score,
        "std_error": trial.std_error,
        "best_epoch": trial.best_epoch,
        "seconds": trial.seconds,
    }
    for key, value in trial.params.items():
        if isinstance(value, bool | int | float):
            found[f"params/{key}"] = value
    return {key: float(value) for key, value in found.items() if math.isfinite(value)}


def best_score(study: Study) -> float:
    """Return the best finite score of trials that no rung sent away, -inf where there is none."""
    return max(
        (t.score for t in study.trials if math.isfinite(t.score) and t.state != "pruned"), default=-math.inf
    )


def study_options(study: Study) -> dict[str, Any]:
    """Return the options of a search that a person compares searches by."""
    record = study.record
    values = {
        name: getattr(record, name)
        for name, part in PARTS.items()
        if part.logged and name not in record.absent
    }
    return {name: value for name, value in values.items() if value is not None}
