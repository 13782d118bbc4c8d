"""HypergradientSearchCV: its evaluations, its moves, its errors; its slopes compared with finite
differences.
"""

import pickle
import time

import numpy as np
import pytest
from scipy.stats import loguniform, uniform
from sklearn import model_selection
from sklearn.base import BaseEstimator, TransformerMixin, clone, is_classifier
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.exceptions import FitFailedWarning
from sklearn.metrics import log_loss, mean_squared_error
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC

import gputune
from face_modules import Net
from gputune.ground.errors import InputError
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
from gputune.sklearn.dataset import FoldRows
from gputune.sklearn.descent import DescentRun, slopes_of
from gputune.sklearn.recipe import FitOptions
from gputune.sklearn.record import fits_of, held_out_part
from gputune.sklearn.replay import SearchRun, with_hook
from searches import Callback, CountingScaler, CountingSplitter

X, Y = load_iris(return_X_y=True)
X = (X - X.mean(0)) / X.std(0)
MLP = MLPClassifier(
    (8,), solver="adamw", max_iter=3, batch_size=32, activation="tanh", random_state=0
)
ADAM = clone(MLP).set_params(solver="adam")
SGD = clone(MLP).set_params(
    solver="sgd",
    nesterovs_momentum=False,
    momentum=0.0,
    activation="relu",
    batch_size=16,
    max_iter=4,
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
    return np.array(
        [p.get(name) for p, s in zip(results["params"], results["start"]) if s == start]
    )


def assert_descended(search, X=X, y=Y):
    """Every start came to something better, and a search over all points as a grid finds the same
    scores."""
    results = search.cv_results_
    scores = search.cv_results_["mean_test_score"]
    paths = [scores[results["start"] == start] for start in set(results["start"])]
    assert all(path.max() > path[0] for path in paths)
    grid = [{name: [value] for name, value in params.items()} for params in results["params"]]
    scoring = search._effective_scoring()
    fixed = GridSearchCV(search.estimator, grid, scoring=scoring, cv=search.cv, refit=False).fit(
        X, y
    )
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
            assert results["params"][point] | {"learning_rate_init": 0} == params | {
                "learning_rate_init": 0
            }
    assert len({repr(params) for params in results["params"]}) == len(results["params"]) > 6
    assert_descended(descended)
    assert (results["std_fit_time"] == 0).all() and (results["mean_fit_time"] > 0).all()


def test_the_best_of_all_points_is_refitted(descended):
    search = descended
    scores = search.cv_results_["mean_test_score"]
    assert scores.argmax() == search.best_index_ < len(scores) - 1  # which was not the last point
    assert (
        search.best_score_ == scores.max()
        and search.best_params_ == search.cv_results_["params"][scores.argmax()]
    )
    alone = clone(MLP).set_params(**search.best_params_).fit(X, Y)
    np.testing.assert_allclose(search.predict_proba(X), alone.predict_proba(X), atol=1e-9)
    # scikit-learn's word on ``score``: by ``scoring`` where it is given, else the refitted
    # estimator's own.
    assert search.score(X, Y) == alone.score(X, Y)
    assert search.scorer_(search, X, Y) == pytest.approx(-log_loss(Y, alone.predict_proba(X)))
    named = descend(
        MLP, {"learning_rate_init": [0.01]}, n_iter=1, outer_steps=1, scoring="neg_log_loss"
    )
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


@pytest.mark.skipif(
    not hasattr(model_selection.RandomizedSearchCV, "set_callbacks"), reason="since 1.9"
)
def test_callbacks_hear_of_every_point(descended):
    heard = [(when, task) for when, task, *_ in CALLBACK.heard]
    assert heard.count(("begin", "candidate-split-evaluation")) == 3 * len(
        descended.cv_results_["params"]
    )
    assert heard.count(("begin", "search")) == heard.count(("end", "search")) == 1
    assert heard[-1] == ("teardown", None)


REGRESSOR = MLPRegressor(
    hidden_layer_sizes=(8, 8), activation="tanh", max_iter=3, batch_size=64, random_state=0
)
PENALTIES = {"C": loguniform(1e-3, 1), "l1_ratio": [0, 0.5]}


@pytest.mark.parametrize(
    ("estimator", "space", "data", "options"),
    [
        (REGRESSOR, {"learning_rate_init": [1e-4]}, load_diabetes(return_X_y=True), {"n_iter": 1}),
        (LogisticRegression(), PENALTIES, (X, Y), {"n_iter": 2, "outer_steps": 2}),
        (
            make_pipeline(CountingScaler(), MLP),
            {"mlpclassifier__learning_rate_init": [1e-3]},
            (X, Y),
            {"n_iter": 1},
        ),
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
    groups = np.arange(150)
    shuffled = np.random.default_rng(0).permutation(150)
    search.fit(X[shuffled], Y[shuffled], groups=groups)
    assert len(splitter.asked) == 1 and splitter.asked[0] is groups
    assert search.cv_results_["outer_step"].max() > 1


@pytest.mark.filterwarnings("ignore:One or more of the test scores are non-finite")
def test_a_point_that_diverges_steps_down():
    with pytest.warns(FitFailedWarning, match="12 fits failed out of a total of") as said:
        search = descend(
            SGD,
            [{"learning_rate_init": [1e300]}, {"learning_rate_init": [0.1]}],
            n_iter=2,
            outer_steps=3,
        )
    rates = path_of(search, int(search.cv_results_["params"][1]["learning_rate_init"] == 1e300))
    np.testing.assert_allclose(np.diff(np.log(rates)), -1.5)
    assert len(rates) == 4 and search.best_params_["learning_rate_init"] < 100
    assert len([w for w in said if w.category is FitFailedWarning]) == 1


@pytest.mark.filterwarnings("ignore:One or more of the test scores are non-finite")
def test_a_configuration_that_is_refused_is_the_last_of_its_start():
    with pytest.warns(FitFailedWarning, match="3 fits failed") as said:
        search = descend(MLP, {"learning_rate_init": [0.01], "batch_size": [-1, 32]}, n_iter=2)
    refused = [params["batch_size"] == -1 for params in search.cv_results_["params"]]
    assert (
        sum(refused) == 1
        and len(refused) > 3
        and len([w for w in said if w.category is FitFailedWarning]) == 1
    )


@pytest.mark.filterwarnings("ignore:One or more of the test scores are non-finite")
def test_a_point_that_cannot_be_scored_is_the_last():
    holed = X.copy()
    holed[140] = np.nan
    split = [(np.arange(100), np.arange(100, 150))]
    with pytest.warns(UserWarning, match="Scoring failed"):
        search = descend(
            MLP, {"learning_rate_init": [0.01]}, holed, Y % 2, n_iter=1, refit=False, cv=split
        )
    assert len(search.cv_results_["params"]) == 1


def test_no_start_moves_after_the_deadline(monkeypatch):
    slopes_of = descent.slopes_of
    calls = []

    def slow(fits, names, mode, training):
        calls.append(training.deadline)
        return {} if len(calls) == 2 else slopes_of(fits, names, mode, training)

    monkeypatch.setattr(descent, "slopes_of", slow)
    search = descend(MLP, {"learning_rate_init": [0.01]}, timeout=1000.0, n_iter=1)
    assert (
        search.cv_results_["outer_step"].tolist() == [0, 1]
        and len(calls) == 2
        and None not in calls
    )
    # a solver has no deadline of its own
    solved = descend(LogisticRegression(), {"C": [0.1]}, timeout=1e-9, n_iter=1)
    assert solved.cv_results_["outer_step"].tolist() == [0]


def test_a_start_that_noise_keeps_in_its_place_ends_where_its_second_measure_fails(monkeypatch):
    def noise(fits, names, mode, training):
        slopes = {"lr": np.array([-9.0, 0.1, 9.0])[:, None, None]}
        return (
            {fits[0].trial: descent.TrialSlopes(np.ones(3), slopes, np.zeros(3))}
            if mode == "exact"
            else {}
        )

    monkeypatch.setattr(descent, "slopes_of", noise)
    search = descend(MLP, {"learning_rate_init": [0.01]}, n_iter=1)
    assert search.cv_results_["outer_step"].tolist() == [0]


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
    assert (
        calls == [3, 3]
        and np.isnan(search.cv_results_["mean_test_score"]).tolist() == [False] * 3 + [True] * 3
    )
    assert search.best_index_ < 3


@pytest.mark.filterwarnings("ignore:The total space of parameters")
@pytest.mark.parametrize(
    ("estimator", "space", "options", "error"),
    [
        (
            SVC(),
            {"C": [1.0]},
            {},
            "but SVC is not an estimator of gputune. Use RandomizedSearchCV",
        ),
        (
            MLP,
            RATES,
            {"hyperparameters": ("alpha", "beta1")},
            "hyperparameters must be some of learning_",
        ),
        (
            MLP,
            RATES,
            {"hyperparameters": "C"},
            "weight_decay or alpha, momentum for MLPClassifier, each named once, got 'C'",
        ),
        (MLP, RATES, {"hyperparameters": ()}, r"each named once, got \(\)"),
        (MLP, RATES, {"hyperparameters": ("alpha", "alpha")}, "named once, got .'alpha', 'alpha'"),
        (
            MLP,
            RATES,
            {"hyperparameters": "lr"},
            "some of learning_rate_init, weight_decay or alpha, momentum for",
        ),
        (MLP, RATES, {"hyperparameters": ("alpha", "weight_decay")}, "each named once"),
        (
            MLP,
            RATES,
            {"hyperparameters": "alpha"},
            "names 'alpha', but start 0 sets its weight decay by 'weight_decay'. Name",
        ),
        (
            ADAM,
            {"alpha": [0.1]},
            {"hyperparameters": "weight_decay"},
            "names 'weight_decay', but start 0 sets its weight decay by 'alpha'",
        ),
        (
            LogisticRegression(),
            {"C": [1.0]},
            {"hyperparameters": ["lr", "C"]},
            "must be some of C for LogisticRegression, each named once",
        ),
        (MLP, RATES | {"solver": ["adamhd"]}, {}, "optimizer='adamhd', which start 0 has. Choose"),
        (
            MLP,
            RATES,
            {"hyperparameters": "momentum"},
            "for adamw, which start 0 uses, got 'momentum'",
        ),
        (
            SGD,
            RATES,
            {"hyperparameters": "momentum"},
            "cannot start from momentum=0.0, as start 0 does, .* the logit",
        ),
        (
            ADAM,
            {"alpha": [0.0]},
            {"hyperparameters": "alpha"},
            "cannot start from alpha=0.0, .* with values above 0, or",
        ),
        (
            LogisticRegression(),
            {"C": [np.inf]},
            {},
            "cannot start from C=inf, .* with finite values above 0",
        ),
        (
            LogisticRegression(fit_intercept=False),
            {"C": [1.0]},
            {},
            "fit_intercept must be True.*got False in start 0. Leave it T",
        ),
        (
            MLP,
            RATES,
            {"cv": KFold(3)},
            "training row for every class .*, got none of class 0 in fold 0",
        ),
        (MLP, RATES, {"cv": [(np.arange(150), [])]}, "Fold 0 of cv has no validation rows"),
        (MLP, {"rate": [1.0]}, {}, "Invalid parameter 'rate' for estimator MLPClassifier"),
        (
            MLP,
            RATES,
            {"step": "long"},
            "The 'step' parameter of HypergradientSearchCV must be a str among",
        ),
        (
            MLP,
            RATES,
            {"outer_steps": 0},
            "The 'outer_steps' parameter of HypergradientSearchCV must be an int in",
        ),
        (
            MLP,
            RATES,
            {"first_step": 0.0},
            "The 'first_step' parameter of HypergradientSearchCV must be a float in",
        ),
        (
            MLP,
            RATES,
            {"smallest_step": -1},
            "The 'smallest_step' parameter of HypergradientSearchCV must be a float",
        ),
        (
            MLP,
            RATES,
            {"hyperparameters": 3},
            "The 'hyperparameters' parameter of HypergradientSearchCV must be",
        ),
    ],
)
def test_mistakes_are_said_before_anything_trains(monkeypatch, estimator, space, options, error):
    monkeypatch.setattr("gputune.sklearn.replay.fit_together", None)
    with pytest.raises(ValueError, match=error):
        descend(estimator, space, **options)


@pytest.mark.filterwarnings("ignore:The least populated class in y has only 2 members")
@pytest.mark.parametrize("estimator", [MLP, LogisticRegression(tol=1e-8)])
def test_the_loss_holds_on_folds_that_hold_out_no_row_of_a_class(estimator):
    """scikit-learn's own log loss refuses the fold without the third class; the descended one does
    not."""
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
    assert (
        again.scorer_(again, X, labels) == search.scorer_(search, X, labels)
        and clone(search).scoring is None
    )


def test_a_class_whose_rows_weigh_nothing_is_lacking():
    weights = (Y != 2).astype(float)
    with pytest.raises(
        InputError,
        match="a training row with sample_weight above 0 for every class .* none of class 2",
    ):
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
    train = FoldRows(check_rows(clone(MLP), X, Y), np.arange(150))
    error = r"training rows: float64 \(rows, 4\), named None, got float64 \(rows, 1\), named None"
    with pytest.raises(ValueError, match=error):
        held_out_part(clone(pipeline).fit(X, Y), train, X[:50], Y[:50])
    with pytest.warns(UserWarning, match="Scoring failed"):
        search = descend(pipeline, {"mlpclassifier__learning_rate_init": [0.01]}, n_iter=1)
    assert len(search.cv_results_["params"]) == 1


def test_score_without_a_refit_is_refused():
    search = descend(MLP, RATES, n_iter=1, outer_steps=1, refit=False)
    with pytest.raises(
        AttributeError, match="`refit=False`. score is available only after refitting"
    ):
        search.score(X, Y)


DATA = {
    "iris": (X[:-7], Y[:-7]),  # folds of unlike sizes
    "cancer": (lambda x, y: ((x - x.mean(0)) / x.std(0), y))(*load_breast_cancer(return_X_y=True)),
    "diabetes": load_diabetes(return_X_y=True),
}
TINY_MLP = MLPClassifier(
    hidden_layer_sizes=(6,), activation="tanh", max_iter=4, batch_size=24, random_state=0
)
TINY_SGD = clone(TINY_MLP).set_params(
    solver="sgd", nesterovs_momentum=False, momentum=0.0, learning_rate_init=0.2
)
TINY_REGRESSOR = MLPRegressor(
    hidden_layer_sizes=(6, 6), activation="tanh", max_iter=3, batch_size=64, random_state=0
)
WEIGHTS = np.random.default_rng(0).uniform(0.2, 2.0, len(Y))


def slopes(estimator, points, names, *, X=X, y=Y, cv=3, weights=None, params=None, **how):
    """Return the derivatives of each point of an estimator, and the fits."""
    run = DescentRun(with_hook(estimator, "auto"), cv)
    run.fit_params = params or ({} if weights is None else {"sample_weight": weights})
    fits = fits_of(run.record(points, X, y, run.split(X, y, {})))
    run.train(points, fits)
    found = slopes_of(fits, names, how.pop("mode", "exact"), FitOptions(**how))
    return [found.get(trial) for trial in range(len(points))], fits


def slope_by_hand(estimator, params, step=1e-5, *, X=X, y=Y, weights=None):
    """Return the finite difference of the mean validation loss in the logarithm of the only
    parameter."""
    splits = list(StratifiedKFold(3).split(X, y))
    ((name, value),) = params.items()
    up, down = (
        np.mean(
            [
                loss_by_hand(estimator, {name: value * np.exp(h)}, *s, X=X, y=y, weights=weights)
                for s in splits
            ]
        )
        for h in (step, -step)
    )
    return (up - down) / (2 * step)


def loss_by_hand(estimator, params, train, test, *, X=X, y=Y, weights=None):
    given = {} if weights is None else {"sample_weight": weights[train]}
    fitted = clone(estimator).set_params(**params).fit(X[train], y[train], **given)
    if is_classifier(estimator):
        return log_loss(y[test], fitted.predict_proba(X[test]))
    return mean_squared_error(y[test], fitted.predict(X[test]))


@pytest.mark.cpu  # a GPU trains estimators in single precision
@pytest.mark.parametrize(
    ("estimator", "name", "word", "value", "data"),
    [
        (TINY_MLP, "lr", "learning_rate_init", 0.01, "iris"),
        (TINY_MLP, "lr", "learning_rate_init", 0.01, "cancer"),
        (
            clone(TINY_MLP).set_params(learning_rate="cosine"),
            "weight_decay",
            "weight_decay",
            0.5,
            "iris",
        ),
        (TINY_MLP, "weight_decay", "alpha", 2.0, "iris"),
        (
            clone(TINY_SGD).set_params(learning_rate_init=0.1),
            "weight_decay",
            "alpha",
            0.5,
            "cancer",
        ),
        (TINY_SGD, "momentum", "momentum", 0.7, "iris"),
        (
            clone(TINY_MLP).set_params(solver="sgd", learning_rate_init=0.05),
            "lr",
            "learning_rate_init",
            0.05,
            "cancer",
        ),
        (TINY_REGRESSOR, "lr", "learning_rate_init", 0.01, "diabetes"),
        (LogisticRegression(tol=1e-12), "C", "C", 0.4, "iris"),
        (LogisticRegression(tol=1e-12, class_weight="balanced"), "C", "C", 0.05, "cancer"),
    ],
)
def test_slopes_are_those_of_finite_differences(estimator, name, word, value, data):
    X, y = DATA[data]
    (found,), _ = slopes(estimator, [{word: value}], (name,), X=X, y=y)
    splitter = StratifiedKFold(3) if is_classifier(estimator) else KFold(3)
    splits = list(splitter.split(X, y))
    h = 1e-3 if name == "C" else 1e-4

    def mean_loss(step):
        return np.mean(
            [loss_by_hand(estimator, {word: value * np.exp(step)}, *s, X=X, y=y) for s in splits]
        )

    # Four points, so that what is left of the third derivative does not show.
    near, far = (mean_loss(k * h) - mean_loss(-k * h) for k in (1, 2))
    assert found.losses.mean() == pytest.approx(mean_loss(0), rel=1e-9)
    assert value * found.slopes[name].mean() == pytest.approx((8 * near - far) / (12 * h), rel=1e-6)
    assert found.slopes[name].shape == (3, 1, 1) and found.ratios.shape == (3,)


@pytest.mark.cpu  # a GPU trains estimators in single precision
def test_training_is_weighted_and_the_loss_is_not():
    (found,), _ = slopes(TINY_MLP, [{"learning_rate_init": 0.02}], ("lr",), weights=WEIGHTS)
    expected = slope_by_hand(TINY_MLP, {"learning_rate_init": 0.02}, weights=WEIGHTS)
    assert 0.02 * found.slopes["lr"].mean() == pytest.approx(expected, rel=1e-6)


def assert_close(one, other):
    np.testing.assert_allclose(one.losses, other.losses, rtol=1e-10)
    for name, table in other.slopes.items():
        np.testing.assert_allclose(one.slopes[name], table, rtol=1e-8)


def test_other_members_change_nothing():
    points = [
        {"learning_rate_init": 0.01},
        {"learning_rate_init": 0.1, "solver": "sgd", "weight_decay": 0.1},
        {"alpha": 1.0, "batch_size": 50, "hidden_layer_sizes": (20, 20)},
        {"alpha": 0.1, "max_iter": 2},
        {"random_state": 1, "dropout": 0.3},
    ]
    data = {"X": DATA["iris"][0], "y": DATA["iris"][1]}
    together, _ = slopes(TINY_MLP, points, ("lr", "weight_decay"), **data)
    for point, found in zip(points, together):
        (alone,), _ = slopes(TINY_MLP, [point], ("lr", "weight_decay"), **data)
        assert_close(found, alone)
    penalties = [{"C": 0.1}, {"C": 2.0, "l1_ratio": 0.5}, {"C": 1.0, "class_weight": "balanced"}]
    for point, found in zip(penalties, slopes(LogisticRegression(), penalties, ("C",), **data)[0]):
        assert_close(found, slopes(LogisticRegression(), [point], ("C",), **data)[0][0])


@pytest.mark.parametrize(
    ("last", "weights"),
    [(TINY_MLP, WEIGHTS), (LogisticRegression(), None)],
    ids=["weighted mlp", "logistic"],
)
def test_a_pipeline_is_its_last_step_on_transformed_rows(last, weights):
    name, word = ("lr", "learning_rate_init") if last is TINY_MLP else ("C", "C")
    prefix = type(last).__name__.lower() + "__"
    pipeline = make_pipeline("passthrough", StandardScaler(), last)
    params = {} if weights is None else {prefix + "sample_weight": weights}
    found, _ = slopes(
        pipeline, [{prefix + word: value} for value in (0.01, 0.1)], (name,), params=params
    )
    for fold, (train, test) in enumerate(StratifiedKFold(3).split(X, Y)):
        scaled = StandardScaler().fit(X[train]).transform(X)
        by_hand, _ = slopes(
            last,
            [{word: 0.01}, {word: 0.1}],
            (name,),
            X=scaled,
            cv=[(train, test)],
            weights=weights,
        )
        for trial, one in enumerate(by_hand):
            assert found[trial].losses[fold] == pytest.approx(one.losses[0], rel=1e-10)
            np.testing.assert_allclose(
                found[trial].slopes[name][fold], one.slopes[name][0], rtol=1e-8
            )


@pytest.mark.cpu  # a GPU trains estimators in single precision
def test_folds_whose_transformers_give_unlike_columns():
    levels = np.array([[i % 5 if i < 100 else i % 9] for i in range(150)], dtype=float)
    pipeline = make_pipeline(OneHotEncoder(handle_unknown="ignore", sparse_output=False), TINY_MLP)
    splits = list(KFold(3).split(levels))
    y = np.arange(150) % 3
    (found,), fits = slopes(
        pipeline, [{"mlpclassifier__learning_rate_init": 0.05}], ("lr",), X=levels, y=y, cv=splits
    )
    assert {fit.train.rows.X.parts[0].shape[1] for fit in fits} == {5, 9}
    for fold, (train, test) in enumerate(splits):
        expected = loss_by_hand(
            pipeline, {"mlpclassifier__learning_rate_init": 0.05}, train, test, X=levels, y=y
        )
        assert found.losses[fold] == pytest.approx(expected, rel=1e-10)


@pytest.mark.cpu  # a GPU trains estimators in single precision
@pytest.mark.parametrize(
    "random_state", [None, np.random.RandomState(0)], ids=["none", "generator"]
)
def test_the_training_is_the_one_that_was_made(random_state):
    fresh = clone(TINY_MLP).set_params(random_state=random_state)
    (found,), fits = slopes(fresh, [{"learning_rate_init": 0.02}], ("lr",))
    for fit, loss in zip(fits, found.losses):
        fitted = clone(fresh)
        fit.finish(fitted)
        rows = fit.valid.index
        assert loss == pytest.approx(log_loss(Y[rows], fitted.predict_proba(X[rows])), rel=1e-9)


@pytest.mark.cpu  # a GPU trains estimators in single precision
def test_modules_of_the_user():
    net = NeuralNetClassifier(Net, optimizer="adam", max_epochs=2, batch_size=32, random_state=0)
    (found,), fits = slopes(
        net, [{"module__hidden": 5, "optimizer__weight_decay": 0.1}], ("lr", "weight_decay")
    )
    assert set(found.slopes) == {"lr", "weight_decay"} and np.isfinite(found.losses).all()
    fitted = clone(net)
    fits[0].finish(fitted)
    test = fits[0].valid.index
    assert found.losses[0] == pytest.approx(
        log_loss(Y[test], fitted.predict_proba(X[test])), rel=1e-9
    )


def test_wide_differences_look_at_the_same_loss():
    (near,), _ = slopes(TINY_MLP, [{"learning_rate_init": 0.01}], ("lr",))
    (wide,), _ = slopes(TINY_MLP, [{"learning_rate_init": 0.01}], ("lr",), mode="differences")
    np.testing.assert_allclose(wide.losses, near.losses, rtol=1e-9)
    np.testing.assert_allclose(wide.slopes["lr"], near.slopes["lr"], rtol=0.2)
    assert (wide.slopes["lr"] != near.slopes["lr"]).all()


def test_what_the_deadline_cuts_short_has_no_slopes():
    (found,), _ = slopes(
        TINY_MLP, [{"learning_rate_init": 0.01}], ("lr",), deadline=time.monotonic() - 1
    )
    assert found is None


@pytest.mark.cpu  # a GPU trains estimators in single precision
def test_a_kink_of_units_that_only_pad_is_no_missing_derivative():
    # The padding's inputs are exactly 0.
    relu = clone(TINY_SGD).set_params(
        activation="relu", hidden_layer_sizes=(7, 7), learning_rate_init=0.05
    )
    (found,), _ = slopes(relu, [{}], ("lr",))
    expected = slope_by_hand(relu, {"learning_rate_init": 0.05}, 1e-7)
    assert 0.05 * found.slopes["lr"].mean() == pytest.approx(expected, rel=1e-5)
