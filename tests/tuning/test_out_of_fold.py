"""What a trial predicts of the rows that it has not seen is what its scores were made of."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_iris, make_multilabel_classification
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold, RepeatedKFold, TimeSeriesSplit
from torch import nn

import gputune
from gputune.models import MLP
from gputune.scoring.losses import best_temperature
from refused import refused

HOW = {"n_trials": 2, "max_epochs": 3, "verbose": 0, "workers": 1}
IRIS = load_iris(return_X_y=True)
SPACE = {"lr": [1e-3], "module__in_features": [4], "module__out_features": [4]}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return gputune.tune("mlp", *IRIS, study=tmp_path_factory.mktemp("oof") / "study.db", cv=3, **HOW)


@pytest.mark.parametrize("model", ["mlp", "logistic"])
@pytest.mark.parametrize("number", [0, 1])
def test_classes_score_as_in_the_search(model, number):
    study = gputune.tune(model, *IRIS, cv=3, scoring="accuracy", random_state=1, **HOW)
    predicted = study.oof_predictions(trial=number)
    assert predicted.shape == (150, 3) and np.allclose(predicted.sum(1), 1)
    right = predicted.argmax(1) == IRIS[1]
    assert right.mean() == pytest.approx(np.mean(study.trials[number].fold_scores))


def test_a_study_that_was_opened_gives_the_same(study):
    opened = gputune.Study.open(study.file)
    np.testing.assert_array_equal(opened.oof_predictions(*IRIS), study.oof_predictions())


def test_a_calibrated_model_has_the_temperature_of_what_its_folds_predict(study, tmp_path):
    plain, model = study.best_model(), study.best_model(calibrate=True)
    logits = torch.tensor(study.oof_predictions()).log()
    assert plain.temperature == 1 != model.temperature
    assert model.temperature == pytest.approx(best_temperature(logits, torch.tensor(IRIS[1])), rel=1e-6)
    expected = (torch.tensor(plain.predict_proba(IRIS[0])).log() / model.temperature).softmax(1)
    np.testing.assert_allclose(model.predict_proba(IRIS[0]), expected, rtol=1e-9)
    np.testing.assert_array_equal(model.predict(IRIS[0]), plain.predict(IRIS[0]))
    model.save(tmp_path / "model")
    loaded = gputune.load_model(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict_proba(IRIS[0]), model.predict_proba(IRIS[0]))
    assert "temperature" in model._repr_html_() and "temperature" not in plain._repr_html_()


@pytest.mark.filterwarnings("ignore:.* train without rows of a class")
def test_rows_of_a_class_that_their_fold_has_not_seen_calibrate_nothing():
    X, y = (part[np.argsort(IRIS[1], kind="stable")] for part in IRIS)
    study = gputune.tune("mlp", X, y, cv=KFold(3), scoring="accuracy", **HOW)  # a class a fold
    assert study.best_model(calibrate=True).temperature == 1


def test_models_ranked_by_the_log_loss_are_calibrated():
    study = gputune.tune("mlp", *IRIS, cv=3, scoring="neg_log_loss", **HOW)
    assert study.best_model().temperature == study.best_model(calibrate=True).temperature != 1
    assert study.best_model(*IRIS, check=False).temperature == 1 == study.best_model(calibrate=False).temperature
    assert study.ensemble(verbose=0, size=1).temperature == study.best_model().temperature
    assert study.ensemble(verbose=0, calibrate=False).temperature == 1
    points = gputune.tune("mlp", *IRIS, cv=3, method=gputune.Hypergradient(outer_steps=1), **HOW)
    assert points.record.scoring == "neg_log_loss" and points.best_model().temperature == 1


def test_what_cannot_be_calibrated_is_refused(study):
    numbers = gputune.tune("mlp", IRIS[0], IRIS[0][:, 0], cv=3, **HOW)
    for make in (numbers.best_model, numbers.ensemble):
        with refused(r"\(calibrate=True\) is for one class a row to be predicted, .* is of numbers; leave it out"):
            make(calibrate=True)
    X, y = make_multilabel_classification(60, random_state=0)
    with refused("is for one class a row to be predicted, and the study is of several labels"):
        gputune.tune(MLP, X, y, cv=2, **HOW).best_model(calibrate=True)
    with refused(r"best_model\(calibrate=...\) must be True, False or None, got 'yes'"):
        study.best_model(calibrate="yes")
    with refused(r"best_model\(calibrate=True\) needs the rows of the search.* leave out check=False"):
        study.best_model(IRIS[0], IRIS[1][::-1].copy(), calibrate=True, check=False)
    points = gputune.tune("mlp", *IRIS, cv=3, method=gputune.Hypergradient(outer_steps=1), **HOW)
    with refused(r"best_model\(calibrate=True\) trains a trial again on its folds, and this study is of descents"):
        points.best_model(calibrate=True)


def test_values_are_in_the_units_of_the_target():
    X, y = load_diabetes(return_X_y=True)
    rows = np.arange(len(y)) % 4
    folds = [(np.flatnonzero(rows != f), np.flatnonzero(rows == f)) for f in range(4)]
    study = gputune.tune("mlp", X, y, cv=folds, scoring="r2", **HOW)
    predicted = study.oof_predictions()
    assert predicted.shape == y.shape
    scores = [r2_score(y[valid], predicted[valid]) for _, valid in folds]
    np.testing.assert_allclose(scores, study.best_trial.fold_scores, rtol=1e-5)
    two = gputune.tune(MLP, X, np.stack([y, -y], 1), cv=folds, **HOW).oof_predictions()
    assert two.shape == (len(y), 2) and np.corrcoef(two[:, 0], -y)[0, 1] < 0


def test_labels_and_rows_of_several_folds_or_of_none():
    X, y = make_multilabel_classification(60, random_state=0)
    study = gputune.tune(MLP, X, y, cv=RepeatedKFold(n_splits=2, n_repeats=2, random_state=0), **HOW)
    labels = study.oof_predictions()
    assert labels.shape == y.shape and ((labels > 0) & (labels < 1)).all()
    predicted = gputune.tune("mlp", *IRIS, cv=TimeSeriesSplit(2), task="regression", **HOW).oof_predictions()
    assert np.isnan(predicted[:50]).all() and np.isfinite(predicted[50:]).all()


def test_what_cannot_train_again_on_its_folds_is_refused(study, tmp_path):
    with refused(r"oof_predictions\(trial=9\) must be the number of a trial that has a score"):
        study.oof_predictions(trial=9)
    with refused(r"oof_predictions\("):
        gputune.Study.open(study.file).oof_predictions(IRIS[0][::2], IRIS[1][::2])
    descent = gputune.Hypergradient(outer_steps=1)
    points = gputune.tune("mlp", *IRIS, cv=3, method=descent, **HOW)
    with refused("trains a trial again on its folds, and this study is of descents, .* another method"):
        points.oof_predictions()
    loop = gputune.search(
        lambda params, report: params["x"], {"x": [1.0]}, direction="maximize", n_trials=1, workers=1, verbose=0
    )
    with refused("this study is of search.., whose training loop is your own: keep what"):
        loop.oof_predictions()
    X, loss = IRIS[0], lambda outputs, y: (outputs - y).abs().sum(1)
    custom = gputune.tune(nn.Linear, X, X, task="custom", loss=loss, space=SPACE, cv=2, **HOW)
    with refused("this study is of a custom target, .* your own folds"):
        custom.oof_predictions()
