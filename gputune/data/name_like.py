"""Find columns of numbers whose values are like names: close values may mean different things.

In the census table adult, for example, a capital gain of 7,298 always comes with a high income, and
6,849 never. A network smooths over such numbers. If they are categories too, it can tell them apart.
"""

import numpy as np
from sklearn.model_selection import KFold
from sklearn.tree import DecisionTreeRegressor

from gputune.data.column import COPIED_LEVELS
from gputune.data.table import Table

FEWEST_ROWS = 10
"""The number of rows from which a value is frequent."""
_FREQUENT_SHARE = 0.9
"""The smallest share of the rows that have a frequent value."""
_LEAVES = 16
"""The number of pieces into which a decision tree cuts the numbers."""
_PRIOR_ROWS = 10
"""The mean of a value's residuals is shrunk as if this many more residuals were 0."""
_LEAST_GAIN = 0.001
_LEAST_Z = 5.0
_MOST_ROWS = 50_000
"""The test reads at most this many rows, drawn at random. It takes about 0.1 s for each column."""


def name_like_columns(X: Table, target: np.ndarray, seed: int = 0) -> list[str]:
    """Return the names of the columns of numbers whose single values help to predict the target.

    A decision tree with 16 leaves predicts the target from one column. The mean residual of each
    exact value then corrects the prediction. Both are fitted on four fifths of the rows and compared
    on the others, five times. A column is in the result if

    - 3 to 128 of its values have at least 10 rows, and together at least 90% of the rows,
    - the correction lowers the squared error by at least 0.1% of the target's variance,
    - and the mean difference is at least five times its standard error.

    Args:
        X: the table, n rows.
        target: classes as integers (n,), or numbers or labels (n,) or (n, targets).
        seed: the seed of the folds, and of the rows if there are more than 50,000.
    """
    rows = np.arange(len(target))
    if len(rows) > _MOST_ROWS:
        rows = np.random.default_rng(seed).choice(rows, _MOST_ROWS, replace=False)
    answers = _standardized(target[rows])
    return [
        name
        for name, kind in zip(X.names, X.kinds)
        if kind == "number" and _is_name_like(X.column(name)[rows], answers, seed)
    ]


def _standardized(target: np.ndarray) -> np.ndarray:
    """Return the target as columns (n, k) of mean 0 whose variances sum to 1.

    Each class becomes a column of 0 and 1. Several numeric targets have equal variances.
    """
    is_numeric = target.dtype.kind == "f"
    if target.ndim == 1 and not is_numeric:
        target = target[:, None] == np.unique(target)
    columns = target.reshape(len(target), -1).astype(np.float64)
    columns = columns - columns.mean(0)
    variances = columns.var(0)
    scale = variances * columns.shape[1] if is_numeric else variances.sum(keepdims=True)
    scaled: np.ndarray = columns / np.sqrt(np.where(scale > 0, scale, 1.0))
    return scaled


def _is_name_like(values: np.ndarray, answers: np.ndarray, seed: int) -> bool:
    """Return whether the exact values (n,) of a column help to predict the answers (n, k)."""
    known = ~np.isnan(values)
    values, answers = values[known], answers[known]
    distinct, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    frequent = counts >= FEWEST_ROWS
    is_covered = counts[frequent].sum() >= _FREQUENT_SHARE * len(values)
    if not 3 <= frequent.sum() <= COPIED_LEVELS or not is_covered:
        return False
    gains = np.zeros(len(values))
    for train, test in KFold(5, shuffle=True, random_state=seed).split(values):
        tree = DecisionTreeRegressor(
            max_leaf_nodes=_LEAVES, min_samples_leaf=FEWEST_ROWS, random_state=seed
        ).fit(values[train, None], answers[train])
        predicted = tree.predict(distinct[:, None]).reshape(len(distinct), -1)
        residuals = answers - predicted[places]
        sums = np.zeros_like(predicted)
        np.add.at(sums, places[train], residuals[train])
        rows_of = np.bincount(places[train], minlength=len(distinct))
        corrections = sums / (rows_of + _PRIOR_ROWS)[:, None]
        corrected = residuals[test] - corrections[places[test]]
        gains[test] = (residuals[test] ** 2).sum(1) - (corrected**2).sum(1)
    gain = gains.mean()
    error = gains.std() / np.sqrt(len(gains))
    return bool(gain >= _LEAST_GAIN and gain >= _LEAST_Z * error)
