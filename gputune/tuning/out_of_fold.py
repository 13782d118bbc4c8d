"""What a trial predicts of the rows that its folds validate on, by members that train again as in the search."""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from gputune.engine.entry import entry
from gputune.errors import InputError
from gputune.study.model import TunedModel
from gputune.study.study import Study
from gputune.tuning.ensemble import is_calibrated, means_of_rows, predictions_of, recalled_for
from gputune.tuning.progress import Progress
from gputune.tuning.refit import numbered, recalled, refit, refitted


@entry
def oof_predictions(
    study: Study, X: object = None, y: object = None, *, trial: int | None = None, trust_code: bool = False
) -> NDArray[np.float64]:
    """Return what a trial predicts of rows that it was not trained on; see ``Study.oof_predictions``."""
    check_folds_train(study, "oof_predictions()")
    one = numbered(study, trial, "oof_predictions")
    search = recalled_for("oof_predictions", study, X, y, trust_code)
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
    """Return the model of ``refit`` with what its trial's members on its folds tell; see ``Study.best_model``."""
    if calibrate is None and (not check or why_no_folds(study)):
        calibrate = False
    calibrated = is_calibrated(study, calibrate, "best_model")
    if not (intervals or calibrated):
        return refit(study, X, y, trial=trial, check=check, trust_code=trust_code)
    called = f"best_model({'intervals' if intervals else 'calibrate'}=True)"
    check_folds_train(study, called)
    if intervals and study.record.task != "regression":
        raise InputError(
            f"{called} is for a number to be predicted, and the study is of classes; leave it out."
        )
    one = numbered(study, trial, "best_model")
    search = recalled(study, X, y, check=check, trust_code=trust_code)
    if search.rows != study.record.fingerprint:
        raise InputError(
            f"{called} needs the rows of the search, whose folds it trains on; leave out check=False."
        )
    if intervals and search.problem.target.n_outputs > 1:
        raise InputError(
            f"{called} is for one number a row, and the target has several; search for one at a time."
        )
    predictions, alone = predictions_of(search, [one], Progress(0)), torch.ones(1)
    model = refitted(search, one)
    if calibrated:
        return replace(model, temperature=predictions.temperature(alone))
    return replace(model, residuals=predictions.residuals(alone))


def check_folds_train(study: Study, called: str) -> None:
    """Raise InputError for a study whose trials do not train again on its folds."""
    if why := why_no_folds(study):
        raise InputError(f"{called} trains a trial again on its folds, and this study is {why}.")


def why_no_folds(study: Study) -> str:
    """Return of what a study is whose trials do not train again on its folds; "" where they do."""
    if study.record.face == "loop":
        return "of search(), whose training loop is your own: keep what your objective predicts in a file"
    if isinstance(study.record.method, dict) and study.record.descends:
        return "of descents, whose points have schedules of their own; use a study of another method"
    if study.record.task == "custom":
        return "of a custom target, of which there is no probability and no mean; train the module on your own folds"
    return ""
