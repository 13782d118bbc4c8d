"""A search of the scikit-learn face as a study file: its trials, for ``gputune.Study.open`` and the command line."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import sklearn
from sklearn.model_selection._search import BaseSearchCV

from gputune.errors import InputError
from gputune.sklearn.base import last_step
from gputune.study.rows import State, to_json
from gputune.study.store import Candidate, Result, Store
from gputune.tuning.record import versions
from gputune.types import Json, first_metric

Place = str | os.PathLike[str]


def check_new(path: Place) -> None:
    """Raise InputError where a study file cannot be made at ``path``: a search of this face is never resumed."""
    if Path(path).exists():
        raise InputError(
            f"study={str(path)!r} exists already, and this search begins a new one; give it a path of its own, or "
            "remove the file."
        )
    if not Path(path).parent.is_dir():
        raise InputError(f"study={str(path)!r}: the folder does not exist; make it first.")


def write_search(path: Place, search: BaseSearchCV, epochs: Sequence[int] | None) -> None:
    """Write a fitted search; ``epochs`` is how long each candidate trained, None where that is not known."""
    results = search.cv_results_
    candidates = [
        Candidate(number, {name: _storable(value) for name, value in params.items()}, origin)
        for number, (params, origin) in enumerate(zip(results["params"], _origins(results)))
    ]
    first = _metric(search, results)
    known = [name.removeprefix("mean_test_") for name in results if name.startswith("mean_test_")]
    metrics = [first, *(name for name in known if name != first)]
    folds = [[results[f"split{f}_test_{name}"] for f in range(search.n_splits_)] for name in metrics]
    scores = np.array(folds).T  # (C, F, M)
    seconds = search.n_splits_ * (results["mean_fit_time"] + results["mean_score_time"])
    rows = zip(scores, seconds.tolist(), epochs or [1] * len(candidates))
    with Store.create(path, _meta(search, metrics)) as store:
        store.add_trials(candidates)
        store.finish(_result(number, *row) for number, row in enumerate(rows))


def _origins(results: Json) -> list[str | tuple[int, int]]:
    """Return where each candidate comes from: a point of a descent from its start and outer step."""
    if "outer_step" not in results:
        return ["random"] * len(results["params"])
    places = zip(results["start"].tolist(), results["outer_step"].tolist())
    return [(start, step) if step else "random" for start, step in places]


def _meta(search: BaseSearchCV, metrics: Sequence[str]) -> Json:
    several = (
        [{"name": name, "scorer": name, "positive": None} for name in metrics] if len(metrics) > 1 else []
    )
    return {
        "metrics": several,
        "face": "sklearn",
        "model": type(last_step(search.estimator)[1]).__name__,
        "method": type(search).__name__,
        "scoring": _score_name(search),
        "folds": search.n_splits_,
        "versions": versions(),
    }


def _result(number: int, scores: np.ndarray, seconds: float, epochs: int) -> Result:
    """Return the result of a trial that was scored (F, M) after its last epoch alone."""
    scores = scores if scores.shape[1] > 1 else scores[:, 0]
    curve = np.full((epochs, *scores.shape), np.nan)
    curve[-1] = scores
    folds = first_metric(scores, axes=1)
    state: State = "complete" if np.isfinite(folds).all() else "failed"
    return Result(number, state, float(folds.mean()), tuple(folds.tolist()), epochs, seconds, curve)


def _metric(search: BaseSearchCV, results: Mapping[str, object]) -> str:
    """Return the metric that chooses: the one of ``refit``, or the first of many."""
    if "mean_test_score" in results:
        return "score"
    if isinstance(search.refit, str):
        return search.refit
    return next(name.removeprefix("mean_test_") for name in results if name.startswith("mean_test_"))


def _score_name(search: BaseSearchCV) -> str:
    """Return what the scores are, for a reader."""
    if isinstance(search.refit, str):
        return search.refit
    scoring = search._effective_scoring()
    if isinstance(scoring, str):
        return scoring
    if scoring is None:
        return "r2" if sklearn.base.is_regressor(search.estimator) else "accuracy"
    if callable(scoring):
        return getattr(scoring, "__name__", type(scoring).__name__)
    return str(next(iter(scoring)))


def _storable(value: object) -> object:
    """Return a value of a configuration as a file can hold it: as text where it can in no other way."""
    with suppress(InputError):
        to_json(value)
        return value
    return repr(value)
