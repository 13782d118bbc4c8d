"""The robust scale: numbers by their median and quartiles, then a smooth clip that keeps outliers within +-3.

Source: Holzmueller et al. (2024), arXiv:2407.04491, section 3.
"""

from typing import TypeVar

import numpy as np
from torch import Tensor

Values = TypeVar("Values", np.ndarray, Tensor)

_BOUND = 3.0


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
    return x / (1 + (x / _BOUND) ** 2) ** 0.5
