"""Files, data frames and arrays become a table: named columns, each with a kind (kinds.py).

Torch tensors as tables of numbers: checked, compared and summed up where they lie.
"""

import difflib
import gzip
import io
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import narwhals as nw
import numpy as np
import torch
from scipy.sparse import issparse
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from gputune.data.columns import Column, fit_column
from gputune.data.kinds import MISSING_TEXT, Kind, from_column, from_series, parse_text
from gputune.errors import InputError
from gputune.memory import free_memory
from gputune.text import size_words

BUNDLED = ("iris", "digits", "wine", "breast_cancer", "diabetes")
"""scikit-learn's data sets that ``sklearn:NAME`` reads."""

FLATTEN = "pass X.reshape(len(X), -1), which the forward of a module may view as it was"
_FIELD_BYTES = 24  # of a short text and of the number that it is read as
_COLUMN_BYTES = 4096  # of a column, however short it is
_SHORT = 500  # rows up to which Python reads a column sooner than polars


@dataclass(frozen=True, eq=False)
class Table:
    """Named columns of equal length.

    Number and boolean columns are float64 with NaN for a missing value; category columns are object arrays of
    str with None; date columns are float64 seconds since 1970-01-01 (UTC, or local time for dates without
    a zone) with NaN.
    """

    names: tuple[str, ...]
    kinds: tuple[Kind, ...]
    columns: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.columns[0])

    def column(self, name: str) -> np.ndarray:
        """Return the values of one column, (n,)."""
        return self.columns[self._places[name]]

    def kind(self, name: str) -> Kind:
        """Return the kind of one column."""
        return self.kinds[self._places[name]]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: j for j, name in enumerate(self.names)}

    def select(self, rows: np.ndarray) -> "Table":
        """Return the given rows (positions or a mask) of all columns."""
        return Table(self.names, self.kinds, tuple(column[rows] for column in self.columns))

    def drop(self, name: str) -> "Table":
        """Return the table without one column."""
        kept = [i for i, other in enumerate(self.names) if other != name]
        return Table(
            tuple(self.names[i] for i in kept),
            tuple(self.kinds[i] for i in kept),
            tuple(self.columns[i] for i in kept),
        )

    def frame(self) -> Any:
        """Return the table as a polars frame: dates as Datetime, null where a value is missing."""
        import polars as pl

        def series(kind: Kind, values: np.ndarray) -> pl.Series:
            if kind == "category":
                return pl.Series(values, dtype=pl.String)
            numbers = pl.Series(values).fill_nan(None)
            if kind == "date":
                return (numbers * 1e6).round().cast(pl.Int64).cast(pl.Datetime("us"))
            return numbers.cast(pl.Boolean) if kind == "boolean" else numbers

        return pl.DataFrame(dict(zip(self.names, map(series, self.kinds, self.columns))))


def read_table(source: str | Path) -> Table:
    """Read a .csv, .tsv (also .gz) or .parquet file, or one of scikit-learn's sets as ``sklearn:NAME``.

    A bundled set has its target in the column ``target``: class names for iris, wine and breast_cancer,
    integers for digits, a number for diabetes. Empty fields and the texts of ``MISSING_TEXT`` are missing
    values; blanks around a field and empty lines at the end are dropped; a header with
    semicolons and no comma means semicolons throughout.

    Raises FileNotFoundError, or InputError for another suffix, a damaged or an empty file, what is no regular file or
    does not fit into the memory that is free, duplicate column names, or an infinite value.
    """
    if str(source).startswith("sklearn:"):
        return _read_bundled(str(source).removeprefix("sklearn:"))
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no file {str(source)!r}; give a CSV or Parquet file or 'sklearn:iris'."
        )
    if path.is_dir():
        raise InputError(f"{str(source)!r} is a folder; give the file in it.")
    if not path.is_file():  # a pipe would be waited for, a device has no end
        raise InputError(
            f"{str(source)!r} is a pipe or a device and no file; write its rows into a file first."
        )
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _read_parquet(path)
    if name.endswith((".csv", ".csv.gz", ".tsv", ".tsv.gz")):
        return _read_text(path, tabs=name.endswith((".tsv", ".tsv.gz")))
    raise InputError(
        f"a table is read from .csv, .tsv (also .gz) or .parquet, got {str(source)!r}; convert it first."
    )


def as_table(X: Any) -> Table:
    """Turn a 2-D array, a pandas or polars frame, or a list of rows into a table; a Table stays as it is.

    Columns of arrays and lists are named x0, x1, ... Raises InputError for sparse matrices, for several inputs, for
    what draws minibatches, for anything that is not two-dimensional, for no rows or columns, equal names, infinite
    values and values without a kind.
    """
    if isinstance(X, Table):
        return X
    _refuse_containers(X)
    if issparse(X):
        raise InputError("X is a sparse matrix, and only dense input is supported; pass X.toarray().")
    if np.ma.isMaskedArray(X):
        raise InputError("X is a masked array, and masks are not read; pass X.filled(numpy.nan).")
    try:
        frame = nw.from_native(X, pass_through=True)
    except nw.exceptions.DuplicateError as error:
        raise InputError(f"column names must differ; rename one of them ({_last_line(error)}).") from error
    if isinstance(frame, nw.LazyFrame):
        raise InputError("X is a lazy frame; pass X.collect().")
    if isinstance(frame, nw.DataFrame):
        return _from_frame(frame)
    return _from_array(X)


def as_rows(X: Any, names: Collection[str]) -> Any:
    """Return what ``as_table`` takes as the user knows it: a frame of the columns ``names``, or an array of all."""
    frame = nw.from_native(X, pass_through=True)
    if not isinstance(frame, nw.DataFrame):
        return X if isinstance(X, np.ndarray) else _rows_to_array(X)
    kept = [j for j, name in enumerate(frame.columns) if str(name) in names]
    return X if len(kept) == len(frame.columns) else frame[:, kept].to_native()


def select_rows(X: Any, rows: np.ndarray) -> Any:
    """Return rows (positions) of what ``as_rows`` returned, of the same kind; an array of its own."""
    frame = nw.from_native(X, pass_through=True)
    return frame[rows].to_native() if isinstance(frame, nw.DataFrame) else X[rows]


def _refuse_containers(X: Any) -> None:
    """Raise InputError for what holds several inputs, or rows in a form of torch's that is no table."""
    name = type(X).__name__
    if isinstance(X, TensorDataset):
        raise InputError(f"X is a {name}; pass its tensors: X, y = dataset.tensors.")
    if isinstance(X, DataLoader):
        raise InputError(
            f"X is a {name}; pass all rows as arrays or tensors X and y, since minibatches are drawn here: batch_size "
            "is a key of space."
        )
    if isinstance(X, Dataset):
        raise InputError(f"X is a {name}, a torch Dataset; pass all its rows as arrays or tensors X and y.")
    if isinstance(X, Mapping):
        raise InputError(
            f"X is a {name}; pass one table of its columns, pandas.DataFrame(X), or of its inputs, "
            "numpy.hstack(list(X.values())), which the forward of a module takes apart."
        )
    shapes = [tuple(getattr(part, "shape", ())) for part in X] if isinstance(X, list | tuple) else []
    if any(len(shape) > 1 for shape in shapes):
        raise InputError(
            f"X is a {name} of {len(shapes)} inputs, of shapes {', '.join(map(str, shapes[:4]))}; pass one table, "
            "numpy.hstack(X), which the forward of a module takes apart."
        )


def split_target(table: Table, target: str) -> tuple[Table, np.ndarray]:
    """Return the table without the target's column, and the target as a plain array, (n,).

    The array holds str (object; None where missing), bool, int64 where every number is an integer, or float64
    (NaN where missing). Raises InputError for an unknown column, a date, or a table with no other column.
    """
    if target not in table.names:
        close = difflib.get_close_matches(str(target), table.names, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? The" if close else "the"
        raise InputError(
            f"target={target!r} is not a column of the table; {hint} columns are {quoted(table.names)}."
        )
    if len(table.names) == 1:
        raise InputError(
            f"the target {target!r} is the only column of the table; there is nothing to predict it from."
        )
    kind, values = table.kind(target), table.column(target)
    if kind == "date":
        raise InputError(
            f"the target {target!r} holds dates, which cannot be predicted; turn it into a number first."
        )
    if kind != "category" and not np.isnan(values).any():
        if kind == "boolean":
            values = values.astype(bool)
        elif (values == np.rint(values)).all() and np.abs(values).max() < 2**53:
            values = values.astype(np.int64)
    return table.drop(target), values


def quoted(names: Iterable[str], limit: int = 8) -> str:
    """Write names for a message: quoted, with commas, the first ``limit`` of them."""
    names = list(names)
    shown = ", ".join(repr(str(name)) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _read_bundled(name: str) -> Table:
    if name not in BUNDLED:
        raise InputError(f"'sklearn:NAME' knows {', '.join(BUNDLED)}, got 'sklearn:{name}'.")
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name}")()
    names = tuple(str(feature) for feature in bunch.feature_names)
    columns = tuple(np.ascontiguousarray(column, dtype=np.float64) for column in bunch.data.T)
    kinds: list[Kind] = ["number"] * len(names)
    if name in ("iris", "wine", "breast_cancer"):
        target = np.array([str(bunch.target_names[code]) for code in bunch.target], dtype=object)
        return Table((*names, "target"), (*kinds, "category"), (*columns, target))
    return Table((*names, "target"), (*kinds, "number"), (*columns, bunch.target.astype(np.float64)))


def _read_parquet(path: Path) -> Table:
    import polars as pl

    try:
        with path.open("rb") as file:  # opened here, since polars takes no name that is not UTF-8
            about = pl.scan_parquet(file)
            rows, columns = about.select(pl.len()).collect().item(), len(about.collect_schema())
            _check_room(path, rows * columns * 8 + columns * _COLUMN_BYTES, free_memory())
            file.seek(0)
            frame = pl.read_parquet(file)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, MemoryError) as error:
        raise InputError(f"{str(path)!r} could not be read as Parquet: {_first_line(error)}") from error
    return _from_frame(nw.from_native(frame, eager_only=True))


def _read_text(path: Path, *, tabs: bool) -> Table:
    """Read a text file with a header line; polars cuts it into fields, kinds.py reads them."""
    import polars as pl

    try:
        with _open_text(path) as file:
            header = next((line for line in file if line.strip()), b"")
            # Rows do not tell: where semicolons separate, commas may be decimal.
            separator = "\t" if tabs else ";" if b";" in header and b"," not in header else ","
            _check_room(path, header.count(separator.encode()) * _COLUMN_BYTES, free_memory())
            file.seek(0)
            fields = pl.read_csv(file, separator=separator, has_header=False, infer_schema=False)
    except pl.exceptions.NoDataError as error:
        raise InputError(f"{str(path)!r} is empty; a header line and at least one row are needed.") from error
    except (
        pl.exceptions.PolarsError,
        pl.exceptions.PanicException,
        OSError,
        EOFError,
        zlib.error,
        MemoryError,
    ) as error:
        raise InputError(
            f"{str(path)!r} could not be read as a text table: {_first_line(error)}; it must be UTF-8 text with one "
            "header line and equally many fields in every line."
        ) from error
    names = ["" if name is None else name.strip() for name in fields.row(0)]
    rows = fields[1:]
    if fields.width > 1 and len(rows) and not any(field and field.strip() for field in rows.row(-1)):
        # Blank lines at the end (spreadsheets also write lines of nothing but separators) are no rows.
        filled = rows.select(pl.any_horizontal(pl.all().str.strip_chars() != "").fill_null(False))
        rows = rows[: max(filled.to_series().arg_true(), default=-1) + 1]
    return _checked(names, [_field(series) for series in rows])


def _open_text(path: Path) -> IO[bytes]:
    """Open a file, unpacked in memory where it is packed. Raises InputError where its fields would find no room."""
    free = free_memory()
    if not path.name.lower().endswith(".gz"):
        with path.open("rb") as file:
            _check_room(path, _text_bytes(path.stat().st_size, file.read(1 << 16)), free)
        return path.open("rb")
    text = io.BytesIO()
    with gzip.open(path, "rb") as packed:
        while part := packed.read(1 << 20):
            text.write(part)
            _check_room(path, _text_bytes(text.tell(), part), free)
    text.seek(0)
    return text


def _text_bytes(size: int, sample: bytes) -> int:
    """Estimate the memory that text of ``size`` bytes takes with its fields, from a part of it."""
    fields = sum(sample.count(mark) for mark in b",;\t\n")
    return size + size * fields * _FIELD_BYTES // max(1, len(sample))


def _check_room(path: Path, needed: int, free: int) -> None:
    if needed > free:
        raise InputError(
            f"{str(path)!r} needs about {size_words(needed)} of memory or more, and {size_words(free)} are free; "
            "leave out rows or columns, or read it where there is more."
        )


def _field(texts: Any) -> tuple[Kind, np.ndarray]:
    """Read a polars series of text as ``parse_text`` does, numbers in a long one 20 times faster."""
    import polars as pl

    if len(texts) <= _SHORT:
        return parse_text(texts.to_numpy())
    stripped = texts.str.strip_chars()
    missing = stripped.is_null() | stripped.is_in(sorted(MISSING_TEXT))
    numbers = stripped.set(missing, None).cast(pl.Float64, strict=False)
    if numbers.null_count() == missing.sum():
        return "number", np.array(numbers.to_numpy(), dtype=np.float64)
    return parse_text(texts.to_numpy())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:500]


def _from_frame(frame: "nw.DataFrame[Any]") -> Table:
    names = [str(name) for name in frame.columns]
    return _checked(names, [from_series(series) for series in frame.iter_columns()])


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip("- ")


def _from_array(X: Any) -> Table:
    array = X if isinstance(X, np.ndarray) else _rows_to_array(X)
    if array.dtype.names is not None:
        raise InputError("X is a structured array; pass a data frame, for example pandas.DataFrame(X).")
    if array.ndim != 2:
        raise InputError(f"X must be two-dimensional (rows, columns), got shape {array.shape}; {FLATTEN}.")
    names = [f"x{j}" for j in range(array.shape[1])]
    return _checked(names, [from_column(column, name) for column, name in zip(array.T, names)])


def _rows_to_array(X: Any) -> np.ndarray:
    """Return rows given as nested lists (values keep their types), or as another library's array."""
    if not isinstance(X, list | tuple):
        return np.asarray(X)
    if not all(isinstance(row, list | tuple | np.ndarray) for row in X):
        raise InputError("X must be two-dimensional: a list of rows, each a list of values.")
    if len({len(row) for row in X}) > 1:
        raise InputError("the rows of X must be equally long; fill the shorter ones with None.")
    return np.array(X, dtype=object)


def _checked(names: Sequence[str], columns: Sequence[tuple[Kind, np.ndarray]]) -> Table:
    """Build a table from the outside world: at least one row and column, distinct names, finite values."""
    if not columns:
        raise InputError("the table has no columns; at least one is needed.")
    if len(columns[0][1]) == 0:
        raise InputError("the table has no rows; at least one is needed.")
    repeated = sorted(name for name, times in Counter(names).items() if times > 1)
    if repeated:
        raise InputError(f"column names must differ, got more than one {quoted(repeated)}; rename them.")
    for name, (kind, values) in zip(names, columns):
        if kind != "category" and np.isinf(values).any():
            row = int(np.isinf(values).argmax())
            raise InputError(
                f"column {name!r} has an infinite value in row {row}; leave it empty (missing) or clip it."
            )
    return Table(tuple(names), tuple(kind for kind, _ in columns), tuple(values for _, values in columns))


_ODD = 0x9E3779B97F4A7C15 - 2**64
"""Multiplier of a hash of rows: the golden ratio's bits, of which splitmix64 makes streams."""


def tensor_names(X: Tensor) -> tuple[str, ...]:
    """Return the names of a tensor's columns, as for arrays: x0, x1, ..."""
    return tuple(f"x{j}" for j in range(X.shape[1]))


def checked_tensor(X: Tensor) -> Tensor:
    """Return a dense (n, D) tensor of finite or missing floats on its device; InputError for anything else.

    Integers become float64, half precision becomes float32.
    """
    if X.layout is not torch.strided:
        raise InputError("X is a sparse tensor, and only dense input is supported; pass X.to_dense().")
    if X.ndim != 2 or 0 in X.shape:
        shape = tuple(X.shape)
        raise InputError(
            f"X must be two-dimensional with at least one row and column, got shape {shape}; {FLATTEN}."
        )
    if X.is_complex():
        raise InputError(f"X must hold real numbers, got {X.dtype}; pass X.real and X.imag as columns.")
    X = X.detach()
    if not X.is_floating_point():
        return X.double()
    infinite = X.isinf().any(0).nonzero().flatten().tolist()
    if infinite:
        raise InputError(
            f"column 'x{infinite[0]}' has an infinite value; replace it by NaN (missing) or clip it."
        )
    return X.float() if X.dtype.itemsize < 4 else X


def fit_tensor_columns(X: Tensor, *, keep: bool = False) -> list[tuple[Column, tuple[str, ...]]]:
    """Decide as ``fit_column`` does for numbers; three numbers a column leave the device."""
    lost = X.isnan()
    low = torch.where(lost, torch.inf, X).amin(0)
    high = torch.where(lost, -torch.inf, X).amax(0)
    summary = torch.stack([low, high, lost.any(0).to(X.dtype)], dim=1).cpu().double().numpy()
    # Stand-in values with the same answers: the smallest, the largest, and a missing one where there is any.
    columns = [np.array([lo, hi, np.nan] if lost else [lo, hi]) for lo, hi, lost in summary]
    columns = [np.where(np.isinf(values), np.nan, values) for values in columns]
    return [
        fit_column(name, "number", values, max_levels=0, min_count=0, keep=keep)
        for name, values in zip(tensor_names(X), columns)
    ]


def tensor_moments(part: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and scale of the known values, each (D,), summed in float64 on the tensor's device.

    The scale is the standard deviation, or 1 where it is no more than a rounding error. Source: scikit-learn's
    StandardScaler.
    """
    lost = part.isnan()
    count = (~lost).sum(0).clamp(min=1)
    mean = part.nansum(0, dtype=torch.float64) / count
    gap = torch.where(lost, 0.0, part - mean.to(part.dtype))
    variance = gap.square().sum(0, dtype=torch.float64) / count
    eps = torch.finfo(torch.float64).eps
    constant = variance <= count * eps * variance + (count * mean * eps) ** 2
    scale = torch.where(constant, 1.0, variance.sqrt())
    return mean.cpu().numpy(), scale.cpu().numpy()


def first_equal(rows: Tensor) -> Tensor | None:
    """Return the position of the first row that equals each of the rows (n, D), (n,) int64; None where all differ.

    A matrix product computes a row by other instructions at the edge of a block than within it, so that equal rows
    may come out with unlike last bits; ``outputs[first_equal(rows)]`` are outputs in which they are equal.
    """
    bits = torch.int64 if rows.dtype == torch.float64 else torch.int32
    key = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for column in rows.T:
        key = (key ^ (column + 0.0).view(bits)) * _ODD  # + 0.0 makes 0.0 of -0.0, which is equal to it
        key = key ^ (key >> 29)
    group = torch.unique(key, return_inverse=True)[1]
    own = torch.arange(len(rows), device=rows.device)
    first = torch.full_like(own, len(rows)).scatter_reduce(0, group, own, "amin")[group]
    later = (first != own).nonzero().flatten()
    unlike = later[(rows[later] != rows[first[later]]).any(1)]  # with one key by chance
    first[unlike] = unlike
    return None if len(later) == len(unlike) else first
