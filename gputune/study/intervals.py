"""Compute the width of prediction intervals from the residuals of the validation folds."""

import math

import numpy as np

from gputune.errors import InputError
from gputune.study.model_files import ModelContent
from gputune.wording import per_interface

_USE_PROBA = per_interface(python="Use predict_proba.", command="Use --proba.")
_NO_INTERVAL = {
    "regression": ("several numbers", "Run a separate search for each column."),
    "custom": ("custom outputs", "Use predict."),
    "multilabel": ("labels", _USE_PROBA),
}
"""For errors: the predictions of each task without intervals, and the remedy."""


def half_width(model: ModelContent, level: float) -> float:
    """Return the half width of prediction intervals that contain about a share ``level`` of the
    true values.

    The half width is in units of the residuals; see ``TunedModel.predict_interval``.

    Raises:
        InputError: the model has no intervals, the level is not between 0 and 1, or the residuals
            are too few for this level.
    """
    interval = per_interface(python="predict_interval", command="--interval")
    if model.task != "regression" or not isinstance(model.center, float):
        predictions, remedy = _NO_INTERVAL.get(model.task, ("classes", _USE_PROBA))
        raise InputError(
            interval,
            f"is only for regression with one target, but this model predicts {predictions}",
            remedy=remedy,
        )
    is_number = isinstance(level, float | int | np.number) and not isinstance(level, bool)
    if not is_number or not 0 < level < 1:
        raise InputError(
            f"predict_interval(level={level!r})",
            "must be a share between 0 and 1, such as 0.9 for 90%",
        )
    if model.residuals is None:
        resume = "gputune resume FOLDER --intervals"
        raise InputError(
            interval,
            "needs the residuals of the folds, but this model does not have them",
            remedy=per_interface(
                python=f"Make the model with study.best_model(intervals=True), or with {resume}.",
                command=f"Make the model with {resume}.",
            ),
        )
    rows = len(model.residuals)
    # 1e-9 absorbs the rounding of the product.
    rank = math.ceil((rows + 1) * level - 1e-9)
    if rank > rows:
        raise InputError(
            f"predict_interval(level={level})",
            f"needs more than the {rows} rows on which the folds validated",
            remedy=f"Pass a level of at most {rows / (rows + 1):.4g}.",
        )
    return float(model.residuals[rank - 1])
