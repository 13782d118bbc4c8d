"""Where the rows of a study come from, so that a study opened later reads the same ones, which
their digest proves."""

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
from gputune.data.columns import checked_tensor
from gputune.data.files import line_of, read_table
from gputune.data.folds import check_groups, hold_out, parse_cv
from gputune.data.kinds import Kind, checked_labels
from gputune.data.missing_target import MissingTarget, rows_with_target, select_targets
from gputune.data.ragged import refuse_ragged
from gputune.data.table import (
    Table,
    as_rows,
    as_table,
    quoted,
    refuse_lists,
    refuse_loader,
    select_rows,
    split_target,
)
from gputune.data.target import Target, TaskWord, check_target, target_array
from gputune.data.torch_dataset import read_dataset
from gputune.errors import InputError
from gputune.input_files import check_room
from gputune.text import did_you_mean
from gputune.types import Json


def fingerprint(X: Table | Tensor | Arrays, y: Target | Tensor | np.ndarray) -> dict[str, object]:
    """Return ``rows``, ``columns`` and ``sha256``, the hex digest of X's names, kinds and values
    and of y's.

    Equal values in an array, a frame or a file of the same names and kinds give the same digest; a
    tensor has its own, which depends on its dtype.
    """
    digest = hashlib.sha256()

    def add(values: Tensor) -> None:
        # Bytes, since NumPy has no bfloat16.
        digest.update(values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    if isinstance(X, Arrays):
        for part, label in enumerate(X.labels):
            digest.update(
                f"{label} {(len(X), *X.parts[part].shape[1:])} {X.parts[part].dtype}".encode()
            )
            for _, block in X.blocks(part):
                add(block)
        rows = len(X)
        columns = len(X.parts)
    elif isinstance(X, Tensor):
        digest.update(f"{tuple(X.shape)} {X.dtype}".encode())
        add(X)
        rows, columns = X.shape
    else:
        digest.update(json.dumps([X.names, X.kinds]).encode())
        for column in X.columns:
            _add(digest, column)
        rows = len(X)
        columns = len(X.names)
    _add(
        digest,
        y.labels if isinstance(y, Target) else y.numpy(force=True) if isinstance(y, Tensor) else y,
    )
    return {"rows": rows, "columns": columns, "sha256": digest.hexdigest()}


def table_size(sizes: Json, origin: Json | None) -> dict[str, int]:
    """Return the rows and columns of a fingerprint; of a table that was cut, the rows that are held
    out count too."""
    return {"rows": (origin or {}).get("rows", sizes["rows"]), "columns": sizes["columns"]}


def rows_difference(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """Return what differs between the rows of a study and those that were ``found``, by their
    numbers."""
    counts = [
        f"{before[n]} {n} then, {now[n]} now" for n in ("rows", "columns") if before[n] != now[n]
    ]
    return "; ".join(counts) or f"{before['rows']} rows then and now, of other names or values"


def _add(digest: "hashlib._Hash", values: np.ndarray) -> None:
    """Add numbers, booleans or text (None = missing) of any length, so that no two lists look
    alike."""
    if values.dtype.kind in "OU":
        # One JSON text, since it keeps "a", "b" apart from "ab", and None from "None".
        digest.update(json.dumps(values.tolist()).encode())
        return
    numbers = values.astype(np.float64) + 0.0  # -0.0 becomes 0.0
    numbers[np.isnan(numbers)] = np.nan  # NaN has many bit patterns
    digest.update(f"{len(numbers)} numbers".encode())
    digest.update(numbers.data)


def digest_of(*arrays: np.ndarray) -> str:
    """Return the SHA-256, in hex, of arrays: their shapes, types and contents."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape} {array.dtype.str};".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Source:
    """Inputs and target as they were given: a table, or a tensor that stays where it lies.

    ``origin`` is what reads the same rows again (path, target, groups, how rows were held out and
    which), None for data in memory; ``original`` the frame, array or list that X was made of, None
    for files and tensors.
    """

    X: Table | Tensor | Arrays
    y: Any
    target: str
    groups: object
    origin: Json | None
    original: object = None
    kept: np.ndarray | None = None
    """Positions of the rows among those that were given; None where no row was left out for a
    missing target."""
    n_given: int = 0
    is_task_guessed: bool = False
    """Whether the task was chosen from all rows of a file, and not by the user."""

    @property
    def n_dropped(self) -> int:
        """How many rows were left out because their target is missing."""
        return 0 if self.kept is None else self.n_given - len(self.kept)

    def with_target(
        self, missing_target: MissingTarget, place: Callable[[int], str], *, of_table: bool
    ) -> "Source":
        """Return the rows that have a target. Raises InputError for missing targets unless they are
        to be dropped."""
        kept = rows_with_target(self.y, self.target, missing_target, place)
        if kept is None:
            return self
        groups = check_groups(self.groups, len(self.X))
        X = self.X[kept] if isinstance(self.X, Tensor) else self.X.select(kept)
        y = select_targets(self.y, kept, of_table=of_table)
        groups = None if groups is None else groups[kept]
        original = self.original
        if hasattr(original, "columns") or isinstance(original, np.ndarray):
            original = select_rows(original, kept)
        elif original is not None:  # a list
            original = [original[row] for row in kept]  # type: ignore[index]
        return replace(
            self, X=X, y=y, groups=groups, original=original, kept=kept, n_given=len(self.X)
        )

    def original_rows(self) -> object:
        """Return the rows of X as the user knows them: the frame or array that was given, a polars
        frame of a file.

        Without the columns of target and groups; a list and a tensor are an array.
        """
        if isinstance(self.X, Arrays):
            return self.X
        if isinstance(self.X, Tensor):
            return self.X.cpu().numpy()
        return self.X.frame() if self.original is None else as_rows(self.original, self.X.names)

    def rows(self, positions: np.ndarray) -> "Source":
        X = self.X[positions] if isinstance(self.X, Tensor) else self.X.select(positions)
        groups = None if self.groups is None else np.asarray(self.groups)[positions]
        y = self.y if isinstance(self.y, np.ndarray | Tensor) else np.asarray(self.y)
        return replace(self, X=X, y=y[positions], groups=groups, original=None)


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
    """Return the rows of X, as ``_read_source`` does, without those whose target is missing if they
    are to be dropped.

    A file remembers that in its ``origin``. ``place`` says in errors where a row stands. Raises
    InputError for a missing target that is not to be dropped.
    """
    source = _read_source(X, y, groups, module=module, drop=drop, kinds=kinds)
    of_table = isinstance(y, str) and isinstance(source.X, Table)
    if place is None:
        place = partial(line_of, X) if of_table and isinstance(X, str | Path) else "row {}".format
    source = source.with_target(missing_target, place, of_table=of_table)
    if missing_target == "drop" and source.origin is not None:
        source = replace(source, origin={**source.origin, "missing_target": missing_target})
    return source


def _read_source(
    X: object,
    y: object = None,
    groups: object = None,
    *,
    module: bool = False,
    drop: Sequence[str] = (),
    kinds: Mapping[str, Kind] | None = None,
) -> Source:
    """Return the rows of X: a file, ``sklearn:NAME``, a frame, an array or a tensor; y is an array,
    or a column's name.

    So is ``groups``. For a ``module`` X may be what ``as_arrays`` takes, or a Dataset of torch's.
    The columns ``drop`` of a table are left out, those of ``kinds`` are read as they say.
    """
    kinds = kinds or {}
    if isinstance(X, str | Path):
        if Path(X).suffix.lower() not in ARRAY_SUFFIXES:
            return _read_table_file(X, y, groups, drop, kinds)
        _refuse_columns(drop, kinds)
        return _read_arrays(Path(X), y, groups, module=module)
    for name, value in (("X", X), ("y", y), ("groups", groups)):
        refuse_ragged(value, name)
    refuse_loader(X)
    if module and isinstance(X, Dataset):
        X, y = read_dataset(X, y)
    if y is None:
        alone = "; a loss of X alone, as of an autoencoder, takes y=X and task='custom'" * module
        raise InputError(
            f"y is missing: pass the target as an array, or the name of its column in X{alone}."
        )
    shape = tuple(X.shape) if isinstance(X, np.ndarray | Tensor) else ()
    if not module and len(shape) > 2:
        sequences = ", model='gru' for sequences" * (len(shape) == 3)
        remedy = (
            f"choose model='cnn' for images{sequences}, or a module of your own; or pass "
            "X.reshape(len(X), -1)"
        )
        raise InputError(
            f"X has rows of shape {shape[1:]}, and the model takes tables, of two axes: {remedy}."
        )
    arrays: Arrays | Tensor | None = as_arrays(X) if module else None
    if arrays is None and isinstance(X, Tensor):
        arrays = checked_tensor(X)
    if arrays is not None:
        _refuse_columns(drop, kinds)
        if isinstance(y, str) or isinstance(groups, str):
            got = f"got y={y!r}, groups={groups!r:.40}; pass the values themselves"
            raise InputError(f"y and groups must be arrays when X is a tensor or arrays, {got}.")
        return Source(arrays, y, "y", groups, None)
    if module:
        refuse_lists(X)
    return _source_of(
        as_table(X), y, groups, drop, kinds, original=None if isinstance(X, Table) else X
    )


def _read_table_file(
    X: str | Path, y: object, groups: object, drop: Sequence[str], kinds: Mapping[str, Kind]
) -> Source:
    """Return the table of a file, whose target and groups are columns of it; of scikit-learn's sets
    "target"."""
    of_sklearn = str(X).startswith("sklearn:")
    y = "target" if of_sklearn and y is None else y
    source = _source_of(read_table(X, kinds), y, groups, drop, kinds)
    if not isinstance(y, str):
        raise InputError(
            f"y must name the target column of the file {str(X)!r}, got {type(y).__name__}."
        )
    path = str(X) if of_sklearn else str(Path(X).resolve())
    column = groups if isinstance(groups, str) else None
    asked = {name: value for name, value in (("drop", list(drop)), ("kinds", dict(kinds))) if value}
    return replace(source, origin={"path": path, "target": y, "groups": column, **asked})


def _source_of(
    table: Table,
    y: object,
    groups: object,
    drop: Sequence[str],
    kinds: Mapping[str, Kind],
    original: object = None,
) -> Source:
    """Return a table with target and groups, which may be names of its columns, that are read and
    dropped as asked."""
    for argument, names in (("drop", drop), ("kinds", kinds)):
        for name in names:
            if name not in table.names:
                known = (
                    "the columns of the table are "
                    f"{quoted(table.names)}.{did_you_mean(name, table.names)}"
                )
                raise InputError(f"{argument} has {name!r}, and {known}")
    kept = {name for name in (y, groups) if isinstance(name, str)}
    if lost := [name for name in drop if name in kept]:
        raise InputError(
            f"drop has {lost[0]!r}, which is the target or the groups; name other columns."
        )
    if drop and not {*table.names} - {*drop} - kept:
        raise InputError(
            f"drop must leave a column to predict from, got {quoted(drop)}; name fewer columns."
        )
    table = table.read_as(kinds).drop(*drop)
    if isinstance(groups, str):
        if isinstance(y, str) and groups == y:
            raise InputError(f"groups and the target must be two columns, got {groups!r} for both.")
        if groups not in table.names:
            raise InputError(
                f"groups={groups!r} is not a column of the table; the columns are "
                f"{quoted(table.names)}."
            )
        if len(table.names) == 1:
            raise InputError(
                f"groups={groups!r} is the only column of the table; there is nothing to predict "
                "from."
            )
        table, groups = table.drop(groups), table.column(groups)
    if not isinstance(y, str):
        return Source(table, y, "y", groups, None, original)
    # the table has text alone where a frame had both
    if hasattr(original, "columns") and y in table.names:
        checked_labels(target_array(as_rows(original, [y]), y).ravel(), y)
    return Source(*split_target(table, y), y, groups, None, original)


def _refuse_columns(drop: Sequence[str], kinds: Mapping[str, Kind]) -> None:
    for name, value in (("drop", list(drop)), ("kinds", dict(kinds))):
        if value:
            raise InputError(
                f"{name} is for tables, whose columns have names, got {value!r}; leave {name} out."
            )


def _read_arrays(path: Path, y: Any, groups: Any, *, module: bool) -> Source:
    """Return the arrays of a file, of which ``y`` names the target, or those of .npy files."""
    X, target, of_groups = pick_arrays(path, y, groups)
    if module and isinstance(X, np.ndarray) and X.ndim == 2 and X.dtype.kind in "iu":
        X = (X,)  # token ids, as an integer tensor of two axes is
    if isinstance(X, np.ndarray | Tensor) and X.ndim <= 2:
        # Such an array becomes a table, with numbers of double precision. Others stay mapped.
        check_room(path, 8 * math.prod(X.shape))
    source = _read_source(X, target, of_groups, module=module)
    if path.suffix.lower() == ".npy":
        y, groups = (None if of is None else str(Path(of).resolve()) for of in (y, groups))
    origin = {"path": str(path.resolve()), "target": y, "groups": groups}
    return replace(
        source,
        target=Path(y).stem if path.suffix.lower() == ".npy" else y,
        origin=origin,
        original=None,
    )


def read_again(origin: Json, *, module: bool = False) -> Source:
    """Return the rows that a study was searched on, without those it held out."""
    return read_apart(origin, module=module)[0]


def read_apart(origin: Json, *, module: bool = False) -> tuple[Source, Source | None]:
    """Return the rows that a study was searched on, and those that it held out, if it did."""
    columns = {name: origin[name] for name in ("drop", "kinds") if name in origin}
    missing_target = origin.get("missing_target", "error")
    source = read_source(
        origin["path"],
        origin["target"],
        origin["groups"],
        module=module,
        missing_target=missing_target,
        **columns,
    )
    if "test_size" not in origin:
        return source, None
    target = check_target(source.y, task=origin["task"], n_rows=len(source.X), name=source.target)
    return set_apart(source, target, **{k: origin[k] for k in ("test_size", "cv", "seed")})


def set_apart(
    source: Source, target: Target, *, test_size: float, cv: str, seed: int
) -> tuple[Source, Source | None]:
    """Split rows into those to search on and those held out, as ``hold_out`` does; None for
    ``test_size=0``."""
    rest, test = hold_out(
        target, test_size=test_size, groups=source.groups, cv=parse_cv(cv), seed=seed
    )
    # Once for all rows: the part of them that stays may have fewer distinct values.
    task = "classification" if target.classes is not None else cast(TaskWord, target.task)
    how = {"test_size": test_size, "cv": cv, "seed": seed, "task": task, "rows": len(source.X)}
    origin = None if source.origin is None else {**source.origin, **how}
    if len(test) == 0:
        return replace(source, origin=origin), None
    apart = source.rows(test)
    if origin is not None:
        origin["held_out"] = fingerprint(apart.X, apart.y)
    return replace(source.rows(rest), origin=origin), apart
