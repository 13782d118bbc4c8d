"""Read a table from a text file, a Parquet file or one of scikit-learn's data sets.

polars reads text and Parquet. gputune refuses a file that needs more memory than is free.
"""

import codecs
import csv
import gzip
import io
import os
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from gputune.data.kinds import MISSING_TEXT, Kind, file_remark, from_column, parse_text, texts_of
from gputune.data.table import Table, as_table, checked_table, every_column, quoted
from gputune.ground.errors import InputError, Verbatim
from gputune.ground.files import MISSING_TABLE, check_file, check_room, open_file
from gputune.ground.memory import free_memory
from gputune.ground.text import count, did_you_mean, is_number

if TYPE_CHECKING:
    import polars as pl

BUNDLED = ("iris", "digits", "wine", "breast_cancer", "diabetes")
"""The scikit-learn data sets that a user can name as ``sklearn:NAME``."""

# remedy for a file that does not exist
_FIELD_BYTES = 24  # of a short text and of its number
_TEXT_BYTES = 64  # of a Python str, without its letters
_COLUMN_BYTES = 4096  # of a column of any length
_LONGEST_NAME = 1000  # characters of a column name, so that messages stay short
_SHORT = 500  # rows up to which Python reads a column faster than polars


def read_table(
    source: str | Path,
    kinds: Collection[str] = (),
    is_used: Callable[[str], bool] = every_column,
) -> Table:
    """Read a table from a .csv, .tsv (also .gz) or .parquet file, or from ``sklearn:NAME``.

    - Empty fields and the texts of ``MISSING_TEXT`` are missing values.
    - Blanks around a field, empty lines at the end and blank lines above the header are dropped.
    - A header with semicolons and without commas means that semicolons separate all fields.
    - A scikit-learn data set has its target in the column ``target``: class names for iris, wine
      and breast_cancer, integers for digits, a numeric value for diabetes.

    Args:
        source: the path of the file, or ``sklearn:NAME``.
        kinds: names of columns of a text file that stay text, as written, for ``Table.read_as``.
        is_used: tells by name which columns are read later. The other columns may have infinite
            values. If they are nested, they become missing values.
    """
    if str(source).startswith("sklearn:"):
        return _read_bundled_table(str(source).removeprefix("sklearn:"))
    path = Path(source)
    if os.path.isdir(path):  # Path.is_dir raises an error for a name that is too long
        # Only the first 1000 files are looked at, since a folder may be large.
        files = islice(path.rglob("*"), 1000)
        if any(file.suffix.lower() in _IMAGES for file in files):
            raise InputError(None, f"{str(source)!r} is a folder of images", remedy=_IMAGES_REMEDY)
    check_file(path, missing=MISSING_TABLE)
    if path.suffix.lower() == ".parquet":
        return as_table(_read_parquet(path, is_used), is_used)
    if _text_suffix(path):
        names, fields, separator = _read_fields(path)
        columns = [_column(series, as_text=name in kinds) for name, series in zip(names, fields)]
        table = checked_table(
            names, columns, typed=kinds, is_used=is_used, thousands=separator != ";"
        )
        remarks = {}
        for name, kind, texts in zip(names, table.kinds, fields):
            if name not in kinds:
                remarks[name] = file_remark(kind, texts)
        return table.with_readings(remarks)
    raise InputError(
        None,
        "A table is read from a .csv, .tsv (also .gz) or .parquet file",
        got=str(source),
        remedy=_IMAGES_REMEDY if path.suffix.lower() in _IMAGES else "Convert it first.",
    )


def read_columns(source: str | Path, names: Sequence[str]) -> list[list[object]]:
    """Return columns of a table file by name, with text as written in the file.

    Raises:
        InputError: the file lacks a column.
    """
    path = Path(source)
    values: dict[str, Iterable[object]] = {}
    if not str(source).startswith("sklearn:"):
        check_file(path, missing=MISSING_TABLE)
    if _text_suffix(path):
        file_names, fields, _ = _read_fields(path)
        values = dict(zip(file_names, fields))
    elif path.suffix.lower() == ".parquet":
        values.update(_read_parquet(path, {*names}.__contains__).to_dict())
    else:
        table = read_table(source)
        values = dict(zip(table.names, table.columns))
    columns = []
    for name in names:
        if name not in values:
            known = f"The columns of {str(source)!r} are {quoted(values)}."
            raise InputError(
                None,
                f"--keep names no column {name!r}",
                remedy=f"{known}{did_you_mean(name, values)}",
            )
        columns.append(["" if value is None else value for value in values[name]])
    return columns


_IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp")
_IMAGES_REMEDY = (
    "In Python, pass a Dataset such as torchvision.datasets.ImageFolder(folder, transform) as X. "
    "Or write the images into one file, numpy.savez('images.npz', image=X, label=y), where X has "
    "the axes (rows, channels, height, width), and use a module as the model."
)


def _read_parquet(path: Path, is_used: Callable[[str], bool]) -> "pl.DataFrame":
    """Return a Parquet file as a polars DataFrame.

    Raises:
        InputError: memory cannot hold the columns, or a column that is used is nested.
    """
    import polars as pl

    if check_file(path) == 0:
        raise InputError(None, f"{str(path)!r} is empty", remedy="Write the table again.")
    # polars receives an open file, because it takes no path that is not UTF-8.
    with _read_errors(path, "Parquet"), open_file(path) as file:
        lazy_frame = pl.scan_parquet(file)
        schema = lazy_frame.collect_schema()
        n_rows = lazy_frame.select(pl.len()).collect().item()
        check_room(path, n_rows * len(schema) * 8 + len(schema) * _COLUMN_BYTES)
        nested = []
        for name, dtype in schema.items():
            if not dtype.is_nested() and dtype not in (pl.Binary, pl.Object):
                continue
            nested.append(name)
            if is_used(name):
                raise InputError(
                    None,
                    f"Column {name!r} of {str(path)!r} holds {dtype}, not single values",
                    remedy="Write columns of numbers, text or dates instead, or leave out the "
                    "column.",
                )
        file.seek(0)
        frame = pl.read_parquet(file, columns=[name for name in schema if name not in nested])
        nulls = [pl.lit(None).alias(name) for name in nested]
        frame = frame.with_columns(nulls).select(schema.names())
    # A few bytes can encode many equal texts, and each text becomes a Python object.
    texts = [column for column in frame if column.dtype == pl.String]
    letters = sum(int(column.str.len_bytes().sum()) for column in texts)
    check_room(path, letters + n_rows * len(texts) * _TEXT_BYTES)
    return frame


def _read_bundled_table(name: str) -> Table:
    if name not in BUNDLED:
        raise InputError(
            None,
            f"The data sets of scikit-learn are sklearn:{', sklearn:'.join(BUNDLED)}",
            got=f"sklearn:{name}",
        )
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name}")()
    names = [*map(str, bunch.feature_names), "target"]
    columns = [from_column(np.ascontiguousarray(column), "") for column in bunch.data.T]
    target = bunch.target
    if name in ("iris", "wine", "breast_cancer"):
        target = bunch.target_names.astype(str).astype(object)[target]
    return checked_table(names, [*columns, from_column(target, "target")])


@contextmanager
def _read_errors(path: Path, form: str, remedy: str = "") -> Iterator[None]:
    """Inside a ``with`` block, turn polars' errors about a damaged or wrong file into an
    InputError.

    The message contains the first line of the original error. ``form`` names the expected format.
    """
    from polars import exceptions

    failures = (
        exceptions.PolarsError,
        exceptions.PanicException,
        OSError,
        EOFError,
        zlib.error,
        MemoryError,
    )
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except exceptions.NoDataError as error:
        raise InputError(
            None, f"{str(path)!r} is empty", remedy="Write a header line and at least one row."
        ) from error
    except failures as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:500]
        raise InputError(
            None, f"{str(path)!r} could not be read as {form}: {reason}", remedy=remedy
        ) from error


def _text_suffix(path: Path) -> str:
    """Return ".csv" or ".tsv" for a text file, which may end in .gz, and "" for any other file."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in (".csv", ".tsv") else ""


def _read_fields(path: Path) -> "tuple[list[str], pl.DataFrame, str]":
    """Return the column names from the header line of a text file, the fields below as text, and
    the separator of the fields."""
    import polars as pl

    remedy = "Write UTF-8 text with one header line and the same number of fields in each line."
    with _read_errors(path, "a text table", remedy):
        header, separator, n_blank = _header(path)
        check_room(path, header.count(separator.encode()) * _COLUMN_BYTES)
        try:
            with _open_text(path) as file:  # opened again: older polars read on from here
                fields = pl.read_csv(
                    file,
                    separator=separator,
                    has_header=False,
                    infer_schema=False,
                    skip_rows=n_blank,
                )
        except pl.exceptions.ComputeError:
            _check_lines(path, separator)
            raise
    # polars fills short lines with nulls.
    if fields.width > 1 and fields.to_series(-1).null_count():
        _check_lines(path, separator)
    names = ["" if name is None else name.strip() for name in fields.row(0)]
    no_names = f"The first line of {str(path)!r} must hold the names of the columns"
    remedy = "Write a line with the column names above the first line."
    longest = max(map(len, names))
    if longest > _LONGEST_NAME:
        raise InputError(
            None, no_names, got=Verbatim(f"a field of {longest} characters"), remedy=remedy
        )
    numbers = [name for name in names if is_number(name)]  # integers, such as years, may be names
    has_decimals = any(not name.lstrip("-").isdecimal() for name in numbers)
    if has_decimals and len(numbers) * 2 >= len(names):
        raise InputError(None, no_names, got=Verbatim(quoted(numbers, 3)), remedy=remedy)
    rows = fields[1:]
    if len(rows) and not any(field and field.strip() for field in rows.row(-1)):
        # Blank lines at the end are not rows. Spreadsheets also write lines that hold only
        # separators.
        is_filled = pl.any_horizontal(pl.all().str.strip_chars() != "")
        if fields.width == 1:
            # The line "" is a missing value, as pandas and polars write it in one column.
            is_filled = is_filled | (pl.first() == "")
        filled = rows.select(is_filled.fill_null(False))
        rows = rows[: max(filled.to_series().arg_true(), default=-1) + 1]
    return names, rows, separator


def _check_lines(path: Path, separator: str) -> None:
    """Raise InputError for the first line that has more or fewer fields than the header line.

    The message contains the line number.
    """
    width = 0
    for line, fields in _lines(path, separator):
        width = width or len(fields)
        if len(fields) != width and any(field.strip() for field in fields):
            n_fields = count(len(fields), "field")
            raise InputError(
                None,
                f"{str(path)!r} has {n_fields} in line {line}, but {width} in its header line",
                remedy="Write the same number of fields in each line.",
            )


def _lines(path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number (from 1) and the list of fields for each line of a text file.

    The first line is the header, so blank lines above it are skipped. Any other empty line is a row
    without values. The iteration ends before a field that is too long for the csv module. An
    unmatched quotation mark causes such a field.
    """
    with _open_text(path) as file, suppress(csv.Error):
        lines = io.TextIOWrapper(file, "utf-8", errors="replace", newline="")
        reader = csv.reader(lines, delimiter=separator)
        is_above = True
        for fields in reader:
            is_above = is_above and len(fields) < 2 and not "".join(fields).strip()
            if not is_above:
                yield reader.line_num, fields


def line_of(source: str | Path, row: int) -> str:
    """Return the place of a row in a table file for messages, such as "line 12".

    For a text file the place is a line number. For any other file it is a row number, from 0.
    """
    path = Path(source)
    if not _text_suffix(path):
        return f"row {row}"
    separator = _header(path)[1]
    # The header is the line before row 0.
    lines = islice(_lines(path, separator), row + 1, None)
    line, _ = next(lines, (row + 2, []))
    return f"line {line}"


def _header(path: Path) -> tuple[bytes, str, int]:
    """Return the header line, the separator of its fields, and the number of blank lines above.

    Only the header line decides the separator, because commas in rows may be decimal commas.
    """
    with _open_text(path) as file:
        lines = ((n_blank, line) for n_blank, line in enumerate(file) if line.strip())
        n_blank, header = next(lines, (0, b""))
    commas = ";" if b";" in header and b"," not in header else ","
    return header, "\t" if _text_suffix(path) == ".tsv" else commas, n_blank


def _open_text(path: Path) -> IO[bytes]:
    """Open a text file for reading bytes. A .gz file is decompressed in memory.

    Raises:
        InputError: memory cannot hold the fields, the encoding is not UTF-8, or the bytes are not
            text.
    """
    free = free_memory()

    def check(size: int, sample: bytes) -> None:
        # The text and its fields both take memory. A sample gives the number of fields per byte.
        fields = sum(sample.count(mark) for mark in b",;\t\n")
        check_room(path, size + size * fields * _FIELD_BYTES // max(1, len(sample)), free)

    if not path.name.lower().endswith(".gz"):
        with open_file(path) as file:
            sample = file.read(1 << 16)
        _check_encoding(path, sample)
        check(path.stat().st_size, sample)
        return open_file(path)
    check_room(path, check_file(path), free)
    text = io.BytesIO()
    with open_file(path) as file, gzip.open(file, "rb") as packed:
        while part := packed.read(1 << 20):
            if text.tell() == 0:
                _check_encoding(path, part[: 1 << 16])
            text.write(part)
            check(text.tell(), part)
    text.seek(0)
    return text


_BYTE_ORDER_MARKS = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def _check_encoding(path: Path, sample: bytes) -> None:
    """Raise InputError if the first bytes of a file show UTF-16, UTF-32 or a binary file."""
    remedy = "Save the file as UTF-8, which Excel calls 'CSV UTF-8'."
    for mark, encoding in _BYTE_ORDER_MARKS:
        if sample.startswith(mark):
            raise InputError(
                None, f"{str(path)!r} is text in {encoding}, but gputune reads UTF-8", remedy=remedy
            )
    if b"\0" in sample:
        raise InputError(
            None,
            f"{str(path)!r} is not a text table, because it has bytes of value 0",
            remedy="If the file is text in UTF-16, save the file as UTF-8.",
        )


def _column(texts: "pl.Series", *, as_text: bool) -> tuple[Kind, np.ndarray]:
    """Return the kind and the values of a column of text, like ``parse_text``, but faster.

    Numbers in a long column are read 20x faster than by ``parse_text``. With ``as_text``, the
    column stays text.
    """
    import polars as pl

    if as_text:
        return "category", texts_of(texts.to_numpy())
    if len(texts) <= _SHORT:
        return parse_text(texts.to_numpy())
    stripped = texts.str.strip_chars()
    missing = stripped.is_null() | stripped.is_in(sorted(MISSING_TEXT))
    numbers = stripped.set(missing, None).cast(pl.Float64, strict=False)
    if numbers.null_count() != missing.sum():
        return parse_text(texts.to_numpy())
    return "number", np.array(numbers.to_numpy(), dtype=np.float64)
