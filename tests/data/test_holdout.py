"""Rows kept apart: in proportion, whole groups, or the last ones."""

import numpy as np
import pytest
from sklearn.model_selection import TimeSeriesSplit

from gputune.data.folds import hold_out
from gputune.data.target import check_target
from gputune.errors import InputError

N = 50
CLASSES = check_target(np.repeat(["a", "b"], [40, 10]), n_rows=N)
NUMBERS = check_target(np.linspace(0, 1, N), n_rows=N)
GROUPS = np.repeat(np.arange(10), 5)


def split(target=CLASSES, *, test_size=0.2, groups=None, cv=5, seed=0):
    rest, test = hold_out(target, test_size=test_size, groups=groups, cv=cv, seed=seed)
    gap = cv.gap if isinstance(cv, TimeSeriesSplit) else 0
    assert rest.dtype == test.dtype == np.int64
    assert len(rest) + len(test) + gap == N
    assert len(np.union1d(rest, test)) == N - gap
    assert (np.diff(rest) > 0).all()
    assert (np.diff(test) > 0).all()
    return rest, test


def test_classes_are_kept_in_proportion():
    _, test = split()
    assert np.bincount(CLASSES.values[test]).tolist() == [8, 2]


def test_numbers_are_drawn_by_the_seed():
    _, test = split(NUMBERS)
    assert len(test) == 10
    assert np.array_equal(test, split(NUMBERS)[1])
    assert not np.array_equal(test, split(NUMBERS, seed=1)[1])
    assert not np.array_equal(split()[1], split(seed=1)[1])
    assert len(split(NUMBERS, test_size=0.21)[1]) == 11


@pytest.mark.parametrize("target", [CLASSES, NUMBERS])
def test_groups_stay_whole(target):
    rest, test = split(target, groups=[f"g{group}" for group in GROUPS])
    assert len(test) == 10
    assert not set(GROUPS[rest]) & set(GROUPS[test])


def test_a_time_series_keeps_its_last_rows():
    rest, test = split(NUMBERS, cv=TimeSeriesSplit(3))
    assert np.array_equal(rest, np.arange(40))
    assert np.array_equal(test, np.arange(40, 50))
    assert np.array_equal(split(cv=TimeSeriesSplit(3, gap=4))[0], np.arange(36))


def test_size_zero_keeps_none():
    rest, test = split(test_size=0)
    assert np.array_equal(rest, np.arange(N))
    assert len(test) == 0


def test_the_only_row_of_a_class_is_not_kept_apart():
    y = np.repeat(["a", "b", "c"], [39, 10, 1])
    for seed in range(5):
        rest, _ = split(check_target(y, n_rows=N), seed=seed)
        assert 49 in rest


@pytest.mark.parametrize("size", [1, 1.0, 1.5, -0.1, np.nan, "0.2", True, None])
def test_bad_sizes(size):
    with pytest.raises(InputError, match=r"test_size must be a share of the rows, 0 <= test_size < 1, got"):
        hold_out(NUMBERS, test_size=size, seed=0)


def test_sides_without_rows():
    with pytest.raises(InputError, match=r"test_size=0\.99 leaves none of the 50 rows"):
        hold_out(NUMBERS, test_size=0.99, seed=0)
    with pytest.raises(InputError, match=r"test_size=0\.99 leaves none of the 50 rows"):
        hold_out(NUMBERS, test_size=0.99, cv=TimeSeriesSplit(2), seed=0)
    with pytest.raises(InputError, match=r"test_size=0\.95 leaves none of the 10 groups"):
        hold_out(NUMBERS, test_size=0.95, groups=GROUPS, seed=0)
    with pytest.raises(InputError, match="would keep 1 of 50 rows apart, which cannot hold the 2 classes"):
        hold_out(CLASSES, test_size=0.01, seed=0)
    with pytest.raises(InputError, match="would keep 50 of 50 rows apart"):
        hold_out(CLASSES, test_size=0.99, seed=0)
    with pytest.raises(InputError, match="groups must have one value a row"):
        hold_out(NUMBERS, test_size=0.2, groups=[1, 2], seed=0)
