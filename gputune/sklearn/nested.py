"""Nested cross-validation: the inner folds of all outer folds train as one population."""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from sklearn import get_config
from sklearn.base import clone, is_classifier
from sklearn.metrics import check_scoring
from sklearn.model_selection import ParameterGrid, ParameterSampler, check_cv
from sklearn.utils import Bunch, indexable
from sklearn.utils.metadata_routing import MetadataRouter, MethodMapping, process_routing
from sklearn.utils.metaestimators import _safe_split
from sklearn.utils.validation import _check_method_params

from gputune.errors import InputError
from gputune.methods.distributions import to_scipy
from gputune.sklearn.dataset import Part, as_sliced
from gputune.sklearn.recipe import Training
from gputune.sklearn.record import fits_of, shared_rows
from gputune.sklearn.replay import SearchRun, TrainedCandidates, train, with_hook, workers
from gputune.sklearn.search import GridSearchCV, RandomizedSearchCV, override, why_not_together
from gputune.types import Config, Json

AnySearch = RandomizedSearchCV | GridSearchCV


@dataclass(frozen=True, eq=False)
class NestedScores:
    """The results of nested cross-validation, by outer fold (O outer folds).

    Attributes:
        scores: (O,) test score of each fold's best candidate, refitted on the fold's training rows.
            Their mean estimates the quality of the search and its refit. ``best_score_`` of one
            search does not.
        best_params: the best parameters of each fold.
        best_scores: (O,) inner cross-validated score of each fold's best candidate.
        searches: the fitted searches.
    """

    scores: NDArray[np.float64]
    best_params: tuple[Config, ...]
    best_scores: NDArray[np.float64]
    searches: tuple[AnySearch, ...]


def nested_cv(
    search: AnySearch,
    X: object,
    y: object,
    *,
    outer: object = 5,
    groups: object = None,
    params: Mapping[str, object] | None = None,
) -> NestedScores:
    """Run a search in each outer fold, and return the scores and best parameters.

    The result equals the loop ``clone(search).fit(X[train], y[train]).score(X[test], y[test])``
    over the outer folds. Here the inner folds of all outer folds train together. A search with
    ``random_state=None`` draws different candidates in every outer fold. These then train one outer
    fold after the other. A ``timeout`` of the search limits all outer folds together.

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
    if why_not_together(search.estimator, getattr(search, search._space_name)) is None:
        routed = _routed_within(search, X, to_fit).estimator.fit
        whole = shared_rows(with_hook(search.estimator, search.device), X, y, routed)
        parts = [whole and Part(whole.rows, whole.index[np.asarray(train)]) for train, _ in splits]
        trained = _train(searches, rows, parts)
    for each, candidates, (features, target, own) in zip(searches, trained, rows):
        # The search evaluates these trained candidates instead of training them itself.
        with override(each, {"_trained": candidates}):
            each.fit(features, target, **own)
    scorer = check_scoring(search)  # the search's own score
    scores = [
        scorer(
            each, *_safe_split(search, X, y, test, train), **_check_method_params(X, to_score, test)
        )
        for each, (train, test) in zip(searches, splits)
    ]
    best_params = tuple(dict(each.best_params_) for each in searches)
    best_scores = np.array(
        [getattr(each, "best_score_", np.nan) for each in searches], dtype=np.float64
    )
    return NestedScores(
        np.array(scores, dtype=np.float64), best_params, best_scores, tuple(searches)
    )


def _check_search(search: object) -> None:
    """Raise InputError for a search that ``nested_cv`` does not support."""
    if not isinstance(search, AnySearch):
        raise InputError(
            "nested_cv(search) must be a RandomizedSearchCV or a GridSearchCV of "
            f"gputune.sklearn, got {search!r}; for another one use "
            "sklearn.model_selection.cross_validate(search, X, y)."
        )
    if search.refit is False:
        raise InputError(
            "nested_cv(search) scores the refitted best candidate of each outer fold, got "
            "refit=False; set refit."
        )
    if search.study is not None:
        raise InputError(
            "nested_cv(search) runs a search in every outer fold, and "
            f"study={str(search.study)!r} keeps one; set study=None."
        )


def _route(
    search: object, splitter: object, groups: object, params: Mapping[str, object]
) -> list[Json]:
    """Return the params for the outer splitter, the search's ``fit`` and its ``score``.

    They are routed like in ``cross_val_score``.
    """
    if not get_config()["enable_metadata_routing"]:
        return [{"groups": groups}, params, {}]
    if groups is not None:
        raise InputError(
            "nested_cv(groups=...) goes to the outer splitter where metadata routing is off, and "
            "it is on: give params={'groups': ...}."
        )
    to = {
        callee: MethodMapping().add(caller="fit", callee=callee)
        for callee in ("split", "fit", "score")
    }
    router = MetadataRouter(owner="nested_cv").add(splitter=splitter, method_mapping=to["split"])
    router.add(estimator=search, method_mapping=to["fit"])
    router.add(scorer=check_scoring(search), method_mapping=to["score"])
    routed = process_routing(router, "fit", **params)
    return [routed.splitter.split, routed.estimator.fit, routed.scorer.score]


def _routed_within(search: AnySearch, X: object, params: Mapping[str, object]) -> Bunch:
    """Return the params that the search passes on from its ``fit``.

    Warnings are ignored here, because ``fit`` itself shows them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return search._get_routed_params_for_fit(_check_method_params(X, params))


def _train(
    searches: Sequence[AnySearch],
    rows: Sequence[tuple[object, object, Mapping[str, object]]],
    parts: Sequence[Part | None],
) -> list[TrainedCandidates]:
    """Train the candidates of all searches in their inner folds."""
    begin = time.monotonic()
    recorded = []
    for search, (X, y, params), part in zip(searches, rows, parts):
        routed = _routed_within(search, X, params)
        run = SearchRun(
            with_hook(search.estimator, search.device), search.cv, fit_params=routed.estimator.fit
        )
        if isinstance(search, GridSearchCV):
            candidates = list(ParameterGrid(search.param_grid))
        else:
            space = to_scipy(search.param_distributions)
            candidates = list(
                ParameterSampler(space, search.n_iter, random_state=search.random_state)
            )
        splits = run.split(X, y, routed.splitter.split)
        recorded.append(
            TrainedCandidates(candidates, splits, run.record(candidates, X, y, splits, part), 0.0)
        )
    # With a fixed random_state all searches draw the same candidates.
    alike = getattr(searches[0], "random_state", 0) is not None
    # one deadline for all outer folds
    deadline = None if searches[0].timeout is None else begin + searches[0].timeout
    for group in [recorded] if alike else [[each] for each in recorded]:
        fits = []
        folds = 0
        for each in group:
            for fit in fits_of(each.events):
                # Fold numbers continue over the outer folds, so that each is unique.
                fit.fold += folds
                fits.append(fit)
            folds += len(each.splits)
        train(fits, Training(workers(), deadline))
    # Fits train together, so each gets an equal share of the time.
    share = (time.monotonic() - begin) / sum(
        len(each.candidates) * len(each.splits) for each in recorded
    )
    return [replace(each, seconds=share) for each in recorded]
