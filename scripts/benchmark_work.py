"""The work that every engine of the benchmark gets: one list of trials, the same rows, folds and epochs.

Workers import this file, so scikit-learn is imported only inside the functions that the parent calls: an
engine's workers pay for the start of the library that they use, and of no other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

WIDTHS = {"narrow": (16, 32, 64), "wide": (16, 32, 64, 128, 256)}
BATCH_SIZES = (16, 32, 64, 128, 256)
LEARNING_RATES = (1e-3, 3e-2)  # log-uniform between

Trial = dict[str, Any]
Fold = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""X and y of the training rows, X and y of the validation rows."""


@dataclass(frozen=True)
class Work:
    """An MLP with two hidden relu layers, Adam without decay, float32, for C trials on F folds.

    X, y    (n, D) float32, not yet scaled, and (n,) classes
    folds   (train, valid) positions
    trials  lr, batch_size and width of each
    """

    name: str
    X: np.ndarray
    y: np.ndarray
    folds: Sequence[tuple[np.ndarray, np.ndarray]]
    trials: Sequence[Trial]
    epochs: int

    def steps(self, trials: Sequence[Trial]) -> int:
        """Optimizer steps of these trials in all folds and epochs."""
        return sum(self.epochs * -(-len(train) // t["batch_size"]) for t in trials for train, _ in self.folds)


@dataclass(frozen=True)
class Outcome:
    """What an engine gives back.

    scores   (C, F) last-epoch accuracies
    start    seconds until the last worker process began to train: start, imports, scaling and writing of the data
    compile  seconds of compiling, in the process that compiled longest
    """

    scores: np.ndarray
    start: float = 0.0
    compile: float = 0.0


def draw_trials(n_trials: int, widths: Sequence[int], seed: int = 0) -> list[Trial]:
    """Return the shared list; a longer one begins with a shorter one's trials."""
    rng = np.random.RandomState(seed)
    low, high = np.log(LEARNING_RATES)
    return [
        {
            "lr": float(np.exp(rng.uniform(low, high))),
            "batch_size": int(rng.choice(BATCH_SIZES)),
            "width": int(rng.choice(widths)),
        }
        for _ in range(n_trials)
    ]


def digits_work(name: str, *, n_trials: int, epochs: int) -> Work:
    """Return the work "narrow" or "wide" on scikit-learn's digits, 1,797 rows, 5 stratified folds."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import StratifiedKFold

    X, y = load_digits(return_X_y=True)
    folds = list(StratifiedKFold(5, shuffle=True, random_state=0).split(X, y))
    return Work(name, X.astype(np.float32), y, folds, draw_trials(n_trials, WIDTHS[name]), epochs)


def standardised(work: Work) -> list[Fold]:
    """Return each fold's rows, scaled by the mean and deviation of its training rows."""
    from sklearn.preprocessing import StandardScaler

    parts = []
    for train, valid in work.folds:
        scaler = StandardScaler().fit(work.X[train])
        parts.append(
            (scaler.transform(work.X[train]), work.y[train], scaler.transform(work.X[valid]), work.y[valid])
        )
    return parts
