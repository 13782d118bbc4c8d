"""Turn any description of a cross-validation into training and validation rows.

Also hold out rows before the cross-validation.
"""

import base64
import math
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from sklearn.model_selection import (
    GroupKFold,
    GroupShuffleSplit,
    KFold,
    ShuffleSplit,
    StratifiedGroupKFold,
    StratifiedKFold,
    StratifiedShuffleSplit,
    TimeSeriesSplit,
)
from torch import Tensor

from gputune.data.dataset import Rows
from gputune.data.kinds import parse_text, text_kind, text_of
from gputune.data.table import Table, quoted
from gputune.data.target import MAX_CLASSES, Target, refuse_identifier, refuse_missing
from gputune.ground.errors import InputError, Verbatim, option, per_interface, warn
from gputune.ground.seeding import stream_seed
from gputune.ground.text import count


@runtime_checkable
class Splitter(Protocol):
    """A cross-validation splitter of scikit-learn, such as KFold, or any object with the same
    ``split``."""

    def split(
        self, X: object, y: object = None, groups: object = None
    ) -> Iterable[tuple[object, object]]: ...


def make_folds(
    cv: object, target: Target, *, X: object = None, groups: object = None, seed: int
) -> list[Rows]:
    """Return the positions of the training and validation rows of each fold, as int64 arrays.

    Args:
        cv: a number of folds, a scikit-learn splitter, or an iterable of pairs of positions, masks
            or slices. A tuple (train, valid) is one pair. A number of folds is shuffled by
            ``seed``, stratified for classes, and does not split groups. Splitters and pairs are
            used unchanged.
        target: the checked target.
        X: the rows for a splitter. If it is None, the splitter receives zeros with the same number
            of rows.
        groups: the group of each row, (n,), or None.
        seed: the seed of the shuffle.

    Raises:
        InputError: ``cv`` is invalid, cannot split these rows, or splits a group.
    """
    groups = check_groups(groups, len(target), cv)
    n_rows = len(target)
    is_number = isinstance(cv, int | np.integer) and not isinstance(cv, bool)
    if is_number:
        n_folds = int(cast(int, cv))
        if _are_small_classes(target, n_folds):
            refuse_identifier(target)
        pairs = _split(_fold_splitter(n_folds, target, groups, seed), target, X, groups)
    elif isinstance(cv, Splitter) and not isinstance(cv, str):
        pairs = _split(cv, target, X, groups)
    elif isinstance(cv, tuple) and len(cv) == 2 and all(map(_selects_rows, cv)):
        pairs = [cv]
    elif isinstance(cv, Iterable) and not isinstance(cv, str):
        pairs = list(cv)
    else:
        raise InputError(
            "cv",
            "must be a number of folds, a scikit-learn splitter, 'time:5' or pairs of (train, "
            "valid) rows",
            got=cv,
        )
    if not pairs:
        raise InputError("cv", "must give at least one fold", got=Verbatim("none"))
    folds = []
    for f, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InputError(
                "cv",
                "must hold pairs of (train, valid) rows",
                got=Verbatim(f"{type(pair).__name__} for fold {f}"),
                remedy="For a single split, pass cv=(train, valid).",
            )
        train, valid = pair
        folds.append((_rows(train, n_rows, f, "training"), _rows(valid, n_rows, f, "validation")))
    if groups is not None:
        _refuse_split_groups(folds, groups, cv)
    shared = [f for f, (train, valid) in enumerate(folds) if np.isin(valid, train).any()]
    if shared:
        warn(
            f"{len(shared)} of {len(folds)} folds (the first is fold {shared[0]}) validate on "
            "rows that they train on, so their scores are too good."
        )
    if target.classes is not None:
        _warn_of_missing_classes(folds, target, target.classes, least=2 if is_number else 1)
    return folds


def _selects_rows(part: object) -> bool:
    """Return True if an object selects rows: a slice, or a sequence of positions or booleans."""
    if isinstance(part, str) or not isinstance(part, Iterable):
        return isinstance(part, slice)
    first: Any = next(iter(part), None)
    # A tuple of slices is a pair. np.ndim(slice) is 0, as for a position.
    return not isinstance(first, slice) and np.ndim(first) == 0


def _refuse_split_groups(folds: list[Rows], groups: np.ndarray, cv: object) -> None:
    """Raise InputError if a group has both training and validation rows in a fold.

    Splitters that ignore groups, such as KFold, and pairs of positions can split a group.
    """
    code_of: dict[object, int] = {}
    codes = np.array([code_of.setdefault(group, len(code_of)) for group in groups.tolist()])
    for f, (train, valid) in enumerate(folds):
        split = np.intersect1d(codes[train], codes[valid])
        if len(split):
            group = list(code_of)[split[0]]
            others = f" (and {len(split) - 1} more)" if len(split) > 1 else ""
            argument = "cv"
            if isinstance(cv, Splitter):
                argument = option("cv", Verbatim(f"{type(cv).__name__}(...)"))
            raise InputError(
                argument,
                f"must not split a group, but in fold {f} the group {group!r}{others} has training "
                "and validation rows",
                remedy="Pass a splitter for groups, such as GroupKFold, or a number of folds, or "
                f"leave out {option('groups')}.",
            )


def all_rows(n_rows: int) -> Rows:
    """Return one fold in which all rows are training rows, for training a model without
    validation."""
    return np.arange(n_rows, dtype=np.int64), np.empty(0, dtype=np.int64)


def check_groups(groups: object, n_rows: int, cv: object = None) -> np.ndarray | None:
    """Check the group of each row, and return the groups as an array (n,), or None without groups.

    Raises:
        InputError: the length is wrong, a value is missing, or ``cv`` splits by time.
    """
    if groups is None:
        return None
    values = groups.detach().cpu().numpy() if isinstance(groups, Tensor) else np.asarray(groups)
    if values.shape != (n_rows,):
        raise InputError(
            "groups",
            f"must have one value per row, shape ({n_rows},)",
            got=Verbatim(f"shape {values.shape}"),
        )
    refuse_missing(values, "groups", "Put each of these rows into a group of its own.")
    if n_rows > 1 and (values == values[0]).all():
        raise InputError(
            "groups",
            "must have at least two different values",
            got=Verbatim(f"only {_group_text(values[0])}"),
            remedy=f"Leave out {option('groups')}, or pass another column.",
        )
    if isinstance(cv, TimeSeriesSplit):
        raise InputError(
            "groups",
            "cannot be used with a time series split, which splits rows by their order",
            remedy=f"Leave out {option('groups')}, or set {option('cv')} to a number of folds.",
        )
    return values


def _group_text(value: object) -> str:
    """Return a group as text. A column of whole numbers in a file has the type float."""
    return repr(str(value)) if isinstance(value, str) else text_of(value)


def _fold_splitter(cv: int, target: Target, groups: np.ndarray | None, seed: int) -> Splitter:
    if cv < 2:
        raise InputError("cv", "must be at least 2 folds", got=cv)
    if cv > len(target):
        raise InputError("cv", f"must not be larger than the number of rows, {len(target)}", got=cv)
    n_groups = cv if groups is None else len(set(groups.tolist()))
    if cv > n_groups:
        which = per_interface(
            "the number of groups", "the number of groups in the rows without the held-out rows"
        )
        remedy = f"Use {option('cv', n_groups)}." if n_groups > 1 else ""
        rule = f"must not be larger than {which}, {n_groups}"
        raise InputError("cv", rule, got=cv, remedy=remedy)
    random_state = stream_seed(seed, "folds") % 2**32
    # scikit-learn stratifies only if a class has at least one row per fold.
    splitter: Callable[..., Splitter]
    if target.classes is None:
        splitter = KFold if groups is None else GroupKFold
    elif not _are_small_classes(target, cv):
        splitter = StratifiedKFold if groups is None else StratifiedGroupKFold
    elif groups is None:
        return _SpreadKFold(cv, seed)
    else:
        splitter = GroupKFold
    return splitter(cv, shuffle=True, random_state=random_state)


def _are_small_classes(target: Target, n_folds: int) -> bool:
    """Return True if a target has many classes, and none of them can have a row in each fold."""
    if target.classes is None or len(target.classes) <= MAX_CLASSES:
        return False
    return bool(np.bincount(target.values).max() < n_folds)


@dataclass(frozen=True)
class _SpreadKFold:
    """A splitter into shuffled folds of equal size, for targets with many small classes.

    The rows of each class are spread over the folds as evenly as possible.
    """

    n_splits: int
    seed: int

    def split(
        self, X: object, y: object = None, groups: object = None
    ) -> Iterable[tuple[object, object]]:
        del X, groups
        labels = np.asarray(y)
        rng = np.random.default_rng(stream_seed(self.seed, "folds"))
        # Classes in random order, and the rows of each class in random order. Consecutive rows go
        # to different folds.
        codes = np.unique(labels, return_inverse=True)[1]
        class_rank = rng.permutation(codes.max() + 1)[codes]
        order = np.lexsort((rng.permutation(len(labels)), class_rank))
        fold_of_row = np.empty(len(labels), dtype=np.int64)
        fold_of_row[order] = np.arange(len(labels)) % self.n_splits
        for fold in range(self.n_splits):
            yield np.flatnonzero(fold_of_row != fold), np.flatnonzero(fold_of_row == fold)


_STRATIFYING = (StratifiedKFold, StratifiedGroupKFold, _SpreadKFold)


def _split(
    splitter: Splitter, target: Target, X: object, groups: np.ndarray | None
) -> list[tuple[object, object]]:
    rows = np.zeros((len(target), 1)) if X is None else X
    try:
        with warnings.catch_warnings():
            # gputune reports both below: the first with the name of the class, the second as an
            # error if it splits a group.
            warnings.filterwarnings("ignore", message="The least populated class")
            warnings.filterwarnings("ignore", message="The groups parameter is ignored")
            pairs = [(train, valid) for train, valid in splitter.split(rows, target.labels, groups)]
    except (ValueError, TypeError) as error:
        if groups is None and "groups" in str(error):
            raise InputError(
                option("cv", splitter), f"splits by groups, so {option('groups')} is needed"
            ) from error
        cv: object = splitter
        if isinstance(splitter, KFold | GroupKFold | StratifiedKFold | StratifiedGroupKFold):
            cv = vars(splitter)["n_splits"]
        if isinstance(splitter, TimeSplit):
            raise splitter.too_many_folds(len(target)) from error
        raise InputError(
            option("cv", cv), f"cannot split these {len(target)} rows: {error}"
        ) from error
    if target.classes is not None and isinstance(splitter, _STRATIFYING):
        counts = np.bincount(target.values, minlength=target.n_outputs)
        rare = np.flatnonzero(counts < len(pairs))
        if len(rare):
            shown = ", ".join(f"{target.classes[k].item()!r} ({counts[k]})" for k in rare[:8])
            others = f" and {len(rare) - 8} more" if len(rare) > 8 else ""
            hint = f"; {target.override}" if target.override else ""
            warn(
                f"{target.name} has classes with fewer rows than the {len(pairs)} folds: "
                f"{shown}{others}. Some folds have no validation row of these classes{hint}."
            )
    return pairs


def _rows(part: object, n_rows: int, fold: int, use: str) -> np.ndarray:
    """Check the training or validation rows of a fold, and return their positions (m,), int64."""
    if isinstance(part, slice):
        part = np.arange(n_rows)[part]
    rows = np.asarray(part)
    if rows.size == 0:
        raise InputError(
            "cv", f"gives no {use} rows for fold {fold}", remedy="Use fewer folds or other groups."
        )
    if rows.ndim != 1 or rows.dtype.kind not in "biu":
        raise InputError(
            None,
            f"The {use} rows of fold {fold} must be positions or a mask",
            got=Verbatim(f"{rows.dtype} of shape {rows.shape}"),
        )
    if rows.dtype.kind == "b":
        if len(rows) != n_rows or not rows.any():
            raise InputError(
                None,
                f"The {use} mask of fold {fold} must have one value for each of the {n_rows} rows, "
                "and select at least one row",
                got=Verbatim(f"length {len(rows)} with {rows.sum()} selected"),
            )
        return np.flatnonzero(rows)
    for row in (rows.min(), rows.max()):
        if not 0 <= row < n_rows:
            raise InputError(
                None,
                f"The {use} rows of fold {fold} must lie in 0..{n_rows - 1}",
                got=row.item(),
            )
    return rows.astype(np.int64)


def _warn_of_missing_classes(
    folds: list[Rows], target: Target, classes: np.ndarray, least: int
) -> None:
    """Warn if a fold has no training row of some class with at least ``least`` rows."""
    counts = partial(np.bincount, minlength=len(classes))
    train_counts = np.array([counts(target.values[train]) for train, _ in folds])
    # (F, K)
    is_missing = (train_counts == 0) & (counts(target.values) >= least)
    lacking = np.flatnonzero(is_missing.any(1))
    if len(lacking):
        absent = classes[is_missing[lacking[0]]]
        warn(
            f"{len(lacking)} of {len(folds)} folds (the first is fold {lacking[0]}) train without "
            f"rows of a class ({', '.join(map(repr, absent[:8].tolist()))} in that fold), so their "
            "models cannot predict this class. Shuffle or stratify the folds, or leave out the rows "
            "of such classes."
        )


def hold_out(
    target: Target, *, test_size: float, groups: object = None, cv: object = None, seed: int
) -> Rows:
    """Split rows into search rows and held-out rows, and return their sorted positions (int64).

    The held-out rows are

    - the last rows, if ``cv`` is a TimeSeriesSplit. The ``gap`` rows before the held-out rows
      belong to neither part.
    - whole groups, if there are ``groups``. Then ``test_size`` is a share of the groups.
    - otherwise random rows, with each class in the same proportion in both parts.

    The row of a class with only one row is never held out.

    Args:
        target: the checked target.
        test_size: the share of rows to hold out, rounded up as in scikit-learn. 0 holds out no
            rows.
        groups: the group of each row, (n,), or None.
        cv: the cross-validation, as for ``make_folds``.
        seed: the seed of the random choice.

    Raises:
        InputError: ``test_size`` is not in [0, 1), or leaves too few rows.
    """
    if not isinstance(test_size, Real) or isinstance(test_size, bool) or not 0 <= test_size < 1:
        raise InputError(
            "test_size", "must be a share of the rows, at least 0 and below 1", got=test_size
        )
    n_rows = len(target)
    if test_size == 0:
        return all_rows(n_rows)
    n_test = math.ceil(test_size * n_rows)
    groups = check_groups(groups, n_rows, cv)
    random_state = stream_seed(seed, "hold out") % 2**32
    if isinstance(cv, TimeSeriesSplit):
        rows = rows_in_time(cv, n_rows)
        rest, test = rows[: n_rows - n_test - cv.gap], rows[n_rows - n_test :]
    elif groups is not None:
        n_groups = len(set(groups.tolist()))
        n_left = n_groups - math.ceil(test_size * n_groups)
        if n_left <= 0:
            raise _nothing_left(test_size, f"{n_groups} groups")
        if n_left == 1:
            smaller = "Use" if n_groups == 2 else "Use a smaller share, or"
            raise InputError(
                option("test_size", test_size),
                f"leaves only one of the {n_groups} groups for the search, but its folds need two",
                remedy=f"{smaller} {option('test_size', 0)}, which holds out no rows.",
            )
        by_group = GroupShuffleSplit(1, test_size=test_size, random_state=random_state)
        rest, test = next(by_group.split(groups, groups=groups))
    elif target.classes is not None:
        rest, test = _hold_out_classes(target, n_test, seed, random_state)
    elif n_test < n_rows:
        by_row = ShuffleSplit(1, test_size=n_test, random_state=random_state)
        rest, test = next(by_row.split(np.zeros(n_rows)))
    else:
        rest = test = np.empty(0)
    if len(rest) == 0:
        raise _nothing_left(test_size, f"{n_rows} rows")
    return np.sort(rest).astype(np.int64), np.sort(test).astype(np.int64)


def _nothing_left(test_size: float, units: str) -> InputError:
    rule = f"leaves none of the {units} to train on"
    return InputError(option("test_size", test_size), rule, remedy="Use a smaller share, or 0.")


def _hold_out_classes(
    target: Target, n_test: int, seed: int, random_state: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows for the search and the held-out rows of a target with classes.

    Each class has the same proportion in both parts.
    """
    counts = np.bincount(target.values, minlength=target.n_outputs)
    if (counts == 1).all():
        refuse_identifier(target)
        raise InputError(
            None,
            f"The target {target.name!r} has only one row for each of its {len(counts)} classes",
            remedy="Choose a different target, or set "
            f"{option('task', 'regression')} if it is a number.",
        )
    is_single = counts[target.values] == 1
    pool = np.flatnonzero(~is_single)
    try:
        by_class = StratifiedShuffleSplit(1, test_size=n_test, random_state=random_state)
        rest, test = next(by_class.split(pool, target.values[pool]))
    except ValueError as error:
        refuse_identifier(target)
        if min(len(counts), n_test) < MAX_CLASSES:
            n_classes = int((counts > 1).sum())
            raise InputError(
                "test_size",
                f"would hold out {n_test} of {len(target)} rows, so the {n_classes} classes cannot "
                "have the same proportions in both parts",
                remedy="Use a different share, or 0.",
            ) from error
        rest, test = _spread_apart(target.values[pool], n_test, seed)
    # The row of a class with only one row is never held out.
    return np.concatenate([pool[rest], np.flatnonzero(is_single)]), pool[test]


def _spread_apart(codes: np.ndarray, n_test: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose held-out rows if a target has more classes than the smaller part has rows.

    Returns the positions for the search and the held-out positions. The held-out rows cover as many
    classes as possible, and each class keeps a row for the search. If the classes have too few
    rows, fewer than ``n_test`` rows are held out.
    """
    rng = np.random.default_rng(stream_seed(seed, "hold out"))
    order = rng.permutation(len(codes))
    seen = np.zeros(codes.max() + 1, dtype=np.int64)
    rank = np.empty(len(codes), dtype=np.int64)  # of each row within its class
    for row in order:
        rank[row] = seen[codes[row]]
        seen[codes[row]] += 1
    spare = order[rank[order] > 0]  # the first row of each class stays
    test = spare[np.argsort(rank[spare], kind="stable")][:n_test]
    return np.setdiff1d(np.arange(len(codes)), test), test


def pack_folds(folds: Sequence[Rows]) -> list[list[str]]:
    """Compress the row positions of each fold to a pair of texts (train, valid), for a study file.

    Sorted positions take a few bits per row.
    """

    def pack(rows: np.ndarray) -> str:
        # Differences of sorted positions are small numbers, which zlib compresses well.
        steps = np.diff(np.asarray(rows, dtype="<i8"), prepend=0).astype("<i8")
        return base64.b64encode(zlib.compress(steps.tobytes())).decode()

    return [[pack(train), pack(valid)] for train, valid in folds]


def unpack_folds(packed: Sequence[Sequence[str]]) -> list[Rows]:
    """Return the row positions (int64, in their original order) from the texts of ``pack_folds``."""

    def unpack(text: str) -> np.ndarray:
        steps = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<i8")
        return np.cumsum(steps, dtype=np.int64)

    return [(unpack(train), unpack(valid)) for train, valid in packed]


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
