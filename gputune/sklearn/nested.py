"""Nested cross-validation, in which the inner folds of all outer folds train together."""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from sklearn import get_config
from sklearn.base import clone, is_classifier
from sklearn.metrics import check_scoring
from sklearn.model_selection import ParameterGrid, ParameterSampler, check_cv
from sklearn.utils import Bunch, indexable
from sklearn.utils.metadata_routing import MetadataRouter, MethodMapping, process_routing
from sklearn.utils.metaestimators import _safe_split
from sklearn.utils.validation import _check_method_params

from gputune.annotations import FloatArray
from gputune.errors import InputError
from gputune.sklearn.dataset import FoldRows, as_sliced
from gputune.sklearn.recipe import FitOptions
from gputune.sklearn.record import fits_of, shared_rows
from gputune.sklearn.replay import SearchRun, TrainedCandidates, train, with_hook, workers
from gputune.sklearn.search import (
    GridSearchCV,
    RandomizedSearchCV,
    override,
    reason_to_train_separately,
)
from gputune.spaces.distributions import to_scipy
from gputune.text import count, measure_of
from gputune.types import Config, Json
from gputune.wording import Verbatim

AnySearch = RandomizedSearchCV | GridSearchCV


@dataclass(frozen=True, eq=False, repr=False)
class NestedScores:
    """The results of nested cross-validation, with one entry for each of the O outer folds.

    Attributes:
        scores: (O,) test score of each fold's best candidate, refitted on the fold's training rows.
            Their mean estimates the quality of the search and its refit. ``best_score_`` of one
            search does not.
        best_params: the best parameters of each fold.
        best_scores: (O,) inner cross-validated score of each fold's best candidate.
        searches: the fitted searches.

    Example:
        >>> from gputune.sklearn import MLPClassifier, RandomizedSearchCV, nested_cv
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> estimator = MLPClassifier(max_iter=10, random_state=0)
        >>> rates = {"learning_rate_init": [0.001, 0.01, 0.1]}
        >>> search = RandomizedSearchCV(estimator, rates, n_iter=2, cv=2, random_state=0)
        >>> nested = nested_cv(search, X, y, outer=3)
        >>> nested.scores.shape, len(nested.best_params), len(nested.searches)
        ((3,), 3, 3)
    """

    scores: FloatArray
    best_params: tuple[Config, ...]
    best_scores: FloatArray
    searches: tuple[AnySearch, ...]

    def __repr__(self) -> str:
        n_folds = len(self.scores)
        error = np.std(self.scores, ddof=1) / np.sqrt(n_folds) if n_folds > 1 else np.nan
        scores = ", ".join(f"{score:.4f}" for score in self.scores)
        mean_score = float(np.mean(self.scores))
        mean = measure_of("score", mean_score).with_error(mean_score, float(error))
        return f"NestedScores({mean} over {count(n_folds, 'outer fold')}: {scores})"


def nested_cv(
    search: AnySearch,
    X: object,
    y: object,
    *,
    outer: object = 5,
    groups: object = None,
    params: Mapping[str, object] | None = None,
) -> NestedScores:
    """Run a search in each outer fold, and return each fold's test score and best parameters.

    The result equals the loop ``clone(search).fit(X[train], y[train]).score(X[test], y[test])``
    over the outer folds. Here the inner folds of all outer folds train together. A search with
    ``random_state=None`` draws different candidates in every outer fold. The outer folds then train
    one after the other. A ``timeout`` of the search limits all outer folds together.

    With scikit-learn's metadata routing enabled, ``params`` go to every object that requests them,
    including the outer splitter.

    Args:
        search: a RandomizedSearchCV or GridSearchCV of gputune, with ``refit`` and without
            ``study``.
        X: the rows.
        y: the targets.
        outer: number of outer folds, a splitter, or an iterable of splits.
        groups: (n,) groups for the outer splitter.
        params: arguments of the search's ``fit``. Values with one entry per row are cut to the
            training rows, as in ``cross_val_score``. ``params={"sample_weight": w}`` weights the
            rows. ``groups=g, params={"groups": g}`` also splits the inner folds by group.

    Returns:
        The scores, best parameters and fitted searches.

    Raises:
        InputError: the search is of another kind, has ``refit=False`` or a ``study``, or ``groups``
            is set while metadata routing is enabled.

    Source: Cawley and Talbot (2010), "On over-fitting in model selection and subsequent selection
    bias in performance evaluation", JMLR 11.

    Example:
        >>> from gputune.sklearn import MLPClassifier, RandomizedSearchCV, nested_cv
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> estimator = MLPClassifier(max_iter=10, random_state=0)
        >>> rates = {"learning_rate_init": [0.001, 0.01, 0.1]}
        >>> search = RandomizedSearchCV(estimator, rates, n_iter=2, cv=2, random_state=0)
        >>> nested = nested_cv(search, X, y, outer=3)
        >>> bool(nested.scores.mean() > 0.5)  # of the search, not of one configuration
        True
    """
    _check_search(search)
    X, y = indexable(as_sliced(X), y)
    splitter = check_cv(outer, y, classifier=is_classifier(search))
    to_split, to_fit, to_score = _route(search, splitter, groups, params or {})
    splits = list(splitter.split(X, y, **to_split))
    searches = [clone(search) for _ in splits]
    rows = [
        (*_safe_split(search, X, y, train), _check_method_params(X, to_fit, train))
        for train, _ in splits
    ]
    trained: Sequence[TrainedCandidates | None] = [None] * len(splits)
    if reason_to_train_separately(search.estimator, getattr(search, search._space_name)) is None:
        routed = _routed_within(search, X, to_fit).estimator.fit
        shared = shared_rows(with_hook(search.estimator, search.device), X, y, routed)
        parts: list[FoldRows | None] = []
        for train, _ in splits:
            part = None
            if shared is not None:
                part = FoldRows(shared.rows, shared.index[np.asarray(train)])
            parts.append(part)
        trained = _train(searches, rows, parts)
    for fold, candidates, (features, target, fit_params) in zip(searches, trained, rows):
        # The search evaluates these trained candidates instead of training them itself.
        with override(fold, {"_trained": candidates}):
            fold.fit(features, target, **fit_params)
    scorer = check_scoring(search)  # the search's own score
    scores = []
    best_scores = []
    for fold, (train, test) in zip(searches, splits):
        test_rows = _safe_split(search, X, y, test, train)
        scores.append(scorer(fold, *test_rows, **_check_method_params(X, to_score, test)))
        best_scores.append(getattr(fold, "best_score_", np.nan))
    return NestedScores(
        np.array(scores, dtype=np.float64),
        tuple(dict(fold.best_params_) for fold in searches),
        np.array(best_scores, dtype=np.float64),
        tuple(searches),
    )


def _check_search(search: object) -> None:
    """Raise InputError for a search that ``nested_cv`` does not support."""
    argument = "nested_cv(search=...)"
    if not isinstance(search, AnySearch):
        raise InputError(
            argument,
            "must be a RandomizedSearchCV or a GridSearchCV of gputune.sklearn",
            got=search,
            remedy="For another search use sklearn.model_selection.cross_validate(search, X, y).",
        )
    if search.refit is False:
        raise InputError(
            argument,
            "must have refit set, because nested_cv scores the refitted best candidate of each "
            "outer fold",
            got=Verbatim("refit=False"),
            remedy="Set refit.",
        )
    if search.study is not None:
        raise InputError(
            argument,
            "must have study=None, because nested_cv runs a search in every outer fold, but a "
            "study holds only one",
            got=Verbatim(f"study={str(search.study)!r}"),
        )


def _route(
    search: object, splitter: object, groups: object, params: Mapping[str, object]
) -> list[Json]:
    """Return the keyword arguments for the outer splitter, the search's ``fit`` and its ``score``.

    The arguments are routed as in ``cross_val_score``.
    """
    if not get_config()["enable_metadata_routing"]:
        return [{"groups": groups}, params, {}]
    if groups is not None:
        raise InputError(
            "nested_cv(groups=...)",
            "must be left out while metadata routing is enabled",
            remedy="Pass params={'groups': ...}.",
        )
    callees = {"splitter": splitter, "estimator": search, "scorer": check_scoring(search)}
    router = MetadataRouter(owner="nested_cv")
    for method, (name, callee) in zip(("split", "fit", "score"), callees.items()):
        mapping = MethodMapping().add(caller="fit", callee=method)
        router.add(method_mapping=mapping, **{name: callee})
    routed = process_routing(router, "fit", **params)
    return [routed.splitter.split, routed.estimator.fit, routed.scorer.score]


def _routed_within(search: AnySearch, X: object, params: Mapping[str, object]) -> Bunch:
    """Return the keyword arguments that the search's ``fit`` passes on to its splitter and
    estimator.

    The function hides warnings, because ``fit`` itself shows them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return search._get_routed_params_for_fit(_check_method_params(X, params))


def _train(
    searches: Sequence[AnySearch],
    rows: Sequence[tuple[object, object, Mapping[str, object]]],
    parts: Sequence[FoldRows | None],
) -> list[TrainedCandidates]:
    """Train the candidates of the searches of all outer folds together, in their inner folds."""
    begin = time.monotonic()
    recorded = []
    for search, (X, y, params), part in zip(searches, rows, parts):
        routed = _routed_within(search, X, params)
        run = SearchRun(
            with_hook(search.estimator, search.device), search.cv, fit_params=routed.estimator.fit
        )
        if isinstance(search, GridSearchCV):
            points = list(ParameterGrid(search.param_grid))
        else:
            space = to_scipy(search.param_distributions)
            points = list(ParameterSampler(space, search.n_iter, random_state=search.random_state))
        splits = run.split(X, y, routed.splitter.split)
        events = run.record(points, X, y, splits, part)
        recorded.append(TrainedCandidates(points, splits, events, 0.0))
    groups = [recorded]
    if getattr(searches[0], "random_state", 0) is None:
        # Each search has drawn other candidates, so they cannot train together.
        groups = [[candidates] for candidates in recorded]
    # one deadline for all outer folds
    deadline = None if searches[0].timeout is None else begin + searches[0].timeout
    n_fits = 0
    for group in groups:
        fits = []
        n_folds = 0
        for candidates in group:
            for fit in fits_of(candidates.events):
                # Fold numbers continue over the outer folds, so that each is unique.
                fit.fold += n_folds
                fits.append(fit)
            n_folds += len(candidates.splits)
            n_fits += len(candidates.candidates) * len(candidates.splits)
        train(fits, FitOptions(workers(), deadline))
    # Fits train together, so each gets an equal share of the time.
    share = (time.monotonic() - begin) / n_fits
    return [replace(candidates, seconds=share) for candidates in recorded]
