"""Versions of scikit-learn's searches that train all candidates and folds together.

Everything else is scikit-learn's own code. A search can also write its trials to a study file, for
``gputune.Study.open`` and the command line.
"""

import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from numbers import Integral, Real
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from sklearn import model_selection
from sklearn.base import BaseEstimator, is_regressor
from sklearn.model_selection._search import BaseSearchCV
from sklearn.pipeline import Pipeline
from sklearn.utils import Bunch
from sklearn.utils._param_validation import Interval

from gputune.ground.annotations import StrPath
from gputune.ground.errors import InputError, warn
from gputune.ground.types import Config
from gputune.sklearn.base import FusedEstimator, constructor, last_step
from gputune.sklearn.dataset import as_sliced
from gputune.sklearn.replay import HookedMemory, SearchRun, with_hook
from gputune.spaces.distributions import to_scipy
from gputune.study.rows import ResultState
from gputune.study.store import Candidate, Result, Store
from gputune.study.values import to_json
from gputune.tuning.record import versions


def reason_to_train_separately(estimator: BaseEstimator, space: object) -> str | None:
    """Return the reason why gputune cannot train the candidates of a search together, or None."""
    prefix, last = last_step(estimator)
    name = type(last).__name__
    if not isinstance(last, FusedEstimator):
        return f"{name} is not an estimator of gputune"
    if type(last).fit is not FusedEstimator.fit:
        return f"{name} overrides fit"
    if not prefix:
        return None
    if type(estimator)._fit is not Pipeline._fit or type(estimator).fit is not Pipeline.fit:
        return f"{type(estimator).__name__} overrides how a Pipeline fits its steps"
    for part in space if isinstance(space, list) else [space]:
        for key in (prefix.removesuffix("__"), "steps", "memory"):
            if isinstance(part, Mapping) and key in part:
                return f"the space contains {key!r}, which changes more than a parameter"
    return None


class FusedSearch(BaseSearchCV):  # type: ignore[misc]  # scikit-learn has no types
    """The mixin that makes a scikit-learn search train its candidates together.

    A search class inherits from the mixin first, then from scikit-learn's class.
    """

    _space_name: ClassVar[str]
    """The name of the parameter that holds the space."""
    _run: SearchRun | None = None
    """The state of the ``fit`` call that is in progress, or None."""

    def fit(self, X: object, y: object = None, **params: object) -> Self:
        """Run the search, and refit the best candidate on all rows.

        Args:
            X: the rows, as the estimator takes them.
            y: the targets.
            **params: params of scikit-learn's search: ``sample_weight``, ``groups`` and everything
                that is routed.

        Returns:
            The search.

        Raises:
            InputError: ``study`` exists already, or its folder does not exist. The errors of
                scikit-learn's search are raised too.
        """
        X = as_sliced(X)
        if isinstance(self.study, str | os.PathLike):  # scikit-learn refuses other types
            path = Path(self.study)
            if path.exists():  # the scikit-learn API never resumes a search
                raise InputError(
                    "study",
                    "must be a new path, because this search begins a new study",
                    got=str(self.study),
                    remedy="Choose another path, or remove the file.",
                )
            if not path.parent.is_dir():
                raise InputError(
                    "study",
                    "must lie in an existing folder",
                    got=str(self.study),
                    remedy="Create the folder first.",
                )
        reason = reason_to_train_separately(self.estimator, getattr(self, self._space_name))
        # scikit-learn refuses a class in place of an estimator.
        if reason is not None and not isinstance(self.estimator, type):
            self._leave_to_own_loop(reason)
        with override(self, self._overrides(together=reason is None)):
            run = self._make_run(X, y) if reason is None else None
            with override(self, {"_run": run}):
                super().fit(X, y, **params)
        # The refitted pipeline gets the user's own memory back.
        memory = getattr(getattr(self, "best_estimator_", None), "memory", None)
        if isinstance(memory, HookedMemory):
            self.best_estimator_.memory = memory.memory
        if self.study is not None:
            write_search(self.study, self, None if run is None else run.epochs)
        return self

    def _make_run(self, X: object, y: object) -> SearchRun:
        """Return the object that trains the candidates during one ``fit`` call.

        X and y are not checked yet.
        """
        del X, y
        deadline = None
        if isinstance(self.timeout, Real):
            deadline = time.monotonic() + float(self.timeout)
        return SearchRun(self.estimator, self.cv, deadline)

    def _overrides(self, *, together: bool) -> dict[str, object]:
        """Return the parameters and attributes that gputune changes while scikit-learn's search
        runs."""
        overrides = {
            self._space_name: to_scipy(getattr(self, self._space_name)),
            "scoring": self._effective_scoring(),
        }
        if self.pre_dispatch is None:
            overrides["pre_dispatch"] = "2*n_jobs"
        if together:
            # n_jobs=1, because the replay needs scikit-learn's loop in this process.
            overrides |= {"estimator": with_hook(self.estimator, self.device), "n_jobs": 1}
            # An iterable of splits may be a generator, but is read more than once. A text and a
            # splitter have a method ``split``.
            if isinstance(self.cv, Iterable) and not hasattr(self.cv, "split"):
                overrides["cv"] = list(self.cv)
        return overrides

    def _effective_scoring(self) -> object:
        """Return the scoring by which the search ranks its candidates."""
        return self.scoring

    def _leave_to_own_loop(self, reason: str) -> None:
        """Warn the user that scikit-learn's loop trains the candidates one by one, for a given
        reason."""
        message = (
            f"{type(self).__name__} cannot train these candidates together, because {reason}. "
            "scikit-learn's own loop fits them one by one."
        )
        without_effect = [
            name for name in ("device", "timeout") if getattr(self, name) not in (None, "auto")
        ]
        if without_effect:
            message = f"{message} No effect: {', '.join(without_effect)}."
        warn(message)

    def _get_routed_params_for_fit(self, params: object) -> Bunch:
        routed = super()._get_routed_params_for_fit(params)
        if self._run is not None:
            self._run.fit_params = routed.estimator.fit
            self._run.split_params = routed.splitter.split
        return routed

    def _run_search(
        self,
        evaluate_candidates: Callable[..., dict[str, np.ndarray]],
        *,
        callback_ctx: object = None,
    ) -> None:
        if self._run is not None:
            evaluate_candidates = functools.partial(self._run.evaluate, evaluate_candidates)
        # since scikit-learn 1.9
        context = {} if callback_ctx is None else {"callback_ctx": callback_ctx}
        super()._run_search(evaluate_candidates, **context)


@contextmanager
def override(search: object, overrides: Mapping[str, object]) -> Iterator[None]:
    """Temporarily replace attributes of a search inside a ``with`` block."""
    before = {name: getattr(search, name) for name in overrides}
    vars(search).update(overrides)
    try:
        yield
    finally:
        vars(search).update(before)


EXTRAS: Config = {"device": "auto", "study": None, "timeout": None}
"""The parameters that gputune adds to scikit-learn's searches, with their defaults."""

CONSTRAINTS: dict[str, list[object]] = {
    "device": [str],
    "study": [str, os.PathLike, None],
    "timeout": [Interval(Real, 0, None, closed="neither"), None],
    "pre_dispatch": [Integral, str, None],
}

_TOGETHER = """

    If the estimator is from gputune, or a Pipeline that ends in one, all candidates train in all
    folds as one tensor program. scikit-learn then evaluates them. A transformer of a pipeline is
    fitted once per fold for all candidates with the same parameters of the transformer. Any other
    estimator is left to scikit-learn's own loop, with a warning.

    Candidates, folds, scores, ranks, ``cv_results_`` and all attributes are scikit-learn's. Each
    fit equals the estimator's own ``fit`` on the rows of the fold, up to rounding. Members train to
    their last epoch, unless the estimator's own rule ends them (``tol`` and ``n_iter_no_change`` of
    an MLP). Their random numbers come from the estimator's ``random_state``. The search's own
    ``random_state`` is for the candidates.

    ``mean_fit_time`` is the share of one fit in the common training time, and ``std_fit_time`` is
    0. Callbacks (since scikit-learn 1.9) are notified of every fit of a candidate, and of a
    transformer's fit in the refit.

    Further parameters and the attributes after ``fit`` are those of scikit-learn's class, see
    https://scikit-learn.org/stable/modules/grid_search.html.

    Args:
        device: device on which candidates train. "auto" [default] uses the estimator's own
            ``device``.
        study: path of a new study file that keeps the trials after the search, for
            ``gputune.Study.open`` and ``gputune trials``. None: no file.
        timeout: seconds (above 0) after which no fit continues. Fits that have not ended get
            ``error_score``. None: no limit.
        n_jobs: accepted, without effect if candidates train together.
        pre_dispatch: accepted, without effect if candidates train together.

    Raises:
        InputError: ``study`` exists already, or its folder does not exist. It is raised by ``fit``,
            like scikit-learn's errors.
"""


class RandomizedSearchCV(FusedSearch, model_selection.RandomizedSearchCV):  # type: ignore[misc]
    __doc__ = f"""scikit-learn's RandomizedSearchCV, training candidates together.{_TOGETHER}
    Note:
        ``param_distributions`` may hold Optuna distributions too.

    Example:
        >>> from gputune.sklearn import MLPClassifier, RandomizedSearchCV
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> estimator = MLPClassifier(max_iter=20, random_state=0)
        >>> rates = {{"learning_rate_init": [0.0001, 0.001, 0.01, 0.1]}}
        >>> search = RandomizedSearchCV(estimator, rates, n_iter=3, cv=3, random_state=0)
        >>> search.fit(X, y).score(X, y) > 0.9
        True
    """

    _space_name = "param_distributions"
    _parameter_constraints: ClassVar = (
        model_selection.RandomizedSearchCV._parameter_constraints | CONSTRAINTS
    )

    __init__ = constructor(model_selection.RandomizedSearchCV, EXTRAS)


class GridSearchCV(FusedSearch, model_selection.GridSearchCV):  # type: ignore[misc]
    __doc__ = f"""scikit-learn's GridSearchCV, training candidates together.{_TOGETHER}
    Example:
        >>> from gputune.sklearn import MLPClassifier, GridSearchCV
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> estimator = MLPClassifier(max_iter=20, random_state=0)
        >>> search = GridSearchCV(estimator, {{"learning_rate_init": [0.0001, 0.01]}}, cv=3)
        >>> search.fit(X, y).best_params_
        {{'learning_rate_init': 0.01}}
    """

    _space_name = "param_grid"
    _parameter_constraints: ClassVar = (
        model_selection.GridSearchCV._parameter_constraints | CONSTRAINTS
    )

    __init__ = constructor(model_selection.GridSearchCV, EXTRAS)


def write_search(path: StrPath, search: BaseSearchCV, epochs: Sequence[int] | None) -> None:
    """Write a fitted search to a study file.

    Args:
        path: the new file.
        search: the fitted search.
        epochs: number of trained epochs of each candidate. None if the number is not known.
    """
    results = search.cv_results_
    n_trials = len(results["params"])
    keys = [name.removeprefix("mean_test_") for name in results if name.startswith("mean_test_")]
    # The metric that chooses the best candidate comes first.
    metrics = sorted(keys, key=lambda name: name != search.refit)
    scores = np.empty((n_trials, search.n_splits_, len(metrics)))
    for m, name in enumerate(metrics):
        for f in range(search.n_splits_):
            scores[:, f, m] = results[f"split{f}_test_{name}"]
    # cv_results_ holds means over the folds. A trial's seconds are the sum.
    seconds = search.n_splits_ * (results["mean_fit_time"] + results["mean_score_time"])
    if len(metrics) == 1:
        metrics = []  # "scoring" names it
    meta = {
        "metrics": [{"name": name, "scorer": name, "positive": None} for name in metrics],
        "face": "sklearn",
        "model": type(last_step(search.estimator)[1]).__name__,
        "method": type(search).__name__,
        "scoring": _score_name(search),
        "folds": search.n_splits_,
        "versions": versions(),
    }
    candidates = []
    for number, params in enumerate(results["params"]):
        step = results["outer_step"][number] if "outer_step" in results else 0
        origin = (int(results["start"][number]), int(step)) if step else "random"
        config = {name: _storable(value) for name, value in params.items()}
        candidates.append(Candidate(number, config, origin))
    with Store.create(path, meta) as store:
        store.add_trials(candidates)
        rows = zip(scores, seconds.tolist(), epochs or [1] * n_trials)
        store.finish(_result(number, *row) for number, row in enumerate(rows))


def _result(number: int, scores: np.ndarray, seconds: float, epochs: int) -> Result:
    """Return the study result of a candidate.

    ``scores`` (F, M) are its scores after the last epoch.
    """
    curve = np.full((epochs, *scores.shape), np.nan)
    # The other epochs have no score and stay NaN.
    curve[-1] = scores
    if scores.shape[1] == 1:
        curve = curve[..., 0]
    folds = scores[:, 0]
    state: ResultState = "complete" if np.isfinite(folds).all() else "failed"
    return Result(number, state, float(folds.mean()), tuple(folds.tolist()), epochs, seconds, curve)


def _score_name(search: BaseSearchCV) -> str:
    """Return the name of the score that ranks the candidates, as a study shows it."""
    scoring = search.refit if isinstance(search.refit, str) else search._effective_scoring()
    if scoring is None:
        return "r2" if is_regressor(search.estimator) else "accuracy"
    if callable(scoring):
        return getattr(scoring, "__name__", type(scoring).__name__)
    return scoring if isinstance(scoring, str) else str(next(iter(scoring)))


def _storable(value: object) -> object:
    """Return a value that a study file can store: the value itself, or its text if necessary."""
    with suppress(InputError):
        to_json(value)
        return value
    return repr(value)
