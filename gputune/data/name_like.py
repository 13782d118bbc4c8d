"""Find columns of numbers that are like names, because close values mean different things.

In the census table adult, for example, a capital gain of 7,298 always comes with a high income, and
6,849 never. A network smooths over such numbers. With the values as categories, it can tell them
apart.
"""

import numpy as np
from sklearn.model_selection import GroupKFold, KFold
from sklearn.preprocessing import SplineTransformer
from sklearn.tree import DecisionTreeRegressor

from gputune.data.columns import COPIED_LEVELS
from gputune.data.table import Table

_PARTS = 5
"""The number of parts of the rows. Each part is tested once."""
_FREQUENT_ROWS = 10
"""The number of rows from which a value is frequent."""
_FREQUENT_SHARE = 0.9
"""The smallest share of the rows that have a frequent value."""
_KNOTS = 8
_LEAVES = 16
"""The number of knots of the spline, and the largest number of leaves of the decision tree."""
_PRIOR_ROWS = 10
"""The correction of a value is the sum of its residuals, divided by its number of rows plus this."""
_LEAST_GAIN = 0.001
"""The smallest decrease of the squared error, as a share of the target's variance."""
_LEAST_STANDARD_ERRORS = 4.0
"""The smallest decrease of the squared error, in its standard errors."""
_MOST_ROWS = 50_000
_MOST_CLASSES = 10
"""The test reads at most this many rows, drawn at random, and the most frequent classes. It then
takes less than a second for each column."""


def name_like_columns(
    X: Table, target: np.ndarray, groups: np.ndarray | None = None, seed: int = 0
) -> list[str]:
    """Return the names of the columns of numbers that are like names.

    A cubic spline with 8 knots and a decision tree with 16 leaves predict the target from the order
    of the values of one column. The mean residual of each exact value then corrects the prediction.
    All are fitted on four fifths of the rows and tested on the others, five times. A column is in
    the result if

    - 3 to 128 of its values have at least 10 rows, and together at least 90% of the rows,
    - the correction lowers the squared error by at least 0.1% of the target's variance,
    - and this decrease is at least four times its standard error.

    Args:
        X: the table, n rows.
        target: classes as integers (n,), numbers (n,), or several numbers or labels (n, k).
        groups: the group of each row (n,), or None. All rows of a group are in the same fifth.
        seed: the seed of the fifths, and of the rows if there are more than 50,000.
    """
    rows = np.arange(len(target))
    if len(rows) > _MOST_ROWS:
        rows = np.random.default_rng(seed).choice(rows, _MOST_ROWS, replace=False)
    answers = _standardized(target[rows])
    groups = None if groups is None else groups[rows]
    return [
        name
        for name, kind in zip(X.names, X.kinds)
        if kind == "number" and _is_name_like(X.column(name)[rows], answers, groups, seed)
    ]


def _standardized(target: np.ndarray) -> np.ndarray:
    """Return the target as columns (n, k) of mean 0, with variances that sum to 1.

    Each frequent class becomes a column of 0 and 1. Several numeric targets have equal variances.
    """
    is_numeric = target.dtype.kind == "f"
    if target.ndim == 1 and not is_numeric:
        classes, counts = np.unique(target, return_counts=True)
        target = target[:, None] == classes[np.argsort(-counts, kind="stable")[:_MOST_CLASSES]]
    columns = target.reshape(len(target), -1).astype(np.float64)
    largest = np.abs(columns).max(0)
    columns = columns / np.where(largest > 0, largest, 1.0)  # squares of huge numbers overflow
    columns = columns - columns.mean(0)
    variances = columns.var(0)
    scale = variances * columns.shape[1] if is_numeric else variances.sum(keepdims=True)
    scaled: np.ndarray = columns / np.sqrt(np.where(scale > 0, scale, 1.0))
    return scaled


def _is_name_like(
    values: np.ndarray, answers: np.ndarray, groups: np.ndarray | None, seed: int
) -> bool:
    """Return whether the exact values (n,) of a column help to predict the answers (n, k)."""
    known = ~np.isnan(values)
    values = values[known]
    answers = answers[known]
    groups = None if groups is None else groups[known]
    distinct, ranks, counts = np.unique(values, return_inverse=True, return_counts=True)
    frequent = counts >= _FREQUENT_ROWS
    is_covered = counts[frequent].sum() >= _FREQUENT_SHARE * len(values)
    if not 3 <= frequent.sum() <= COPIED_LEVELS or not is_covered:
        return False
    splitter = KFold(_PARTS, shuffle=True, random_state=seed)
    if groups is not None:
        n_groups = len(np.unique(groups))
        if n_groups < 2:
            return False
        splitter = GroupKFold(min(_PARTS, n_groups))
    gains = np.zeros(len(values))
    for train, test in splitter.split(values, groups=groups):
        n_rows = np.bincount(ranks[train], minlength=len(distinct))
        sums = np.stack(
            [np.bincount(ranks[train], column, len(distinct)) for column in answers[train].T],
            axis=1,
        )
        means = sums / np.maximum(n_rows, 1)[:, None]
        predicted = _smooth(means, n_rows)
        corrections = (means - predicted) * (n_rows / (n_rows + _PRIOR_ROWS))[:, None]
        residuals = answers[test] - predicted[ranks[test]]
        corrected = residuals - corrections[ranks[test]]
        gains[test] = (residuals**2).sum(1) - (corrected**2).sum(1)
    gain = gains.mean()
    error = gains.std() / np.sqrt(len(gains))
    return bool(gain >= _LEAST_GAIN and gain >= _LEAST_STANDARD_ERRORS * error)


def _smooth(means: np.ndarray, n_rows: np.ndarray) -> np.ndarray:
    """Return predictions (m, k) for the m values of a column in ascending order.

    The predictions are a spline plus a decision tree, so they follow smooth functions and steps.
    Both see the order of the values only, not the values.

    Args:
        means: the mean answers for each value, (m, k).
        n_rows: the number of rows with each value, (m,).
    """
    order = np.arange(len(means))[:, None]
    basis = SplineTransformer(_KNOTS).fit_transform(order)
    weights = np.sqrt(n_rows)[:, None]
    spline: np.ndarray = basis @ np.linalg.lstsq(weights * basis, weights * means)[0]
    tree = DecisionTreeRegressor(
        max_leaf_nodes=_LEAVES,
        min_weight_fraction_leaf=min(0.5, _FREQUENT_ROWS / n_rows.sum()),
        random_state=0,
    )
    tree.fit(order, means - spline, sample_weight=n_rows)
    predicted: np.ndarray = spline + tree.predict(order).reshape(spline.shape)
    return predicted
