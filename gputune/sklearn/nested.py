"""Nested cross-validation: the inner folds of all outer folds train as one population."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone, is_classifier
from sklearn.model_selection import check_cv
from sklearn.utils import indexable
from sklearn.utils.metaestimators import _safe_split

from gputune.errors import InputError
from gputune.sklearn.asking import shared_rows
from gputune.sklearn.layout import Part
from gputune.sklearn.pipelines import prepared, why_not_together
from gputune.sklearn.running import Run, Trained, workers
from gputune.sklearn.search import GridSearchCV, RandomizedSearchCV
from gputune.sklearn.tape import Fit, train


@dataclass(frozen=True, eq=False)
class NestedScores:
    """What nested cross-validation found, by outer fold (O of them).

    scores       (O,) of each fold's best candidate, refitted on the fold's training rows, on its test rows: their
                 mean estimates how well the search and its refit do, which ``best_score_`` of one search does not
    best_params  of each fold
    best_scores  (O,) inner cross-validated score of each fold's best candidate
    searches     the fitted searches
    """

    scores: NDArray[np.float64]
    best_params: tuple[dict[str, Any], ...]
    best_scores: NDArray[np.float64]
    searches: tuple[Any, ...]


def nested_cv(search: Any, X: Any, y: Any, *, outer: Any = 5) -> NestedScores:
    """Return scores and best parameters of a search in each outer fold, equal to those of the loop by hand.

    ``search`` is a RandomizedSearchCV or a GridSearchCV of gputune, ``outer`` a number of folds, a splitter or an
    iterable of splits. By hand it is ``clone(search).fit(X[train], y[train]).score(X[test], y[test])`` in each outer
    fold. Here the inner folds of all outer ones train together; a search with ``random_state=None`` draws other
    candidates in every outer fold, which then train one outer fold after the other. A ``timeout`` is that of all.

    Raises InputError for another search, for one without ``refit``, and for one with a ``study``.
    """
    _check_search(search)
    X, y = indexable(X, y)
    splits = list(check_cv(outer, y, classifier=is_classifier(search)).split(X, y))
    searches = [clone(search) for _ in splits]
    rows = [_safe_split(search, X, y, train) for train, _ in splits]
    together = why_not_together(search.estimator, getattr(search, search._space_name)) is None
    given: Sequence[Trained | None] = [None] * len(splits)
    if together:
        given = _train(searches, rows, _parts(searches[0], X, y, [train for train, _ in splits]))
    for each, trained, train_rows in zip(searches, given, rows):
        each._fit_given(trained, *train_rows, {})
    tests = [_safe_split(search, X, y, test, train) for train, test in splits]
    return NestedScores(
        scores=np.array([each.score(*test) for each, test in zip(searches, tests)], dtype=np.float64),
        best_params=tuple(dict(each.best_params_) for each in searches),
        best_scores=np.array([getattr(each, "best_score_", np.nan) for each in searches], dtype=np.float64),
        searches=tuple(searches),
    )


def _check_search(search: Any) -> None:
    if not isinstance(search, RandomizedSearchCV | GridSearchCV):
        raise InputError(
            f"nested_cv(search) must be a RandomizedSearchCV or a GridSearchCV of gputune.sklearn, got {search!r}; for "
            "another one use sklearn.model_selection.cross_validate(search, X, y)."
        )
    if search.refit is False:
        raise InputError(
            "nested_cv(search) scores the refitted best candidate of each outer fold, got refit=False; set refit."
        )
    if search.study is not None:
        raise InputError(
            f"nested_cv(search) runs a search in every outer fold, and study={str(search.study)!r} keeps one; set "
            "study=None."
        )


def _parts(search: Any, X: Any, y: Any, trains: Sequence[Any]) -> list[Part | None]:
    """Return the rows of each outer fold as parts of all rows, None where a fold has to be checked by itself."""
    whole = shared_rows(prepared(search.estimator, search.device), X, y, {})
    return [None if whole is None else Part(whole.rows, whole.index[np.asarray(train)]) for train in trains]


def _train(
    searches: Sequence[Any], rows: Sequence[tuple[Any, Any]], parts: Sequence[Part | None]
) -> list[Trained]:
    """Train the candidates of all searches in their inner folds."""
    begin = time.monotonic()
    asked = [_ask(*each) for each in zip(searches, rows, parts)]
    alike = getattr(searches[0], "random_state", 0) is not None  # then all searches draw the same candidates
    groups = [asked] if alike else [[each] for each in asked]
    deadline = None if searches[0].timeout is None else begin + searches[0].timeout
    for group in groups:
        fits = _numbered([[event for event in each.events if isinstance(event, Fit)] for each in group])
        train(fits, workers=workers(), deadline=deadline)
    share = (time.monotonic() - begin) / sum(len(each.candidates) * len(each.splits) for each in asked)
    return [replace(each, seconds=share) for each in asked]


def _ask(search: Any, rows: tuple[Any, Any], within: Part | None) -> Trained:
    """Return what one search asks for, not trained yet."""
    run = Run(prepared(search.estimator, search.device), search.cv)
    candidates, splits = search._drawn(), run.split(*rows, {})
    return Trained(candidates, splits, run.ask(candidates, *rows, splits, within), 0.0)


def _numbered(fits: Sequence[Sequence[Fit]]) -> list[Fit]:
    """Return the fits of all outer folds, with their inner folds numbered on."""
    first = 0
    for own in fits:
        for fit in own:
            fit.fold += first
        first = 1 + max((fit.fold for fit in own), default=first - 1)
    return list(itertools.chain(*fits))
