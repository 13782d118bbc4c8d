"""Random search on iris beside scikit-learn: a logistic regression, then a multilayer perceptron.

    python scripts/examples/iris_random_search.py

The logistic regression is solved to convergence by both, so the scores are equal. The perceptron is trained by
both for the same epochs with Adam, from other starting weights, so its scores are alike but not the same.
"""

import warnings
from typing import Any

import numpy as np
import sklearn
from scipy.stats import loguniform
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, RandomizedSearchCV, StratifiedKFold
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

import gputune

N_TRIALS = 6
EPOCHS = 50

Folds = list[tuple[np.ndarray, np.ndarray]]  # (train, valid) rows of each
Row = tuple[dict[str, Any], float, float]  # configuration, gputune's mean accuracy, scikit-learn's


def search_logistic(X: np.ndarray, y: np.ndarray, folds: Folds) -> list[Row]:
    """Return one row for each drawn C and penalty."""
    space = {"C": [0.1, 1, 10, 100], "l1_ratio": [0, 1]}  # 0 is the l2 penalty, 1 is l1
    study = gputune.tune(
        "logistic", X, y, space=space, n_trials=N_TRIALS, include_default=False, cv=folds, random_state=0,
        verbose=0,
    )  # fmt: skip
    # Before 1.8 scikit-learn reads l1_ratio only beside penalty="elasticnet", which later releases deprecate.
    older = tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 8)
    penalty = {"penalty": "elasticnet"} if older else {}
    logistic = LogisticRegression(solver="saga", tol=1e-8, max_iter=20_000, random_state=0, **penalty)
    # The same seed draws the same configurations.
    search = RandomizedSearchCV(
        Pipeline([("scale", StandardScaler()), ("logistic", logistic)]),
        {f"logistic__{key}": values for key, values in space.items()},
        n_iter=N_TRIALS, random_state=0, cv=folds, refit=False,
    )  # fmt: skip
    return side_by_side(study, search, X, y)


def search_mlp(X: np.ndarray, y: np.ndarray, folds: Folds) -> list[Row]:
    """Return one row for each drawn rate, batch size and width."""
    space = {"lr": loguniform(1e-3, 1e-1), "batch_size": [8, 16, 32], "width": [8, 16, 32, 64]}
    study = gputune.tune(
        "mlp", X, y, space=space, n_trials=N_TRIALS, include_default=False, cv=folds, optimizer="adam",
        max_epochs=EPOCHS, epoch="last", verbose=0,
    )  # fmt: skip
    mlp = MLPClassifier(alpha=0, max_iter=EPOCHS, tol=0, n_iter_no_change=EPOCHS + 1, random_state=0)
    drawn = [  # gputune's own draws in scikit-learn's words, each as a grid of one point
        {
            "mlp__learning_rate_init": [trial.params["lr"]],
            "mlp__batch_size": [trial.params["batch_size"]],
            "mlp__hidden_layer_sizes": [(trial.params["width"], trial.params["width"])],
        }
        for trial in study.trials
    ]
    search = GridSearchCV(Pipeline([("scale", StandardScaler()), ("mlp", mlp)]), drawn, cv=folds, refit=False)
    return side_by_side(study, search, X, y)


def side_by_side(
    study: gputune.Study, search: GridSearchCV | RandomizedSearchCV, X: np.ndarray, y: np.ndarray
) -> list[Row]:
    """Run scikit-learn's search and return one row a trial; both have their trials in the order of the draws."""
    with warnings.catch_warnings():
        # saga crawls at C=100, and a perceptron trained for a fixed time is not meant to converge
        warnings.simplefilter("ignore", ConvergenceWarning)
        scores = search.fit(X, y).cv_results_["mean_test_score"]
    return [(trial.params, trial.score, score) for trial, score in zip(study.trials, scores)]


def show(title: str, rows: list[Row]) -> None:
    """Print the rows, best first."""
    print(f"\n{title}: mean accuracy of 5 folds\n gputune  scikit-learn  configuration")
    for params, ours, theirs in sorted(rows, key=lambda row: -row[1]):
        words = ", ".join(f"{k}={v:.4g}" for k, v in params.items())
        print(f"{ours:8.4f}  {theirs:12.4f}  {words}")


def main() -> None:
    """Run both searches on the same folds."""
    X, y = load_iris(return_X_y=True)
    folds = list(StratifiedKFold(5, shuffle=True, random_state=0).split(X, y))
    show("logistic regression", search_logistic(X, y, folds))
    show("multilayer perceptron", search_mlp(X, y, folds))


if __name__ == "__main__":
    main()
