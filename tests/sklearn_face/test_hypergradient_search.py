"""HypergradientSearchCV: what it evaluates, how it moves, and what it refuses."""

import pickle
import time

import numpy as np
import pytest
from scipy.stats import loguniform, uniform
from sklearn import model_selection
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.datasets import load_diabetes, load_iris
from sklearn.exceptions import FitFailedWarning
from sklearn.metrics import log_loss
from sklearn.model_selection import KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

import gputune
from face_modules import Net
from gputune.errors import InputError
from gputune.sklearn import (
    GridSearchCV,
    HypergradientSearchCV,
    LogisticRegression,
    MLPClassifier,
    MLPRegressor,
    NeuralNetClassifier,
    descent,
)
from gputune.sklearn.base import check_rows
from gputune.sklearn.dataset import Part
from gputune.sklearn.record import held_out_part
from gputune.sklearn.replay import SearchRun
from searches import Callback, CountingScaler, CountingSplitter

X, Y = load_iris(return_X_y=True)
X = (X - X.mean(0)) / X.std(0)
MLP = MLPClassifier((8,), solver="adamw", max_iter=3, batch_size=32, activation="tanh", random_state=0)
ADAM = clone(MLP).set_params(solver="adam")
SGD = clone(MLP).set_params(
    solver="sgd", nesterovs_momentum=False, momentum=0.0, activation="relu", batch_size=16, max_iter=4
)
NET = NeuralNetClassifier(Net, max_epochs=2, random_state=0)
RATES = {"learning_rate_init": loguniform(1e-4, 1)}
SPACE = RATES | {"hidden_layer_sizes": [4, 8, 20], "batch_size": [16, 32]}
OPTIONS = {"n_iter": 3, "outer_steps": 4, "cv": 3, "random_state": 0}


def descend(estimator, space, X=X, y=Y, **options):
    return HypergradientSearchCV(estimator, space, **(OPTIONS | options)).fit(X, y)


def path_of(search, start=0, name="learning_rate_init"):
    """Return the values that one start went through."""
    results = search.cv_results_
    return np.array([p.get(name) for p, s in zip(results["params"], results["start"]) if s == start])


def assert_descended(search, X=X, y=Y):
    """Every start came to something better, and a search over all points as a grid finds the same scores."""
    results, scores = search.cv_results_, search.cv_results_["mean_test_score"]
    paths = [scores[results["start"] == start] for start in set(results["start"])]
    assert all(path.max() > path[0] for path in paths)
    grid = [{name: [value] for name, value in params.items()} for params in results["params"]]
    scoring = search._effective_scoring()
    fixed = GridSearchCV(search.estimator, grid, scoring=scoring, cv=search.cv, refit=False).fit(X, y)
    for name, values in fixed.cv_results_.items():
        if name.startswith("split") or name == "mean_test_score":
            np.testing.assert_allclose(results[name], values, rtol=0, atol=1e-9)


CALLBACK = Callback()


@pytest.fixture(scope="module")
def descended(tmp_path_factory):
    study = tmp_path_factory.mktemp("descent") / "study.db"
    search = HypergradientSearchCV(MLP, SPACE, **OPTIONS, study=study, n_jobs=2, device="cpu")
    if hasattr(search, "set_callbacks"):  # since 1.9
        search.set_callbacks(CALLBACK)
    return search.fit(X, Y)


@pytest.mark.cpu  # a GPU trains estimators in single precision
def test_every_point_is_a_candidate(descended):
    drawn = model_selection.RandomizedSearchCV(MLP, SPACE, n_iter=3, cv=3, random_state=0).fit(X, Y)
    results = descended.cv_results_
    assert set(results) == set(drawn.cv_results_) | {"start", "outer_step"}
    assert results["params"][:3] == drawn.cv_results_["params"]
    for start, params in enumerate(results["params"][:3]):
        own = results["start"] == start
        assert results["outer_step"][own].tolist() == list(range(own.sum()))
        for point in np.flatnonzero(own):  # what is not moved stays
            assert results["params"][point] | {"learning_rate_init": 0} == params | {"learning_rate_init": 0}
    assert len({repr(params) for params in results["params"]}) == len(results["params"]) > 6
    assert_descended(descended)
    assert (results["std_fit_time"] == 0).all() and (results["mean_fit_time"] > 0).all()


def test_the_best_of_all_points_is_refitted(descended):
    search = descended
    scores = search.cv_results_["mean_test_score"]
    assert scores.argmax() == search.best_index_ < len(scores) - 1  # which was not the last point
    assert search.best_score_ == scores.max() and search.best_params_ == search.cv_results_["params"][scores.argmax()]
    alone = clone(MLP).set_params(**search.best_params_).fit(X, Y)
    np.testing.assert_allclose(search.predict_proba(X), alone.predict_proba(X), atol=1e-9)
    # scikit-learn's word on ``score``: by ``scoring`` where it is given, else the refitted estimator's own.
    assert search.score(X, Y) == alone.score(X, Y)
    assert search.scorer_(search, X, Y) == pytest.approx(-log_loss(Y, alone.predict_proba(X)))
    named = descend(MLP, {"learning_rate_init": [0.01]}, n_iter=1, outer_steps=1, scoring="neg_log_loss")
    assert named.score(X, Y) == pytest.approx(-log_loss(Y, named.predict_proba(X)))


def test_another_score_ranks_and_does_not_move(descended):
    many = descend(MLP, SPACE, scoring=["accuracy", "neg_log_loss"], refit="accuracy")
    assert descended.cv_results_["params"] == many.cv_results_["params"]
    assert many.best_score_ == many.cv_results_["mean_test_accuracy"].max() > 0.5
    losses = many.cv_results_["mean_test_neg_log_loss"]
    np.testing.assert_array_equal(losses, descended.cv_results_["mean_test_score"])
    assert many.multimetric_ and descended.scoring is None


def test_a_study_has_the_origin_of_every_point(descended):
    study = gputune.Study.open(descended.study)
    starts, steps = (descended.cv_results_[name].tolist() for name in ("start", "outer_step"))
    expected = [(start, step) if step else "random" for start, step in zip(starts, steps)]
    assert [trial.origin for trial in study.trials] == expected
    assert "best neg_log_loss" in repr(study) and study.best_params == descended.best_params_


@pytest.mark.skipif(not hasattr(model_selection.RandomizedSearchCV, "set_callbacks"), reason="since 1.9")
def test_callbacks_hear_of_every_point(descended):
    heard = [(when, task) for when, task, *_ in CALLBACK.heard]
    assert heard.count(("begin", "candidate-split-evaluation")) == 3 * len(descended.cv_results_["params"])
    assert heard.count(("begin", "search")) == heard.count(("end", "search")) == 1
    assert heard[-1] == ("teardown", None)


REGRESSOR = MLPRegressor(hidden_layer_sizes=(8, 8), activation="tanh", max_iter=3, batch_size=64, random_state=0)
PENALTIES = {"C": loguniform(1e-3, 1), "l1_ratio": [0, 0.5]}


@pytest.mark.parametrize(
    ("estimator", "space", "data", "options"),
    [
        (REGRESSOR, {"learning_rate_init": [1e-4]}, load_diabetes(return_X_y=True), {"n_iter": 1}),
        (LogisticRegression(), PENALTIES, (X, Y), {"n_iter": 2, "outer_steps": 2}),
        (make_pipeline(CountingScaler(), MLP), {"mlpclassifier__learning_rate_init": [1e-3]}, (X, Y), {"n_iter": 1}),
    ],
    ids=["regression", "logistic", "pipeline"],
)
@pytest.mark.cpu  # a GPU trains estimators in single precision
def test_every_estimator_descends(estimator, space, data, options, scaler_fits):
    search = descend(estimator, space, *data, **options)
    if estimator is REGRESSOR:
        assert search.best_score_ < -1000  # in the target's own unit
    elif space is not PENALTIES:
        assert scaler_fits == [100, 100, 100, 150]  # once a fold for all points, and the refit
    assert_descended(search, *data)


@pytest.mark.parametrize("step", ["sign", "normalized"])
@pytest.mark.cpu  # a GPU trains estimators in single precision
def test_several_hyperparameters(step):
    names = ("learning_rate_init", "alpha", "momentum")
    space = {"learning_rate_init": [0.01], "alpha": [0.5], "momentum": [0.5]}
    search = descend(SGD, space, hyperparameters=names, step=step, first_step=0.5, n_iter=1)
    rates, alphas, momenta = (path_of(search, name=name)[:2] for name in names)
    moves = np.concatenate([np.diff(np.log(x)) for x in (rates, alphas, momenta / (1 - momenta))])
    np.testing.assert_allclose(np.abs(moves) if step == "sign" else np.linalg.norm(moves), 0.5)
    assert_descended(search)


@pytest.mark.parametrize(
    ("estimator", "space", "hyperparameters", "moved"),
    [
        (MLP, {"hidden_layer_sizes": [8]}, None, {"learning_rate_init"}),  # the usual one
        (MLP, {"hidden_layer_sizes": [8]}, "weight_decay", {"weight_decay"}),
        (MLP, {"learning_rate_init": [0.01]}, "learning_rate_init", {"learning_rate_init"}),
        (LogisticRegression(), {"l1_ratio": [0]}, "C", {"C"}),
        (ADAM, {"alpha": [0.1]}, ["alpha", "learning_rate_init"], {"learning_rate_init", "alpha"}),
        (NET, {"optimizer__momentum": [0.5]}, ("optimizer__momentum",), {"optimizer__momentum"}),
        (
            make_pipeline(StandardScaler(), ADAM),
            {"mlpclassifier__alpha": [0.1]},
            ("alpha", "mlpclassifier__learning_rate_init"),
            {"mlpclassifier__alpha", "mlpclassifier__learning_rate_init"},
        ),
    ],
)
def test_a_value_is_written_in_the_word_that_holds_it(estimator, space, hyperparameters, moved):
    search = descend(estimator, space, hyperparameters=hyperparameters, n_iter=1, outer_steps=1)
    before, after = search.cv_results_["params"]
    assert {name for name in after if after[name] != before.get(name)} == moved
    assert all(name in before or name in moved for name in after)


def test_values_stay_within_the_range_of_their_distribution():
    narrow = loguniform(1e-3, 1.1e-3)
    rates = path_of(descend(MLP, {"learning_rate_init": narrow}, n_iter=1))
    assert rates[1] == 1.1e-3 and len(rates) == 2  # held at the bound, and nowhere to go from there
    alternatives = [
        {"learning_rate_init": narrow, "hidden_layer_sizes": [4]},
        {"learning_rate_init": uniform(0.001, 0.001), "hidden_layer_sizes": [8]},
    ]
    points = descend(MLP, alternatives).cv_results_["params"]
    assert max(point["learning_rate_init"] for point in points) == 0.002


def test_folds_are_split_once_for_all_steps():
    splitter = CountingSplitter()
    search = HypergradientSearchCV(ADAM, {"alpha": [0.1]}, n_iter=1, outer_steps=2, cv=splitter)
    groups, shuffled = np.arange(150), np.random.default_rng(0).permutation(150)
    search.fit(X[shuffled], Y[shuffled], groups=groups)
    assert len(splitter.asked) == 1 and splitter.asked[0] is groups
    assert search.cv_results_["outer_step"].max() > 1


@pytest.mark.filterwarnings("ignore:One or more of the test scores are non-finite")
def test_a_point_that_diverges_steps_down():
    with pytest.warns(FitFailedWarning, match="12 fits failed out of a total of") as said:
        search = descend(SGD, [{"learning_rate_init": [1e300]}, {"learning_rate_init": [0.1]}], n_iter=2, outer_steps=3)
    rates = path_of(search, int(search.cv_results_["params"][1]["learning_rate_init"] == 1e300))
    np.testing.assert_allclose(np.diff(np.log(rates)), -1.5)
    assert len(rates) == 4 and search.best_params_["learning_rate_init"] < 100
    assert len([w for w in said if w.category is FitFailedWarning]) == 1


@pytest.mark.filterwarnings("ignore:One or more of the test scores are non-finite")
def test_a_configuration_that_is_refused_is_the_last_of_its_start():
    with pytest.warns(FitFailedWarning, match="3 fits failed") as said:
        search = descend(MLP, {"learning_rate_init": [0.01], "batch_size": [-1, 32]}, n_iter=2)
    refused = [params["batch_size"] == -1 for params in search.cv_results_["params"]]
    assert sum(refused) == 1 and len(refused) > 3 and len([w for w in said if w.category is FitFailedWarning]) == 1


@pytest.mark.filterwarnings("ignore:One or more of the test scores are non-finite")
def test_a_point_that_cannot_be_scored_is_the_last():
    holed = X.copy()
    holed[140] = np.nan
    split = [(np.arange(100), np.arange(100, 150))]
    with pytest.warns(UserWarning, match="Scoring failed"):
        search = descend(MLP, {"learning_rate_init": [0.01]}, holed, Y % 2, n_iter=1, refit=False, cv=split)
    assert len(search.cv_results_["params"]) == 1


def test_no_start_moves_after_the_deadline(monkeypatch):
    slopes_of, calls = descent.slopes_of, []

    def slow(fits, names, mode, training):
        calls.append(training.deadline)
        return {} if len(calls) == 2 else slopes_of(fits, names, mode, training)

    monkeypatch.setattr(descent, "slopes_of", slow)
    search = descend(MLP, {"learning_rate_init": [0.01]}, timeout=1000.0, n_iter=1)
    assert search.cv_results_["outer_step"].tolist() == [0, 1] and len(calls) == 2 and None not in calls
    solved = descend(LogisticRegression(), {"C": [0.1]}, timeout=1e-9, n_iter=1)  # a solver has no deadline of its own
    assert solved.cv_results_["outer_step"].tolist() == [0]


@pytest.mark.filterwarnings("ignore:One or more of the test scores are non-finite")
def test_a_step_that_the_deadline_cuts_short_is_the_last(monkeypatch):
    calls = []

    def late(run, candidates, fits):
        calls.append(len(candidates))
        if len(calls) == 2:
            run.deadline = time.monotonic() - 1
        SearchRun.train(run, candidates, fits)

    monkeypatch.setattr(descent.DescentRun, "train", late)
    with pytest.warns(FitFailedWarning, match="9 fits failed out of a total of 18"):
        search = descend(MLP, RATES, timeout=1000.0)
    assert calls == [3, 3] and np.isnan(search.cv_results_["mean_test_score"]).tolist() == [False] * 3 + [True] * 3
    assert search.best_index_ < 3


@pytest.mark.filterwarnings("ignore:The total space of parameters")
@pytest.mark.parametrize(
    ("estimator", "space", "options", "error"),
    [
        (SVC(), {"C": [1.0]}, {}, "and SVC is none of gputune's estimators; use RandomizedSearchCV"),
        (MLP, RATES, {"hyperparameters": ("alpha", "beta1")}, "descent of MLPClassifier moves some of learning_"),
        (MLP, RATES, {"hyperparameters": "C"}, "weight_decay or alpha, momentum, each named once, got 'C'"),
        (MLP, RATES, {"hyperparameters": ()}, r"each named once, got \(\)"),
        (MLP, RATES, {"hyperparameters": ("alpha", "alpha")}, "named once, got .'alpha', 'alpha'"),
        (MLP, RATES, {"hyperparameters": "lr"}, "some of learning_rate_init, weight_decay or alpha, momentum, each"),
        (MLP, RATES, {"hyperparameters": ("alpha", "weight_decay")}, "each named once"),
        (MLP, RATES, {"hyperparameters": "alpha"}, "start 0 decays by weight_decay, and not by alpha; name"),
        (ADAM, {"alpha": [0.1]}, {"hyperparameters": "weight_decay"}, "start 0 decays by alpha, and not by weight_dec"),
        (LogisticRegression(), {"C": [1.0]}, {"hyperparameters": ["lr", "C"]}, "moves some of C, each named once"),
        (MLP, RATES | {"solver": ["adamhd"]}, {}, "what start 0 has: optimizer='adamhd'; choose"),
        (MLP, RATES, {"hyperparameters": "momentum"}, "adamw has no 'momentum', and start 0 uses it"),
        (SGD, RATES, {"hyperparameters": "momentum"}, "cannot start from momentum=0, as start 0 does, .* in the logit"),
        (ADAM, {"alpha": [0.0]}, {"hyperparameters": "alpha"}, "cannot start from alpha=0, .* with values above 0, or"),
        (LogisticRegression(), {"C": [np.inf]}, {}, "cannot start from C=inf, .* with values above 0 and finite"),
        (LogisticRegression(fit_intercept=False), {"C": [1.0]}, {}, "got fit_intercept=False in start 0; leave it T"),
        (MLP, RATES, {"cv": KFold(3)}, "fold 0 have class 0, of which it has no training row: its log loss"),
        (MLP, RATES, {"cv": [(np.arange(150), [])]}, "fold 0 has no validation rows to descend on"),
        (MLP, {"rate": [1.0]}, {}, "Invalid parameter 'rate' for estimator MLPClassifier"),
        (MLP, RATES, {"step": "long"}, "The 'step' parameter of HypergradientSearchCV must be a str among"),
        (MLP, RATES, {"outer_steps": 0}, "The 'outer_steps' parameter of HypergradientSearchCV must be an int in"),
        (MLP, RATES, {"first_step": 0.0}, "The 'first_step' parameter of HypergradientSearchCV must be a float in"),
        (MLP, RATES, {"smallest_step": -1}, "The 'smallest_step' parameter of HypergradientSearchCV must be a float"),
        (MLP, RATES, {"hyperparameters": 3}, "The 'hyperparameters' parameter of HypergradientSearchCV must be"),
    ],
)  # fmt: skip
def test_mistakes_are_said_before_anything_trains(monkeypatch, estimator, space, options, error):
    monkeypatch.setattr("gputune.sklearn.replay.fit_together", None)
    with pytest.raises(ValueError, match=error):
        descend(estimator, space, **options)


@pytest.mark.filterwarnings("ignore:The least populated class in y has only 2 members")
@pytest.mark.parametrize("estimator", [MLP, LogisticRegression(tol=1e-8)])
def test_the_loss_holds_on_folds_that_hold_out_no_row_of_a_class(estimator):
    """scikit-learn's own log loss refuses the fold without the third class; the descended one does not."""
    labels = np.array(["a", "b", "c"])[np.where(np.arange(150) >= 148, 2, np.minimum(Y, 1))]
    space = {"C": loguniform(1e-3, 1e2)} if isinstance(estimator, LogisticRegression) else RATES
    search = descend(estimator, space, y=labels, n_iter=2)
    results = search.cv_results_
    scores = np.stack([results[f"split{fold}_test_score"] for fold in range(3)])
    assert np.isfinite(scores).all() and search.best_score_ == results["mean_test_score"].max()
    best = clone(estimator).set_params(**search.best_params_)
    splits = list(model_selection.StratifiedKFold(3).split(X, labels))
    assert any("c" not in labels[test] for _, test in splits)
    for fold, (train, test) in enumerate(splits):
        fitted = clone(best).fit(X[train], labels[train])
        loss = log_loss(labels[test], fitted.predict_proba(X[test]), labels=["a", "b", "c"])
        assert scores[fold][search.best_index_] == pytest.approx(-loss, rel=1e-6)
    again = pickle.loads(pickle.dumps(search))
    assert again.scorer_(again, X, labels) == search.scorer_(search, X, labels) and clone(search).scoring is None


def test_a_class_whose_rows_weigh_nothing_is_lacking():
    weights = (Y != 2).astype(float)
    with pytest.raises(InputError, match="class 2, of which it has no training row with sample_weight above 0"):
        HypergradientSearchCV(MLP, RATES, **OPTIONS).fit(X, Y, sample_weight=weights)


class Narrowing(TransformerMixin, BaseEstimator):
    """Gives other columns of other rows."""

    def fit(self, X, y=None):
        self.rows_ = len(X)
        return self

    def transform(self, X):
        return X if len(X) == self.rows_ else X[:, :1]


@pytest.mark.filterwarnings("ignore:One or more of the test scores are non-finite")
def test_validation_rows_of_other_columns_are_refused():
    pipeline = make_pipeline(Narrowing(), MLP)
    train = Part(check_rows(clone(MLP), X, Y), np.arange(150))
    error = r"rows of float64 \(rows, 1\), named None, after training rows of float64 \(rows, 4\), named None"
    with pytest.raises(ValueError, match=error):
        held_out_part(clone(pipeline).fit(X, Y), train, X[:50], Y[:50])
    with pytest.warns(UserWarning, match="Scoring failed"):
        search = descend(pipeline, {"mlpclassifier__learning_rate_init": [0.01]}, n_iter=1)
    assert len(search.cv_results_["params"]) == 1


def test_score_without_a_refit_is_refused():
    search = descend(MLP, RATES, n_iter=1, outer_steps=1, refit=False)
    with pytest.raises(AttributeError, match="`refit=False`. score is available only after refitting"):
        search.score(X, Y)
