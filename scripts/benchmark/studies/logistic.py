"""The logistic regression in gputune's GridSearchCV and in scikit-learn's, at the same accuracy.

Both search the same candidates on the same folds of standardized digits: C from 1e-3 to 1e3, with
the l2 and with the l1 penalty. One measure of accuracy is used for both: the objective divided by
its minimum, at several values of C on one fold. gputune computes the minimum at a tolerance of
1e-10. Times are shown only if gputune is as close to the minimum as scikit-learn at all these
values, up to 1e-7. For this comparison gputune stops at a tolerance of 1e-5 (l2) or 1e-4 (l1).
scikit-learn solves l2 with newton-cholesky. It solves l1 with saga, its only solver for the softmax
with l1, which reaches its limit of steps at large C.
"""

import time
import warnings
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import logsumexp
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.preprocessing import StandardScaler

import gputune.sklearn
from benchmark.report import publish, table
from benchmark.work import stop_workers

FOLDS = 5
CANDIDATES = 60
ROUNDING = 1e-7  # share by which an objective may lie above the best one and count as equal
SOLVERS: dict[str, Any] = {
    "l2": {"solver": "newton-cholesky", "tol": 1e-6},
    "l1": {"solver": "saga", "l1_ratio": 1.0, "tol": 1e-3, "max_iter": 200, "random_state": 0},
}
OWN_TOLERANCE = {"l2": 1e-5, "l1": 1e-4}
LOOKED_AT = 12  # number of values of C at which the objectives are compared
HEAD = (
    "penalty|candidates x folds|gputune, s|scikit-learn on all cores, s|times as fast|"
    "worst objective over the minimum: gputune, scikit-learn|largest difference of mean log loss"
)


@dataclass(frozen=True)
class Row:
    """One penalty: seconds of both libraries, and the accuracy of their solutions.

    It has the worst relative excess of an objective over the minimum, and the difference of the
    mean scores. ``excess`` is the largest amount by which gputune's relative excess is above
    scikit-learn's at one C.
    """

    penalty: str
    candidates: int
    gputune_seconds: float
    sklearn_seconds: float
    gputune_gap: float
    sklearn_gap: float
    excess: float
    score_difference: float

    def row(self) -> str:
        worst = f"{self.gputune_gap:.1e}, {self.sklearn_gap:.1e}"
        times = _times(self.gputune_seconds, self.sklearn_seconds)
        return (
            f"{self.penalty}|{self.candidates} x "
            f"{FOLDS}|{times}|{worst}|{self.score_difference:.1e}"
        )


def run(options: Namespace) -> int:
    rows = [compare(penalty, CANDIDATES) for penalty in ("l2", "l1")]
    own = sum(row.gputune_seconds for row in rows)
    theirs = sum(row.sklearn_seconds for row in rows)
    text = table(HEAD, [*(row.row() for row in rows), f"both||{_times(own, theirs)}"])
    if any(row.excess > ROUNDING for row in rows):
        print(
            f"{text}\nNO SPEED: gputune's solutions are further from optimal than scikit-learn's."
        )
        return 1
    return publish(
        options.out, "logistic", "Searching the logistic regression", __doc__ or "", text, rows=rows
    )


def compare(penalty: str, candidates: int) -> Row:
    """Search one penalty with both libraries, scikit-learn on all cores."""
    X, y = load_digits(return_X_y=True)
    X = StandardScaler().fit_transform(X)
    grid = {"C": np.geomspace(1e-3, 1e3, candidates)}
    folds = list(StratifiedKFold(FOLDS).split(X, y))
    own = gputune.sklearn.LogisticRegression(
        l1_ratio=float(penalty == "l1"), tol=OWN_TOLERANCE[penalty]
    )
    theirs = LogisticRegression(**SOLVERS[penalty])
    common = {"cv": folds, "scoring": "neg_log_loss", "refit": False}
    own_seconds, own_scores = timed(gputune.sklearn.GridSearchCV(own, grid, **common), X, y)
    seconds, scores = timed(GridSearchCV(theirs, grid, n_jobs=-1, **common), X, y)
    train, _ = folds[0]
    gaps = optimality((own, theirs), X[train], y[train], grid["C"], penalty)
    worst = *gaps.max(0).tolist(), float((gaps[:, 0] - gaps[:, 1]).max())
    difference = float(np.nanmax(np.abs(own_scores - scores)))
    return Row(penalty, candidates, own_seconds, seconds, *worst, difference)


def timed(search: GridSearchCV, X: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the seconds of a search, including everything that a user waits for, and its mean
    scores.
    """
    stop_workers()
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(X, y)
    return time.perf_counter() - begin, search.cv_results_["mean_test_score"]


def optimality(
    models: tuple[Any, Any], X: np.ndarray, y: np.ndarray, values: np.ndarray, penalty: str
) -> np.ndarray:
    """Return the relative excess of both objectives over the minimum, (values of C, 2).

    The first column is gputune's model, the second one the other model.
    """
    sharp = clone(models[0]).set_params(tol=1e-10)
    gaps = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for C in map(float, values[:: max(1, len(values) // LOOKED_AT)]):
            fitted = [clone(model).set_params(C=C).fit(X, y) for model in (*models, sharp)]
            found = [objective(one, X, y, C, penalty) for one in fitted]
            gaps.append([one / min(found) - 1 for one in found[:2]])
    return np.array(gaps)


def objective(fitted: Any, X: np.ndarray, y: np.ndarray, C: float, penalty: str) -> float:
    """Return ``C * sum of losses + penalty``, scikit-learn's objective."""
    logits = X @ fitted.coef_.T + fitted.intercept_
    loss = float((logsumexp(logits, axis=1) - logits[np.arange(len(y)), y]).sum())
    size = np.abs(fitted.coef_) if penalty == "l1" else fitted.coef_**2 / 2
    return C * loss + float(size.sum())


def _times(own: float, theirs: float) -> str:
    return f"{own:.1f}|{theirs:.1f}|{theirs / own:.1f}"
