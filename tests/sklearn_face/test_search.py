"""RandomizedSearchCV and GridSearchCV beside scikit-learn's own, over the same estimators;
pipelines; study files."""

import json
import pickle
import time
import warnings

import joblib
import numpy as np
import pandas as pd
import pytest
import sklearn
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from scipy.stats import loguniform, randint
from sklearn import model_selection
from sklearn.base import clone
from sklearn.datasets import load_diabetes
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning, FitFailedWarning
from sklearn.feature_selection import SelectFromModel
from sklearn.metrics import get_scorer
from sklearn.model_selection import GroupKFold, KFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler, OneHotEncoder, StandardScaler
from sklearn.svm import SVC

import gputune
from command_line import run
from face_modules import Net
from gputune.ground.errors import InputError
from gputune.sklearn import (
    GridSearchCV,
    HypergradientSearchCV,
    LogisticRegression,
    MLPClassifier,
    MLPRegressor,
    NeuralNetClassifier,
    RandomizedSearchCV,
    replay,
)
from searches import (
    OPTIONS,
    SCORES,
    Callback,
    CountingScaler,
    CountingSplitter,
    X,
    Y,
    assert_same_results,
    both,
    both_random,
)

WEIGHTS = np.random.default_rng(0).uniform(0.1, 2, len(Y))
MLP = MLPClassifier(hidden_layer_sizes=(8,), max_iter=4, batch_size=32, random_state=0)
RATES = {"learning_rate_init": loguniform(1e-3, 1e-1)}
ALTERNATIVES = [
    {
        "hidden_layer_sizes": randint(4, 40),
        "learning_rate_init": loguniform(1e-3, 1e-1),
        "alpha": [0.01, 0.1],
    },
    {
        "learning_rate_init": [0.01, 0.1],
        "dropout": [0.2],
        "batch_size": randint(5, 60),
        "solver": ["adam", "sgd"],
    },
]


def fitting_scorer(model, X, y):
    """Fits estimators of its own."""
    return (
        model.score(X, y)
        + clone(model).fit(X, y).score(X, y)
        + LogisticRegression().fit(X, y).score(X, y)
    )


SGD = clone(MLP).set_params(solver="sgd")


@pytest.mark.parametrize(
    ("estimator", "space"),
    [
        (MLPClassifier(max_iter=5, random_state=3), ALTERNATIVES),
        (LogisticRegression(), {"C": loguniform(1e-2, 1e2), "l1_ratio": [0.0, 1.0]}),
        (
            NeuralNetClassifier(Net, max_epochs=3, random_state=1),
            {"module__hidden": [4, 8], "lr": [0.1, 0.01]},
        ),
    ],
    ids=lambda v: type(v).__name__,
)
def test_scores_are_those_of_scikit_learns_search(estimator, space, training):
    options = {"scoring": SCORES, "refit": "neg_log_loss", "n_iter": 4, "return_train_score": True}
    ours, _, theirs, _ = both_random(estimator, space, **options)
    assert [call[:2] for call in training] == [(4, 3)]
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-6)
    assert ours.score(X, Y) == pytest.approx(theirs.score(X, Y), abs=1e-6)
    assert ours.classes_.tolist() == [0, 1, 2] and ours.n_features_in_ == 4


def test_a_grid_and_a_regression(training):
    data = load_diabetes(return_X_y=True)
    model = MLPRegressor(hidden_layer_sizes=(8,), max_iter=5, random_state=0)
    grid = {"learning_rate_init": [0.01, 0.1], "weight_decay": [0.0, 0.1]}
    ours, _, theirs, _ = both(GridSearchCV, model_selection.GridSearchCV, model, grid, *data, cv=4)
    assert_same_results(ours, theirs)
    assert [call[:2] for call in training] == [(4, 4)]


@pytest.mark.parametrize(
    "options",
    [
        {"refit": lambda: lambda results: int(results["mean_test_score"].argmin())},
        {"scoring": SCORES, "refit": False},
        {"scoring": lambda: lambda model, X, y: {"a": model.score(X, y), "b": 1.0}, "refit": "a"},
        {"cv": lambda: KFold(3, shuffle=True, random_state=np.random.RandomState(1))},
        {"random_state": lambda: np.random.RandomState(1)},
        {"cv": lambda: ((np.arange(i, 150, 2), np.arange(1 - i, 150, 2)) for i in range(2))},
        {"cv": lambda: [(np.arange(150) % 3 > 0, np.arange(150) % 3 == 0)]},
        {"cv": GroupKFold(3), "fit_params": {"groups": np.arange(150) % 7}},
        {"fit_params": {"sample_weight": WEIGHTS}},
        {"scoring": lambda: fitting_scorer, "n_iter": 2, "cv": 2},
        {
            "X": pd.DataFrame(X, columns=list("abcd")),
            "y": pd.Series(np.array(["setosa", "versicolor", "other"])[Y]),
        },
        {"X": X.tolist(), "y": Y.tolist()},
        {"space": {"random_state": [1, 2, 3, 4]}},
        {"estimator": clone(MLP).set_params(random_state=np.random.RandomState(5))},
    ],
    ids=[
        "callable refit",
        "no refit",
        "dict scorer",
        "random folds",
        "generator state",
        "splits",
        "masks",
        "groups",
        "weights",
        "scorer that fits",
        "frame",
        "lists",
        "seeds",
        "generator",
    ],
)
def test_the_options_of_scikit_learn(options):
    ours, said, theirs, said_by_theirs = both_random(
        **{"estimator": MLP, "space": RATES, **options}
    )
    assert said == said_by_theirs
    assert hasattr(ours, "best_score_") == hasattr(theirs, "best_score_")
    assert hasattr(ours, "best_estimator_") == hasattr(theirs, "best_estimator_")
    for name in ("classes_", "feature_names_in_"):
        np.testing.assert_array_equal(getattr(ours, name, None), getattr(theirs, name, None))


def test_one_draw_of_a_seed_is_for_all_candidates():
    fresh = clone(MLP).set_params(random_state=None)
    search = RandomizedSearchCV(fresh, {"dropout": [0.0, 0, 0.0]}, n_iter=3, cv=3).fit(X, Y)
    assert np.ptp(search.cv_results_["mean_test_score"]) == 0


def test_a_search_leaves_its_parameters_as_they_were(training):
    splitter = CountingSplitter()
    generator = np.random.RandomState(0)
    search = RandomizedSearchCV(
        MLP, RATES, n_iter=2, cv=splitter, n_jobs=-1, random_state=generator
    )
    before = dict(vars(search))
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        search.fit(X, Y[1:])
    assert all(vars(search)[name] is value for name, value in before.items())
    search.fit(X, Y)
    assert all(vars(search)[name] is value for name, value in before.items())
    assert len(splitter.asked) == 1 and [call[:2] for call in training] == [(2, 3)]
    again = pickle.loads(pickle.dumps(search))
    np.testing.assert_array_equal(again.predict(X), search.predict(X))


def test_times_are_shares_of_the_time_of_all():
    begin = time.perf_counter()
    search = RandomizedSearchCV(MLP, RATES, **OPTIONS).fit(X, Y)
    spent = time.perf_counter() - begin
    times = search.cv_results_
    assert np.ptp(times["mean_fit_time"]) == 0 and not times["std_fit_time"].any()
    assert 0 < times["mean_fit_time"].sum() * 3 < spent
    assert (times["mean_score_time"] > 0).all() and 0 < search.refit_time_ < spent


def test_failed_fits_are_counted_and_explained():
    _, said, _, said_by_theirs = both_random(
        SGD, {"learning_rate_init": [1e300, 0.1, -1.0]}, n_iter=3
    )
    assert len(said) == 2 and [kind for kind, _ in said] == [kind for kind, _ in said_by_theirs]
    failed = next(message for kind, message in said if kind is FitFailedWarning)
    assert "6 fits failed out of a total of 9" in failed
    assert "3 fits failed with the following error" in failed  # each reason once
    assert (
        "DivergedError: the training diverged with nesterov and a learning rate of 1e+300" in failed
    )
    assert "'learning_rate_init' parameter of MLPClassifier must be" in failed


def test_all_failed_raises():
    search = RandomizedSearchCV(SGD, {"learning_rate_init": [1e300, 1e299]}, n_iter=2, cv=3)
    with pytest.raises(ValueError, match=r"All the 6 fits failed[\s\S]*DivergedError"):
        search.fit(X, Y)
    with pytest.raises(ArithmeticError, match="diverged"):
        search.set_params(error_score="raise").fit(X, Y)


def test_a_fold_may_fail_by_itself():
    wrong = X.copy()
    wrong[0, 0] = np.nan
    ours, said, _, said_by_theirs = both_random(MLP, RATES, X=wrong, refit=False)
    # trained, but cannot be scored
    assert np.isfinite(ours.cv_results_["split0_test_score"]).sum() == 0
    assert len(said) == len(said_by_theirs) > 2
    assert "8 fits failed out of a total of 12" in str(said)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"space": {"bogus": [1, 2]}}, "Invalid parameter 'bogus'"),
        ({"space": {"learning_rate_init": 5}}, "not iterable or a distribution"),
        ({"space": 7}, "param_distributions"),
        ({"n_iter": 0}, "n_iter"),
        ({"cv": "five"}, "'cv' parameter"),
        ({"scoring": "bogus"}, "'scoring' parameter"),
        ({"scoring": SCORES}, "For multi-metric scoring"),
        ({"y": X[:, 0]}, "Unknown label type"),
        ({"y": Y[:-1]}, "inconsistent numbers of samples"),
        ({"y": None}, "fits failed"),
        ({"fit_params": {"bogus": 1}}, "unexpected keyword argument 'bogus'"),
    ],
)
def test_the_same_mistake_is_the_same_error(wrong, error, training):
    arguments = {"estimator": MLP, "space": RATES, "X": X, "y": Y, **OPTIONS, **wrong}
    caught = []
    for search in (RandomizedSearchCV, model_selection.RandomizedSearchCV):
        with pytest.raises((ValueError, TypeError), match=error) as found:
            both(search, search, **arguments)
        caught.append(found.type)
    assert caught[0] is caught[1] and training == []


def test_a_score_of_one_class_of_named_classes_is_scikit_learns_error():
    names = np.where(Y == 0, "setosa", "other")
    ours, said, _, said_by_theirs = both_random(
        MLP, {"alpha": [0.01]}, y=names, scoring="f1", refit=False
    )
    assert np.isnan(ours.cv_results_["mean_test_score"]).all()
    assert (
        sum("pos_label=1 is not a valid label: It should be one of" in text for _, text in said)
        == 3
    )
    assert [category for category, _ in said] == [category for category, _ in said_by_theirs]


@pytest.mark.parametrize("ours", [RandomizedSearchCV, HypergradientSearchCV])
def test_a_class_in_place_of_an_estimator_is_scikit_learns_error(ours):
    caught = []
    for search in (ours, model_selection.RandomizedSearchCV):
        with (
            warnings.catch_warnings(record=True) as said,
            pytest.raises(TypeError, match="instance") as found,
        ):
            warnings.simplefilter("always")
            search(MLPClassifier, RATES).fit(X, Y)
        caught.append(str(found.value))
        assert not any("one by one" in str(warning.message) for warning in said)
    assert caught[0] == caught[1]


@pytest.mark.parametrize(
    "wrong",
    [{"device": 3}, {"timeout": 0}, {"timeout": "long"}, {"study": 3}, {"pre_dispatch": 2.5}],
)
def test_its_own_parameters_are_checked_as_scikit_learns(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"The '{name}' parameter of RandomizedSearchCV must be"):
        RandomizedSearchCV(MLP, RATES, **wrong).fit(X, Y)


class Own(MLPClassifier):
    def fit(self, X, y):
        return super().fit(X + 1, y)


@pytest.mark.parametrize(
    ("estimator", "space", "options", "words"),
    [
        (SVC(), {"C": [0.1, 1.0]}, {}, "SVC is not an estimator of gputune"),
        (
            Own((8,), max_iter=2, random_state=0),
            RATES,
            {"timeout": 60.0},
            "Own overrides fit.*No effect: .*timeout",
        ),
    ],
)
def test_another_estimator_is_left_to_scikit_learn_with_one_warning(
    estimator, space, options, words, training
):
    with pytest.warns(UserWarning, match=words) as caught:
        ours = RandomizedSearchCV(estimator, space, n_iter=2, random_state=0, **options).fit(X, Y)
    assert [warning.filename for warning in caught] == [__file__] and training == []
    assert_same_results(
        ours,
        model_selection.RandomizedSearchCV(estimator, space, n_iter=2, random_state=0).fit(X, Y),
    )


def test_a_device_is_that_of_all_fits_and_the_refit():
    search = RandomizedSearchCV(MLP, RATES, device="cpu", n_iter=2).fit(X, Y)
    assert search.best_estimator_.device == "cpu" and search.estimator.device == "auto"
    pipeline = make_pipeline(StandardScaler(), MLP)
    search = RandomizedSearchCV(
        pipeline, {"mlpclassifier__alpha": [0, 0.1]}, n_iter=2, cv=2, device="cpu"
    ).fit(X, Y)
    assert search.best_estimator_[-1].device == "cpu" and pipeline[-1].device == "auto"
    for estimator, space in ((MLP, {"alpha": [0, 0.1]}), (LogisticRegression(), {"C": [0.1, 1.0]})):
        with pytest.raises(InputError, match="^device must be 'auto' or a device of this machine"):
            RandomizedSearchCV(estimator, space, device="abacus", n_iter=2).fit(X, Y)


def test_time_that_is_over_fails_the_fits(monkeypatch):
    monkeypatch.setattr(replay, "workers", lambda: 1)  # a process takes longer to start than this
    # no end of its own
    long = MLPClassifier((8,), max_iter=10**6, n_iter_no_change=10**6, random_state=0)
    search = RandomizedSearchCV(
        long, {"learning_rate_init": [0.1, 0.2]}, n_iter=2, cv=2, timeout=0.2, refit=False
    )
    with pytest.raises(
        ValueError,
        match=r"All the 4 fits failed[\s\S]*TimeoutError: this fit had not finished at the timeout",
    ):
        search.fit(X, Y)


def test_within_a_worker_of_joblib_no_other_processes_start():
    assert replay.workers() is None
    within = joblib.Parallel(n_jobs=2, prefer="threads")(
        joblib.delayed(replay.workers)() for _ in range(2)
    )
    assert within == [1, 1]


def test_a_convergence_warning_is_that_of_each_fit():
    slow = LogisticRegression(max_iter=1)
    _, said, _, said_by_theirs = both_random(slow, {"C": [1.0, 10.0]}, n_iter=2)
    kinds = [kind for kind, _ in said]
    assert kinds == [kind for kind, _ in said_by_theirs] and kinds.count(ConvergenceWarning) == 7


def test_loops_that_change_are_noticed(monkeypatch):
    search = RandomizedSearchCV(MLP, RATES, n_iter=2, cv=3)
    monkeypatch.setattr(replay.RecordedFit, "is_of", lambda *_: False)
    with pytest.raises(RuntimeError, match="6 fits that were trained together were never used"):
        search.fit(X, Y)


@pytest.mark.skipif(
    not hasattr(model_selection.RandomizedSearchCV, "set_callbacks"), reason="since 1.9"
)
def test_callbacks_receive_the_same_as_in_scikit_learn():
    heard = []
    for search in (RandomizedSearchCV, model_selection.RandomizedSearchCV):
        callback = Callback()
        search(MLP, RATES, **OPTIONS).set_callbacks(callback).fit(X, Y)
        heard.append(callback.heard)
    assert heard[0] == heard[1] and len(heard[0]) > 20
    callback = Callback()
    pipeline = make_pipeline(StandardScaler(), MLP).set_callbacks(callback)
    GridSearchCV(pipeline, {"mlpclassifier__alpha": [0, 0.1]}, cv=2).fit(X, Y)
    # none of what was only recorded
    assert [heard[:2] for heard in callback.heard].count(("begin", "fit")) == 5


def test_optunas_distributions():
    space = {
        "learning_rate_init": FloatDistribution(1e-3, 1e-1, log=True),
        "weight_decay": FloatDistribution(0.0, 0.5),
        "dropout": FloatDistribution(0.0, 0.5, step=0.25),
        "hidden_layer_sizes": IntDistribution(4, 64, log=True),
        "batch_size": IntDistribution(16, 48, step=16),
        "activation": CategoricalDistribution(("relu", "tanh")),
    }
    quick = MLPClassifier(max_iter=1, random_state=0)
    search = RandomizedSearchCV(quick, [space], n_iter=60, cv=2, random_state=0, refit=False).fit(
        X, Y
    )
    drawn = {name: [params[name] for params in search.cv_results_["params"]] for name in space}
    rates = drawn["learning_rate_init"]
    assert all(1e-3 <= rate <= 1e-1 for rate in rates) and np.median(rates) < 0.02
    assert all(0 <= decay <= 0.5 for decay in drawn["weight_decay"])
    assert set(drawn["dropout"]) == {0.0, 0.25, 0.5}
    assert set(drawn["batch_size"]) == {16, 32, 48} and set(drawn["activation"]) == {"relu", "tanh"}
    widths = drawn["hidden_layer_sizes"]
    assert (
        all(type(width) is int and 4 <= width <= 64 for width in widths) and np.median(widths) < 30
    )
    assert search.param_distributions == [space]


STEP_RATES = {"mlpclassifier__learning_rate_init": loguniform(1e-3, 1e-1)}


def test_scores_of_a_pipeline_are_those_of_scikit_learns_search(training):
    pipeline = make_pipeline(StandardScaler(), PCA(3), MLP)
    space = STEP_RATES | {"mlpclassifier__hidden_layer_sizes": [4, 8, 20]}
    ours, _, theirs, _ = both_random(
        pipeline, space, scoring=SCORES, refit="neg_log_loss", return_train_score=True
    )
    assert training == [(4, 3, (300, 3))]  # the training rows of all folds, one after the other
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-9)


def test_a_searched_transformer_is_fitted_once_for_each_of_its_parameters(scaler_fits, training):
    pipeline = make_pipeline(CountingScaler(), MLP)
    space = {
        "countingscaler__shift": [0.0, 1.0],
        "mlpclassifier__learning_rate_init": [0.01, 0.02, 0.1],
    }
    ours, *_ = both_random(pipeline, space, n_iter=6)
    # each fold, and the refit; scikit-learn's each fit
    assert scaler_fits == [100] * 6 + [150] + [100] * 18 + [150]
    assert ours.best_estimator_[0].mean_ == pytest.approx(
        X.mean(0) + ours.best_params_["countingscaler__shift"]
    )
    assert sorted(training) == [(3, 3, (300, 4))] * 2


@pytest.mark.parametrize(
    ("steps", "space"),
    [
        ([StandardScaler()], {"standardscaler": [MinMaxScaler(), "passthrough", StandardScaler()]}),
        ([FunctionTransformer(lambda x: 2 * x)], {}),
        ([SelectFromModel(LogisticRegression())], {"selectfrommodel__estimator__C": [0.1, 1.0]}),
        ([Pipeline([("inner", StandardScaler())]), PCA()], {"pca__n_components": [2, 3]}),
        ([OneHotEncoder(handle_unknown="ignore", sparse_output=False)], {}),
        (["passthrough"], {}),
    ],
    ids=[
        "whole step",
        "lambda",
        "a model of gputune inside",
        "pipeline inside",
        "unlike columns",
        "no step",
    ],
)
def test_what_a_step_may_be(steps, space):
    pipeline = make_pipeline(*(s if isinstance(s, str) else clone(s) for s in steps), MLP)
    _, said, *_ = both_random(pipeline, STEP_RATES | space)
    assert said == []


def test_names_and_the_memory_of_the_user(tmp_path):
    frame = pd.DataFrame(X, columns=list("abcd"))
    memory = joblib.Memory(tmp_path, verbose=0)
    pipeline = make_pipeline(StandardScaler().set_output(transform="pandas"), MLP, memory=memory)
    ours, *_ = both_random(pipeline, STEP_RATES, X=frame)
    assert ours.best_estimator_.memory.location == memory.location and pipeline.memory is memory
    assert ours.best_estimator_[-1].feature_names_in_.tolist() == list("abcd")


@pytest.mark.parametrize("memory", [None, "cache-folder"])
def test_a_mistake_shows_the_pipeline_as_the_user_wrote_it(memory):
    pipeline = make_pipeline(StandardScaler(), MLP, memory=memory)
    messages = []
    for search in (GridSearchCV, model_selection.GridSearchCV):
        with pytest.raises(ValueError) as found:
            search(pipeline, {"mlp__learning_rate_init": [0.1]}, cv=3).fit(X, Y)
        messages.append(str(found.value))
    assert (
        messages[0] == messages[1]
        and "Invalid parameter 'mlp' for estimator Pipeline" in messages[0]
    )


def test_parameters_of_fit_reach_their_steps():
    weights = np.random.default_rng(0).uniform(0.1, 2, len(Y)) ** 3
    pipeline = make_pipeline(StandardScaler(), MLP)
    given = {"mlpclassifier__sample_weight": weights, "standardscaler__sample_weight": weights}
    ours, *_ = both_random(pipeline, STEP_RATES, fit_params=given)
    plain = RandomizedSearchCV(pipeline, STEP_RATES, **OPTIONS).fit(X, Y)
    assert not np.allclose(
        ours.cv_results_["mean_test_score"], plain.cv_results_["mean_test_score"]
    )
    with sklearn.config_context(enable_metadata_routing=True):
        asking = make_pipeline(
            StandardScaler().set_fit_request(sample_weight=True),
            clone(MLP).set_fit_request(sample_weight=True),
        )
        accuracy = get_scorer("accuracy").set_score_request(sample_weight=False)
        routed, *_ = both_random(
            asking, STEP_RATES, fit_params={"sample_weight": weights}, scoring=lambda: accuracy
        )
    np.testing.assert_allclose(
        routed.cv_results_["mean_test_score"], ours.cv_results_["mean_test_score"]
    )


def test_a_step_that_fails_is_a_failed_fit(training):
    pipeline = make_pipeline(PCA(), clone(MLP).set_params(solver="sgd"))
    space = {"pca__n_components": [2, 30], "mlpclassifier__learning_rate_init": [0.1, 1e300]}
    _, said, _, said_by_theirs = both_random(pipeline, space)
    (failed,) = [message for kind, message in said if kind is FitFailedWarning]
    assert "9 fits failed out of a total of 12" in failed
    assert "6 fits failed with the following error" in failed and "n_components=30" in failed
    assert [kind for kind, _ in said] == [kind for kind, _ in said_by_theirs]
    assert training == [(2, 3, (300, 2))]


@pytest.mark.parametrize("name", ["mlpclassifier__bogus", "bogus__learning_rate_init"])
def test_an_unknown_parameter_is_an_error_before_anything_is_fitted(name, scaler_fits):
    pipeline = make_pipeline(CountingScaler(), MLP)
    with pytest.raises(ValueError, match="Invalid parameter 'bogus'"):
        RandomizedSearchCV(pipeline, [STEP_RATES, {name: [1]}], n_iter=9, cv=3, random_state=0).fit(
            X, Y
        )
    assert scaler_fits == []


@pytest.mark.parametrize(
    ("step", "values"), [("mlpclassifier", [MLP, LogisticRegression()]), ("memory", [None])]
)
def test_a_search_over_the_last_step_itself_is_left_to_scikit_learn(step, values):
    pipeline = make_pipeline(StandardScaler(), MLP)
    _, said, *_ = both_random(
        pipeline, {step: values, "standardscaler__with_mean": [True, False]}, n_iter=2
    )
    ((kind, message),) = said
    assert kind is UserWarning and f"the space contains {step!r}" in message


def test_a_pipeline_of_another_kind_is_left_to_scikit_learn():
    class Other(Pipeline):
        def fit(self, X, y=None, **params):
            return super().fit(X, y, **params)

    other = Other([("scale", StandardScaler()), ("mlpclassifier", MLP)])
    with pytest.warns(UserWarning, match="Other overrides how a Pipeline fits its steps"):
        RandomizedSearchCV(other, STEP_RATES, n_iter=2, cv=2).fit(X, Y)


SHORT_MLP = MLPClassifier(hidden_layer_sizes=(8,), max_iter=3, solver="sgd", random_state=0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "study.db"


def search_rates(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the fit that diverges
        return GridSearchCV(
            SHORT_MLP, {"learning_rate_init": [0.1, 1e300, 0.2]}, cv=3, study=path, **options
        ).fit(X, Y)


def test_a_study_has_every_trial(path):
    search = search_rates(path)
    study = gputune.Study.open(path)
    assert [trial.params for trial in study.trials] == search.cv_results_["params"]
    assert [trial.state for trial in study.trials] == ["complete", "failed", "complete"]
    assert [trial.best_epoch for trial in study.trials] == [3, 1, 3]
    for fold in range(3):
        scores = [trial.fold_scores[fold] for trial in study.trials]
        np.testing.assert_array_equal(scores, search.cv_results_[f"split{fold}_test_score"])
    assert study.best_score == search.best_score_ and study.best_params == search.best_params_
    assert repr(study).startswith("Study(MLPClassifier, 3 trials, 1 failed, best accuracy ")
    assert np.isnan(study.curves[:, :2]).all()
    code, out, _ = run("trials", path)
    assert code == 0 and "3 trials by accuracy, mean ± standard error over 3 folds" in out
    code, out, _ = run("best", path, "--format", "json")
    assert code == 0 and json.loads(out)["params"] == search.best_params_
    with pytest.raises(InputError, match=r"best_model\(\) cannot refit a study of GridSearchCV"):
        study.best_model(X, Y)
    with pytest.raises(
        InputError, match="holds a different search. It differs from this call in: model"
    ):
        gputune.tune("mlp", X, Y, n_trials=1, max_epochs=1, study=path, verbose=0)


def test_an_existing_file_is_refused_before_anything_trains(path, monkeypatch):
    path.write_text("mine")
    monkeypatch.setattr("gputune.sklearn.replay.fit_together", None)
    with pytest.raises(
        InputError, match="study must be a new path, because this search begins a new study, got"
    ):
        search_rates(path)
    assert path.read_text() == "mine"
    with pytest.raises(InputError, match="study must lie in an existing folder, got"):
        search_rates(path.parent / "nowhere" / "study.db")


@pytest.mark.parametrize(
    ("scoring", "refit", "metric", "name"),
    [
        ("neg_log_loss", True, "score", "neg_log_loss"),
        (["neg_log_loss", "accuracy"], "accuracy", "accuracy", "accuracy"),
        (["neg_log_loss", "accuracy"], False, "neg_log_loss", "neg_log_loss"),
        ({"score": "accuracy", "loss": "neg_log_loss"}, "loss", "loss", "loss"),
        (lambda model, X, y: model.score(X, y), True, "score", "<lambda>"),
    ],
)
def test_the_score_is_the_one_that_chooses(path, scoring, refit, metric, name):
    options = {"n_iter": 2, "cv": 2, "scoring": scoring, "refit": refit, "study": path}
    search = RandomizedSearchCV(LogisticRegression(), {"C": [0.1, 1.0]}, **options).fit(X, Y)
    study = gputune.Study.open(path)
    assert [trial.score for trial in study.trials] == search.cv_results_[
        f"mean_test_{metric}"
    ].tolist()
    assert study.meta["scoring"] == name and study.meta["method"] == "RandomizedSearchCV"
    others = (
        [other for other in scoring if other != name] if isinstance(scoring, list | dict) else []
    )
    assert study.metrics == ((name, *others) if others else ())
    for other in others:
        expected = search.cv_results_[f"mean_test_{other}"]
        np.testing.assert_allclose(
            [trial.scores[other] for trial in study.trials], expected, rtol=1e-12
        )


def test_a_regression_is_scored_by_r2(path):
    GridSearchCV(gputune.sklearn.MLPRegressor(max_iter=1), {"alpha": [0.1]}, cv=2, study=path).fit(
        X, X[:, 0]
    )
    assert gputune.Study.open(path).meta["scoring"] == "r2"


def test_any_estimator_and_any_value_can_be_kept(path):
    kernel = np.inner

    def own(a, b):
        return kernel(a, b)

    with pytest.warns(UserWarning, match="one by one"):
        GridSearchCV(SVC(), {"kernel": ["rbf", own]}, cv=2, study=path).fit(X, Y)
    first, second = gputune.Study.open(path).trials
    assert first.params == {"kernel": "rbf"} and second.params["kernel"].startswith("<function ")
