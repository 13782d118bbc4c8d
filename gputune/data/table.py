"""Turn data frames, arrays and lists into a table of named columns, each with a kind.

Other containers are refused.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import narwhals as nw
import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from gputune.data.kinds import Kind, from_column, from_series, read_amounts, read_as
from gputune.data.ragged import refuse_ragged
from gputune.data.readings import frame_remark
from gputune.errors import InputError
from gputune.text import nearest

_FLATTEN = "pass X.reshape(len(X), -1), which the forward of a module may view as it was"
_ONE_AXIS = (
    "one row is X.reshape(1, -1), of a data frame frame.iloc[[0]]; one column is X.reshape(-1, 1)"
)


@dataclass(frozen=True, eq=False)
class Table:
    """Named columns of equal length.

    - Number and boolean columns are float64, with NaN for a missing value.
    - Category columns are object arrays of str, with None for a missing value.
    - Date columns are float64 seconds since 1970-01-01 (UTC, or local time for dates without a time
      zone), with NaN for a missing value.
    """

    names: tuple[str, ...]
    kinds: tuple[Kind, ...]
    columns: tuple[np.ndarray, ...]
    amounts: Mapping[str, str] = field(default_factory=dict)
    """Remark by column name on numbers that were written as amounts (see kinds.py).

    It includes columns that were taken out.
    """
    readings: Mapping[str, str] = field(default_factory=dict)
    """Remark by column name on a column that a file and a data frame would read differently.

    See readings.py.
    """

    def __len__(self) -> int:
        return len(self.columns[0])

    def column(self, name: str) -> np.ndarray:
        """Return the values of one column, (n,)."""
        return self.columns[self._places[name]]

    def kind(self, name: str) -> Kind:
        return self.kinds[self._places[name]]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: j for j, name in enumerate(self.names)}

    def select(self, rows: np.ndarray) -> "Table":
        """Return the given rows (positions or a mask) of all columns."""
        return replace(self, columns=tuple(column[rows] for column in self.columns))

    def drop(self, *names: str) -> "Table":
        kept = (
            column for column in zip(self.names, self.kinds, self.columns) if column[0] not in names
        )
        left, kinds, columns = zip(*kept)
        readings = {name: remark for name, remark in self.readings.items() if name not in names}
        return Table(left, kinds, columns, self.amounts, readings)

    def read_as(self, kinds: Mapping[str, Kind]) -> "Table":
        """Return the table with some columns converted to the kinds in ``kinds``.

        Raises:
            InputError: a value cannot be converted.
        """
        read = {
            name: read_as(kind, self.kind(name), self.column(name), name)
            for name, kind in kinds.items()
        }
        columns = tuple(read.get(name, values) for name, values in zip(self.names, self.columns))
        amounts = {name: remark for name, remark in self.amounts.items() if name not in kinds}
        readings = {name: remark for name, remark in self.readings.items() if name not in kinds}
        return Table(
            self.names, tuple(map(kinds.get, self.names, self.kinds)), columns, amounts, readings
        )

    def with_readings(self, remarks: Mapping[str, str]) -> "Table":
        """Return the table with these ``readings``. Empty remarks are left out."""
        return replace(self, readings={name: remark for name, remark in remarks.items() if remark})

    def frame(self) -> object:
        """Return the table as a polars frame: dates as Datetime, null for a missing value."""
        import polars as pl

        def series(kind: Kind, values: np.ndarray) -> pl.Series:
            if kind == "category":
                return pl.Series(values, dtype=pl.String)
            numbers = pl.Series(values).fill_nan(None)
            if kind == "date":
                return (numbers * 1e6).round().cast(pl.Int64).cast(pl.Datetime("us"))
            return numbers.cast(pl.Boolean) if kind == "boolean" else numbers

        return pl.DataFrame(dict(zip(self.names, map(series, self.kinds, self.columns))))


def as_table(X: object) -> Table:
    """Return a table made from a 2-D array, a pandas or polars frame, or a list of rows.

    A Table is returned unchanged. Columns of arrays and lists are named x0, x1, ...

    Raises:
        InputError: X has any other type. The message shows how to convert it.
    """
    if isinstance(X, Table):
        return X
    from scipy.sparse import issparse

    refuse_ragged(X, "X")
    _refuse_containers(X)
    if issparse(X):
        raise InputError(
            "X is a sparse matrix, and only dense input is supported; pass X.toarray()."
        )
    if np.ma.isMaskedArray(X):
        raise InputError("X is a masked array, and masks are not read; pass X.filled(numpy.nan).")
    try:
        frame = nw.from_native(X, pass_through=True)
    except nw.exceptions.DuplicateError as error:
        last_line = str(error).strip().splitlines()[-1].strip("- ")
        raise InputError(f"column names must differ; rename one of them ({last_line}).") from error
    if isinstance(frame, nw.LazyFrame):
        raise InputError("X is a lazy frame; pass X.collect().")
    if isinstance(frame, nw.DataFrame):
        # A categorical column stays a category, because its owner chose that type.
        typed = [
            str(s.name)
            for s in frame.iter_columns()
            if isinstance(s.dtype, nw.Categorical | nw.Enum)
        ]
        table = checked_table(
            [*map(str, frame.columns)], [*map(from_series, frame.iter_columns())], typed
        )
        texts = [str(column.name) for column in frame.iter_columns() if column.dtype == nw.String]
        remarks = {
            name: frame_remark(table.column(name))
            for name in texts
            if table.kind(name) == "category"
        }
        return table.with_readings(remarks)
    array = X if isinstance(X, np.ndarray) else _rows_to_array(X)
    if array.dtype.names is not None:
        raise InputError(
            "X is a structured array; pass a data frame, for example pandas.DataFrame(X)."
        )
    if array.ndim == 0:
        raise InputError(
            f"X must be rows, a data frame, an array of two axes or a list of lists, got {X!r:.60}."
        )
    if (
        array.ndim == 1
        and array.dtype == object
        and isinstance(array[0], list | tuple | np.ndarray)
    ):
        raise InputError("X is an object array of rows, not a table. Pass numpy.stack(X).")
    if array.ndim != 2:
        raise InputError(
            f"X must be two-dimensional (rows, columns), got shape {array.shape}; "
            f"{two_axes(array.ndim)}."
        )
    names = nameless(array.shape[1])
    return checked_table(names, list(map(from_column, array.T, names)))


def nameless(columns: int) -> tuple[str, ...]:
    """Return the default names of unnamed columns: x0, x1, ..."""
    return tuple(f"x{j}" for j in range(columns))


def as_rows(X: object, names: Collection[str]) -> object:
    """Return X in the user's own type: a data frame with only the columns ``names``, or an array.

    An array has all columns. X is anything that ``as_table`` takes.
    """
    frame = nw.from_native(X, pass_through=True)
    if not isinstance(frame, nw.DataFrame):
        return X if isinstance(X, np.ndarray) else _rows_to_array(X)
    kept = [j for j, name in enumerate(frame.columns) if str(name) in names]
    return X if len(kept) == len(frame.columns) else frame[:, kept].to_native()


def select_rows(X: Any, rows: np.ndarray) -> object:
    """Return rows (positions) of the result of ``as_rows``, in the same type. An array is a
    copy."""
    frame = nw.from_native(X, pass_through=True)
    return frame[rows].to_native() if isinstance(frame, nw.DataFrame) else X[rows]


def split_target(table: Table, target: str) -> tuple[Table, np.ndarray]:
    """Return the table without the target's column, and the target as a plain array, (n,).

    The array holds str (object; None if missing), bool, int64 if every number is an integer, or
    float64 (NaN if missing).
    """
    if target not in table.names:
        near = nearest(target, table.names, cutoff=0.5)
        hint = f"did you mean {near!r}? The" if near else "the"
        raise InputError(
            f"target={target!r} is not a column of the table; {hint} columns are "
            f"{quoted(table.names)}."
        )
    if len(table.names) == 1:
        raise InputError(
            f"the target {target!r} is the only column of the table; there is nothing to predict "
            "it from."
        )
    kind = table.kind(target)
    values = table.column(target)
    if kind == "date":
        raise InputError(
            f"the target {target!r} holds dates, which cannot be predicted; turn it into a number "
            "first."
        )
    if kind != "category" and not np.isnan(values).any():
        if kind == "boolean":
            values = values.astype(bool)
        elif (values == np.rint(values)).all() and np.abs(values).max() < 2**53:
            values = values.astype(np.int64)
    return table.drop(target), values


def quoted(names: Iterable[str], limit: int = 8) -> str:
    """Return names for a message, in quotation marks and with commas.

    At most ``limit`` names are written out.
    """
    names = list(names)
    shown = ", ".join(_short_repr(str(name)) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _short_repr(name: str, most: int = 100) -> str:
    """Return a name in quotation marks, cut after ``most`` characters."""
    return repr(name) if len(name) <= most else repr(f"{name[:most]}...")


def two_axes(ndim: int) -> str:
    """Return the advice on how to turn an array with ``ndim`` axes into a table."""
    return ("one value is X.reshape(1, 1)", _ONE_AXIS, _FLATTEN)[min(ndim, 2)]


def _rows_to_array(X: object) -> np.ndarray:
    """Return nested lists, or another library's array, as a NumPy array. Values of lists keep
    their types."""
    if not isinstance(X, list | tuple):
        return np.asarray(X)
    if not all(isinstance(row, list | tuple | np.ndarray) for row in X):
        pad = "torch.nn.utils.rnn.pad_sequence(X, batch_first=True)"
        remedy = f" Make tensors one: torch.stack(X), or of several lengths {pad}."
        of_tensors = any(isinstance(row, Tensor) for row in X)
        raise InputError(
            "X must be two-dimensional: a list of rows, each a list of "
            f"values.{remedy * of_tensors}"
        )
    return np.array(X, dtype=object)


def checked_table(
    names: Sequence[str], columns: Sequence[tuple[Kind, np.ndarray]], typed: Collection[str] = ()
) -> Table:
    """Return a table with at least one row and one column, distinct names and finite values.

    Text that is all amounts becomes numbers, except in the columns ``typed``, whose owner chose
    their type.
    """
    if not columns:
        raise InputError("the table has no columns; at least one is needed.")
    if len(columns[0][1]) == 0:
        raise InputError("the table has no rows; at least one is needed.")
    if repeated := sorted(name for name, times in Counter(names).items() if times > 1):
        raise InputError(
            f"column names must differ, got more than one {quoted(repeated)}; rename them."
        )
    amounts = dict[str, str]()
    read = list[tuple[Kind, np.ndarray]]()
    for name, (kind, values) in zip(names, columns):
        if kind != "category" and np.isinf(values).any():
            row = int(np.isinf(values).argmax())
            place = f"row {row}{', where the first is row 0' * (row > 0)}"
            raise InputError(
                f"column {name!r} has an infinite value in {place}; clip it, or leave it empty."
            )
        if kind == "category" and name not in typed and (found := read_amounts(values)) is not None:
            kind, (values, amounts[name]) = "number", found
        read.append((kind, values))
    return Table(
        tuple(names), tuple(kind for kind, _ in read), tuple(values for _, values in read), amounts
    )


def _refuse_containers(X: object) -> None:
    """Raise InputError for containers of several inputs, and for torch containers of rows."""
    refuse_loader(X)
    name = type(X).__name__
    if isinstance(X, TensorDataset):
        raise InputError(f"X is a {name}; pass its tensors: X, y = dataset.tensors.")
    if isinstance(X, Dataset):
        raise InputError(
            f"X is a {name}, a torch Dataset; pass all its rows as arrays or tensors X and y."
        )
    if isinstance(X, Mapping):
        remedy = (
            "pass one table of its columns, pandas.DataFrame(X), or of its inputs, "
            "numpy.hstack(list(X.values()))"
        )
        raise InputError(f"X is a {name}; {remedy}, which the forward of a module takes apart.")
    shapes = (
        [tuple(getattr(part, "shape", ())) for part in X] if isinstance(X, list | tuple) else []
    )
    if any(len(shape) > 1 for shape in shapes):
        remedy = "pass one table, numpy.hstack(X), which the forward of a module takes apart"
        words = f"{len(shapes)} inputs, of shapes {', '.join(map(str, shapes[:4]))}"
        raise InputError(f"X is a {name} of {words}; {remedy}.")


def refuse_loader(X: object) -> None:
    """Raise InputError for a DataLoader, which draws minibatches itself."""
    if isinstance(X, DataLoader):
        remedy = "pass its dataset, loader.dataset, or all rows as tensors X and y"
        raise InputError(
            "X is a DataLoader, and minibatches are drawn here (batch_size is a key of space): "
            f"{remedy}."
        )


def refuse_lists(X: object) -> None:
    """Raise InputError for lists that look like inputs of a module but are not arrays or a table.

    The message shows how to convert them.
    """
    if is_image(X):
        raise InputError(f"X is one PIL image; pass all of them: {_STACK_IMAGES}.")
    if isinstance(X, np.ndarray) and X.dtype == object and X.ndim == 1:
        X = list(X)
    parts = dict(X if isinstance(X, Mapping) else enumerate(X if isinstance(X, tuple) else ()))
    # A few parts, some of which have rows with axes, are inputs. Otherwise the parts are rows or
    # columns of a table.
    if len(parts) <= 8 and any(len(_shape_of(part)) > 1 for part in parts.values()):
        for key, part in parts.items():
            if not isinstance(part, Tensor | np.ndarray):
                got = f"got {type(part).__name__}; pass numpy.asarray(X[{key!r}])"
                raise InputError(
                    f"X[{key!r}] must be an array or a tensor, one for each input, {got}."
                )
    if not isinstance(X, list | tuple) or not X:
        return
    kind = f"X is a {type(X).__name__} of {len(X)}"
    if any(isinstance(item, str) for item in X):
        remedy = (
            "give the words numbers, and pass a tensor of integers (rows, length), padded to one "
            "length"
        )
        raise InputError(f"{kind} texts; {remedy}.")
    if any(is_image(item) for item in X):
        raise InputError(f"{kind} PIL images; pass {_STACK_IMAGES}.")
    shapes = [_shape_of(item) for item in X]
    if all(len(shape) < 2 for shape in shapes):
        return  # rows of a table
    other = next((i for i, shape in enumerate(shapes) if shape != shapes[0]), None)
    several = "; where they are inputs of the module, pass a tuple of them" if len(X) < 9 else ""
    if other is None:
        stack = "torch.stack(X)" if isinstance(X[0], Tensor) else "numpy.stack(X)"
        raise InputError(f"{kind} arrays of shape {shapes[0]}; pass one array, {stack}{several}.")
    remedy = f"pad or crop them to one shape and pass numpy.stack(X){several}"
    raise InputError(
        f"{kind} arrays of unlike shapes: X[0] has {shapes[0]}, X[{other}] {shapes[other]}; "
        f"{remedy}."
    )


def is_image(value: object) -> bool:
    """Return True for a PIL image. PIL need not be installed."""
    return type(value).__module__.partition(".")[0] == "PIL" and hasattr(value, "getpixel")


_STACK_IMAGES = (
    "numpy.stack([numpy.asarray(image) for image in X]), images of one size, which has the "
    "channels last: .transpose(0, 3, 1, 2) puts them first, as torch's layers want them"
)


def _shape_of(item: object) -> tuple[int, ...]:
    if isinstance(item, list | tuple):
        return (len(item), *(_shape_of(item[0]) if item else ()))
    return tuple(item.shape) if isinstance(item, Tensor | np.ndarray) else ()
