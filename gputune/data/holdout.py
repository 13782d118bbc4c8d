"""Rows kept apart before anything is fitted, for one honest score at the end."""

import math
from numbers import Real
from typing import Any

import numpy as np
from sklearn.model_selection import GroupShuffleSplit, ShuffleSplit, StratifiedShuffleSplit, TimeSeriesSplit

from gputune.data.dataset import Rows
from gputune.data.folds import all_rows, check_groups, refuse_groups_in_time
from gputune.data.target import Target
from gputune.errors import InputError
from gputune.seeding import stream_seed


def hold_out(target: Target, *, test_size: float, groups: Any = None, cv: Any = None, seed: int) -> Rows:
    """Return the rows to tune on and the rows kept apart, both sorted, int64; the latter empty for size 0.

    ``test_size`` is a share of the rows, rounded up as in scikit-learn. Where ``cv`` is a TimeSeriesSplit, the
    last rows are kept apart (and its ``gap`` rows before them used by neither side); with ``groups``, whole groups
    (then it is a share of the groups); else random rows, with the classes in proportion. The row of a class
    that has only one is never kept apart. Raises InputError for a size outside [0, 1) and for sides without rows.
    """
    if not isinstance(test_size, Real) or isinstance(test_size, bool) or not 0 <= test_size < 1:
        raise InputError(f"test_size must be a share of the rows, 0 <= test_size < 1, got {test_size!r}.")
    n_rows = len(target)
    if test_size == 0:
        return all_rows(n_rows)
    n_test = math.ceil(test_size * n_rows)
    groups = check_groups(groups, n_rows)
    refuse_groups_in_time(cv, groups)
    random_state = stream_seed(seed, "hold out") % 2**32
    if isinstance(cv, TimeSeriesSplit):
        test = np.arange(n_rows - n_test, n_rows)
        rest = np.arange(max(n_rows - n_test - cv.gap, 0))
    elif groups is not None:
        rest, test = _whole_groups(groups, test_size, random_state)
    elif target.classes is not None:
        rest, test = _stratified(target, n_test, random_state)
    elif n_test < n_rows:
        splitter = ShuffleSplit(1, test_size=n_test, random_state=random_state)
        rest, test = next(splitter.split(np.zeros(n_rows)))
    else:
        rest, test = np.empty(0), np.arange(n_rows)
    if len(rest) == 0:
        raise InputError(
            f"test_size={test_size} leaves none of the {n_rows} rows to train on; use a smaller one."
        )
    return np.sort(rest).astype(np.int64), np.sort(test).astype(np.int64)


def _whole_groups(groups: np.ndarray, test_size: float, random_state: int) -> Rows:
    count = len(set(groups.tolist()))
    if math.ceil(test_size * count) >= count:
        raise InputError(
            f"test_size={test_size} leaves none of the {count} groups to train on; use a smaller one or 0."
        )
    splitter = GroupShuffleSplit(1, test_size=test_size, random_state=random_state)
    rest, test = next(splitter.split(groups, groups=groups))
    return rest, test


def _stratified(target: Target, n_test: int, random_state: int) -> Rows:
    counts = np.bincount(target.values, minlength=target.n_outputs)
    if (counts == 1).all():
        raise InputError(
            f"the target {target.name!r} has {len(counts)} classes of one row each, from which nothing can be learned; "
            "choose another target, or task='regression' where it is a number."
        )
    single = counts[target.values] == 1
    pool = np.flatnonzero(~single)
    try:
        splitter = StratifiedShuffleSplit(1, test_size=n_test, random_state=random_state)
        rest, test = next(splitter.split(pool, target.values[pool]))
    except ValueError as error:
        raise InputError(
            f"test_size would keep {n_test} of {len(target)} rows apart, which cannot hold the "
            f"{int((counts > 1).sum())} classes in proportion on both sides; use another share, or 0."
        ) from error
    return np.concatenate([pool[rest], np.flatnonzero(single)]), pool[test]
