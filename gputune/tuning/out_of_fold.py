"""What a trial predicts of the rows that its folds validate on, by members that train again as in the search."""

import numpy as np
import torch
from numpy.typing import NDArray

from gputune.engine.entry import entry
from gputune.errors import InputError
from gputune.study.study import Study
from gputune.tuning.ensemble import predictions_of, recalled_for
from gputune.tuning.progress import Progress
from gputune.tuning.refit import numbered


@entry
def oof_predictions(
    study: Study, X: object = None, y: object = None, *, trial: int | None = None, trust_code: bool = False
) -> NDArray[np.float64]:
    """Return what a trial predicts of rows that it was not trained on; see ``Study.oof_predictions``."""
    _check(study)
    one = study.best_trial if trial is None else numbered(study, trial, "oof_predictions")
    search = recalled_for("oof_predictions", study, X, y, trust_code)
    predictions = predictions_of(search, [one], Progress(0))
    data = predictions.data
    values = [data.in_units(f, of_one).cpu() for f, (of_one,) in enumerate(predictions.values)]
    sums, counts = torch.zeros(data.n_rows, values[0].shape[1], dtype=torch.float64), torch.zeros(data.n_rows)
    for fold, value in zip(data.folds, values, strict=True):
        rows = fold.valid.cpu()
        sums.index_add_(0, rows, value)
        counts.index_add_(0, rows, torch.ones(len(rows)))
    means = (sums / counts[:, None]).numpy()
    return means[:, 0] if data.task == "regression" and means.shape[1] == 1 else means


def _check(study: Study) -> None:
    """Raise InputError for a study whose trials do not train again on its folds."""
    if study.record.face == "loop":
        why = "of search(), whose training loop is your own: keep what your objective predicts in a file"
    elif isinstance(study.record.method, dict) and study.record.descends:
        why = "of descents, whose points have schedules of their own; use a study of another method"
    elif study.record.task == "custom":
        why = "of a custom target, of which there is no probability and no mean; train the module on your own folds"
    else:
        return
    raise InputError(f"oof_predictions() trains a trial again on its folds, and this study is {why}.")
