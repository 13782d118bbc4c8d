"""The quantile-normal transform: scikit-learn fits it, plain arrays are kept, one function applies it."""

import numpy as np
from scipy.special import ndtri
from sklearn.preprocessing import QuantileTransformer

MAX_QUANTILES = 1000

# scikit-learn keeps normal scores away from infinity: its bound on probabilities is 1e-7.
_LARGEST_NORMAL = float(-ndtri(1e-7 - np.spacing(1)))


def fit_quantiles(part: np.ndarray) -> np.ndarray:
    """Return (Q, R) quantiles of R columns, NaN left out, at Q equally spaced probabilities from 0 to 1."""
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
    ranks = np.linspace(0.0, 1.0, len(quantiles))
    above = np.interp(values, quantiles, ranks)
    below = 1.0 - np.interp(-values, -quantiles[::-1], ranks)
    rank = (above + below) / 2
    rank = np.where(values >= quantiles[-1], 1.0, np.where(values <= quantiles[0], 0.0, rank))
    return np.asarray(np.clip(ndtri(rank), -_LARGEST_NORMAL, _LARGEST_NORMAL))
