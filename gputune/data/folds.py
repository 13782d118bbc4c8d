"""Turn any description of a cross-validation into training and validation rows.

Also hold out rows before the cross-validation.
"""

import base64
import math
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Protocol, runtime_checkable

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
from gputune.data.target import MAX_CLASSES, Target, refuse_missing
from gputune.errors import InputError, warn
from gputune.seeding import stream_seed


@runtime_checkable
class Splitter(Protocol):
    """A CV splitter in the sense of scikit-learn."""

    def split(
        self, X: object, y: object = None, groups: object = None
    ) -> Iterable[tuple[object, object]]: ...


def make_folds(
    cv: object, target: Target, *, X: object = None, groups: object = None, seed: int
) -> list[Rows]:
    """Return the row positions (train, valid) of each fold, int64.

    Args:
        cv: a number of folds, a scikit-learn splitter, or an iterable of pairs of positions, masks
            or slices. A number of folds is shuffled by ``seed``, stratified for classes, and keeps
            groups whole. Splitters and pairs are used unchanged.
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
    if (
        isinstance(cv, int | np.integer)
        and not isinstance(cv, bool)
        and _are_small_classes(target, int(cv))
    ):
        refuse_identifier(target)
    if isinstance(cv, int | np.integer) and not isinstance(cv, bool):
        pairs = _split(_fold_splitter(int(cv), target, groups, seed), target, X, groups)
    elif isinstance(cv, Splitter) and not isinstance(cv, str):
        pairs = _split(cv, target, X, groups)
    elif isinstance(cv, Iterable) and not isinstance(cv, str):
        pairs = list(cv)
    else:
        kinds = "a number of folds, a splitter of scikit-learn or pairs of (train, valid) rows"
        raise InputError(f"cv must be {kinds}, got {cv!r}.")
    if not pairs:
        raise InputError("cv must give at least one fold, got none.")
    folds = []
    for f, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            got = f"got {type(pair).__name__} for fold {f}; one split is cv=[(train, valid)]"
            raise InputError(f"cv must hold pairs of (train, valid) rows, {got}.")
        folds.append(
            (_rows(pair[0], n_rows, f, "training"), _rows(pair[1], n_rows, f, "validation"))
        )
    if groups is not None:
        _refuse_split_groups(folds, groups, cv)
    if shared := [f for f, (train, valid) in enumerate(folds) if np.isin(valid, train).any()]:
        warn(
            f"{len(shared)} of {len(folds)} folds (the first is fold {shared[0]}) validate on "
            "rows that they train on, so their scores are too good."
        )
    if target.classes is not None:
        _warn_of_missing_classes(
            folds, target, target.classes, least=2 if isinstance(cv, int | np.integer) else 1
        )
    return folds


def _refuse_split_groups(folds: list[Rows], groups: np.ndarray, cv: object) -> None:
    """Raise InputError if a group has rows on both sides of a fold.

    Splitters of rows, and pairs, ignore groups.
    """
    known: dict[object, int] = {}
    codes = np.array([known.setdefault(group, len(known)) for group in groups.tolist()])
    for f, (train, valid) in enumerate(folds):
        if len(both := np.intersect1d(codes[train], codes[valid])):
            more = f" (and {len(both) - 1} more)" * (len(both) > 1)
            what = (
                f"cv={type(cv).__name__}(...)"
                if isinstance(cv, Splitter)
                else "the (train, valid) rows of cv"
            )
            raise InputError(
                f"groups are not kept whole by {what}: in fold {f} the group "
                f"{[*known][both[0]]!r}{more} is among the training and the validation rows; give "
                "a splitter that keeps them, such as GroupKFold, or a number of folds, or leave "
                "groups out."
            )


def all_rows(n_rows: int) -> Rows:
    """Return the single fold of a refit: all rows for training, and an empty validation part."""
    return np.arange(n_rows, dtype=np.int64), np.empty(0, dtype=np.int64)


def parse_cv(text: str) -> int | TimeSeriesSplit:
    """Return the value of ``--cv``: 5 for "5", or a time series split for "time:5".

    In a time series split the validation rows always come after the training rows.
    """
    kind, _, count = text.rpartition(":")
    if kind not in ("", "time") or not count.isdecimal() or int(count) < 2:
        raise InputError(
            f"--cv must be a number of folds such as 5, at least 2, or time:5, got {text!r}."
        )
    return TimeSeriesSplit(int(count)) if kind else int(count)


def check_groups(groups: object, n_rows: int, cv: object = None) -> np.ndarray | None:
    """Return groups as an array, (n,), or None.

    Raises:
        InputError: the length is wrong, a value is missing, or ``cv`` splits by time.
    """
    if groups is None:
        return None
    values = groups.detach().cpu().numpy() if isinstance(groups, Tensor) else np.asarray(groups)
    if values.shape != (n_rows,):
        shapes = f"shape ({n_rows},), got shape {values.shape}"
        raise InputError(f"groups must have one value a row, {shapes}; pass the group of each row.")
    refuse_missing(values, "groups", "give each such row a group of its own")
    if isinstance(cv, TimeSeriesSplit):
        why = "which cuts by the order of rows; leave groups out, or give a number of folds"
        raise InputError(
            "groups cannot be kept whole by a time series split (cv='time:K', TimeSeriesSplit), "
            f"{why}."
        )
    return values


def _fold_splitter(cv: int, target: Target, groups: np.ndarray | None, seed: int) -> Splitter:
    if cv < 2:
        raise InputError(f"cv must be at least 2 folds, got {cv}.")
    if cv > len(target):
        raise InputError(
            f"cv={cv} folds need at least as many rows, got {len(target)}; use fewer folds."
        )
    if groups is not None and cv > (count := len(set(groups.tolist()))):
        raise InputError(
            f"cv={cv} folds need at least as many groups, got {count}; use fewer folds."
        )
    random_state = stream_seed(seed, "folds") % 2**32
    # scikit-learn stratifies only if a class has at least one row per fold.
    if _are_small_classes(target, cv):
        return (
            GroupKFold(cv, shuffle=True, random_state=random_state)
            if groups is not None
            else _SpreadKFold(cv, seed)
        )
    kinds = (
        (KFold, GroupKFold) if target.classes is None else (StratifiedKFold, StratifiedGroupKFold)
    )
    kind: Callable[..., Splitter] = kinds[groups is not None]
    return kind(cv, shuffle=True, random_state=random_state)


def _are_small_classes(target: Target, n_folds: int) -> bool:
    """Return True for more than ``MAX_CLASSES`` classes that all have fewer rows than there are
    folds."""
    if target.classes is None or len(target.classes) <= MAX_CLASSES:
        return False
    return bool(np.bincount(target.values).max() < n_folds)


@dataclass(frozen=True)
class _SpreadKFold:
    """Shuffled folds of equal size.

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
        place = rng.permutation(codes.max() + 1)[codes]
        order = np.lexsort((rng.permutation(len(labels)), place))
        fold_of_row = np.empty(len(labels), dtype=np.int64)
        fold_of_row[order] = np.arange(len(labels)) % self.n_splits
        for fold in range(self.n_splits):
            yield np.flatnonzero(fold_of_row != fold), np.flatnonzero(fold_of_row == fold)


def refuse_identifier(target: Target) -> None:
    """Raise InputError for a text target that looks like an identifier.

    It has more than ``MAX_CLASSES`` different values, and these are more than half as many as its
    rows.
    """
    assert target.classes is not None
    n_classes = len(target.classes)
    n_rows = len(target)
    if n_classes > MAX_CLASSES and 2 * n_classes > n_rows and target.classes.dtype.kind == "U":
        raise InputError(
            f"The target {target.name!r} looks like an identifier: it has {n_classes} different "
            f"values in {n_rows} rows. Choose another column as the target, or leave out the rows "
            "of rare classes."
        )


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
                f"cv={splitter!r} splits by groups, but groups is None; pass groups."
            ) from error
        of_number = isinstance(
            splitter, KFold | GroupKFold | StratifiedKFold | StratifiedGroupKFold
        )
        cv = vars(splitter)["n_splits"] if of_number else repr(splitter)
        raise InputError(f"cv={cv} cannot split these {len(target)} rows: {error}") from error
    if target.classes is not None and isinstance(splitter, _STRATIFYING):
        counts = np.bincount(target.values, minlength=target.n_outputs)
        if len(rare := np.flatnonzero(counts < len(pairs))):
            shown = ", ".join(f"{target.classes[k].item()!r} ({counts[k]})" for k in rare[:8])
            more = f" and {len(rare) - 8} more" * (len(rare) > 8)
            warn(
                f"{target.name} has classes with fewer rows than the {len(pairs)} folds: "
                f"{shown}{more}; some folds are validated without "
                f"them{'; ' * bool(target.override)}{target.override}."
            )
    return pairs


def _rows(part: object, n_rows: int, fold: int, use: str) -> np.ndarray:
    """Return the checked positions, (m,) int64, of one side of one fold."""
    if isinstance(part, slice):
        part = np.arange(n_rows)[part]
    rows = np.asarray(part)
    if rows.size == 0:
        raise InputError(f"fold {fold} of cv has no {use} rows; use fewer folds or other groups.")
    if rows.ndim != 1 or rows.dtype.kind not in "biu":
        got = f"got {rows.dtype} of shape {rows.shape}"
        raise InputError(f"the {use} rows of fold {fold} must be positions or a mask, {got}.")
    if rows.dtype.kind == "b":
        if len(rows) != n_rows or not rows.any():
            raise InputError(
                f"the {use} mask of fold {fold} must have one value for each of the {n_rows} rows "
                f"and select at least one, got length {len(rows)} with {int(rows.sum())} selected."
            )
        return np.flatnonzero(rows).astype(np.int64)
    if rows.min() < 0 or rows.max() >= n_rows:
        odd = rows.min() if rows.min() < 0 else rows.max()
        raise InputError(f"the {use} rows of fold {fold} must lie in 0..{n_rows - 1}, got {odd}.")
    return rows.astype(np.int64)


def _warn_of_missing_classes(
    folds: list[Rows], target: Target, classes: np.ndarray, least: int
) -> None:
    """Warn about classes with at least ``least`` rows that a fold does not train on."""
    train = np.array(
        [np.bincount(target.values[rows], minlength=len(classes)) for rows, _ in folds]
    )
    missing = (train == 0) & (np.bincount(target.values, minlength=len(classes)) >= least)
    if len(few := np.flatnonzero(missing.any(1))):
        shown = ", ".join(repr(classes[k].item()) for k in np.flatnonzero(missing[few[0]])[:8])
        warn(
            f"{len(few)} of {len(folds)} folds (the first is fold {few[0]}) train without rows of "
            f"a class ({shown} there), which they cannot predict; shuffle or stratify the folds, "
            "or leave such classes out."
        )


def hold_out(
    target: Target, *, test_size: float, groups: object = None, cv: object = None, seed: int
) -> Rows:
    """Return the rows to tune on and the held-out rows, both sorted, int64.

    The held-out rows are

    - the last rows, if ``cv`` is a TimeSeriesSplit. Its ``gap`` rows before them belong to neither
      side.
    - whole groups, if there are ``groups``. Then ``test_size`` is a share of the groups.
    - otherwise random rows, with the classes in proportion.

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
            f"test_size must be a share of the rows, 0 <= test_size < 1, got {test_size!r}."
        )
    n_rows = len(target)
    if test_size == 0:
        return all_rows(n_rows)
    n_test = math.ceil(test_size * n_rows)
    groups = check_groups(groups, n_rows, cv)
    random_state = stream_seed(seed, "hold out") % 2**32
    if isinstance(cv, TimeSeriesSplit):
        test = np.arange(n_rows - n_test, n_rows)
        rest = np.arange(max(n_rows - n_test - cv.gap, 0))
    elif groups is not None:
        count = len(set(groups.tolist()))
        if math.ceil(test_size * count) >= count:
            remedy = "use a smaller one or 0"
            raise InputError(
                f"test_size={test_size} leaves none of the {count} groups to train on; {remedy}."
            )
        by_group = GroupShuffleSplit(1, test_size=test_size, random_state=random_state)
        rest, test = next(by_group.split(groups, groups=groups))
    elif target.classes is not None:
        counts = np.bincount(target.values, minlength=target.n_outputs)
        if (counts == 1).all():
            refuse_identifier(target)
            raise InputError(
                f"the target {target.name!r} has {len(counts)} classes of one row each, from "
                "which nothing can be learned; choose another target, or task='regression' where "
                "it is a number."
            )
        is_single = counts[target.values] == 1
        pool = np.flatnonzero(~is_single)
        try:
            by_class = StratifiedShuffleSplit(1, test_size=n_test, random_state=random_state)
            rest, test = next(by_class.split(pool, target.values[pool]))
        except ValueError as error:
            refuse_identifier(target)
            if min(len(counts), n_test) < MAX_CLASSES:
                raise InputError(
                    f"test_size would keep {n_test} of {n_rows} rows apart, which cannot hold the "
                    f"{int((counts > 1).sum())} classes in proportion on both sides; use another "
                    "share, or 0."
                ) from error
            rest, test = _spread_apart(target.values[pool], n_test, seed)
        rest = np.concatenate([pool[rest], np.flatnonzero(is_single)])
        test = pool[test]
    elif n_test < n_rows:
        rest, test = next(
            ShuffleSplit(1, test_size=n_test, random_state=random_state).split(np.zeros(n_rows))
        )
    else:
        rest = np.empty(0)
        test = np.arange(n_rows)
    if len(rest) == 0:
        raise InputError(
            f"test_size={test_size} leaves none of the {n_rows} rows to train on; use a smaller "
            "one."
        )
    return np.sort(rest).astype(np.int64), np.sort(test).astype(np.int64)


def _spread_apart(codes: np.ndarray, n_test: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions to tune on and the held-out positions, if there are more classes than
    rows in the smaller part.

    The held-out rows cover as many classes as possible, and each class keeps a row to tune on. If
    the classes have too few rows for that, fewer than ``n_test`` rows are held out.
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
    """Return the (train, valid) row positions of each fold as pairs of text.

    Sorted positions take a few bits per row.
    """

    def pack(rows: np.ndarray) -> str:
        # Differences of sorted positions are small numbers, which zlib compresses well.
        steps = np.diff(np.asarray(rows, dtype="<i8"), prepend=0).astype("<i8")
        return base64.b64encode(zlib.compress(steps.tobytes())).decode()

    return [[pack(train), pack(valid)] for train, valid in folds]


def unpack_folds(packed: Sequence[Sequence[str]]) -> list[Rows]:
    """Return the row positions, int64, that ``pack_folds`` packed, in the same order."""

    def unpack(text: str) -> np.ndarray:
        return np.cumsum(
            np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<i8"), dtype=np.int64
        )

    return [(unpack(train), unpack(valid)) for train, valid in packed]
