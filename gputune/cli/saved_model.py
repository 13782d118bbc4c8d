"""Options for the saved model: calibration, intervals, and the comparison with the default model.

The module has the checks before the search, and the sentences of the closing text.
"""

import math
from pathlib import Path

import numpy as np

from gputune.cli.held_out import HeldOut
from gputune.data.folds import unpack_folds
from gputune.data.source import Source
from gputune.data.target import check_target
from gputune.ground.errors import InputError
from gputune.ground.text import Measure, count
from gputune.ground.types import Json
from gputune.study.model import TunedModel
from gputune.study.model_files import DESCRIPTION, read_description
from gputune.study.study import Study, Trial
from gputune.tuning.options import Options
from gputune.views.default_trial import default_trial

LEVEL = 0.9  # level of the intervals whose coverage is printed

COMPARED_SHARE = 0.1
"""Share of the search's member-steps that a comparison may cost.

A member-step is one optimizer step of one trial on one fold. The model of the default configuration
is trained for a comparison if its training takes less than this share.
"""


def read_saved_description(folder: Path) -> Json:
    """Return the description of the model in a folder, or {} if no description can be read."""
    try:
        return read_description(folder / DESCRIPTION)
    except (FileNotFoundError, InputError):
        return {}


def check_extras(rest: Source, options: Options, *, intervals: bool, calibrate: bool) -> None:
    """Raise InputError before training if the model cannot have intervals or be calibrated."""
    if not (intervals or calibrate):
        return
    target = check_target(rest.y, task=options.rows.task, n_rows=len(rest.X), name=rest.target)
    is_one_number = target.task == "regression" and target.n_outputs == 1
    is_one_class = target.task in ("binary", "multiclass")
    flags = []
    if intervals:
        flags.append(("--intervals", "one number", is_one_number))
    if calibrate:
        flags.append(("--calibrate", "one class", is_one_class))
    for flag, prediction, fits in flags:
        if not fits:
            rule = f"needs a model that predicts {prediction}, but the target is {target.in_words}"
            raise InputError(flag, rule, remedy="Leave it out.")
        if options.search.differentiates:
            rule = (
                "trains a trial on its folds again, but this is not possible for a hypergradient "
                "search"
            )
            raise InputError(flag, rule, remedy="Leave it out.")


def calibration_text(model: TunedModel) -> str:
    """Return a sentence with the temperature of a calibrated model, or "" for other models."""
    if model.temperature == 1.0:
        return ""
    return (
        "The probabilities are calibrated: the logits are divided by the temperature "
        f"{model.temperature:.4g}, which was fitted on the validation rows of the folds."
    )


def coverage_text(model: TunedModel, test: Source | None) -> str:
    """Return a sentence with the share of held-out rows inside the model's intervals."""
    if test is None:
        return (
            "The model has prediction intervals. No rows were held out to check how many target "
            "values lie inside the intervals."
        )
    try:
        lower, upper = model.predict_interval(test.X, LEVEL)
    except InputError:
        return (
            f"The model has intervals, but the folds have too few rows for a level of {LEVEL:.0%}."
        )
    y = np.asarray(test.y, dtype=np.float64)
    inside = int(((lower <= y) & (y <= upper)).sum())
    rows = count(len(y), "held-out row")
    return f"Intervals with level {LEVEL:.0%} hold {inside} of {rows} ({inside / len(y):.0%})."


def is_cheap_to_train(study: Study, trial: Trial) -> bool:
    """Return whether training a trial on all rows takes less than a tenth of the search's
    member-steps."""
    folds = unpack_folds(study.record.arguments.folds)
    fold_rows = [len(train) for train, _ in folds]
    all_rows = int(study.record.fingerprint["rows"])
    epochs: list[int] = (~np.isnan(study.curves)).any(2).sum(1).tolist()
    spent = 0
    for searched, n_epochs in zip(study.trials, epochs):
        spent += n_epochs * sum(_steps(study, searched, rows) for rows in fold_rows)
    return trial.best_epoch * _steps(study, trial, all_rows) < COMPARED_SHARE * spent


def _steps(study: Study, trial: Trial, n_rows: int) -> int:
    """Return the number of optimizer steps of one epoch on ``n_rows`` rows.

    Returns 1 for the logistic regression that is solved to convergence.
    """
    choice = study.data.choice
    options = study.data.options
    if choice.solved:
        return 1
    return math.ceil(
        n_rows / int(choice.complete(trial.params, options.training.schedule)["batch_size"])
    )


def is_worth_comparing(study: Study, held_out: HeldOut | None) -> bool:
    """Return True if a comparison with the default's model is possible and cheap.

    Then gputune makes the comparison by default.
    """
    default = default_trial(study)
    if default is None or held_out is None or held_out.reason or is_default_best(study):
        return False
    return is_cheap_to_train(study, default)


def comparison_text(measure: Measure, saved: HeldOut, default: HeldOut) -> str:
    """Return a remark on the held-out scores of the saved model and of the default's model, or
    ""."""
    if saved.reason or default.reason:
        return f"The default's model has no held-out {measure.name} to compare with."
    if not may_be_chance(saved, default):
        return ""
    return (
        "The held-out score of the saved model or of the default lies within the other's 95% "
        "interval, so the difference may be chance."
    )


def same_model_text(model: TunedModel) -> str:
    """Return a sentence for the case that the best trial is the default configuration.

    Then there is no other model to compare.
    """
    saved = "model of the best trial" if "ensemble" in model.info else "saved model"
    return f"The best trial is the default configuration, so the {saved} is the default's model."


def is_default_best(study: Study) -> bool:
    """Return whether the best trial is the default configuration."""
    default = default_trial(study)
    return default is not None and default.number == study.best_trial.number


def may_be_chance(one: HeldOut, other: HeldOut) -> bool:
    """Return whether one of two different scores lies within the other's interval."""
    return one.score != other.score and (
        one.interval_holds(other.score) or other.interval_holds(one.score)
    )
