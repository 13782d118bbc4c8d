"""Cross-validate a logistic regression on iris, in five folds, beside scikit-learn.

    python scripts/examples/iris_cross_validation.py

gputune solves the regression of all folds at once, each to convergence, so its scores are scikit-learn's.
"""

import numpy as np
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import gputune

SCORES = ("accuracy", "neg_log_loss")  # scikit-learn's names; greater is better

Folds = list[tuple[np.ndarray, np.ndarray]]  # (train, valid) rows of each


def with_gputune(X: np.ndarray, y: np.ndarray, folds: Folds, scoring: str) -> np.ndarray:
    """Return the score of each fold. A search of one trial, the default one (C=1, l2) is a cross-validation."""
    study = gputune.tune("logistic", X, y, n_trials=1, cv=folds, scoring=scoring, verbose=0)
    return np.array(study.best_trial.fold_scores)


def with_sklearn(X: np.ndarray, y: np.ndarray, folds: Folds, scoring: str) -> np.ndarray:
    """Return the score of each fold; gputune scales by each fold's training rows, hence the pipeline."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000))
    return np.array(cross_val_score(model, X, y, cv=folds, scoring=scoring))


def main() -> None:
    """Print both, fold by fold."""
    X, y = load_iris(return_X_y=True)
    # Iris is sorted by class, so the rows are shuffled. Both get the same folds.
    folds = list(StratifiedKFold(5, shuffle=True, random_state=0).split(X, y))
    for scoring in SCORES:
        ours, theirs = (score(X, y, folds, scoring) for score in (with_gputune, with_sklearn))
        print(f"\n{scoring:<12}  gputune  scikit-learn")
        for f, (a, b) in enumerate(zip(ours, theirs)):
            print(f"fold {f + 1:<7} {a:8.4f}  {b:12.4f}")
        print(f"mean         {ours.mean():8.4f}  {theirs.mean():12.4f}")


if __name__ == "__main__":
    main()
