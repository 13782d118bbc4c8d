"""Convert data frames, arrays and lists to a table of named columns, each with a kind such as
number.

Containers of any other type raise an error.
"""

from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NoReturn

import narwhals as nw
import numpy as np
from torch import Tensor

from gputune.data.containers import refuse_containers, refuse_ragged
from gputune.data.kinds import (
    READ_AS_MISSING,
    Kind,
    frame_remark,
    from_column,
    from_series,
    read_amounts,
    read_as,
    refuse_infinite,
)
from gputune.ground.errors import InputError, Verbatim, option, per_interface
from gputune.ground.text import nearest

_FLATTEN = per_interface(
    "Pass X.reshape(len(X), -1). A module can restore the shape in its forward.",
    "Write the file again with X.reshape(len(X), -1). A module can restore the shape in its "
    "forward.",
)
_ONE_AXIS = (
    "One row is X.reshape(1, -1), or frame.iloc[[0]] of a DataFrame. One column is "
    "X.reshape(-1, 1)."
)


@dataclass(frozen=True, eq=False)
class Table:
    """A table of named columns, to which gputune converts data frames, files, arrays and lists.

    - Number and boolean columns are float64, with NaN for a missing value.
    - Category columns are object arrays of str, with None for a missing value.
    - Date columns are float64 seconds since 1970-01-01 (UTC, or local time for dates without a time
      zone), with NaN for a missing value.
    """

    names: tuple[str, ...]
    kinds: tuple[Kind, ...]
    columns: tuple[np.ndarray, ...]
    amounts: Mapping[str, str] = field(default_factory=dict)
    """For each column of amounts, such as "$1,200", a remark for the user, by column name.

    The mapping includes columns that were taken out of the table.
    """
    readings: Mapping[str, str] = field(default_factory=dict)
    """Remarks, by column name, on columns that gputune reads differently from a file and a data
    frame.

    The mapping includes the columns of the target and the groups.
    """
    dropped_dates: Mapping[str, np.ndarray] = field(default_factory=dict)
    """The date columns that were taken out of the table, by name.

    A time series split needs them for the order of the rows.
    """
    thousands: bool = True
    """False if a comma in a number may be a decimal comma, see ``read_amounts``."""

    def __len__(self) -> int:
        return len(self.columns[0])

    def column(self, name: str) -> np.ndarray:
        """Return the values (n,) of the column ``name`` of this table."""
        return self.columns[self._places[name]]

    def kind(self, name: str) -> Kind:
        return self.kinds[self._places[name]]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: j for j, name in enumerate(self.names)}

    def select(self, rows: np.ndarray) -> "Table":
        """Return a table with only the rows ``rows``, which are positions or a mask."""
        return replace(
            self,
            columns=tuple(column[rows] for column in self.columns),
            dropped_dates={name: dates[rows] for name, dates in self.dropped_dates.items()},
        )

    def drop(self, *names: str) -> "Table":
        triples = list(zip(self.names, self.kinds, self.columns))
        left, kinds, columns = zip(*(column for column in triples if column[0] not in names))
        dates = {name: column for name, kind, column in triples if name in names and kind == "date"}
        return replace(
            self,
            names=left,
            kinds=kinds,
            columns=columns,
            readings=_without(self.readings, names),
            dropped_dates={**self.dropped_dates, **dates},
        )

    def take_out(self, name: str) -> "tuple[Table, np.ndarray]":
        """Return the table without a column, and the values (n,) of the column.

        The table keeps the remarks on the column, which is the target or the groups.
        """
        return replace(self.drop(name), readings=self.readings), self.column(name)

    def read_as(self, kinds: Mapping[str, Kind]) -> "Table":
        """Return a table with some columns converted to the kinds that the user chose.

        ``kinds`` is a dict from column name to kind.

        Raises:
            InputError: a value cannot be converted.
        """
        columns = dict(zip(self.names, self.columns))
        for name, kind in kinds.items():
            columns[name] = read_as(
                kind, self.kind(name), columns[name], name, thousands=self.thousands
            )
        return replace(
            self,
            kinds=tuple(map(kinds.get, self.names, self.kinds)),
            columns=tuple(columns.values()),
            amounts=_without(self.amounts, kinds),
            readings=_without(self.readings, kinds),
        )

    def missing_remark(self, name: str) -> str:
        """Return the remark on text of a column that is read as a missing value, or ""."""
        remark = self.readings.get(name, "")
        return remark if remark.endswith(READ_AS_MISSING) else ""

    def with_readings(self, remarks: Mapping[str, str]) -> "Table":
        """Return the table with ``remarks`` (by column name) as its ``readings``. The result leaves
        out empty remarks."""
        return replace(self, readings={name: remark for name, remark in remarks.items() if remark})

    def frame(self) -> object:
        """Return the table as a polars DataFrame, with dates as Datetime and null for missing
        values."""
        import polars as pl

        def series(kind: Kind, values: np.ndarray) -> pl.Series:
            if kind == "category":
                return pl.Series(values, dtype=pl.String)
            numbers = pl.Series(values).fill_nan(None)
            if kind == "date":
                return (numbers * 1e6).round().cast(pl.Int64).cast(pl.Datetime("us"))
            return numbers.cast(pl.Boolean) if kind == "boolean" else numbers

        return pl.DataFrame(dict(zip(self.names, map(series, self.kinds, self.columns))))


def _without(remarks: Mapping[str, str], names: Container[str]) -> dict[str, str]:
    return {name: remark for name, remark in remarks.items() if name not in names}


def every_column(name: str) -> bool:
    """Return True for any column: the default of ``is_used`` in this file."""
    del name
    return True


def as_table(X: object, is_used: Callable[[str], bool] = every_column) -> Table:
    """Convert a 2-D array, a pandas or polars DataFrame, or a list of rows to a table.

    A Table stays unchanged. Columns of arrays and lists get the names x0, x1, ... ``is_used`` tells
    by name which columns are read later. The other columns may have infinite values.

    Raises:
        InputError: X has any other type. The message shows how to convert it.
    """
    if isinstance(X, Table):
        return X
    from scipy.sparse import issparse

    refuse_ragged(X, "X")
    refuse_containers(X)
    if issparse(X):
        raise InputError(
            "X",
            "is a sparse matrix, but gputune supports only dense input",
            remedy="Pass X.toarray().",
        )
    if np.ma.isMaskedArray(X):
        raise InputError(
            "X",
            "is a masked array, but gputune does not read masks",
            remedy="Pass X.filled(numpy.nan).",
        )
    try:
        frame = nw.from_native(X, pass_through=True)
    except nw.exceptions.DuplicateError as error:
        last_line = str(error).strip().splitlines()[-1].strip("- ")
        raise InputError(
            None, f"Column names must differ ({last_line})", remedy="Rename one of them."
        ) from error
    if isinstance(frame, nw.LazyFrame):
        raise InputError("X", "is a lazy frame", remedy="Pass X.collect().")
    if isinstance(frame, nw.DataFrame):
        return _frame_table(frame, is_used)
    array = X if isinstance(X, np.ndarray) else _rows_to_array(X)
    if array.dtype.names is not None:
        raise InputError(
            "X",
            "is a structured array",
            remedy="Pass a DataFrame, for example pandas.DataFrame(X).",
        )
    if array.ndim == 0:
        raise InputError(
            "X", "must be a DataFrame, an array with two axes or a list of lists", got=X
        )
    is_objects = array.ndim == 1 and array.dtype == object
    if is_objects and isinstance(array[0], list | tuple | np.ndarray):
        raise InputError("X", "is an object array of rows", remedy="Pass numpy.stack(X).")
    if array.ndim != 2:
        raise InputError(
            "X",
            "must be two-dimensional (rows, columns)",
            got=Verbatim(f"shape {array.shape}"),
            remedy=two_axes(array.ndim),
        )
    names = nameless(array.shape[1])
    return checked_table(names, list(map(from_column, array.T, names)), is_used=is_used)


def _frame_table(frame: "nw.DataFrame[Any]", is_used: Callable[[str], bool]) -> Table:
    names = list(map(str, frame.columns))
    columns = list(frame.iter_columns())
    # A categorical column stays a category, because its owner chose that type.
    dtypes = {name: column.dtype for name, column in zip(names, columns)}
    typed = [name for name in names if isinstance(dtypes[name], nw.Categorical | nw.Enum)]
    table = checked_table(names, list(map(from_series, columns)), typed, is_used=is_used)
    remarks = {}
    for name, kind, values in zip(names, table.kinds, table.columns):
        if kind == "category" and dtypes[name] == nw.String:
            remarks[name] = frame_remark(values)
    return table.with_readings(remarks)


def nameless(columns: int) -> tuple[str, ...]:
    """Return the names x0, x1, ... for the columns of an array or a list."""
    return tuple(f"x{j}" for j in range(columns))


def as_rows(X: object, names: Collection[str]) -> object:
    """Return X in the user's own type, for a custom scorer.

    A data frame keeps only the columns ``names``. Any other X becomes an array with all columns.

    X is anything that ``as_table`` accepts.
    """
    frame = nw.from_native(X, pass_through=True)
    if not isinstance(frame, nw.DataFrame):
        return X if isinstance(X, np.ndarray) else _rows_to_array(X)
    positions = [j for j, name in enumerate(frame.columns) if str(name) in names]
    return X if len(positions) == len(frame.columns) else frame[:, positions].to_native()


def select_rows(X: Any, rows: np.ndarray) -> object:
    """Return the rows at some positions of a data frame or an array, in the same type.

    An array is a copy.
    """
    frame = nw.from_native(X, pass_through=True)
    return frame[rows].to_native() if isinstance(frame, nw.DataFrame) else X[rows]


def split_target(table: Table, target: str) -> tuple[Table, np.ndarray]:
    """Split a table into the table without the target column, and the target as an array (n,).

    The array holds str (object; None if missing), bool (object with None if any is missing), int64
    if every number is an integer, or float64 (NaN if missing).
    """
    if target not in table.names:
        near = nearest(target, table.names, cutoff=0.5)
        hint = f"Did you mean {near!r}? " if near else ""
        raise InputError(
            "target",
            "must be a column of the table",
            got=target,
            remedy=f"{hint}The columns are {quoted(table.names)}.",
        )
    if len(table.names) == 1:
        raise InputError(
            None,
            f"The target {target!r} is the only column of the table",
            remedy="Add columns to predict it from.",
        )
    kind = table.kind(target)
    rest, values = table.take_out(target)
    if kind == "date":
        raise InputError(
            None,
            f"The target {target!r} holds dates, but gputune cannot predict dates",
            remedy="Convert them to numbers first.",
        )
    if kind == "boolean":
        is_missing = np.isnan(values)
        values = values.astype(bool)
        if is_missing.any():  # next to None, True stays True
            values = values.astype(object)
            values[is_missing] = None
    elif kind == "number" and not np.isnan(values).any():
        are_whole = (values == np.rint(values)).all() and np.abs(values).max() < 2**53
        values = values.astype(np.int64) if are_whole else values
    return rest, values


def quoted(names: Iterable[str], limit: int = 8) -> str:
    """Return a list of names for a message, such as "'age', 'color' and 3 more".

    The text shows at most ``limit`` names.
    """
    names = list(names)
    texts = []
    for name in map(str, names[:limit]):
        texts.append(repr(name if len(name) <= 100 else f"{name[:100]}..."))
    shown = ", ".join(texts)
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def refuse_no_target(file: str, noun: str, names: Sequence[str]) -> NoReturn:
    """Raise InputError for a search that names no target. The message lists what the file holds.

    Args:
        file: the path of the file.
        noun: "column" or "array".
        names: the names of the columns or arrays of the file. The example names the last of them.
    """
    known = f"The {noun}s of {file!r} are {quoted(names, 10)}."
    example = option("y", str(names[-1]))
    raise InputError(
        "y", "is missing", remedy=f"{known} Name the {noun} to predict, for example {example}."
    )


def two_axes(ndim: int) -> str:
    """Return advice for an error: how to reshape an array with ``ndim`` axes to two axes."""
    return ("One value is X.reshape(1, 1).", _ONE_AXIS, _FLATTEN)[min(ndim, 2)]


def _rows_to_array(X: object) -> np.ndarray:
    """Convert nested lists, or an array of another library, to a NumPy array.

    The values of lists keep their types.
    """
    if not isinstance(X, list | tuple):
        return np.asarray(X)
    if not all(isinstance(row, list | tuple | np.ndarray) for row in X):
        remedy = ""
        if any(isinstance(row, Tensor) for row in X):
            remedy = (
                "Combine tensors with torch.stack(X), or tensors of different lengths with "
                "torch.nn.utils.rnn.pad_sequence(X, batch_first=True)."
            )
        raise InputError(
            "X",
            "must be two-dimensional: a list of rows, where each row is a list of values",
            remedy=remedy,
        )
    return np.array(X, dtype=object)


def checked_table(
    names: Sequence[str],
    columns: Sequence[tuple[Kind, np.ndarray]],
    typed: Collection[str] = (),
    *,
    is_used: Callable[[str], bool] = every_column,
    thousands: bool = True,
) -> Table:
    """Return a table after checking that it has rows, columns, distinct names and no infinite value
    in a column that is used.

    A text column of amounts, such as "$1,200", becomes numbers. Columns in ``typed`` stay text,
    because the user chose their type. ``thousands`` is an argument of ``read_amounts``.
    """
    if not columns:
        raise InputError(None, "The table has no columns", remedy="Add at least one column.")
    if len(columns[0][1]) == 0:
        raise InputError(None, "The table has no rows", remedy="Add at least one row.")
    repeated = sorted(name for name, number in Counter(names).items() if number > 1)
    if repeated:
        raise InputError(
            None,
            f"Column names must differ, but {quoted(repeated)} occurs more than once",
            remedy="Rename the columns.",
        )
    amounts = dict[str, str]()
    kinds = list[Kind]()
    read_columns = list[np.ndarray]()
    for name, (kind, values) in zip(names, columns):
        if kind != "category" and is_used(name):
            refuse_infinite(values, name)
        numbers = None
        if kind == "category" and name not in typed:
            numbers = read_amounts(values, thousands=thousands)
        if numbers is not None:
            kind = "number"
            values, amounts[name] = numbers
        kinds.append(kind)
        read_columns.append(values)
    return Table(tuple(names), tuple(kinds), tuple(read_columns), amounts, thousands=thousands)
