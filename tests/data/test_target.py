"""The target y: the rule for its task, its codes and classes, the weights of its rows as in
scikit-learn, and the errors.
"""

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from scipy.sparse import csr_array
from sklearn.utils.class_weight import compute_sample_weight

from gputune.data.target import are_many_whole_numbers, check_target
from gputune.data.weights import check_weights
from gputune.ground.errors import PYTHON
from refused import refused


def check(y, **options):
    return check_target(y, n_rows=len(y), **options)


@pytest.mark.parametrize(
    ("y", "task", "classes", "codes"),
    [
        (["no", "yes", "no"], "binary", ["no", "yes"], [0, 1, 0]),
        ([True, False, True], "binary", [False, True], [1, 0, 1]),
        ([5, 3, 9, 3], "multiclass", [3, 5, 9], [1, 0, 2, 0]),
        (["1", "2", "10"], "multiclass", ["1", "10", "2"], [0, 2, 1]),
        (np.array(["b", "a", "b"], dtype=object), "binary", ["a", "b"], [1, 0, 1]),
        (pd.Series(["b", "a", "b"], index=[7, 8, 9]), "binary", ["a", "b"], [1, 0, 1]),
        (pd.Series(["b", "a", "b"], dtype="category"), "binary", ["a", "b"], [1, 0, 1]),
        (pd.Series([1, 0, 1], dtype="Int64"), "binary", [0, 1], [1, 0, 1]),
        (pd.Series([True, False, True], dtype="boolean"), "binary", [False, True], [1, 0, 1]),
        (pd.DataFrame({"t": [1, 0, 1]}), "binary", [0, 1], [1, 0, 1]),
        (pl.Series(["b", "a", "b"]), "binary", ["a", "b"], [1, 0, 1]),
        (torch.tensor([2, 0, 2]), "binary", [0, 2], [1, 0, 1]),
        (np.array([[1], [0], [1]]), "binary", [0, 1], [1, 0, 1]),
        (np.array([1, 0, 1], dtype=np.uint8), "binary", [0, 1], [1, 0, 1]),
        ([0.0, 1.0, 0.0], "binary", [0.0, 1.0], [0, 1, 0]),
        (np.array([1, 0, 1], dtype=np.float32), "binary", [0.0, 1.0], [1, 0, 1]),
        (np.array([1, 0.0, 1], dtype=object), "binary", [0.0, 1.0], [1, 0, 1]),
        (pd.Series([3.0, 1.0, 5.0, 1.0]), "multiclass", [1.0, 3.0, 5.0], [1, 0, 2, 0]),
        (pd.Series([1, 0, 1], dtype="Float64"), "binary", [0.0, 1.0], [1, 0, 1]),
        (pl.Series([1.0, 0.0, 1.0]), "binary", [0.0, 1.0], [1, 0, 1]),
        (torch.tensor([1.0, 0.0, 1.0], dtype=torch.bfloat16), "binary", [0.0, 1.0], [1, 0, 1]),
    ],
)
def test_classes(y, task, classes, codes):
    target = check(y)
    found = target.classes.tolist()
    assert (target.task, found, [*map(type, found)]) == (task, classes, [*map(type, classes)])
    assert (target.values.dtype, target.values.tolist(), target.n_outputs) == (
        np.int64,
        codes,
        len(classes),
    )
    assert target.labels.tolist() == [classes[code] for code in codes]


@pytest.mark.parametrize(
    "y",
    [
        [0.5, 1.0, 2.0],
        [1, 2, 3],
        [1.0, 2.0, 3.0],
        np.repeat(np.arange(21), 2),
        np.repeat(np.arange(21.0), 9),
        pd.Series([0.5, 1.0, 2.0], dtype="Float64"),
        torch.tensor([0.5, 1.0], dtype=torch.bfloat16),
        np.array([1, 2.5], dtype=object),
    ],
)
def test_numbers(y):
    target = check(y)
    assert (target.task, target.classes, target.n_outputs) == ("regression", None, 1)
    assert target.values.dtype == np.float64 and target.labels is target.values
    np.testing.assert_array_equal(target.values, np.array([float(value) for value in y]))


@pytest.mark.parametrize("dtype", [int, float])
def test_twenty_whole_numbers_that_repeat_are_classes_and_more_a_number(dtype):
    assert check(np.repeat(np.arange(20), 2).astype(dtype)).n_outputs == 20
    y = np.repeat(np.arange(30), 10).astype(dtype)
    assert check(y).task == "regression" and are_many_whole_numbers(check(y))
    assert not are_many_whole_numbers(check(y + 0.5))
    assert check(y, task="regression").task == "regression"
    assert check(y, task="classification").n_outputs == 30
    assert check(y + 0.5).task == "regression"


@pytest.mark.parametrize(
    ("y", "task", "override"),
    [
        ([3.0, 4.0, 5.0, 3.0], None, "if they are numbers, set task='regression'"),
        ([3, 4, 6, 7] * 99, None, "if they are numbers, set task='regression'"),
        ([0, 1, 2, 0], None, "if they are numbers, set task='regression'"),
        ([0, 1, 2] * 10, None, ""),
        ([1, 2, 3] * 10, None, ""),
        ([0.0, 1.0, 0.0], None, ""),
        ([-1, 1, 1], None, ""),
        ([1, 2, 3], None, "if they are classes, set task='classification'"),
        ([0, 1, 0], "regression", "if they are classes, set task='classification'"),
        ([0.5, 1.0], None, ""),
        (["a", "b"], None, ""),
        ([True, False], None, ""),
    ],
)
def test_what_takes_whole_numbers_the_other_way_is_said(y, task, override):
    assert PYTHON.render(check(y, task=task).override) == override


def test_the_task_overrides_the_rule_and_select_keeps_the_classes():
    assert check([0.0, 1.0, 2.0], task="classification").classes.tolist() == [0, 1, 2]
    assert check([0, 1, 0], task="binary").task == "binary"
    assert check([0, 1, 2], task="multiclass").task == "multiclass"
    assert check([0, 1, 0], task="regression").values.tolist() == [0, 1, 0]
    assert check([True, False], task="regression").values.tolist() == [1, 0]
    assert check(np.arange(30), task="classification").n_outputs == 30
    part = check(["a", "b", "c", "a"], name="kind").select(np.array([0, 3]))
    assert (part.labels.tolist(), part.n_outputs, part.name) == (["a", "a"], 3, "kind")


@pytest.mark.parametrize(
    ("y", "task", "message"),
    [
        (
            ["a", None, "b"],
            None,
            r"y has 1 missing value \(the first in row 1\). Leave those rows out",
        ),
        ([1.0, np.nan, np.nan], None, r"y has 2 missing values \(the first in row 1\)"),
        (pd.Series([1, None, 2], dtype="Int64"), None, r"1 missing value \(the first in row 1\)"),
        (pd.Series(["a", None]), None, r"1 missing value \(the first in row 1\)"),
        (pl.Series([1, None, 2]), None, r"1 missing value \(the first in row 1\)"),
        ([np.nan, np.nan], None, "y is missing in every row. Check its values."),
        (["a", "a"], None, "y must have at least two classes, got only 'a'"),
        (
            [3, 3],
            None,
            "y is 3 in every row, so there is nothing to predict. Check the column",
        ),
        ([3, 3], "classification", "y must have at least two classes, got only 3"),
        (np.zeros((3, 0)), None, r"one value per row, got shape \(3, 0\)"),
        (np.array([["a", "b"]]), None, r"y holds text in several columns, shape \(1, 2\)"),
        (np.array([[0.5, np.nan], [1, 2]]), None, r"1 missing value \(the first in row 0\)"),
        (
            np.eye(3),
            None,
            r"y holds one-hot rows of shape \(3, 3\). Pass y.argmax\(1\) .*task='multilabel'",
        ),
        (torch.eye(3, dtype=torch.bool), None, "one-hot rows"),
        (pd.DataFrame({"a": [1, 0], "b": [0, 1]}), None, "one-hot rows"),
        (np.array([[2, 1], [0, 1]]), "multilabel", "needs columns of 0 and 1"),
        (np.zeros((2, 2, 2)), "regression", "needs one or several columns"),
        (["a", "b"], "custom", "task='custom' needs numbers in y, got text"),
        ([0, 1], "multilabel", "task='multilabel' needs several columns of 0 and 1 in y, got one"),
        (
            [2**70, 1],
            None,
            f"y holds {2**70}, which does not fit into a 64-bit integer. Pass classes as text, and numbers as "
            "floa",
        ),
        (
            [10**400, 0.5],
            None,
            "Column 'y' holds an integer that is larger than any float. Pass it as text",
        ),
        (
            [[1], [2, 3]],
            None,
            r"y has rows of different shapes: row 0 has \(1,\), row 1 has \(2,\)",
        ),
        (
            [0.5, 1.5],
            "classification",
            "task='classification' needs classes in y, got continuous numbers such as 0.5",
        ),
        (["a", "b"], "regression", "task='regression' needs numbers in y, got text such as 'a'"),
        (
            [0, 1, 2],
            "binary",
            "task='binary' does not fit y, which has 3 classes. Use task='multiclass'",
        ),
        (
            [0, 1],
            "multiclass",
            "task='multiclass' does not fit y, which has 2 classes. Use task='binary'",
        ),
        ([0, 1], "ranking", "task must be one of 'classification', .*got 'ranking'"),
        ([0.5, np.inf], None, "y must be finite, got inf in row 1"),
        (np.array([1j, 2]), None, "must hold numbers, booleans or text, got complex128"),
        (
            np.array(["2020-01-01", "2020-01-02"], dtype="datetime64[D]"),
            None,
            r"got datetime64\[D\]",
        ),
        (pd.Series(pd.to_datetime(["2020-01-01", "2020-01-02"])), None, "y holds dates"),
        ([{1}, {2}], None, "holds set"),
        (
            np.array([1, "a"], dtype=object),
            None,
            r"y mixes text \('a'\) and int \(1\). Convert",
        ),
        (
            pd.Series([True, "a"], dtype="category"),
            None,
            r"mixes text \('a'\) and bool \(True\)",
        ),
        (torch.zeros(2, device="meta"), None, "y is on the device 'meta', which holds no values"),
    ],
)
def test_bad_targets(y, task, message):
    with refused(message):
        check(y, task=task)


def test_sparse_and_wrong_length():
    for y, message in (
        (csr_array(np.eye(2)), "sparse matrix"),
        ([0, 1], "y must have .* got 2 values and 3 rows"),
    ):
        with refused(message):
            check_target(y, n_rows=3)


LABELS = np.array(list("aabacbbaaa"))
TARGET = check_target(LABELS, n_rows=10)
TRAIN = np.array([0, 1, 2, 4, 7, 8])


def weigh(rows, classes, train=TRAIN):
    return check_weights(rows, classes, TARGET).for_fold(TARGET, train)


def test_all_ones_is_none():
    for sample, classes in [(None, None), (np.ones(10), None), (None, {}), (np.ones(10), {"a": 1})]:
        assert weigh(sample, classes) is None


def test_balanced_weights_are_scikit_learns_over_the_training_rows():
    weights = weigh(None, "balanced")
    np.testing.assert_allclose(
        weights[TRAIN], compute_sample_weight("balanced", LABELS[TRAIN]), rtol=1e-15
    )
    changed = check_target(np.where(np.isin(np.arange(10), TRAIN), LABELS, "c"), n_rows=10)
    other = check_weights(None, "balanced", changed).for_fold(changed, TRAIN)
    np.testing.assert_array_equal(other[TRAIN], weights[TRAIN])
    train = np.array([0, 1, 2])  # a class without training rows does not count
    weights = weigh(None, "balanced", train)
    np.testing.assert_allclose(weights[train], compute_sample_weight("balanced", LABELS[train]))
    assert weights[4] == 1


def test_class_and_sample_weights_multiply_and_each_class_weighs_the_same_in_the_balance():
    weights = weigh(torch.arange(1, 11), {"b": 3, "c": 0})
    factor = np.array([{"a": 1, "b": 3, "c": 0}[label] for label in LABELS])
    np.testing.assert_array_equal(weights, np.arange(1, 11) * factor)
    rows = np.arange(1.0, 11)
    weights = weigh(rows, "balanced")
    sums = [weights[TRAIN][LABELS[TRAIN] == label].sum() for label in "abc"]
    np.testing.assert_allclose(sums, rows[TRAIN].sum() / 3)


def test_integer_and_boolean_classes_are_found_by_value():
    target = check_target([0, 1, 0], n_rows=3)
    for weight in ({1: 2.0}, {"1": 2.0}):  # as a command line has it
        weights = check_weights(None, weight, target).for_fold(target, np.arange(3))
        np.testing.assert_array_equal(weights, [1, 2, 1])


@pytest.mark.parametrize(
    ("sample", "classes", "message"),
    [
        (
            np.ones(3),
            None,
            r"sample_weight must have one number per row, shape \(10,\), got shape \(3,\)",
        ),
        (np.ones((10, 1)), None, r"got shape \(10, 1\)"),
        (["a"] * 10, None, "sample_weight must hold numbers"),
        ([1] * 9 + [-2], None, "sample_weight must be finite and not negative, got -2.0 in row 9"),
        (
            [np.nan] + [1] * 9,
            None,
            "sample_weight must be finite and not negative, got nan in row 0",
        ),
        (
            None,
            "even",
            "class_weight must be None, 'balanced' or a dict from class to weight, got 'even'",
        ),
        (
            None,
            {"d": 1},
            "class_weight names the class 'd', but the classes of y are 'a', 'b', 'c'",
        ),
        (None, {"a": -1}, "class_weight must be finite and not negative, got -1 for the class 'a'"),
        (
            None,
            {"a": "x"},
            "class_weight must be finite and not negative, got 'x' for the class 'a'",
        ),
        (None, {"a": np.inf}, "class_weight must be finite"),
    ],
)
def test_bad_weights(sample, classes, message):
    with refused(message):
        check_weights(sample, classes, TARGET)


def test_weights_of_a_regression_and_weights_that_are_all_zero():
    with refused("class_weight is only for classes, but y holds numbers, got 'balanced'"):
        check_weights(None, "balanced", check_target([0.5, 1.5], n_rows=2))
    with refused("weights of the training rows of a fold add up to 0"):
        weigh(np.isin(np.arange(10), TRAIN, invert=True), None)


@pytest.mark.parametrize(
    ("y", "task", "found", "shape", "words"),
    [
        (np.array([[2.0, 1], [0, 1]]), None, "regression", (2, 2), "2 numbers (regression)"),
        (
            pd.DataFrame({"a": [0.5, 2], "b": [2, 1]}),
            None,
            "regression",
            (2, 2),
            "2 numbers (regression)",
        ),
        (np.array([[1, 1], [0, 1]]), None, "multilabel", (2, 2), "2 labels"),
        (torch.eye(2, dtype=torch.bool), "multilabel", "multilabel", (2, 2), "2 labels"),
        (np.zeros((2, 3, 4)), None, "custom", (2, 3, 4), "12 numbers, unchanged"),
        ([0, 1], "custom", "custom", (2,), "numbers, unchanged"),
    ],
)
def test_several_columns(y, task, found, shape, words):
    target = check_target(y, task=task, n_rows=2)
    assert (target.task, target.values.shape, target.classes, target.in_words) == (
        found,
        shape,
        None,
        words,
    )
    assert target.override == ""
