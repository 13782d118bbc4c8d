"""The logistic regression searched by gputune's GridSearchCV and by scikit-learn's, no further from optimal.

Both search the same candidates on the same folds of standardised digits: C from 1e-3 to 1e3, with the l2 and with the
l1 penalty. How far a solution is from optimal is measured in one way for both: its objective over the minimum, which
gputune finds at a tolerance of 1e-10, at values of C on one fold. Times are shown only where gputune is no further
from it than scikit-learn at any of them, to 1e-7; to that end it stops at a tolerance of 1e-5 (l2) or 1e-4 (l1).
scikit-learn solves l2 with newton-cholesky and l1 with saga, its only solver for the softmax with l1, which at large C
ends at its limit of steps.
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
from benchmark.report import describe_machine, publish, table
from benchmark.work import stop_workers

FOLDS, CANDIDATES = 5, 60
ROUNDING = 1e-7  # share by which an objective may lie above the best one and count as equal
CHOLESKY_TOLERANCE, SAGA_TOLERANCE, SAGA_STEPS = 1e-6, 1e-3, 200
OWN_TOLERANCE = {"l2": 1e-5, "l1": 1e-4}
LOOKED_AT = 12  # values of C


@dataclass(frozen=True)
class Row:
    """One penalty: seconds of both, worst share of an objective above the minimum, and difference of the mean scores.

    ``excess`` is the most by which gputune's share is above scikit-learn's at one C.
    """

    penalty: str
    candidates: int
    gputune_seconds: float
    sklearn_seconds: float
    gputune_gap: float
    sklearn_gap: float
    excess: float
    score_difference: float


def run(options: Namespace) -> int:
    """Measure, print and write; return 0, or 1 where a solution is too far from optimal to compare times."""
    machine = describe_machine(with_card=False)
    rows = [compare(penalty, CANDIDATES) for penalty in ("l2", "l1")]
    text = _table(rows)
    if any(row.excess > ROUNDING for row in rows):
        print(f"{text}\nNO SPEED: gputune's solutions are further from optimal than scikit-learn's.")
        return 1
    title = "Searching the logistic regression"
    return publish(options.out, "logistic", title, machine, __doc__ or "", text, rows=rows)


def compare(penalty: str, candidates: int) -> Row:
    """Search one penalty with both libraries, scikit-learn on all cores."""
    X, y = load_digits(return_X_y=True)
    X = StandardScaler().fit_transform(X)
    grid = {"C": np.geomspace(1e-3, 1e3, candidates)}
    folds = list(StratifiedKFold(FOLDS).split(X, y))
    own = gputune.sklearn.LogisticRegression(l1_ratio=float(penalty == "l1"), tol=OWN_TOLERANCE[penalty])
    solver = {
        "l2": {"solver": "newton-cholesky", "tol": CHOLESKY_TOLERANCE},
        "l1": {"solver": "saga", "l1_ratio": 1.0, "tol": SAGA_TOLERANCE, "max_iter": SAGA_STEPS, "random_state": 0},
    }
    theirs = LogisticRegression(**solver[penalty])
    common = {"cv": folds, "scoring": "neg_log_loss", "refit": False}
    own_seconds, own_scores = timed(gputune.sklearn.GridSearchCV(own, grid, **common), X, y)
    seconds, scores = timed(GridSearchCV(theirs, grid, n_jobs=-1, **common), X, y)
    train, _ = folds[0]
    gaps = optimality({"gputune": own, "sklearn": theirs}, X[train], y[train], grid["C"], penalty)
    excess = float((gaps["gputune"] - gaps["sklearn"]).max())
    worst = [float(gaps[name].max()) for name in ("gputune", "sklearn")]
    difference = float(np.nanmax(np.abs(own_scores - scores)))
    return Row(penalty, candidates, own_seconds, seconds, *worst, excess, difference)


def timed(search: GridSearchCV, X: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the seconds that a search takes with everything that a user waits for, and its mean scores."""
    stop_workers()
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(X, y)
    return time.perf_counter() - begin, search.cv_results_["mean_test_score"]


def optimality(
    models: dict[str, Any], X: np.ndarray, y: np.ndarray, values: np.ndarray, penalty: str
) -> dict[str, np.ndarray]:
    """Return by how much each library's objectives lie above the minimum, for some values of C on these rows."""
    sharp = clone(models["gputune"]).set_params(tol=1e-10)
    gaps: dict[str, list[float]] = {name: [] for name in models}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for C in values[:: max(1, len(values) // LOOKED_AT)]:
            found = {}
            for name, model in {**models, "minimum": sharp}.items():
                fitted = clone(model).set_params(C=float(C)).fit(X, y)
                found[name] = objective(fitted, X, y, float(C), penalty)
            for name, own in gaps.items():
                own.append(found[name] / min(found.values()) - 1)
    return {name: np.array(own) for name, own in gaps.items()}


def objective(fitted: Any, X: np.ndarray, y: np.ndarray, C: float, penalty: str) -> float:
    """Return ``C * sum of losses + penalty``, scikit-learn's objective."""
    logits = X @ fitted.coef_.T + fitted.intercept_
    loss = float((logsumexp(logits, axis=1) - logits[np.arange(len(y)), y]).sum())
    size = np.abs(fitted.coef_) if penalty == "l1" else fitted.coef_**2 / 2
    return C * loss + float(size.sum())


def _table(rows: list[Row]) -> str:
    head = [
        "penalty", "candidates x folds", "gputune, s", "scikit-learn on all cores, s", "times as fast",
        "worst objective over the minimum: gputune, scikit-learn", "largest difference of mean log loss",
    ]  # fmt: skip
    own, theirs = sum(r.gputune_seconds for r in rows), sum(r.sklearn_seconds for r in rows)
    lines = [
        (r.penalty, f"{r.candidates} x {FOLDS}", *_times(r.gputune_seconds, r.sklearn_seconds),
         f"{r.gputune_gap:.1e}, {r.sklearn_gap:.1e}", f"{r.score_difference:.1e}")
        for r in rows
    ]  # fmt: skip
    return table(head, [*lines, ("both", "", *_times(own, theirs))])


def _times(own: float, theirs: float) -> list[str]:
    return [f"{number:.1f}" for number in (own, theirs, theirs / own)]
