"""Piecewise-linear encoding: a number becomes a feature for each of its bins, 0 below it, 1 above it, linear within.

Source: Gorishniy et al. (2022), On embeddings for numerical features in tabular deep learning, arXiv:2203.05556,
section 3.2: bins between quantiles, or between the thresholds of a decision tree on the target. The first bin is open
below and the last one above, as there. Departure: a leaf of the tree has at least a quarter of the rows of equal bins.
"""

import numpy as np

N_BINS = 16
"""Bins of a number at most; where it has fewer, the features of the others are 0."""
OPEN = np.array([[0.0], [1.0], [-np.finfo(np.float64).max], [np.finfo(np.float64).max]])
"""The one bin of a number that stays as it is."""


def quantile_edges(values: np.ndarray) -> np.ndarray:
    """Return the edges of bins that hold equally many of the values (n,), ascending; fewer where values are equal."""
    return np.unique(np.quantile(values, np.linspace(0, 1, N_BINS + 1)))


def tree_edges(values: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the ends of the values (n,), and between them the thresholds of a tree that predicts a target (n, ...).

    That is of classes where it is one integer a row.
    """
    from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

    low, high = values.min(), values.max()
    is_of_classes = target.ndim == 1 and target.dtype.kind in "iu"
    kind = DecisionTreeClassifier if is_of_classes else DecisionTreeRegressor
    y = (target if is_of_classes else target - target.mean(0)).reshape(len(target), -1)
    least = max(1, len(values) // (4 * N_BINS))
    # Trees compute in single precision, in which values far from 0 may all be equal.
    unit = (values - low) / (high - low) if high > low else np.zeros(len(values))
    fitted = kind(max_leaf_nodes=N_BINS, min_samples_leaf=least, random_state=0)
    tree = fitted.fit(unit[:, None], y).tree_
    inside = low + (high - low) * tree.threshold[tree.children_left >= 0]
    return np.unique(np.clip([low, *inside, high], low, high))


def bins_between(edges: np.ndarray) -> np.ndarray:
    """Return (4, N_BINS): of each bin its lower edge, its width, and the least and the most that its feature is."""
    bins, count = np.zeros((4, N_BINS)), len(edges) - 1
    bins[1] = 1.0
    if count:
        bins[0, :count], bins[1, :count], bins[3, :count] = edges[:-1], np.diff(edges), 1.0
        bins[2, 0], bins[3, count - 1] = OPEN[2:, 0]
    return bins
