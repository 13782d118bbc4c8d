"""Files become a table: text and Parquet by polars, scikit-learn's sets by name, none that memory does not hold.

Or arrays: files of NumPy's and torch's, of which nothing is unpickled.
"""

import csv
import gzip
import io
import pickle
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gputune.data.kinds import MISSING_TEXT, Kind, from_column, parse_text, texts_of
from gputune.data.table import Table, as_table, checked_table, quoted
from gputune.errors import InputError
from gputune.memory import free_memory
from gputune.text import count, did_you_mean, is_number, size_words

if TYPE_CHECKING:
    import polars as pl

BUNDLED = ("iris", "digits", "wine", "breast_cancer", "diabetes")
"""scikit-learn's data sets that ``sklearn:NAME`` reads."""

_FIELD_BYTES = 24  # of a short text and of the number that it is read as
_COLUMN_BYTES = 4096  # of a column, however short it is
_SHORT = 500  # rows up to which Python reads a column sooner than polars


def read_table(source: str | Path, kinds: Collection[str] = ()) -> Table:
    """Read a .csv, .tsv (also .gz) or .parquet file, or one of scikit-learn's sets as ``sklearn:NAME``.

    The columns of a text file that ``kinds`` names stay text, as they are written, for ``Table.read_as``. A bundled set
    has its target in the column ``target``: class names for iris, wine and breast_cancer, integers for digits, a number
    for diabetes. Empty fields and the texts of ``MISSING_TEXT`` are missing values; blanks around a field and empty
    lines at the end are dropped; a header with semicolons and no comma means semicolons throughout.
    """
    if str(source).startswith("sklearn:"):
        return _read_bundled_table(str(source).removeprefix("sklearn:"))
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {str(source)!r}; give a CSV or Parquet file or 'sklearn:iris'.")
    if path.is_dir():
        files = (path for path, _ in zip(path.rglob("*"), range(1000)))  # a large folder is not gone through
        of_images = any(path.suffix.lower() in _IMAGES for path in files)
        raise InputError(f"{str(source)!r} is a folder; {_OF_IMAGES if of_images else 'give the file in it'}.")
    if not path.is_file():  # a pipe would be waited for, a device has no end
        raise InputError(f"{str(source)!r} is a pipe or a device and no file; write its rows into a file first.")
    if path.suffix.lower() == ".parquet":
        import polars as pl

        with _read_errors(path, "Parquet"), path.open("rb") as file:  # polars takes no name that is not UTF-8
            about = pl.scan_parquet(file)
            rows, width = about.select(pl.len()).collect().item(), len(about.collect_schema())
            _check_room(path, rows * width * 8 + width * _COLUMN_BYTES, free_memory())
            file.seek(0)
            frame = pl.read_parquet(file)
        return as_table(frame)
    if _text_suffix(path):
        names, fields = _read_fields(path)
        columns = [_column(series, as_text=name in kinds) for name, series in zip(names, fields)]
        return checked_table(names, columns, typed=kinds)
    remedy = _OF_IMAGES if path.suffix.lower() in _IMAGES else "convert it first"
    raise InputError(f"a table is read from .csv, .tsv (also .gz) or .parquet, got {str(source)!r}; {remedy}.")


def read_columns(source: str | Path, names: Sequence[str]) -> list[list[object]]:
    """Return columns of a file that ``read_table`` reads, text as it is written. Raises InputError for one it lacks."""
    import polars as pl

    path, values = Path(source), dict[str, Iterable[object]]()
    if _text_suffix(path):
        values = dict(zip(*_read_fields(path)))
    elif path.suffix.lower() == ".parquet":
        with path.open("rb") as file:
            values.update(pl.read_parquet(file).to_dict())
    else:
        table = read_table(source)
        values = dict(zip(table.names, table.columns))
    for name in names:
        if name not in values:
            known = f"and the columns of {str(source)!r} are {quoted(values)}.{did_you_mean(name, values)}"
            raise InputError(f"--keep has {name!r}, {known}")
    return [["" if value is None else value for value in values[name]] for name in names]


_IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp")
_OF_IMAGES = (
    "images go in as one array: in Python pass a Dataset such as torchvision.datasets.ImageFolder(folder, transform) "
    "as X, or write numpy.savez('images.npz', image=X, label=y) with X (rows, channels, height, width), for a module"
)


def _read_bundled_table(name: str) -> Table:
    if name not in BUNDLED:
        raise InputError(f"'sklearn:NAME' knows {', '.join(BUNDLED)}, got 'sklearn:{name}'.")
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name}")()
    names = [*map(str, bunch.feature_names), "target"]
    columns = [from_column(np.ascontiguousarray(column), "") for column in bunch.data.T]
    named = name in ("iris", "wine", "breast_cancer")
    target = bunch.target_names.astype(str).astype(object)[bunch.target] if named else bunch.target
    return checked_table(names, [*columns, from_column(target, "target")])


@contextmanager
def _read_errors(path: Path, form: str, rule: str = "") -> Iterator[None]:
    """Raise InputError, with the first line of what the reader says, for a file that is damaged or of another form."""
    from polars import exceptions

    failures = exceptions.PolarsError, exceptions.PanicException, OSError, EOFError, zlib.error, MemoryError
    try:
        yield
    except exceptions.NoDataError as error:
        raise InputError(f"{str(path)!r} is empty; a header line and at least one row are needed.") from error
    except failures as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:500]
        raise InputError(f"{str(path)!r} could not be read as {form}: {reason}{rule}") from error


def _text_suffix(path: Path) -> str:
    """Return .csv or .tsv for a text file, which may be packed; "" for another one."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in (".csv", ".tsv") else ""


def _read_fields(path: Path) -> "tuple[list[str], pl.DataFrame]":
    """Return the names in the header line, and the fields below it, as text."""
    import polars as pl

    rule = "; it must be UTF-8 text with one header line and equally many fields in every line."
    with _read_errors(path, "a text table", rule):
        header, separator = _header(path)
        _check_room(path, header.count(separator.encode()) * _COLUMN_BYTES, free_memory())
        try:
            with _open_text(path) as file:  # anew: older polars go on where the system has read to
                fields = pl.read_csv(file, separator=separator, has_header=False, infer_schema=False)
        except pl.exceptions.ComputeError:
            _check_lines(path, separator)
            raise
    if fields.width > 1 and fields.to_series(-1).null_count():  # polars fills up a line that is too short
        _check_lines(path, separator)
    names = ["" if name is None else name.strip() for name in fields.row(0)]
    numbers = [name for name in names if is_number(name)]  # whole ones, such as years, may be names
    if any(not name.lstrip("-").isdecimal() for name in numbers) and len(numbers) * 2 >= len(names):
        raise InputError(
            f"{str(path)!r} has {quoted(numbers, 3)} in its first line, where the names of the columns are due; write "
            "a line of names above it."
        )
    rows = fields[1:]
    if fields.width > 1 and len(rows) and not any(field and field.strip() for field in rows.row(-1)):
        # Blank lines at the end (spreadsheets also write lines of nothing but separators) are no rows.
        filled = rows.select(pl.any_horizontal(pl.all().str.strip_chars() != "").fill_null(False))
        rows = rows[: max(filled.to_series().arg_true(), default=-1) + 1]
    return names, rows


def _check_lines(path: Path, separator: str) -> None:
    """Raise InputError, with its number, for the first line that has more or fewer fields than the header line."""
    width = 0
    for line, fields in _lines(path, separator):
        width = width or len(fields)
        if len(fields) != width and any(field.strip() for field in fields):
            why = f"and {width} in its header line; write equally many in every line"
            raise InputError(f"{str(path)!r} has {count(len(fields), 'field')} in line {line}, {why}.")


def _lines(path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number, from 1, and the fields of each line of a text file; an empty one is a row without values."""
    with _open_text(path) as file:
        lines = io.TextIOWrapper(file, "utf-8", errors="replace", newline="")
        reader = csv.reader(lines, delimiter=separator)
        yield from ((reader.line_num, fields) for fields in reader)


def line_of(source: str | Path, row: int) -> str:
    """Return where a row of a file that ``read_table`` read stands: its line in a text file, else its number."""
    path = Path(source)
    if not _text_suffix(path):
        return f"row {row}"
    below = (line for n, (line, _) in enumerate(_lines(path, _header(path)[1])) if n == row + 1)
    return f"line {next(below, row + 2)}"


def _header(path: Path) -> tuple[bytes, str]:
    """Return the header line and what separates its fields; in rows, commas may be decimal."""
    with _open_text(path) as file:
        header = next((line for line in file if line.strip()), b"")
    commas = ";" if b";" in header and b"," not in header else ","
    return header, "\t" if _text_suffix(path) == ".tsv" else commas


def _open_text(path: Path) -> IO[bytes]:
    """Open a file, unpacked in memory where it is packed. Raises InputError where its fields would find no room."""
    free = free_memory()

    def check(size: int, sample: bytes) -> None:
        # The text takes memory, and so do its fields: as many as in a part of it.
        fields = sum(sample.count(mark) for mark in b",;\t\n")
        _check_room(path, size + size * fields * _FIELD_BYTES // max(1, len(sample)), free)

    if not path.name.lower().endswith(".gz"):
        with path.open("rb") as file:
            check(path.stat().st_size, file.read(1 << 16))
        return path.open("rb")
    text = io.BytesIO()
    with gzip.open(path, "rb") as packed:
        while part := packed.read(1 << 20):
            text.write(part)
            check(text.tell(), part)
    text.seek(0)
    return text


def _check_room(path: Path, needed: int, free: int) -> None:
    if needed > free:
        why = f"and {size_words(free)} are free; leave out rows or columns, or read it where there is more"
        raise InputError(f"{str(path)!r} needs about {size_words(needed)} of memory or more, {why}.")


def _column(texts: "pl.Series", *, as_text: bool) -> tuple[Kind, np.ndarray]:
    """Read a polars series of text as ``parse_text`` does, numbers in a long one 20 times faster."""
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


ARRAY_SUFFIXES = (".npz", ".npy", ".pt", ".pth")
_WRITE = "write it with numpy.savez(path, image=X, label=y), or torch.save of a dict of tensors"


def read_array_file(path: Path) -> dict[str, object]:
    """Return the arrays of a file by their names: of .npz, of a .pt that holds a dict of tensors; of .npy one, "".

    That of .npy is mapped, so that its rows are read where they are gathered.
    """
    if path.is_dir():
        raise InputError(f"{str(path)!r} is a folder; give the file in it.")
    try:
        if path.suffix == ".npy":
            return {"": np.load(path, mmap_mode="r", allow_pickle=False)}
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        arrays = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        why = f"which is not unpickled since that may run code; {_WRITE}"
        raise InputError(f"{str(path)!r} holds more than tensors, {why}.") from error
    except (FileNotFoundError, PermissionError):
        raise
    except (ValueError, RuntimeError, EOFError, OSError, zipfile.BadZipFile) as error:
        writer = "torch.save" if path.suffix in (".pt", ".pth") else "NumPy"
        reason = f"it is damaged, or was not written by {writer}"
        if str(error).startswith("Object arrays"):
            reason = "it holds Python objects, such as rows of unlike shapes, which are not unpickled"
        elif path.stat().st_size == 0:
            reason = "it is empty"
        raise InputError(f"{str(path)!r} cannot be read as arrays: {reason}; {_WRITE}.") from error
    if not isinstance(arrays, dict) or not all(isinstance(value, Tensor) for value in arrays.values()):
        remedy = "save one, for example torch.save({'image': X, 'label': y}, path)"
        raise InputError(f"{str(path)!r} must hold a dict of tensors, got {type(arrays).__name__}; {remedy}.")
    return {str(name): value for name, value in arrays.items()}


def pick_arrays(path: Path, y: Any, groups: Any) -> tuple[object, object, object]:
    """Return X, y and groups of a file; ``y`` and ``groups`` name arrays in it, or beside a .npy are files of it.

    X is a dict where more than one array is left. Raises InputError for other names, and where nothing is left.
    """
    values = read_array_file(path)
    if path.suffix == ".npy":
        return values[""], _beside(path, "y", y), None if groups is None else _beside(path, "groups", groups)
    for argument, name in (("target", y), ("groups", groups)):
        if not (isinstance(name, str) and name in values) and not (argument == "groups" and name is None):
            known = f"which are {quoted(values)}" if values else "and it holds none"
            got = repr(name) if isinstance(name, str | None) else f"an object of type {type(name).__name__}"
            raise InputError(f"{argument}={got} is none of the arrays of {str(path)!r}, {known}; name one of them.")
    target, of_groups = values.pop(y), None if groups is None else np.asarray(values.pop(groups))
    if not values:
        raise InputError(f"{str(path)!r} holds no array but the target {y!r}; there is nothing to predict it from.")
    return values if len(values) > 1 else next(iter(values.values())), target, of_groups


def _beside(path: Path, option: str, name: object) -> np.ndarray:
    """Return the array of the .npy file ``name``."""
    if not isinstance(name, str | Path) or Path(name).suffix != ".npy":
        got = f"got {name!r:.60}; or write both into one file, numpy.savez(path, image=X, label=y)"
        raise InputError(f"{option} must be a .npy file too, with one value a row of {str(path)!r}, {got}.")
    if not Path(name).exists():
        raise InputError(f"{option}: there is no file {str(name)!r}; give the .npy file of {option}.")
    return np.array(read_array_file(Path(name))[""])
