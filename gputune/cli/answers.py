"""Rows of a file with known targets, to score the predictions of a model."""

from functools import partial
from pathlib import Path

from gputune.data.array_files import ARRAY_SUFFIXES, pick_target
from gputune.data.columns import Layout
from gputune.data.files import line_of, read_table
from gputune.data.source import Source, read_source
from gputune.data.table import Table
from gputune.data.target import MissingTarget, check_target
from gputune.ground.errors import InputError
from gputune.study.model import TunedModel


def rows_with_target(
    model: TunedModel, file: str, target: str | None = None, missing_target: MissingTarget = "error"
) -> Source:
    """Return the rows of a file that have a known target value.

    Args:
        model: the model that will predict the rows.
        file: a table, or a file of arrays.
        target: the column or array with the targets. None: the target of the search.
        missing_target: "drop" leaves out rows without a target, "error" refuses them.

    Raises:
        InputError: the file lacks the target, or the target cannot be scored.
    """
    name = model.target if target is None else target
    if Path(file).suffix.lower() in ARRAY_SUFFIXES or not isinstance(model.layout, Layout):
        if target is None and Path(file).suffix.lower() == ".npy":
            remedy = f"Pass the .npy file with the true value for each row of {file!r}."
            raise InputError("--target", "is missing", remedy=remedy)
        source = _arrays_with_target(model, Path(file), name)
        source = source.with_target(missing_target, "row {}".format, is_column=False)
    else:
        table = _table_with_target(model, file, name)
        source = read_source(
            table, name, missing_target=missing_target, place=partial(line_of, file)
        )
    if model.classes is None:
        check_target(source.y, task=model.task, n_rows=len(source.X), name=name)
    return source


def _arrays_with_target(model: TunedModel, path: Path, name: str) -> Source:
    """Return the input arrays of a file and its target array.

    Raises InputError if the arrays have different lengths.
    """
    X = model._inputs(path)
    y = pick_target(path, name)
    if y.ndim == 0 or len(y) != len(X):
        raise InputError(
            None,
            f"{str(path)!r} has {len(X)} rows, but the target {name!r} has shape {y.shape}",
            remedy="Pass one true value for each row.",
        )
    return Source(X, y, name, None, None)


def _table_with_target(model: TunedModel, file: str, name: str) -> Table:
    """Return the table of a file, with its target column.

    Raises InputError if the table lacks the target column.
    """
    assert isinstance(model.layout, Layout)
    texts = [column.name for column in model.layout.columns if column.kind == "category"]
    # Labels stay text: "007" and "7" are two labels, but one number.
    labels = [name] if model.classes is not None and model.classes.dtype.kind == "U" else []
    used = {name, *(column.name for column in model.layout.columns)}
    table = read_table(file, [*texts, *labels], used.__contains__)
    if name not in table.names:
        raise InputError(
            None,
            f"{file!r} has no column {name!r} with true values",
            remedy="To predict rows without true values, use gputune predict.",
        )
    return table
