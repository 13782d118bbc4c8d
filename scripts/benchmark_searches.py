"""The searches whose time to quality is measured: random search and halving by gputune, Optuna and scikit-learn.

Each gets the same candidates, folds and epochs, and says when it came to know which score. Halving keeps a third at
epochs 1, 3, 9, ... in each of them. A score is the fold mean after the last epoch that the candidate has trained.
"""

import functools
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_cores import one_thread_each, read_folds, write_folds
from benchmark_gputune import built_again
from benchmark_torch import accuracy, denormals_as_zero, train
from benchmark_work import Trial, Work

import gputune


@dataclass(frozen=True)
class Event:
    """After so many seconds the fold mean of a candidate (its position in the list) was known."""

    seconds: float
    candidate: int
    score: float


Search = Callable[[Work, int], list[Event]]
"""The work, whose trials are the candidates, and the number of cores -> what became known, and when."""


class Heard(gputune.callbacks.Callback):
    """Collects the trials that have ended."""

    def __init__(self) -> None:
        self.begin, self.events = time.monotonic(), list[Event]()

    def on_trials_end(self, trials: gputune.Study) -> None:
        """Called where trials leave at a rung, and at the end."""
        seconds = time.monotonic() - self.begin
        self.events += [Event(seconds, trial.number, trial.score) for trial in trials.trials]


def search_with_gputune(method: str, work: Work, cores: int) -> list[Event]:
    """Search; a candidate is heard of when it has left or ended."""
    heard = Heard()
    with built_again():
        gputune.tune(
            "mlp", work.X, work.y, n_trials=0, include=work.trials, include_default=False, cv=work.folds,
            method=method, optimizer="adam", max_epochs=work.epochs, epoch="last", verbose=0, device="cpu",
            callbacks=[heard],
        )  # fmt: skip
    return heard.events


def search_with_optuna(pruned: bool, work: Work, cores: int) -> list[Event]:
    """Search with the PyTorch loop, one process a core; a candidate is heard of after every epoch."""
    import optuna
    from benchmark_optuna_loop import share

    halving = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    with recorded() as (begin, path), tempfile.TemporaryDirectory() as folder:
        objective = functools.partial(_train_together, write_folds(work, folder), path, work.epochs, pruned)
        share(work, range(len(work.trials)), objective, halving if pruned else None, cores, folder)
        return [Event(at - begin, candidate, score) for at, candidate, _, score in _read(path)]


def _train_together(folds: str, path: str, epochs: int, pruned: bool, trial: Any, params: Trial) -> float:
    """Train one candidate on all folds, epoch by epoch, until the end or its pruning."""
    import optuna

    rows = read_folds(folds)
    runs, score = [train(fold, params) for fold in rows], 0.0
    # The pruner looks at no other epochs, and to report one is a write to the disk.
    rungs = {3**k for k in range(epochs) if 3**k < epochs} if pruned else set()
    with denormals_as_zero():
        for epoch in range(1, epochs + 1):
            score = float(np.mean([accuracy(next(run), fold) for run, fold in zip(runs, rows)]))
            _record(path, trial.user_attrs["position"], epoch, score)
            if epoch in rungs:
                trial.report(score, epoch)
                if trial.should_prune():
                    raise optuna.TrialPruned
    return score


def search_with_sklearn(halving: bool, work: Work, cores: int) -> list[Event]:
    """Search with one process a core; a candidate is heard of after the last fold of a rung."""
    from sklearn.experimental import enable_halving_search_cv  # noqa: F401
    from sklearn.model_selection import HalvingRandomSearchCV, RandomizedSearchCV

    with recorded() as (begin, path):
        scoring = functools.partial(_scored, path, [trial["lr"] for trial in work.trials])
        # Lists of one value each: the search draws all of them, in an order of its own.
        space = [_sklearn_space(trial) for trial in work.trials]
        common = {
            "scoring": scoring,
            "cv": work.folds,
            "refit": False,
            "random_state": 0,
            "error_score": "raise",
            "return_train_score": False,
        }
        if halving:
            search = HalvingRandomSearchCV(
                _sklearn_model(work.epochs), space, resource="mlpclassifier__max_iter", factor=3, min_resources=1,
                max_resources=work.epochs, n_candidates=len(space), **common,
            )  # fmt: skip
        else:
            search = RandomizedSearchCV(_sklearn_model(work.epochs), space, n_iter=len(space), **common)
        with warnings.catch_warnings(), one_thread_each(cores):
            warnings.simplefilter(
                "ignore"
            )  # the epochs are what is asked for; a batch may be larger than a small fold
            search.fit(work.X, work.y)
        return _of_all_folds(_read(path), len(work.folds), begin)


def _sklearn_model(epochs: int) -> Any:
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    network = MLPClassifier(alpha=0, max_iter=epochs, tol=0, n_iter_no_change=epochs + 1, random_state=0)
    return make_pipeline(StandardScaler(), network)


def _sklearn_space(trial: Trial) -> dict[str, list[Any]]:
    return {
        "mlpclassifier__hidden_layer_sizes": [(trial["width"], trial["width"])],
        "mlpclassifier__learning_rate_init": [trial["lr"]],
        "mlpclassifier__batch_size": [trial["batch_size"]],
    }


def _scored(path: str, rates: list[float], model: Any, X: np.ndarray, y: np.ndarray) -> float:
    score, network = float(model.score(X, y)), model.named_steps["mlpclassifier"]
    _record(path, rates.index(network.learning_rate_init), network.max_iter, score)
    return score


def _of_all_folds(lines: list[tuple[float, int, int, float]], folds: int, begin: float) -> list[Event]:
    """Return the means of candidates at the moments when the last fold's score was there."""
    scores: dict[tuple[int, int], list[float]] = {}
    events = []
    for at, candidate, epochs, score in lines:
        found = scores.setdefault((candidate, epochs), [])
        found.append(score)
        if len(found) == folds:
            events.append(Event(at - begin, candidate, float(np.mean(found))))
    return events


@contextmanager
def recorded() -> Iterator[tuple[float, str]]:
    """Yield the time now, and the path of a file in which processes record scores."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores"
        path.touch()
        yield time.monotonic(), str(path)


def _record(path: str, candidate: int, epochs: int, score: float) -> None:
    line = json.dumps([time.monotonic(), candidate, epochs, score]) + "\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(file, line.encode())  # one write: lines of several processes do not mix
    finally:
        os.close(file)


def _read(path: str) -> list[tuple[float, int, int, float]]:
    """Return time, candidate, epochs and score of each line, in the order of time."""
    return sorted(tuple(json.loads(line)) for line in Path(path).read_text().splitlines())


SEARCHES: dict[str, tuple[str, Search]] = {
    "gputune, random": ("gputune", functools.partial(search_with_gputune, "random")),
    "gputune, halving": ("gputune", functools.partial(search_with_gputune, "halving")),
    "Optuna, random": ("optuna", functools.partial(search_with_optuna, False)),
    "Optuna, successive halving pruner": ("optuna", functools.partial(search_with_optuna, True)),
    "scikit-learn, RandomizedSearchCV": ("sklearn", functools.partial(search_with_sklearn, False)),
    "scikit-learn, HalvingRandomSearchCV": ("sklearn", functools.partial(search_with_sklearn, True)),
}
"""Name -> the package that it needs, and the search."""
