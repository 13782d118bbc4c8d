"""scikit-learn's side of the benchmark: MLPClassifier with the work's settings, without early
stopping.
"""

import functools
import warnings
from collections import defaultdict
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

from benchmark.work import (
    Event,
    Fold,
    Trial,
    Work,
    one_thread_each,
    over_cores,
    read,
    record,
    recorded,
)


def fit(fold: Fold, trial: Trial, epochs: int) -> float:
    """Train one classifier on one fold; with float32 rows it computes in float32."""
    X, y, X_valid, y_valid = fold
    network = _network(epochs).set_params(**_words(trial))
    network.batch_size = min(network.batch_size, len(X))  # a larger one is a warning
    with warnings.catch_warnings():
        # A fixed number of epochs is intended, so the warning about it is ignored.
        warnings.simplefilter("ignore", ConvergenceWarning)
        network.fit(X, y)
    return float(network.score(X_valid, y_valid))


train = functools.partial(over_cores, fit)  # one process a core


def _network(epochs: int) -> MLPClassifier:
    return MLPClassifier(
        alpha=0, max_iter=epochs, tol=0, n_iter_no_change=epochs + 1, random_state=0
    )


def _words(trial: Trial) -> dict[str, Any]:
    sizes = (trial["width"], trial["width"])
    return {
        "hidden_layer_sizes": sizes,
        "learning_rate_init": trial["lr"],
        "batch_size": trial["batch_size"],
    }


def search(method: str, work: Work, cores: int) -> list[Event]:
    """Search, "random" or "halving", with one process per core.

    A candidate's score is recorded after the last fold of a rung.
    """
    from sklearn.experimental import enable_halving_search_cv  # noqa: F401
    from sklearn.model_selection import HalvingRandomSearchCV, RandomizedSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), _network(work.epochs))
    # Each candidate is a grid of one point. The search draws all of them, in its own order.
    space = [
        {f"mlpclassifier__{key}": [value] for key, value in _words(trial).items()}
        for trial in work.trials
    ]
    with recorded() as (begin, path):
        scoring = functools.partial(_scored, path, [trial["lr"] for trial in work.trials])
        common = {
            "scoring": scoring,
            "cv": work.folds,
            "refit": False,
            "random_state": 0,
            "error_score": "raise",
        }
        if method == "halving":
            searching = HalvingRandomSearchCV(
                model,
                space,
                resource="mlpclassifier__max_iter",
                factor=3,
                min_resources=1,
                max_resources=work.epochs,
                n_candidates=len(space),
                return_train_score=False,
                **common,
            )
        else:
            searching = RandomizedSearchCV(model, space, n_iter=len(space), **common)
        with warnings.catch_warnings(), one_thread_each(cores):
            # The number of epochs is intended, and a batch may be larger than a small fold.
            warnings.simplefilter("ignore")
            searching.fit(work.X, work.y)
        scores = defaultdict[tuple[int, int], list[float]](list)
        events = []
        for at, candidate, epochs, score in read(path):
            (found := scores[candidate, epochs]).append(score)
            if len(found) == len(work.folds):
                events.append(Event(at - begin, candidate, float(np.mean(found))))
        return events


def _scored(path: str, rates: list[float], model: Any, X: np.ndarray, y: np.ndarray) -> float:
    score = float(model.score(X, y))
    network = model.named_steps["mlpclassifier"]
    record(path, rates.index(network.learning_rate_init), network.max_iter, score)
    return score
