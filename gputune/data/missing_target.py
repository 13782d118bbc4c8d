"""Rows without a target: an error, or left out if the caller asks for that."""

from collections.abc import Callable, Sized
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from gputune.data.kinds import is_missing
from gputune.data.target import refuse_missing, target_array
from gputune.errors import InputError
from gputune.text import count

MissingTarget = Literal["error", "drop"]
MISSING_TARGET: tuple[MissingTarget, ...] = get_args(MissingTarget)

_REMEDY = "fill it, or say missing_target='drop' to leave those rows out"


def rows_with_target(
    y: object, name: str, missing_target: MissingTarget, place: Callable[[int], str]
) -> np.ndarray | None:
    """Return the positions of the rows that have a target, or None if all rows have one.

    Args:
        y: targets (n,) or (n, ...), as ``tune`` takes them.
        name: the target's name in errors.
        missing_target: "drop", or "error" to refuse missing targets.
        place: returns the place of a row as text, for errors.

    Raises:
        InputError: a target is missing and ``missing_target`` is "error", or every target is
            missing.
    """
    missing = _missing_rows(target_array(y, name))
    if not missing.any():
        return None
    if missing_target == "error" or missing.all():
        refuse_missing(np.where(missing, np.nan, 0.0), name, _REMEDY, place)
    return np.flatnonzero(~missing)


def select_targets(y: Any, positions: np.ndarray, *, of_table: bool) -> np.ndarray | Tensor:
    """Return the targets of rows that all have a target.

    A table column with missing values holds floats. Its whole numbers become integers again.
    """
    if isinstance(y, Tensor):
        selected: Tensor = y[positions]
        return selected
    values: np.ndarray = target_array(y, "y")[positions]
    if (
        of_table
        and values.dtype.kind == "f"
        and (values == np.rint(values)).all()
        and (abs(values) < 2**53).all()
    ):
        return values.astype(np.int64)
    return values


def check_row_options(n_given: int, cv: object, sample_weight: object) -> None:
    """Raise InputError for options that do not fit when rows are left out.

    These are folds given as row positions, which would change, and sample weights with another
    length than ``n_given``.
    """
    if not isinstance(cv, int | np.integer | str) and not hasattr(cv, "split"):
        raise InputError(
            "cv holds row positions, which change when missing_target='drop' leaves rows out. "
            "Leave those rows out of X and y yourself, or give cv as a number of folds or a "
            "splitter."
        )
    if isinstance(sample_weight, Sized) and len(sample_weight) != n_given:
        raise InputError(
            f"sample_weight must have one number a row, shape ({n_given},), got "
            f"{len(sample_weight)}."
        )


def select_weights(sample_weight: Any, positions: np.ndarray) -> object:
    """Return the weights of some rows."""
    if sample_weight is None:
        return None
    if isinstance(sample_weight, Tensor):
        return sample_weight[positions]
    return np.asarray(sample_weight)[positions]


def dropped_words(n_dropped: int, name: str) -> str:
    """Return the remark on rows that were left out."""
    verb = "was" if n_dropped == 1 else "were"
    return f"{count(n_dropped, 'row')} without a value of {name!r} {verb} left out"


def _missing_rows(values: np.ndarray) -> np.ndarray:
    """Return a mask (n,) of the rows of values (n, ...) that have a missing value."""
    if values.ndim == 0 or values.dtype.kind in "biuU":
        return np.zeros(len(values) if values.ndim else 0, dtype=bool)
    if values.dtype.kind == "f":
        missing = np.isnan(values)
    else:
        missing = np.array([is_missing(value) for value in values.ravel()], dtype=bool).reshape(
            values.shape
        )
    return missing.reshape(len(values), -1).any(1) if len(values) else np.zeros(0, dtype=bool)
