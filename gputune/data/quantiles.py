"""Scales by quantiles: the robust one, by median and quartiles, and the quantile-normal transform.

The robust scale ends in a smooth clip that keeps outliers within +-3. Source: Holzmueller et al. (2024),
arXiv:2407.04491, section 3. Of the quantile-normal transform scikit-learn fits the quantiles, plain arrays are kept,
and ``normal_scores`` applies it; ``normal_scores_of`` by operations that torch.export and ONNX both have.

Piecewise-linear encoding: a number becomes a feature for each of its bins, 0 below it, 1 above it, linear within.
Source: Gorishniy et al. (2022), On embeddings for numerical features in tabular deep learning, arXiv:2203.05556,
section 3.2: bins between quantiles, or between the thresholds of a decision tree on the target. The first bin is open
below and the last one above, as there. Departure: a leaf of the tree has at least a quarter of the rows of equal bins.
"""

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Values = TypeVar("Values", np.ndarray, Tensor)

_BOUND = 3.0
_FAR = 1e15
"""Where the smooth clip is its bound up to rounding; the square of what lies beyond may overflow."""


def median_and_spread(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the medians (D,) of columns (n, D), NaN left out, and what scales them.

    That is the distance of the quartiles, half the range where these are equal, and 1 where all values are: a column
    that is constant in these rows is only centred. Departure from the source, which makes it 0 in all rows.
    """
    low, median, high = np.nanquantile(part, (0.25, 0.5, 0.75), axis=0)
    half = (np.nanmax(part, 0) - np.nanmin(part, 0)) / 2
    spread = np.where(high > low, high - low, half)
    return median, np.where(spread > 0, spread, 1.0)


def smooth_clip(x: Values) -> Values:
    """Return x / sqrt(1 + (x / 3)^2), which is x near 0 and lies within +-3."""
    x = x.clip(-_FAR, _FAR)
    return x / (1 + (x / _BOUND) ** 2) ** 0.5


MAX_QUANTILES = 1000

# scikit-learn's bound on probabilities, which keeps normal scores away from infinity.
_LEAST = 1e-7 - 2.0**-52


def fit_quantiles(part: np.ndarray) -> np.ndarray:
    """Return (Q, R) quantiles of R columns, NaN left out, at Q equally spaced probabilities from 0 to 1."""
    from sklearn.preprocessing import QuantileTransformer

    if part.shape[1] == 0:
        return np.empty((0, 0))
    count = min(MAX_QUANTILES, len(part))
    fitted = QuantileTransformer(n_quantiles=count, subsample=None).fit(part)
    return np.asarray(fitted.quantiles_, dtype=np.float64)


def normal_scores(values: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """Return the normal deviate at each value's rank among the quantiles (Q,), within +-5.2.

    A value that fills several quantiles gets the middle of their ranks; at and beyond the outermost quantiles the
    rank is 0 or 1. Departure from scikit-learn: it also moves what lies within an absolute 1e-7 of these two to
    them, which would break columns of tiny numbers.
    """
    from scipy.special import ndtri

    ranks = np.linspace(0.0, 1.0, len(quantiles))
    above = np.interp(values, quantiles, ranks)
    below = 1.0 - np.interp(-values, -quantiles[::-1], ranks)
    rank = (above + below) / 2
    rank = np.where(values >= quantiles[-1], 1.0, np.where(values <= quantiles[0], 0.0, rank))
    largest = -ndtri(_LEAST)
    return np.asarray(np.clip(ndtri(rank), -largest, largest))


# Wichura's PPND16: numerator and denominator in the middle, and in the tails up to a probability of 1.4e-11, which the
# bound below keeps away. Constant term first.
_MIDDLE_ABOVE = (
    3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
    4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3,
)  # fmt: skip
_MIDDLE_BELOW = (
    1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
    2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3,
)  # fmt: skip
_TAIL_ABOVE = (
    1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
    1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4,
)  # fmt: skip
_TAIL_BELOW = (
    1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
    1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9,
)  # fmt: skip


def normal_scores_of(values: Tensor, quantiles: Tensor) -> Tensor:
    """Return (n, R) normal scores of float64 values (n, R) by their quantiles (Q, R): those of ``normal_scores``."""
    above = _interpolate(values, quantiles)
    below = 1.0 - _interpolate(-values, -quantiles.flip(0))
    rank = (above + below) / 2
    rank = torch.where(values <= quantiles[0], 0.0, rank)
    return normal_deviate(torch.where(values >= quantiles[-1], 1.0, rank))


def normal_deviate(rank: Tensor) -> Tensor:
    """Return the standard normal deviate of probabilities, which are kept 1e-7 away from 0 and 1.

    Source: Wichura (1988), algorithm AS 241, doi:10.2307/2347330; relative error about 1e-16.
    """
    p = torch.minimum(torch.maximum(rank, _double(_LEAST)), _double(1.0 - _LEAST))
    q = p - 0.5
    r = _double(0.180625) - q * q
    middle = q * _polynomial(r, _MIDDLE_ABOVE) / _polynomial(r, _MIDDLE_BELOW)
    r = (-torch.minimum(p, 1.0 - p).log()).sqrt() - _double(1.6)
    tail = _polynomial(r, _TAIL_ABOVE) / _polynomial(r, _TAIL_BELOW)
    return torch.where(q.abs() <= _double(0.425), middle, torch.where(q < 0, -tail, tail))


def _polynomial(r: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = _double(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * r + _double(coefficient)
    return value


def _double(number: float) -> Tensor:
    """Return a number as a tensor: ONNX would be given a plain one in single precision."""
    return torch.tensor(number, dtype=torch.float64)


def _interpolate(values: Tensor, quantiles: Tensor) -> Tensor:
    """Return (n, R) ranks between 0 and 1, linear between quantiles; anything beyond the outermost ones."""
    last = len(quantiles) - 2  # the last one not above a value is found by binary search: ONNX has no searchsorted
    at = torch.zeros_like(values, dtype=torch.int64)
    for bit in reversed(range(max(1, last).bit_length())):
        further = at + 2**bit
        fits = (further <= last) & (quantiles.gather(0, further.clamp(max=last)) <= values)
        at = torch.where(fits, further, at)
    low, high = quantiles.gather(0, at), quantiles.gather(0, at + 1)
    return (at.double() + (values - low) / (high - low)) / (len(quantiles) - 1)


N_BINS = 16
"""Bins of a number at most; where it has fewer, the features of the others are 0."""
OPEN = np.array([[0.0], [1.0], [-np.finfo(np.float64).max], [np.finfo(np.float64).max]])
"""The one bin of a number that stays as it is."""


def quantile_edges(values: np.ndarray) -> np.ndarray:
    """Return the edges of bins that hold equally many of the values (n,), ascending; fewer where values are equal."""
    return np.unique(np.quantile(values, np.linspace(0, 1, N_BINS + 1)))


def tree_edges(values: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the ends of the values (n,), and between them the thresholds of a tree for a target (n, ...)."""
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


def bins_of(values: np.ndarray, target: np.ndarray | None) -> np.ndarray:
    """Return ``bins_between`` the edges of a feature's known values (n,), for a target (n, ...) where there is one."""
    known = ~np.isnan(values)
    edges = quantile_edges(values[known]) if target is None else tree_edges(values[known], target[known])
    return bins_between(edges)


def bins_between(edges: np.ndarray) -> np.ndarray:
    """Return (4, N_BINS): of each bin its lower edge, its width, and the least and the most that its feature is."""
    bins, count = np.zeros((4, N_BINS)), len(edges) - 1
    bins[1] = 1.0
    if count:
        bins[0, :count], bins[1, :count], bins[3, :count] = edges[:-1], np.diff(edges), 1.0
        bins[2, 0], bins[3, count - 1] = OPEN[2:, 0]
    return bins
