"""Rows with a missing target: raise an error, or leave the rows out if
``missing_target="drop"``."""

from collections.abc import Callable, Sized
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from gputune.data.kinds import is_missing
from gputune.data.target import refuse_missing, target_array
from gputune.ground.errors import InputError, Verbatim, option
from gputune.ground.text import count

MissingTarget = Literal["error", "drop"]
MISSING_TARGET: tuple[MissingTarget, ...] = get_args(MissingTarget)

_REMEDY = f"Fill it, or set {option('missing_target', 'drop')} to leave those rows out."


def rows_with_target(
    y: object,
    name: str,
    missing_target: MissingTarget,
    place: Callable[[int], str],
    remark: str = "",
) -> np.ndarray | None:
    """Return the positions of the rows that have a target, or None if no target is missing.

    Args:
        y: targets (n,) or (n, ...), as ``tune`` takes them.
        name: the target's name in errors.
        missing_target: "drop", or "error" to refuse missing targets.
        place: returns the place of a row as text, for errors.
        remark: a remark on text of the target that is read as a missing value, for errors, or "".

    Raises:
        InputError: a target is missing and ``missing_target`` is "error", or every target is
            missing.
    """
    missing = _missing_rows(target_array(y, name))
    if not missing.any():
        return None
    if missing_target == "error" or missing.all():
        remedy = f"{remark}. {_REMEDY}" if remark else _REMEDY
        refuse_missing(np.where(missing, np.nan, 0.0), name, remedy, place)
    return np.flatnonzero(~missing)


def select_targets(y: Any, positions: np.ndarray, *, is_column: bool) -> np.ndarray | Tensor:
    """Return the targets at ``positions``, which are the rows that have a target.

    ``is_column`` means that y is a column of a table. A column with missing values holds floats, so
    its whole numbers become integers again.
    """
    if isinstance(y, Tensor):
        selected: Tensor = y[positions]
        return selected
    values: np.ndarray = target_array(y, "y")[positions]
    if not is_column or values.dtype.kind != "f":
        return values
    # Below 2**53, floats hold integers exactly.
    are_whole = (values == np.rint(values)) & (abs(values) < 2**53)
    return values.astype(np.int64) if are_whole.all() else values


def check_row_options(n_given: int, cv: object, sample_weight: object) -> None:
    """Raise InputError for options that are invalid once rows with missing targets are dropped.

    Folds as row positions are invalid, because the positions change. Sample weights must have the
    length ``n_given``, as X before the rows were dropped.
    """
    if not isinstance(cv, int | np.integer | str) and not hasattr(cv, "split"):
        raise InputError(
            "cv",
            f"holds row positions, but {option('missing_target', 'drop')} changes the positions",
            remedy="Leave the rows without a target out of X and y yourself, or pass a number of "
            "folds or a splitter.",
        )
    if isinstance(sample_weight, Sized) and len(sample_weight) != n_given:
        raise InputError(
            "sample_weight",
            f"must have one number per row, shape ({n_given},)",
            got=Verbatim(f"{len(sample_weight)} numbers"),
        )


def select_values(values: Any, positions: np.ndarray) -> Any:
    """Return the values, such as groups or weights, of the rows at ``positions``. None stays
    None."""
    if values is None:
        return None
    return (values if isinstance(values, Tensor) else np.asarray(values))[positions]


def dropped_words(n_dropped: int, name: str) -> str:
    """Return a remark such as "2 rows without a value of 'price' were left out"."""
    verb = "was" if n_dropped == 1 else "were"
    return f"{count(n_dropped, 'row')} without a value of {name!r} {verb} left out"


def _missing_rows(values: np.ndarray) -> np.ndarray:
    """Return a mask (n,) of the rows of values (n, ...) that have a missing value."""
    if values.size == 0 or values.ndim == 0 or values.dtype.kind in "biuU":
        return np.zeros(values.shape[:1], dtype=bool)
    rows = values.reshape(len(values), -1)
    if values.dtype.kind == "f":
        return np.asarray(np.isnan(rows).any(1))
    return np.array([any(map(is_missing, row)) for row in rows], dtype=bool)
