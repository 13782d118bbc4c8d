"""Iris in three ways: cross-validation, random search, and hypergradient search.

    python scripts/examples/iris.py [cross-validation] [random-search] [descent]

The first two are compared with scikit-learn. Both libraries solve a logistic regression to
convergence, so its scores are equal. Both train a perceptron for the same epochs with Adam, but
from different starting weights, so its scores are similar but not equal.

A hypergradient search moves down the mean validation loss of 5 folds. It uses the derivative in the
logarithm of a hyperparameter. For C of the regression it uses implicit differentiation; for the
perceptron's learning rate it differentiates through training. A grid is trained on the same folds,
so the losses of the grid and of the path belong to the same curve.
"""

import math
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import sklearn
from scipy.stats import loguniform
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    RandomizedSearchCV,
    StratifiedKFold,
    cross_val_score,
)
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import gputune

# of the random search
N_TRIALS = 6
EPOCHS = 50
N_GRID = 61
DESCENT_EPOCHS = 20

X, y = load_iris(return_X_y=True)
# Iris is sorted by class, so the rows are shuffled. All models get the same folds.
FOLDS = list(StratifiedKFold(5, shuffle=True, random_state=0).split(X, y))


def cross_validation() -> None:
    """Print the scores of a logistic regression by both libraries, fold by fold."""
    # gputune scales by each fold's training rows, so scikit-learn needs a pipeline to do the same.
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000))
    for scoring in ("accuracy", "neg_log_loss"):  # scikit-learn's names; greater is better
        # A search of one trial, the default one (C=1, l2), is a cross-validation.
        study = gputune.tune("logistic", X, y, n_trials=1, cv=FOLDS, scoring=scoring, verbose=0)
        ours = np.array(study.best_trial.fold_scores)
        theirs = cross_val_score(model, X, y, cv=FOLDS, scoring=scoring)
        print(f"\n{scoring:<12}  gputune  scikit-learn")
        for f, (a, b) in enumerate(zip(ours, theirs)):
            print(f"fold {f + 1:<7} {a:8.4f}  {b:12.4f}")
        print(f"mean         {ours.mean():8.4f}  {theirs.mean():12.4f}")


def random_search() -> None:
    """Search both models with both libraries and print the trials, best first."""
    common = {
        "n_trials": N_TRIALS,
        "include_default": False,
        "cv": FOLDS,
        "random_state": 0,
        "verbose": 0,
    }
    # 0 is the l2 penalty, 1 is l1
    space: dict[str, Any] = {"C": [0.1, 1, 10, 100], "l1_ratio": [0, 1]}
    study = gputune.tune("logistic", X, y, space=space, **common)
    # Before 1.8 scikit-learn reads l1_ratio only together with penalty="elasticnet", which later
    # releases deprecate.
    older = tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 8)
    penalty = {"penalty": "elasticnet"} if older else {}
    logistic = LogisticRegression(
        solver="saga", tol=1e-8, max_iter=20_000, random_state=0, **penalty
    )
    search = RandomizedSearchCV(  # the same seed draws the same configurations
        make_pipeline(StandardScaler(), logistic),
        {f"logisticregression__{key}": values for key, values in space.items()},
        n_iter=N_TRIALS,
        random_state=0,
        cv=FOLDS,
        refit=False,
    )
    side_by_side("logistic regression", study, search)

    space = {"lr": loguniform(1e-3, 1e-1), "batch_size": [8, 16, 32], "width": [8, 16, 32, 64]}
    training = {"optimizer": "adam", "max_epochs": EPOCHS, "epoch": "last"}
    study = gputune.tune("mlp", X, y, space=space, **common, **training)
    mlp = MLPClassifier(
        alpha=0, max_iter=EPOCHS, tol=0, n_iter_no_change=EPOCHS + 1, random_state=0
    )
    drawn = [  # gputune's own draws in scikit-learn's words, each as a grid of one point
        {
            "mlpclassifier__learning_rate_init": [trial.params["lr"]],
            "mlpclassifier__batch_size": [trial.params["batch_size"]],
            "mlpclassifier__hidden_layer_sizes": [(trial.params["width"], trial.params["width"])],
        }
        for trial in study.trials
    ]
    search = GridSearchCV(make_pipeline(StandardScaler(), mlp), drawn, cv=FOLDS, refit=False)
    side_by_side("multilayer perceptron", study, search)


def side_by_side(
    title: str, study: gputune.Study, search: GridSearchCV | RandomizedSearchCV
) -> None:
    """Run scikit-learn's search and print both searches; their trials are in the order of the
    draws.
    """
    with warnings.catch_warnings():
        # saga crawls at C=100, and a perceptron trained for a fixed time is not meant to converge
        warnings.simplefilter("ignore", ConvergenceWarning)
        scores = search.fit(X, y).cv_results_["mean_test_score"]
    print(f"\n{title}: mean accuracy of 5 folds\n gputune  scikit-learn  configuration")
    for trial, theirs in sorted(zip(study.trials, scores), key=lambda pair: -pair[0].score):
        words = ", ".join(f"{k}={v:.4g}" for k, v in trial.params.items())
        print(f"{trial.score:8.4f}  {theirs:12.4f}  {words}")


@dataclass(frozen=True)
class Descent:
    """A path of the hyperparameter ``name``, with its trials by outer step.

    It also has a grid of values with their losses.
    """

    name: str
    path: list[gputune.Trial]
    grid: np.ndarray
    losses: np.ndarray

    @property
    def values(self) -> list[float]:
        """The hyperparameter at each point of the path."""
        return [trial.params[self.name] for trial in self.path]

    def slope(self, trial: gputune.Trial) -> tuple[float, float]:
        """The slope of the mean loss in the logarithm, and its standard error over the folds."""
        return tuple(trial.detail[key][self.name][0][0] for key in ("slope", "slope_error"))


def descend(
    model: str, name: str, start: float, low: float, high: float, **options: Any
) -> Descent:
    """Search one hyperparameter by hypergradients from ``start`` within [low, high].

    Then train a grid over the whole range.
    """
    common = {"n_trials": 0, "include_default": False, "cv": FOLDS, "verbose": 0, **options}
    space = {name: loguniform(low, high)}  # nothing is drawn from it: it sets the bounds
    study = gputune.tune(
        model, X, y, space=space, include=[{name: start}], method="hypergradient", **common
    )
    grid = np.geomspace(low, high, N_GRID)
    points = [{name: value} for value in grid]
    beside = gputune.tune(
        model, X, y, include=points, scoring="neg_log_loss", epoch="last", **common
    )
    losses = [-trial.score if np.isfinite(trial.score) else math.inf for trial in beside.trials]
    return Descent(
        name, sorted(study.trials, key=lambda trial: trial.origin[1]), grid, np.array(losses)
    )


def table(descent: Descent) -> str:
    """Return the path: value, loss and slope in the logarithm, with standard errors."""
    lines = [f"step {descent.name:>10}     loss  +-           slope  +-"]
    for trial, value in zip(descent.path, descent.values):
        slope, error = descent.slope(trial)
        lines.append(
            f"{trial.origin[1]:4} {value:10.4g}  {-trial.score:7.4f}  {trial.std_error:6.4f}  "
            f"{slope:8.4f}  "
            f"{error:6.4f}{'' if trial.detail['mode'] == 'exact' else '  by differences'}"
        )
    return "\n".join(lines)


def verdict(descent: Descent) -> str:
    """Return the distance of the path's best point from the best point of the grid.

    ``tune`` returns the path's best point.
    """
    name = descent.name
    grid = descent.grid
    losses = descent.losses
    best = max(descent.path, key=lambda trial: trial.score)
    value = best.params[name]
    i = int(losses.argmin())
    excess = -best.score - losses[i]
    slope, error = descent.slope(descent.path[-1])
    sign = "clear" if abs(slope) >= error else "not, it is within its standard error"
    return (
        f"path:  {name} = {value:.4g}, loss {-best.score:.4f}, the best of {len(descent.path)} "
        f"points\ngrid:  {name} = {grid[i]:.4g}, loss {losses[i]:.4f}, the best of {len(grid)}\n"
        f"apart: a factor of {math.exp(abs(math.log(value / grid[i]))):.2g} in {name}; "
        f"{excess:+.4f} in loss, {excess / best.std_error:.2g} of its standard error over the "
        f"folds\nend:   the sign of the last slope is {sign}"
    )


def descent() -> None:
    """Search both hyperparameters by hypergradients and print each path next to its grid."""
    rate = {"optimizer": "adam", "max_epochs": DESCENT_EPOCHS}
    for title, path in (
        ("logistic regression: descent on C, from 1", descend("logistic", "C", 1.0, 0.1, 1000)),
        (
            f"multilayer perceptron, Adam, {DESCENT_EPOCHS} epochs: descent on the learning rate, "
            "from 0.0001",
            descend("mlp", "lr", 1e-4, 1e-5, 1, **rate),
        ),
    ):
        print(f"\n{title}\n\n{table(path)}\n\n{verdict(path)}")


PARTS = {"cross-validation": cross_validation, "random-search": random_search, "descent": descent}

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
