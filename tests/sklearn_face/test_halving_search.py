"""HalvingRandomSearchCV beside scikit-learn's own, which trains every rung anew."""

import gc

import numpy as np
import pytest
from scipy.stats import loguniform, randint
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris
from sklearn.model_selection import _search_successive_halving as scikit_learns
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC

from face_modules import Net
from gputune.engine.compiled import CompiledChunk
from gputune.engine.stacked import StackedChunk
from gputune.ground.errors import DivergedError
from gputune.sklearn import (
    HalvingRandomSearchCV,
    LogisticRegression,
    MLPClassifier,
    MLPRegressor,
    NeuralNetClassifier,
    replay,
)
from gputune.sklearn.recipe import TrainedMember
from searches import assert_same_results, both

X, Y = load_iris(return_X_y=True)
MLP = MLPClassifier(hidden_layer_sizes=(16,), random_state=0)
RATES = {"learning_rate_init": loguniform(1e-3, 1e-1)}
ATTRIBUTES = (
    "n_candidates_ n_resources_ n_remaining_candidates_ n_iterations_ n_possible_iterations_ "
    "n_required_iterations_ min_resources_ max_resources_ best_index_ best_params_"
).split()


def beside_scikit_learn(estimator, space, X=X, y=Y, *, resource="max_iter", **options):
    given = {
        "max_resources": 9,
        "n_candidates": 9,
        "cv": 2,
        "random_state": 0,
        "scoring": None,
        **options,
    }
    ours, said, theirs, said_by_theirs = both(
        lambda *a, **k: HalvingRandomSearchCV(
            *a, resource=resource.removeprefix("mlpclassifier__"), **k
        ),
        lambda *a, **k: scikit_learns.HalvingRandomSearchCV(*a, resource=resource, **k),
        estimator,
        space,
        X,
        y,
        **given,
    )
    assert_same_results(ours, theirs)
    for name in ATTRIBUTES:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.best_score_ == pytest.approx(theirs.best_score_, abs=1e-6)
    assert [kind for kind, _ in said] == [kind for kind, _ in said_by_theirs]
    return ours


@pytest.fixture
def epochs(monkeypatch):
    """Note the trials and epochs of all training."""
    spent = []
    for kind in (CompiledChunk, StackedChunk):

        def noted(chunk, epoch, advance=kind.advance):
            spent.append((epoch, len(chunk.network.configs)))
            advance(chunk, epoch)

        monkeypatch.setattr(kind, "advance", noted)
    return spent


@pytest.mark.parametrize("solver", ["adamw", "sgd", "adamhd"])
def test_rungs_are_those_of_scikit_learns_search(solver):
    space = RATES | {
        "hidden_layer_sizes": randint(4, 30),
        "batch_size": [16, 32],
        "dropout": [0.0, 0.3],
    }
    search = beside_scikit_learn(
        clone(MLP).set_params(solver=solver), space, scoring="neg_log_loss"
    )
    assert search.n_resources_ == [1, 3, 9] and search.n_candidates_ == [9, 3, 1]
    assert search.cv_results_["iter"].tolist() == [0] * 9 + [1] * 3 + [2]
    assert search.cv_results_["n_resources"].tolist() == [1] * 9 + [3] * 3 + [9]
    assert search.best_estimator_.n_iter_ == 9


def test_training_continues_from_rung_to_rung(epochs):
    HalvingRandomSearchCV(
        MLP, RATES, n_candidates=9, max_resources=9, cv=3, random_state=0, refit=False
    ).fit(X, Y)
    rungs = [(0, 9), *((epoch, 3) for epoch in (1, 2)), *((epoch, 1) for epoch in range(3, 9))]
    assert epochs == rungs


def test_what_has_trained_a_rung_is_gone_in_the_next(monkeypatch):
    alive = []
    fit_together = replay.fit_together

    def counted(*given):
        alive.append(sum(isinstance(each, TrainedMember) for each in gc.get_objects()))
        return fit_together(*given)

    monkeypatch.setattr(replay, "fit_together", counted)
    gc.collect()
    HalvingRandomSearchCV(
        MLP, RATES, n_candidates=9, max_resources=9, cv=2, random_state=0, refit=False
    ).fit(X, Y)
    assert alive == [0, 0, 0]


@pytest.mark.parametrize(
    ("estimator", "space", "data"),
    [
        (
            MLPRegressor(hidden_layer_sizes=(8, 8), random_state=0),
            RATES,
            load_diabetes(return_X_y=True),
        ),
        (
            NeuralNetClassifier(Net, module__dropout=0.2, random_state=0),
            {"module__hidden": [4, 8], "lr": RATES["learning_rate_init"]},
            (X, Y),
        ),
        # folds of unlike sizes decay unlike
        (MLP, {"alpha": [0.01, 0.1, None], **RATES}, (X[:-3], Y[:-3])),
    ],
    ids=["regression", "module", "alpha"],
)
def test_other_estimators(estimator, space, data):
    options = {"aggressive_elimination": True, "max_resources": 4, "factor": 2}
    beside_scikit_learn(estimator, space, *data, resource=estimator._epochs, **options)


def test_epochs_are_the_resource_by_default():
    short = clone(MLP).set_params(max_iter=4)
    search, same = (
        HalvingRandomSearchCV(short, RATES, cv=2, random_state=0, **resource).fit(X, Y)
        for resource in ({"resource": "max_iter"}, {})
    )
    assert search.n_resources_ == [1, 3] and search.best_params_.keys() == {
        "learning_rate_init",
        "max_iter",
    }
    assert search.estimator.max_iter == 4
    assert (
        search.resource == "max_iter"
        and search.max_resources == "auto"
        and search.max_resources_ == 4
    )
    np.testing.assert_array_equal(
        same.cv_results_["mean_test_score"], search.cv_results_["mean_test_score"]
    )


def test_pipelines():
    rates = {"mlpclassifier__learning_rate_init": RATES["learning_rate_init"]}
    both_steps = rates | {"standardscaler__with_std": [True, False]}
    resource = {"resource": "mlpclassifier__max_iter"}
    search = beside_scikit_learn(make_pipeline(StandardScaler(), MLP), both_steps, **resource)
    assert search.cv_results_["param_mlpclassifier__max_iter"].tolist() == [1] * 9 + [3] * 3 + [9]
    assert search.best_estimator_.memory is None
    encoder = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    beside_scikit_learn(
        make_pipeline(encoder, MLP), rates, n_candidates=3, max_resources=3, **resource
    )


def test_seeds_that_are_not_given_are_drawn_once(epochs):
    np.random.seed(0)
    fresh = clone(MLP).set_params(random_state=None)
    space = {"learning_rate_init": [0.01, 0.02, 0.05, 0.1]}
    options = {"n_candidates": 4, "max_resources": 4, "factor": 2, "cv": 2, "refit": False}
    search = HalvingRandomSearchCV(fresh, space, **options).fit(X, Y)
    assert [epoch for epoch, _ in epochs] == [0, 1, 2, 3] and search.n_candidates_ == [4, 2, 1]


def test_equal_candidates_continue_from_rung_to_rung(epochs):
    options = {"n_candidates": 4, "max_resources": 4, "factor": 2, "cv": 2, "refit": False}
    search = HalvingRandomSearchCV(MLP, {"learning_rate_init": [0.05] * 4}, **options).fit(X, Y)
    assert [epoch for epoch, _ in epochs] == [0, 1, 2, 3] and search.n_candidates_ == [4, 2, 1]
    assert len(set(search.cv_results_["mean_test_score"][-3:-1])) == 1


@pytest.mark.parametrize(
    ("rates", "failed"), [([1e300, 0.1, 0.2, 0.05], 1), ([1e300, 1e299, 1e298, 0.1], 4)]
)
def test_a_candidate_that_diverges_is_kept_after_all_others_and_begins_again(rates, failed):
    sgd = clone(MLP).set_params(solver="sgd", batch_size=16)
    options = {"n_candidates": 4, "factor": 2, "max_resources": 4}
    search = beside_scikit_learn(sgd, {"learning_rate_init": rates}, **options)
    assert search.n_candidates_ == [4, 2, 1] and search.best_params_["learning_rate_init"] < 1
    assert np.isnan(search.cv_results_["mean_test_score"]).sum() == failed


@pytest.mark.filterwarnings("ignore")  # of the fits that failed
def test_a_candidate_that_fails_in_one_fold_begins_again(epochs, monkeypatch):
    def fail_in_one(*given, fit_together=replay.fit_together):
        return fit_together(*given) | {
            (0, trial): DivergedError("it diverged") for trial in given[0]
        }

    monkeypatch.setattr(replay, "fit_together", fail_in_one)
    options = {"n_candidates": 4, "max_resources": 4, "factor": 2, "cv": 2, "refit": False}
    HalvingRandomSearchCV(MLP, {"learning_rate_init": [0.01, 0.02, 0.05, 0.1]}, **options).fit(X, Y)
    assert [epoch for epoch, _ in epochs] == [0, 0, 1, 0, 1, 2, 3]


C_SPACE = {"C": loguniform(1e-2, 1)}


@pytest.mark.filterwarnings("ignore:HalvingRandomSearchCV cannot train these candidates together")
@pytest.mark.parametrize("estimator", [LogisticRegression(), SVC()])
def test_rows_are_the_resource_of_an_estimator_without_epochs(estimator):
    options = {"n_candidates": 6, "cv": 3, "random_state": 0}
    search = HalvingRandomSearchCV(estimator, C_SPACE, **options).fit(X, Y)
    theirs = scikit_learns.HalvingRandomSearchCV(estimator, C_SPACE, **options).fit(X, Y)
    assert_same_results(search, theirs)
    assert search.n_resources_ == theirs.n_resources_ == [18, 54]
    assert search.get_params()["resource"] == "auto" and clone(search).resource == "auto"


class FitsItself(MLPClassifier):
    """Has a fit of its own, so that scikit-learn's loop fits it."""

    def fit(self, X, y, sample_weight=None):
        return super().fit(X, y, sample_weight)


def test_epochs_are_the_resource_in_scikit_learns_loop_too():
    pipeline = make_pipeline(
        StandardScaler(), FitsItself(hidden_layer_sizes=(8,), max_iter=3, random_state=0)
    )
    search = HalvingRandomSearchCV(
        pipeline, {"fitsitself__alpha": [0.1, 0.2, 0.3]}, n_candidates=3, cv=2
    )
    with pytest.warns(UserWarning, match="FitsItself overrides fit"):
        search.fit(X, Y)
    assert search.n_resources_ == [1, 3] and search.best_params_["fitsitself__max_iter"] == 3
    assert search.resource == "auto" and search.estimator is pipeline


def test_a_schedule_runs_to_the_end_of_the_last_rung():
    cosine = clone(MLP).set_params(learning_rate="cosine")
    options = {"max_resources": 9, "cv": 2, "random_state": 0, "scoring": "neg_log_loss"}
    rates = {"learning_rate_init": [0.1, 0.01, 0.001]}
    search = HalvingRandomSearchCV(cosine, rates, n_candidates=3, min_resources=3, **options).fit(
        X, Y
    )
    best = search.cv_results_["mean_test_score"][-1]
    alone = {name: [search.best_params_[name]] for name in rates}
    options |= {"resource": "max_iter", "min_resources": 9, "n_candidates": 1}
    whole = scikit_learns.HalvingRandomSearchCV(cosine, alone, **options).fit(X, Y)
    assert best == pytest.approx(whole.best_score_, abs=1e-9)  # as if it had never stopped


@pytest.mark.parametrize(
    ("estimator", "space", "options", "error"),
    [
        (MLP, {"max_iter": [1, 2]}, {"n_candidates": 2}, "part of the searched parameters"),
        (
            LogisticRegression(),
            {"C": [1.0]},
            {"max_resources": 9, "resource": "max_epochs"},
            "Cannot use resource=max",
        ),
        (
            MLP,
            RATES,
            {"resource": "max_epochs"},
            "MLPClassifier has no parameter 'max_epochs'. Pass max_iter",
        ),
        (MLP, RATES, {"resource": None}, "The 'resource' parameter of HalvingRandomSearchCV"),
        (MLP, RATES, {"device": 3}, "The 'device' parameter of HalvingRandomSearchCV"),
        (
            MLP,
            RATES,
            {"min_resources": 999},
            "min_resources_=999 is greater than max_resources_=200",
        ),
    ],
)
def test_mistakes_are_scikit_learns(estimator, space, options, error):
    with pytest.raises(ValueError, match=error):
        HalvingRandomSearchCV(estimator, space, **options).fit(X, Y)
