"""A search of the scikit-learn face as a study file."""

import json
import warnings

import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.svm import SVC

import gputune
from command_line import run
from gputune.errors import InputError
from gputune.sklearn import GridSearchCV, LogisticRegression, MLPClassifier, RandomizedSearchCV

X, Y = load_iris(return_X_y=True)
MLP = MLPClassifier(hidden_layer_sizes=(8,), max_iter=3, solver="sgd", random_state=0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "study.db"


def search_rates(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the fit that diverges
        return GridSearchCV(MLP, {"learning_rate_init": [0.1, 1e300, 0.2]}, cv=3, study=path, **options).fit(X, Y)


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
    with pytest.raises(InputError, match="holds another search, which differs from this call in: model"):
        gputune.tune("mlp", X, Y, n_trials=1, max_epochs=1, study=path, verbose=0)


def test_an_existing_file_is_refused_before_anything_trains(path, monkeypatch):
    path.write_text("mine")
    monkeypatch.setattr("gputune.sklearn.replay.fit_together", None)
    with pytest.raises(InputError, match="exists already, and this search begins a new one"):
        search_rates(path)
    assert path.read_text() == "mine"
    with pytest.raises(InputError, match="the folder does not exist; make it first"):
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
    assert [trial.score for trial in study.trials] == search.cv_results_[f"mean_test_{metric}"].tolist()
    assert study.meta["scoring"] == name and study.meta["method"] == "RandomizedSearchCV"
    others = [other for other in scoring if other != name] if isinstance(scoring, list | dict) else []
    assert study.metrics == ((name, *others) if others else ())
    for other in others:
        expected = search.cv_results_[f"mean_test_{other}"]
        np.testing.assert_allclose([trial.scores[other] for trial in study.trials], expected, rtol=1e-12)


def test_a_regression_is_scored_by_r2(path):
    GridSearchCV(gputune.sklearn.MLPRegressor(max_iter=1), {"alpha": [0.1]}, cv=2, study=path).fit(X, X[:, 0])
    assert gputune.Study.open(path).meta["scoring"] == "r2"


def test_any_estimator_and_any_value_can_be_kept(path):
    kernel = np.inner

    def own(a, b):
        return kernel(a, b)

    with pytest.warns(UserWarning, match="one by one"):
        GridSearchCV(SVC(), {"kernel": ["rbf", own]}, cv=2, study=path).fit(X, Y)
    first, second = gputune.Study.open(path).trials
    assert first.params == {"kernel": "rbf"} and second.params["kernel"].startswith("<function ")
