"""What the best trial of a study does on the rows that its folds validate on, as the page shows it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class FoldReport:
    """Of one trial; what was not asked for is empty.

    confusion   (K, K) rows of the true class (first axis) that are predicted as each class
    columns     names of the columns of X, most important first
    drops       (n,) how much worse the score is, on average, when one column is shuffled among the rows of a fold
    errors      (n,) standard deviation of that over shuffles and folds
    """

    trial: int
    confusion: NDArray[np.int64]
    columns: tuple[str, ...]
    drops: NDArray[np.float64]
    errors: NDArray[np.float64]
