"""Nested cross-validation: a search in each outer fold."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import cross_validate

from gputune.ground.annotations import FloatArray
from gputune.ground.errors import InputError, Verbatim
from gputune.ground.text import count, measure_of
from gputune.ground.types import Config
from gputune.sklearn.dataset import as_sliced
from gputune.sklearn.search import GridSearchCV, RandomizedSearchCV

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
    over the outer folds. The candidates and inner folds of an outer fold train together. A
    ``timeout`` of the search applies to each outer fold.

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
        InputError: the search is of another kind, or has ``refit=False`` or a ``study``.
        ValueError: ``groups`` is set while metadata routing is enabled.

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
    fitted = cross_validate(
        search,
        as_sliced(X),
        y,
        cv=outer,
        groups=groups,
        params=params,
        return_estimator=True,
        error_score="raise",
    )
    searches = fitted["estimator"]
    best_scores = [getattr(fold, "best_score_", np.nan) for fold in searches]
    return NestedScores(
        np.asarray(fitted["test_score"], dtype=np.float64),
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
