"""A search of gputune beside scikit-learn's own with the same arguments, and fits beside fits
alone."""

import warnings
from collections import defaultdict
from typing import ClassVar

import numpy as np
import pytest
from sklearn import model_selection
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.datasets import load_iris
from sklearn.utils.estimator_checks import parametrize_with_checks

from gputune.sklearn import RandomizedSearchCV
from gputune.sklearn.base import fit_together
from gputune.sklearn.dataset import FoldGroup
from gputune.sklearn.recipe import FitOptions

SCORES = ["neg_log_loss", "accuracy"]
OPTIONS = {"n_iter": 4, "cv": 3, "random_state": 0}
X, Y = load_iris(return_X_y=True)


def checks_in_turn(estimators, others=(), *, of=1):
    """All of scikit-learn's checks, each of ``of`` of the estimators in turn; the others of them
    take long."""
    given = parametrize_with_checks([*estimators, *others])
    names = given.args[0]
    pairs = list(given.args[1])
    owners = defaultdict(list)  # of each check, by its function and its options
    for estimator, check in pairs:
        if estimator in estimators:
            owners[check.func, repr(check.keywords)].append(estimator)
    short = [
        (e, key)
        for i, (key, own) in enumerate(owners.items())
        for e in (own + own)[i % len(own) :][:of]
    ]
    cases = [
        pytest.param(
            e,
            check,
            marks=() if (e, (check.func, repr(check.keywords))) in short else pytest.mark.long,
        )
        for e, check in pairs
    ]
    return pytest.mark.parametrize(names, cases, **given.kwargs)


def both(ours, theirs, estimator, space, X, y, *, fit_params=None, **options):
    """Fit the two searches and return them with the messages of their warnings."""
    found = []
    for search_class in (ours, theirs):
        made = {name: value() if callable(value) else value for name, value in options.items()}
        search = search_class(estimator, space, **made)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            search.fit(X, y, **(fit_params or {}))
        found += [search, [(w.category, str(w.message)) for w in caught]]
    return found


def both_random(estimator, space, X=X, y=Y, **options):
    """Fit both randomized searches, on irises unless other rows are given, and assert that they
    found the same."""
    classes = RandomizedSearchCV, model_selection.RandomizedSearchCV
    ours, said, theirs, said_by_theirs = both(
        *classes, estimator, space, X, y, **(OPTIONS | options)
    )
    assert_same_results(ours, theirs)
    return ours, said, theirs, said_by_theirs


def assert_same_results(ours, theirs, *, tolerance=1e-6):
    """Assert that two searches found the same, trial by trial and fold by fold."""
    mine = ours.cv_results_
    other = theirs.cv_results_
    assert list(mine) == list(other)
    assert repr(mine["params"]) == repr(other["params"])
    for name, values in other.items():
        assert type(mine[name]) is type(values)
        if isinstance(values, np.ndarray):
            assert mine[name].dtype == values.dtype and mine[name].shape == values.shape
        if isinstance(values, np.ma.MaskedArray):
            np.testing.assert_array_equal(mine[name].mask, values.mask)
        elif name.startswith("rank_"):
            np.testing.assert_array_equal(mine[name], values)
        elif name.endswith("_score") or "_test_" in name or "_train_" in name:
            np.testing.assert_allclose(mine[name], values, rtol=0, atol=tolerance)
    for name in ("best_index_", "best_params_", "n_splits_", "multimetric_"):
        assert hasattr(ours, name) == hasattr(theirs, name)
        assert repr(getattr(ours, name, None)) == repr(getattr(theirs, name, None))


class CountingSplitter:
    """Splits as KFold does, and counts how often it is asked."""

    def __init__(self, n_splits=3):
        self.n_splits = n_splits
        self.asked = []

    def split(self, X, y=None, groups=None):
        self.asked.append(groups)
        yield from model_selection.KFold(self.n_splits).split(X, y)

    def get_n_splits(self, X=None, y=None, groups=None):
        return self.n_splits


class CountingScaler(TransformerMixin, BaseEstimator):
    """Centers, and notes the rows of every fit."""

    fits: ClassVar = []

    def __init__(self, shift=0.0):
        self.shift = shift

    def fit(self, X, y=None):
        self.fits.append(len(X))
        self.mean_ = X.mean(0) + self.shift
        return self

    def transform(self, X):
        return X - self.mean_


class Callback:
    """A scikit-learn callback that records its calls: (begin or end, task, its id, rows)."""

    def __init__(self):
        self.heard = []

    def setup(self, estimator, context):
        self.heard.append(("setup", None, None, None))

    def teardown(self, estimator, context):
        self.heard.append(("teardown", None, None, None))

    def on_fit_task_begin(self, estimator, context, *, X=None, y=None):
        self.heard.append(
            ("begin", context.task_name, context.task_id, None if X is None else len(X))
        )

    def on_fit_task_end(self, estimator, context, *, X=None, y=None):
        self.heard.append(
            ("end", context.task_name, context.task_id, None if X is None else len(X))
        )


class Fits:
    """Candidates fitted together: each equals ``clone(candidate).fit`` on the rows of its fold."""

    def __init__(self, candidates, rows, folds, **options):
        self.candidates = candidates
        self.rows = rows
        group = FoldGroup(tuple(range(len(folds))), rows, tuple(folds))
        self.results = fit_together(dict(enumerate(candidates)), group, FitOptions(**options))

    def error(self, fold, trial):
        result = self.results[fold, trial]
        return result if isinstance(result, Exception) else None

    def estimator(self, fold, trial):
        return clone(self.candidates[trial])._become(self.results[fold, trial], self.rows)
