"""scikit-learn's side of the benchmark: MLPClassifier with the work's settings and nothing that stops it early."""

import warnings

from benchmark_cores import over_cores
from benchmark_work import Fold, Outcome, Trial, Work
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier


def train_with_sklearn(work: Work, cores: int) -> Outcome:
    """Train the work with one process a core."""
    return over_cores(fit, work, cores)


def fit(fold: Fold, trial: Trial, epochs: int) -> float:
    """Train one classifier on one fold; float32 rows make it compute in float32."""
    X, y, X_valid, y_valid = fold
    network = MLPClassifier(
        hidden_layer_sizes=(trial["width"], trial["width"]),
        learning_rate_init=trial["lr"],
        batch_size=min(trial["batch_size"], len(X)),  # a larger one is a warning
        alpha=0,
        max_iter=epochs,
        tol=0,
        n_iter_no_change=epochs + 1,
        random_state=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a fixed number of epochs is what is asked for
        network.fit(X, y)
    return float(network.score(X_valid, y_valid))
