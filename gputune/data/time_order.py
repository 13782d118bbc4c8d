"""The order of rows in time, for ``cv="time:5"``.

If the table has a date column, a time series split that is written as text follows this column.
A scikit-learn splitter takes the rows in their given order, as scikit-learn does.
"""

from collections.abc import Iterator

import numpy as np
from sklearn.model_selection import TimeSeriesSplit

from gputune.data.kinds import parse_text
from gputune.data.readings import text_kind
from gputune.data.table import Table, quoted
from gputune.ground.errors import InputError, option
from gputune.ground.text import count


class TimeSplit(TimeSeriesSplit):  # type: ignore[misc]  # scikit-learn has no types
    """A time series split that the user wrote as text, such as "time:5".

    ``order`` has the positions of the rows in the order of time, (n,), or None if the rows are in
    this order already.
    """

    def __init__(self, n_splits: int, order: np.ndarray | None = None) -> None:
        super().__init__(n_splits)
        self.order = order

    def __str__(self) -> str:
        return f"time:{self.n_splits}"

    def too_many_folds(self, n_rows: int) -> InputError:
        """Return the error for a split of ``n_rows`` rows, which are too few for these folds."""
        return InputError(
            option("cv", str(self)),
            f"cannot split these {n_rows} rows: it needs at least {self.n_splits + 1} rows",
            remedy=f"Use at most {option('cv', f'time:{n_rows - 1}')}." if n_rows > 2 else "",
        )

    def split(
        self, X: object, y: object = None, groups: object = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for train, valid in super().split(X, y, groups):
            if self.order is None:
                yield train, valid
            else:
                yield self.order[train], self.order[valid]


def rows_in_time(cv: TimeSeriesSplit, n_rows: int) -> np.ndarray:
    """Return the positions of the rows in the order that a time series split gives them, (n,)."""
    order = cv.order if isinstance(cv, TimeSplit) else None
    return np.arange(n_rows) if order is None else order


def parse_cv(text: str) -> int | TimeSplit:
    """Return the value of ``--cv``: 5 for "5", or a time series split for "time:5".

    In a time series split the validation rows always come after the training rows.
    """
    kind, _, number = text.rpartition(":")
    if kind not in ("", "time") or not number.isdecimal() or int(number) < 2:
        raise InputError(
            "cv",
            "must be the number of folds, such as 5, or a time series split, such as time:5, with at "
            "least 2 folds",
            got=text,
        )
    return TimeSplit(int(number)) if kind else int(number)


def in_time_order(cv: object, X: object) -> object:
    """Return ``cv``. If it is a ``TimeSplit``, it follows the date column of the table X.

    The rows stay in their given order if they are sorted by a date column already, or if X has no
    date column or several.

    Raises:
        InputError: the date column has missing values.
    """
    names = unsorted_dates(cv, X)
    if not isinstance(cv, TimeSplit) or not isinstance(X, Table) or len(names) != 1:
        return cv
    dates = _dates(X)[names[0]]
    missing = np.flatnonzero(np.isnan(dates))
    if len(missing):
        raise InputError(
            "cv",
            f"splits by time, but the date column {names[0]!r} has "
            f"{count(len(missing), 'missing value')} (the first is in row {missing[0]})",
            remedy="Fill in the values, leave out these rows, or sort the rows.",
        )
    return TimeSplit(cv.n_splits, np.argsort(dates, kind="stable"))


def unsorted_dates(cv: object, X: object) -> tuple[str, ...]:
    """Return the names of the date columns, if a ``TimeSplit`` needs an order and X has none.

    The result is empty if the rows are in the order of one of the date columns. Columns that were
    dropped from X count only if X has no date column left.
    """
    if not isinstance(cv, TimeSplit) or not isinstance(X, Table):
        return ()
    names = []
    for name, dates in _dates(X).items():
        known = dates[~np.isnan(dates)]
        if len(known) == 0 or (known == known[0]).all():
            continue  # one date does not order the rows
        if (np.diff(known) >= 0).all():
            return ()
        names.append(name)
    columns = tuple(name for name in names if name in X.names)
    return columns or tuple(names)


def _dates(X: Table) -> dict[str, np.ndarray]:
    """Return the date columns of a table and the date columns that were dropped from it, by
    name."""
    pairs = zip(X.names, X.kinds, strict=True)
    columns = {name: X.column(name) for name, kind in pairs if kind == "date"}
    return {**columns, **X.dropped_dates}


def time_remark(cv: object, X: object) -> str:
    """Return a sentence on the order of the rows that a ``TimeSplit`` uses, or ""."""
    names = unsorted_dates(cv, X)
    if len(names) == 1:
        return (
            f"the rows are not sorted by the date column {names[0]!r}, so the folds are made in "
            "the order of its values"
        )
    if names:
        return (
            f"the rows are sorted by none of the date columns {quoted(names)}, so the folds take "
            "the rows in their given order; sort the rows first if this is not their order in time"
        )
    if name := _column_of_date_texts(cv, X):
        kinds = option("kinds", {name: "date"})
        return (
            f"the dates of the column {name!r} are text, so the folds take the rows in their given "
            f"order; to order the rows by these dates, set {kinds}"
        )
    return ""


def _column_of_date_texts(cv: object, X: object) -> str:
    """Return the name of the first column of unsorted dates that a data frame stores as text.

    The result is "" if ``cv`` is no ``TimeSplit`` or if the table has columns of dates.
    """
    if not isinstance(cv, TimeSplit) or not isinstance(X, Table) or "date" in X.kinds:
        return ""
    for name in X.names:
        if X.kind(name) == "category" and text_kind(X.column(name)) == "date":
            _, dates = parse_text(X.column(name))
            known = dates[~np.isnan(dates)]
            if (np.diff(known) < 0).any():
                return name
    return ""
