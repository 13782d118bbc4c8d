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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_cores import stop_workers
from benchmark_machine import write_both
from scipy.special import logsumexp
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.preprocessing import StandardScaler

import gputune.sklearn

FOLDS, CANDIDATES = 5, 60
ROUNDING = 1e-7  # share by which an objective may lie above the best one and count as equal
CHOLESKY_TOLERANCE, SAGA_TOLERANCE, SAGA_STEPS = 1e-6, 1e-3, 200
OWN_TOLERANCE = {"l2": 1e-5, "l1": 1e-4}
LOOKED_AT = 12  # values of C

Found = tuple[float, np.ndarray, list[np.ndarray]]
"""Seconds, split scores (C, F) and the coefficients with intercepts of each fit (F arrays of a candidate)."""


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


def run_logistic(out: Path, machine: dict[str, Any], *, candidates: int) -> int:
    """Measure, print and write; return 0, or 1 where a solution is too far from optimal to compare times."""
    rows = [compare(penalty, candidates) for penalty in ("l2", "l1")]
    text = markdown(machine, rows)
    print(text)
    if any(row.excess > ROUNDING for row in rows):
        print("NO SPEED: gputune's solutions are further from optimal than scikit-learn's.")
        return 1
    write_both(out, machine, "logistic", text, {**machine, "rows": [asdict(row) for row in rows]})
    return 0


def compare(penalty: str, candidates: int) -> Row:
    """Search one penalty with both libraries, scikit-learn on all cores."""
    X, y = load_digits(return_X_y=True)
    X = StandardScaler().fit_transform(X)
    grid = {"C": np.geomspace(1e-3, 1e3, candidates)}
    folds = list(StratifiedKFold(FOLDS).split(X, y))
    own = gputune.sklearn.LogisticRegression(l1_ratio=float(penalty == "l1"), tol=OWN_TOLERANCE[penalty])
    theirs = (
        LogisticRegression(solver="newton-cholesky", tol=CHOLESKY_TOLERANCE)
        if penalty == "l2"
        else LogisticRegression(
            solver="saga", l1_ratio=1.0, tol=SAGA_TOLERANCE, max_iter=SAGA_STEPS, random_state=0
        )
    )
    searches = {
        "gputune": lambda: gputune.sklearn.GridSearchCV(
            own, grid, cv=folds, scoring="neg_log_loss", refit=False
        ),
        "sklearn": lambda: GridSearchCV(
            theirs, grid, cv=folds, scoring="neg_log_loss", refit=False, n_jobs=-1
        ),
    }
    seconds, scores = {}, {}
    for name, make in searches.items():
        seconds[name], scores[name] = timed(make(), X, y)
    gaps = optimality({"gputune": own, "sklearn": theirs}, X, y, folds, grid["C"], penalty)
    excess = float((gaps["gputune"] - gaps["sklearn"]).max())
    difference = float(np.nanmax(np.abs(scores["gputune"] - scores["sklearn"])))
    return Row(
        penalty,
        candidates,
        seconds["gputune"],
        seconds["sklearn"],
        float(gaps["gputune"].max()),
        float(gaps["sklearn"].max()),
        excess,
        difference,
    )


def timed(search: GridSearchCV, X: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the seconds that a search takes with everything that a user waits for, and its mean scores."""
    stop_workers()
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(X, y)
    return time.perf_counter() - begin, search.cv_results_["mean_test_score"]


def optimality(
    models: dict[str, Any],
    X: np.ndarray,
    y: np.ndarray,
    folds: list[tuple[np.ndarray, np.ndarray]],
    values: np.ndarray,
    penalty: str,
) -> dict[str, np.ndarray]:
    """Return by how much each library's objectives lie above the minimum, for some values of C on one fold."""
    train, _ = folds[0]
    sharp = clone(models["gputune"]).set_params(tol=1e-10)
    gaps: dict[str, list[float]] = {name: [] for name in models}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for C in values[:: max(1, len(values) // LOOKED_AT)]:
            found = {}
            for name, model in {**models, "minimum": sharp}.items():
                fitted = clone(model).set_params(C=float(C)).fit(X[train], y[train])
                found[name] = objective(
                    fitted.coef_, fitted.intercept_, X[train], y[train], float(C), penalty
                )
            for name, own in gaps.items():
                own.append(found[name] / min(found.values()) - 1)
    return {name: np.array(own) for name, own in gaps.items()}


def objective(
    coef: np.ndarray, intercept: np.ndarray, X: np.ndarray, y: np.ndarray, C: float, penalty: str
) -> float:
    """Return ``C * sum of losses + penalty``, scikit-learn's objective."""
    logits = X @ coef.T + intercept
    loss = float((logsumexp(logits, axis=1) - logits[np.arange(len(y)), y]).sum())
    size: Callable[[np.ndarray], np.ndarray] = np.abs if penalty == "l1" else lambda w: w**2 / 2
    return C * loss + float(size(coef).sum())


def markdown(machine: dict[str, Any], rows: list[Row]) -> str:
    """Return the table."""
    lines = [
        f"# Searching the logistic regression: {machine['cpu']}, {machine['cores']} cores",
        "",
        f"{machine['date']}, commit {machine['commit']}, Python {machine['python']}, "
        + ", ".join(f"{name} {number}" for name, number in machine["versions"].items()),
        "",
        (__doc__ or "").strip(),
        "",
        "| penalty | candidates x folds | gputune, s | scikit-learn on all cores, s | times as fast | "
        "worst objective over the minimum: gputune, scikit-learn | largest difference of mean log loss |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.penalty} | {r.candidates} x {FOLDS} | {r.gputune_seconds:.1f} | {r.sklearn_seconds:.1f} | "
        f"{r.sklearn_seconds / r.gputune_seconds:.1f} | {r.gputune_gap:.1e}, {r.sklearn_gap:.1e} | "
        f"{r.score_difference:.1e} |"
        for r in rows
    ]
    own, theirs = sum(r.gputune_seconds for r in rows), sum(r.sklearn_seconds for r in rows)
    lines.append(f"| both | | {own:.1f} | {theirs:.1f} | {theirs / own:.1f} | | |")
    return "\n".join(lines) + "\n"
