"""Validation rows of a fold as what is trained sees them: transformed by what was fitted on the training rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.base import clone

from gputune.errors import InputError
from gputune.hypergradients.result import check_classes
from gputune.sklearn.base import check_rows
from gputune.sklearn.dataset import Part, Rows, form
from gputune.sklearn.pipelines import last_step
from gputune.sklearn.replay import Fit


def held_out_part(fitted: Any, train: Part, X: Any, y: Any) -> Part:
    """Return rows X (m, D) and y (m,) as validation rows beside ``train``, on which ``fitted`` was fitted.

    ``fitted`` is an estimator, or a Pipeline whose transformers are fitted. The rows weigh one each. Raises what the
    transformers and scikit-learn's checks raise, and ValueError where the columns are not those of the training rows.
    """
    prefix, last = last_step(fitted)
    for _, step in fitted.steps[:-1] if prefix else ():
        if step is not None and step != "passthrough":
            X = step.transform(X)
    rows = check_rows(clone(last), X, y)
    weights = None if train.rows.weights is None else np.ones(len(rows.X))
    rows = Rows(rows.X.astype(train.rows.X.dtype, copy=False), rows.y, weights, rows.classes, rows.names)
    if form(rows) != form(train.rows):
        raise ValueError(
            f"the transformers gave validation rows of {rows.X.shape[1]} columns, named {rows.names}, after training "
            f"rows of {train.rows.X.shape[1]} columns, named {train.rows.names}; let them give the same ones."
        )
    return Part(rows, np.arange(len(rows.X)))


def check_held_out(fits: Sequence[Fit]) -> None:
    """Raise InputError where the loss on the validation rows of a fold has no slope, whatever is trained."""
    seen: set[tuple[int, int]] = set()
    for fit in fits:
        train, valid = fit.asked, fit.held_out
        if not (isinstance(train, Part) and isinstance(valid, Part)) or (fit.fold, id(train)) in seen:
            continue
        seen.add((fit.fold, id(train)))
        if len(valid.index) == 0:
            raise InputError(f"cv: fold {fit.fold} has no validation rows to descend on; give it some.")
        check_classes(
            fit.fold,
            _classes(valid, weighing=False),
            _classes(train, weighing=True),
            weighed=train.rows.weights is not None,
        )


def _classes(part: Part, *, weighing: bool) -> set[Any]:
    """Return the labels of all rows, or of those that weigh something; none for a regression."""
    rows, index = part.rows, part.index
    if rows.classes is None:
        return set()
    if weighing and rows.weights is not None:
        index = index[rows.weights[index] > 0]
    return set(rows.classes[np.unique(rows.y[index])].tolist())
