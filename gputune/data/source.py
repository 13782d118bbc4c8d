"""Read the rows of a study, X and y, and record how to read the same rows again.

A study that you open later reads the same file again. A digest (SHA-256) proves that the rows have
not changed.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gputune.data.array_files import ARRAY_SUFFIXES, pick_arrays
from gputune.data.arrays import Arrays, as_arrays
from gputune.data.columns import AnyRows, checked_tensor
from gputune.data.containers import LABELS, read_dataset, refuse_lists, refuse_loader, refuse_ragged
from gputune.data.files import line_of, read_table
from gputune.data.folds import check_groups, hold_out, in_time_order, parse_cv
from gputune.data.kinds import Kind, checked_labels
from gputune.data.table import (
    Table,
    as_rows,
    as_table,
    quoted,
    refuse_no_target,
    select_rows,
    split_target,
)
from gputune.data.target import (
    MissingTarget,
    Target,
    TaskWord,
    check_target,
    rows_with_target,
    select_targets,
    select_values,
    target_array,
)
from gputune.ground.errors import InputError, Verbatim, option, per_interface
from gputune.ground.files import check_room
from gputune.ground.text import did_you_mean
from gputune.ground.types import Json


def fingerprint(X: AnyRows, y: Target | Tensor | np.ndarray) -> dict[str, object]:
    """Return the number of rows and columns of X, and a SHA-256 digest of X and y.

    The result is a dict with the keys ``rows``, ``columns`` and ``sha256``.

    The digest, in hex, covers X's names, kinds and values, and y. Equal values in an array, a data
    frame or a file with the same names and kinds give the same digest. A tensor has a different
    digest, which depends on its dtype.
    """
    digest = hashlib.sha256()

    if isinstance(X, Arrays):
        columns = len(X.parts)
        for part, (label, x) in enumerate(zip(X.labels, X.parts)):
            digest.update(f"{label} {(len(X), *x.shape[1:])} {x.dtype}".encode())
            for _, block in X.blocks(part):
                digest.update(bytes_of(block))
    elif isinstance(X, Tensor):
        columns = X.shape[1]
        digest.update(f"{tuple(X.shape)} {X.dtype}".encode())
        digest.update(bytes_of(X))
    else:
        columns = len(X.names)
        digest.update(json.dumps([X.names, X.kinds]).encode())
        for column in X.columns:
            _add(digest, column)
    if isinstance(y, Target):
        y = y.labels
    elif isinstance(y, Tensor):
        y = y.numpy(force=True)
    _add(digest, y)
    return {"rows": len(X), "columns": columns, "sha256": digest.hexdigest()}


def bytes_of(values: Tensor) -> memoryview:
    # As bytes, because NumPy has no bfloat16.
    return values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def table_size(sizes: Json, origin: Json | None) -> dict[str, int]:
    """Return the number of rows and columns of a study's data, including held-out rows.

    ``sizes`` is a result of ``fingerprint``.
    """
    return {"rows": (origin or {}).get("rows", sizes["rows"]), "columns": sizes["columns"]}


def rows_difference(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """Return a text for an error: how a study's rows differ from the current rows.

    For example, "150 rows then, 140 now".
    """
    different = [noun for noun in ("rows", "columns") if before[noun] != now[noun]]
    if not different:
        return f"{before['rows']} rows then and now, with different names or values"
    return "; ".join(f"{before[noun]} {noun} then, {now[noun]} now" for noun in different)


def _add(digest: "hashlib._Hash", values: np.ndarray) -> None:
    """Add an array's values to a digest. The values are numbers, booleans or text (None = missing).

    Different lists of values always add different bytes.
    """
    if values.dtype.kind in "OU":
        # JSON keeps "a", "b" apart from "ab", and None apart from "None".
        digest.update(json.dumps(values.tolist()).encode())
        return
    numbers = values.astype(np.float64) + 0.0  # -0.0 becomes 0.0
    numbers[np.isnan(numbers)] = np.nan  # NaN has many bit patterns
    digest.update(f"{len(numbers)} numbers".encode())
    digest.update(numbers.data)


def digest_of(*arrays: np.ndarray) -> str:
    """Return a SHA-256 digest, in hex, of some arrays: their shapes, types and contents."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape} {array.dtype.str};".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Source:
    """The X, y and groups of a search, as the user passed them and before scaling.

    X is a table, arrays, or a tensor that stays on its device. ``origin`` describes how to read the
    same rows again: path, target, groups, and the held-out rows. It is None for data in memory.
    ``original`` is the data frame, array or list from which X was made. It is None for files and
    tensors. ``group_column`` is the column of the table that held the groups, or "".
    """

    X: AnyRows
    y: Any
    target: str
    groups: object
    origin: Json | None
    original: object = None
    group_column: str = ""
    positions: np.ndarray | None = None
    """The positions in the user's X of the rows that have a target, or None if no target is
    missing."""
    n_given: int = 0
    is_task_guessed: bool = False
    """True if gputune chose the task from all rows of a file, and the user did not choose it."""

    @property
    def n_dropped(self) -> int:
        """The number of rows that gputune left out because their target is missing."""
        return 0 if self.positions is None else self.n_given - len(self.positions)

    def with_target(
        self, missing_target: MissingTarget, place: Callable[[int], str], *, is_column: bool
    ) -> "Source":
        """Return the source with only the rows that have a target.

        ``is_column`` means that y is a column of X.

        Raises:
            InputError: a target is missing, and ``missing_target`` is not "drop".
        """
        remark = self.X.missing_remark(self.target) if isinstance(self.X, Table) else ""
        positions = rows_with_target(self.y, self.target, missing_target, place, remark)
        if positions is None:
            return self
        groups = check_groups(self.groups, len(self.X))
        original = self.original
        if hasattr(original, "columns") or isinstance(original, np.ndarray):
            original = select_rows(original, positions)
        elif original is not None:  # a list
            original = [original[row] for row in positions]  # type: ignore[index]
        return replace(
            self,
            X=_select(self.X, positions),
            y=select_targets(self.y, positions, is_column=is_column),
            groups=select_values(groups, positions),
            original=original,
            positions=positions,
            n_given=len(self.X),
        )

    def original_rows(self) -> object:
        """Return the rows of X in the user's own type, without the columns of target and groups.

        The result is the data frame or array that the user passed, or a polars DataFrame for a
        file. A list or a tensor becomes an array.
        """
        if isinstance(self.X, Arrays):
            return self.X
        if isinstance(self.X, Tensor):
            return self.X.cpu().numpy()
        return self.X.frame() if self.original is None else as_rows(self.original, self.X.names)

    def rows(self, positions: np.ndarray) -> "Source":
        return replace(
            self,
            X=_select(self.X, positions),
            y=select_values(self.y, positions),
            groups=select_values(self.groups, positions),
            original=None,
        )


def _select(X: AnyRows, positions: np.ndarray) -> AnyRows:
    return X[positions] if isinstance(X, Tensor) else X.select(positions)


def read_source(
    X: object,
    y: object = None,
    groups: object = None,
    *,
    module: bool = False,
    drop: Sequence[str] = (),
    kinds: Mapping[str, Kind] | None = None,
    missing_target: MissingTarget = "error",
    place: Callable[[int], str] | None = None,
) -> Source:
    """Read X, y and groups from a file or from objects in memory, as the rows of a search.

    Rows with a missing target raise an error, or are dropped with ``missing_target="drop"``. The
    ``origin`` of a file records that rows were dropped.

    Args:
        X: a file, ``sklearn:NAME``, a data frame, an array or a tensor. For a ``module`` it may
            also be inputs that ``as_arrays`` takes, or a torch Dataset.
        y: the target as an array, or the name of its column.
        groups: the groups as an array, or the name of their column.
        module: True if a module takes the rows, and not a table model.
        drop: columns of a table to leave out.
        kinds: the kinds of columns of a table, by name.
        missing_target: "drop", or "error" to refuse missing targets.
        place: returns the place of a row as text, for errors.

    Raises:
        InputError: a target is missing, and ``missing_target`` is "error".
    """
    kinds = kinds or {}
    if not isinstance(X, str | Path):
        source = _read_values(X, y, groups, drop, kinds, module=module)
    elif Path(X).suffix.lower() in ARRAY_SUFFIXES:
        _refuse_columns(drop, kinds)
        source = _read_arrays(Path(X), y, groups, module=module)
    else:
        source = _read_table_file(X, y, groups, drop, kinds)
    is_column = isinstance(y, str) and isinstance(source.X, Table)
    if place is None:
        is_file = is_column and isinstance(X, str | Path)
        place = partial(line_of, cast(str, X)) if is_file else "row {}".format
    source = source.with_target(missing_target, place, is_column=is_column)
    if isinstance(groups, str) and isinstance(source.X, Table):
        source = replace(source, group_column=groups)
    if missing_target == "drop" and source.origin is not None:
        source = replace(source, origin={**source.origin, "missing_target": missing_target})
    return source


def _read_values(
    X: object,
    y: object,
    groups: object,
    drop: Sequence[str],
    kinds: Mapping[str, Kind],
    *,
    module: bool,
) -> Source:
    """Return the source for X in memory: a data frame, an array, a tensor or a torch Dataset."""
    for name, value in (("X", X), ("y", y), ("groups", groups)):
        refuse_ragged(value, name)
    refuse_loader(X)
    if module and isinstance(X, Dataset):
        X, y = read_dataset(X, y)
    if module and isinstance(X, list) and X and isinstance(X[0], Mapping):
        raise InputError(
            "X",
            "is a list of dicts",
            remedy="Pass a torch Dataset whose items are these dicts, or a dict with one tensor for "
            "each input.",
        )
    if y is None:
        remedy = "Pass the target as an array, or the name of its column in X."
        if isinstance(X, Mapping) and LABELS in X:
            remedy = f"Take it out of X: labels = X.pop({LABELS!r}), and pass y=labels."
        elif module:
            remedy = (
                f"{remedy} If the loss reads only X, as for an autoencoder, pass y=X and "
                f"{option('task', 'custom')}."
            )
        raise InputError("y", "is missing", remedy=remedy)
    shape = tuple(X.shape) if isinstance(X, np.ndarray | Tensor) else ()
    if not module and len(shape) > 2:
        sequences = f" {option('model', 'gru')} for sequences," if len(shape) == 3 else ""
        table = per_interface(
            "pass X.reshape(len(X), -1)", "write the file again with X.reshape(len(X), -1)"
        )
        raise InputError(
            "X",
            f"has rows of shape {shape[1:]}, but the model takes tables (rows, columns)",
            remedy=f"Choose {option('model', 'cnn')} for images,{sequences} or a custom module. Or "
            f"{table}.",
        )
    arrays: Arrays | Tensor | None = as_arrays(X) if module else None
    if arrays is None and isinstance(X, Tensor):
        arrays = checked_tensor(X)
    if arrays is not None:
        _refuse_columns(drop, kinds)
        if isinstance(y, str) or isinstance(groups, str):
            raise InputError(
                None,
                "y and groups must be arrays if X is a tensor or arrays",
                got=Verbatim(f"y={y!r}, groups={groups!r:.40}"),
                remedy="Pass the values, not their names.",
            )
        return Source(arrays, y, "y", groups, None)
    if module:
        refuse_lists(X)
    original = None if isinstance(X, Table) else X
    return _source_of(as_table(X, lambda name: name not in drop), y, groups, drop, kinds, original)


def _read_table_file(
    X: str | Path, y: object, groups: object, drop: Sequence[str], kinds: Mapping[str, Kind]
) -> Source:
    """Return the source for a table file, in which the target and the groups are columns.

    The default target of a scikit-learn data set is "target".
    """
    is_bundled = str(X).startswith("sklearn:")
    if is_bundled and y is None:
        y = "target"
    table = read_table(X, kinds, lambda name: name not in drop)
    if y is None:
        refuse_no_target(str(X), "column", table.names)
    source = _source_of(table, y, groups, drop, kinds)
    if not isinstance(y, str):
        raise InputError(
            "y",
            f"must name the target column of the file {str(X)!r}",
            got=Verbatim(f"a {type(y).__name__}"),
        )
    origin: dict[str, object] = {
        "path": str(X) if is_bundled else str(Path(X).resolve()),
        "target": y,
        "groups": groups if isinstance(groups, str) else None,
    }
    # Left out when unset, so that older studies keep their digest.
    if drop:
        origin["drop"] = list(drop)
    if kinds:
        origin["kinds"] = dict(kinds)
    return replace(source, origin=origin)


def _source_of(
    table: Table,
    y: object,
    groups: object,
    drop: Sequence[str],
    kinds: Mapping[str, Kind],
    original: object = None,
) -> Source:
    """Return the source for a table, without the columns ``drop`` and with the column kinds
    ``kinds``.

    Target and groups may be names of columns of the table.
    """
    known = f"The columns are {quoted(table.names)}."
    for argument, names in (("drop", drop), ("kinds", kinds)):
        for name in names:
            if name not in table.names:
                raise InputError(
                    argument,
                    "must name columns of the table",
                    got=name,
                    remedy=f"{known}{did_you_mean(name, table.names)}",
                )
    used = {name for name in (y, groups) if isinstance(name, str)}
    for name in drop:
        if name in used:
            raise InputError("drop", "must not name the target or the groups", got=name)
    if drop and not {*table.names} - {*drop} - used:
        raise InputError(
            "drop",
            "must leave at least one column to predict from",
            got=Verbatim(quoted(drop)),
            remedy="Name fewer columns.",
        )
    table = table.read_as(kinds).drop(*drop)
    if isinstance(groups, str):
        if isinstance(y, str) and groups == y:
            raise InputError("groups", "must not be the column of the target", got=groups)
        if groups not in table.names:
            raise InputError("groups", "must be a column of the table", got=groups, remedy=known)
        if len(table.names) == 1:
            raise InputError(
                option("groups", groups),
                "is the only column of the table",
                remedy="Add columns to predict the target from.",
            )
        table, groups = table.take_out(groups)
    if not isinstance(y, str):
        return Source(table, y, "y", groups, None, original)
    # The table holds only text if the data frame column mixed text and numbers.
    if hasattr(original, "columns") and y in table.names:
        checked_labels(target_array(as_rows(original, [y]), y).ravel(), y)
    return Source(*split_target(table, y), y, groups, None, original)


def _refuse_columns(drop: Sequence[str], kinds: Mapping[str, Kind]) -> None:
    for name, value in (("drop", list(drop)), ("kinds", dict(kinds))):
        if value:
            raise InputError(
                name,
                "is only for tables, because their columns have names",
                got=value,
                remedy=f"Leave out {option(name)}.",
            )


def _read_arrays(path: Path, y: Any, groups: Any, *, module: bool) -> Source:
    """Return the source for a file of arrays.

    ``y`` is the name of the target array in the file, or the path of another .npy file.
    """
    X, target, group_values = pick_arrays(path, y, groups)
    if module and isinstance(X, np.ndarray) and X.ndim == 2 and X.dtype.kind in "iu":
        X = (X,)  # token ids, like an integer tensor with two axes
    if isinstance(X, np.ndarray | Tensor) and X.ndim <= 2:
        # Such an array becomes a table in double precision. Other arrays stay memory-mapped.
        check_room(path, 8 * math.prod(X.shape))
    source = _read_values(X, target, group_values, (), {}, module=module)
    name = y
    if path.suffix.lower() == ".npy":
        name = Path(y).stem
        y = str(Path(y).resolve())
        groups = None if groups is None else str(Path(groups).resolve())
    origin = {"path": str(path.resolve()), "target": y, "groups": groups}
    return replace(source, target=name, origin=origin, original=None)


def read_again(origin: Json, *, module: bool = False) -> Source:
    """Read the rows of a study again from their file or data set, without the held-out rows."""
    return read_with_held_out(origin, module=module)[0]


def read_with_held_out(origin: Json, *, module: bool = False) -> tuple[Source, Source | None]:
    """Read the rows of a study again from their file or data set.

    Returns the rows of the search, and the held-out rows or None.
    """
    source = read_source(
        origin["path"],
        origin["target"],
        origin["groups"],
        module=module,
        drop=origin.get("drop", ()),
        kinds=origin.get("kinds"),
        missing_target=origin.get("missing_target", "error"),
    )
    if "test_size" not in origin:
        return source, None
    target = check_target(source.y, task=origin["task"], n_rows=len(source.X), name=source.target)
    return split_held_out(
        source, target, test_size=origin["test_size"], cv=origin["cv"], seed=origin["seed"]
    )


def split_held_out(
    source: Source, target: Target, *, test_size: float, cv: str, seed: int
) -> tuple[Source, Source | None]:
    """Split a source into the rows of the search and the held-out rows, by ``hold_out``.

    With ``test_size=0`` the second result is None.
    """
    splitter = in_time_order(parse_cv(cv), source.X)
    rest, test = hold_out(target, test_size=test_size, groups=source.groups, cv=splitter, seed=seed)
    # The task is chosen once from all rows: the remaining rows may have fewer distinct values.
    task = "classification" if target.classes is not None else cast(TaskWord, target.task)
    split = {"test_size": test_size, "cv": cv, "seed": seed, "task": task, "rows": len(source.X)}
    origin = None if source.origin is None else {**source.origin, **split}
    if len(test) == 0:
        return replace(source, origin=origin), None
    held_out = source.rows(test)
    if origin is not None:
        origin["held_out"] = fingerprint(held_out.X, held_out.y)
    return replace(source.rows(rest), origin=origin), held_out
