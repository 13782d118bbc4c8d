"""Columns of numbers whose values are like names: close values have different meanings."""

import numpy as np
import pandas as pd
import pytest

from gputune.data import name_like
from gputune.data.name_like import name_like_columns
from gputune.data.table import as_table

RNG = np.random.default_rng(0)
N = 4000
CODES = RNG.integers(0, 60, N) * 7
"""Scattered values. Each has its own random mean of the target."""
MEANS = RNG.normal(size=500)
SMOOTH = RNG.integers(0, 60, N)
NOISE = RNG.normal(size=N)
TABLE = pd.DataFrame(
    {
        "code": CODES,
        "smooth": SMOOTH,
        "real": RNG.normal(size=N),
        "text": np.where(CODES > 200, "high", "low"),
        "flag": CODES > 100,
    }
)


def found(target, **columns):
    return name_like_columns(as_table(TABLE.assign(**columns)), np.asarray(target))


NUMBERS = MEANS[CODES] + np.sin(SMOOTH / 10) + NOISE
TARGETS = {
    "numbers": NUMBERS,
    "classes": np.digitize(NUMBERS, [-1, 1]),
    "two numbers": np.stack([1e6 * NOISE, NUMBERS], axis=1),
    "labels": np.stack([NOISE > 0, NUMBERS > 0], axis=1).astype(np.int64),
}


@pytest.mark.parametrize("name", TARGETS)
def test_only_the_column_of_codes_is_found(name):
    assert found(TARGETS[name]) == ["code"]


def test_a_shuffled_target_has_no_such_columns():
    for seed in range(20):
        assert not found(np.random.default_rng(seed).permutation(NUMBERS))


def test_missing_values_of_the_column_are_ignored():
    code = np.where(RNG.random(N) < 0.3, np.nan, CODES)
    assert found(NUMBERS, code=code) == ["code"]


def test_a_column_needs_a_few_frequent_values():
    assert not found(NUMBERS, code=CODES + RNG.random(N))  # no value occurs twice
    rare = np.where(RNG.random(N) < 0.2, 1e4 + np.arange(N), CODES)
    assert not found(NUMBERS, code=rare)  # a fifth of the rows has a rare value
    many = RNG.integers(0, 200, N)
    assert not found(MEANS[many], code=many)  # more values than categories
    assert not found(NUMBERS, code=CODES > 200)  # a boolean is a category already


def test_huge_numbers_and_smooth_numbers_with_many_digits():
    assert found(NUMBERS, code=CODES * 1e300) == ["code"]
    smooth = np.sin(SMOOTH / 10) + 0.3 * NOISE
    for start in (0, 20_240_100, 1_000_000_000):
        assert not found(smooth, smooth=SMOOTH + start)


def test_huge_and_tiny_targets():
    assert found(NUMBERS * 1e300) == found(NUMBERS * 1e-300) == ["code"]


def test_values_that_only_name_a_group_are_not_found():
    table = as_table(TABLE)
    assert name_like_columns(table, NUMBERS, groups=SMOOTH) == ["code"]
    assert not name_like_columns(table, NUMBERS, groups=CODES)
    partly = as_table(TABLE.assign(code=np.where(CODES > 0, np.nan, CODES + SMOOTH % 3)))
    assert not name_like_columns(partly, NUMBERS, groups=CODES)  # one group with known values


def test_only_the_most_frequent_classes_count(monkeypatch):
    monkeypatch.setattr("gputune.data.name_like._MOST_CLASSES", 2)
    assert found(np.digitize(NUMBERS, [-1, 1])) == ["code"]
    answers = name_like._standardized(np.repeat(np.arange(4), [5, 90, 1, 4]))
    assert answers.shape == (100, 2)
    assert answers.var(0)[0] > answers.var(0)[1] and answers.var(0).sum() == pytest.approx(1)


def test_many_rows_are_drawn(monkeypatch):
    monkeypatch.setattr("gputune.data.name_like._MOST_ROWS", 3000)
    assert found(NUMBERS) == ["code"]


def test_a_constant_target_has_no_such_columns():
    assert not found(np.ones(N))
