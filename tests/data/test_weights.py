"""Sample weights and class weights: scikit-learn's numbers, and the errors."""

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_sample_weight

from gputune.data.target import check_target, check_weights
from gputune.errors import InputError

LABELS = np.array(list("aabacbbaaa"))
TARGET = check_target(LABELS, n_rows=10)
TRAIN = np.array([0, 1, 2, 4, 7, 8])


def test_all_ones_is_none():
    for sample, classes in [(None, None), (np.ones(10), None), (None, {}), (np.ones(10), {"a": 1})]:
        assert check_weights(sample, classes, TARGET).for_fold(TARGET, TRAIN) is None


def test_balanced_weights_are_scikit_learns_over_the_training_rows():
    weights = check_weights(None, "balanced", TARGET).for_fold(TARGET, TRAIN)
    np.testing.assert_allclose(weights[TRAIN], compute_sample_weight("balanced", LABELS[TRAIN]), rtol=1e-15)
    changed = check_target(np.where(np.isin(np.arange(10), TRAIN), LABELS, "c"), n_rows=10)
    other = check_weights(None, "balanced", changed).for_fold(changed, TRAIN)
    np.testing.assert_array_equal(other[TRAIN], weights[TRAIN])


def test_a_class_without_training_rows_does_not_count_in_the_balance():
    train = np.array([0, 1, 2])
    weights = check_weights(None, "balanced", TARGET).for_fold(TARGET, train)
    np.testing.assert_allclose(weights[train], compute_sample_weight("balanced", LABELS[train]))
    assert weights[4] == 1


def test_class_and_sample_weights_multiply():
    rows = torch.arange(1, 11)
    weights = check_weights(rows, {"b": 3, "c": 0}, TARGET).for_fold(TARGET, TRAIN)
    factor = np.array([{"a": 1, "b": 3, "c": 0}[label] for label in LABELS])
    np.testing.assert_array_equal(weights, np.arange(1, 11) * factor)


def test_each_class_weighs_the_same_in_the_balance():
    rows = np.arange(1.0, 11)
    weights = check_weights(rows, "balanced", TARGET).for_fold(TARGET, TRAIN)
    sums = [weights[TRAIN][LABELS[TRAIN] == label].sum() for label in "abc"]
    np.testing.assert_allclose(sums, rows[TRAIN].sum() / 3)


def test_integer_and_boolean_classes_are_found_by_value():
    target = check_target([0, 1, 0], n_rows=3)
    weights = check_weights(None, {1: 2.0}, target).for_fold(target, np.arange(3))
    np.testing.assert_array_equal(weights, [1, 2, 1])


@pytest.mark.parametrize(
    ("sample", "classes", "message"),
    [
        (np.ones(3), None, r"sample_weight must have one number a row, shape \(10,\), got shape \(3,\)"),
        (np.ones((10, 1)), None, r"got shape \(10, 1\)"),
        (["a"] * 10, None, "sample_weight must hold one number a row"),
        ([1] * 9 + [-2], None, "sample_weight must be finite and not negative, got -2.0 in row 9"),
        ([np.nan] + [1] * 9, None, "sample_weight must be finite and not negative, got nan in row 0"),
        (None, "even", "class_weight must be None, 'balanced' or a dict from class to weight, got 'even'"),
        (None, {"d": 1}, "class_weight has the class 'd', which y has not: 'a', 'b', 'c'"),
        (None, {"a": -1}, "class_weight must be finite and not negative, got -1 for the class 'a'"),
        (None, {"a": "x"}, "class_weight must be finite and not negative, got 'x' for the class 'a'"),
        (None, {"a": np.inf}, "class_weight must be finite"),
    ],
)
def test_bad_weights(sample, classes, message):
    with pytest.raises(InputError, match=message):
        check_weights(sample, classes, TARGET)


def test_weights_of_a_regression_and_weights_that_are_all_zero():
    with pytest.raises(
        InputError, match="class_weight needs classes, got class_weight='balanced' for a regression"
    ):
        check_weights(None, "balanced", check_target([0.5, 1.5], n_rows=2))
    weights = check_weights(np.isin(np.arange(10), TRAIN, invert=True), None, TARGET)
    with pytest.raises(InputError, match="training rows add up to 0"):
        weights.for_fold(TARGET, TRAIN)
