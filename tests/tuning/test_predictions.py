"""Scores, importances and probabilities that gputune computes from predictions of trained trials."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional

import gputune
from gputune.population.population import Ensemble
from gputune.tuning.predictions import _halves, predictions_of
from gputune.tuning.progress import Progress
from gputune.tuning.refit import Access, search_of
from gputune.tuning.validation import fold_report
from refused import refused

tune = partial(gputune.tune, cv=2, n_trials=2, include_default=False, verbose=0, workers=1)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 3)).astype("float32")
Y = (X[:, 0] > 0).astype(int)


class OneLogit(nn.Module):
    def __init__(self, n_features):
        super().__init__()
        self.linear = nn.Linear(n_features, 1)

    def forward(self, x):
        return self.linear(x)


def bce(outputs, y):
    return functional.binary_cross_entropy_with_logits(outputs[:, 0], y.to(outputs.dtype))


def neg_bce(outputs, y):
    assert outputs.shape == (len(y), 1)
    return -float(bce(outputs, y))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    "how", [{"scoring": "neg_loss"}, {"scoring": neg_bce}, {"loss": bce, "scoring": "neg_loss"}]
)
def test_an_ensemble_and_the_importance_of_one_logit_have_its_sign(how, keep):
    space = {"lr": [1e-5, 0.03]}
    study = tune(OneLogit, X, Y, space=space, max_epochs=20, keep_predictions=keep, **how)
    best = study.best_trial
    assert best.params["lr"] == 0.03 and best.score > -0.5
    ensemble = study.ensemble(size=1, verbose=0)
    assert ensemble.info["ensemble"] == {str(best.number): 1.0}
    assert ensemble.info["score"] == pytest.approx(best.score, rel=1e-4)
    assert study.best_model().predict(X).mean() > 0.2
    importance = fold_report(Access(study), importance=True)
    assert importance.columns[0] == "x0"


def test_the_mean_of_one_logit_networks_has_the_score_of_their_mean_probability():
    small = {"lr": 0.01, "module__width": 8, "module__depth": 1}
    study = tune(
        "realmlp",
        X,
        Y,
        space=small,
        n_trials=1,
        n_ens=2,
        loss="bce",
        scoring="neg_loss",
        max_epochs=2,
    )
    p = torch.as_tensor(study.oof_predictions()[:, 1])
    true = torch.as_tensor(Y).double()
    assert study.best_score == pytest.approx(
        -float(functional.binary_cross_entropy(p, true)), rel=1e-4
    )


def check_fold_scores(study):
    """Check that the predictions of trials, from which ensembles choose, have the trials' scores."""
    predictions = predictions_of(search_of(Access(study)), study.trials, Progress(0))
    for fold, values in enumerate(predictions.values):
        scores = [trial.fold_scores[fold] for trial in study.trials]
        np.testing.assert_allclose(predictions.scores(fold, values)[0], scores, rtol=1e-4)


def weighted(estimator, X, y):
    """The share of right predictions, in which rows of a large first column count 10 times."""
    assert type(X) in (np.ndarray, pd.DataFrame)
    first = X[:, 0] if isinstance(X, np.ndarray) else X["a"]
    return float(np.average(estimator.predict(X) == y, weights=np.where(first > 0, 10.0, 1.0)))


def of_every_second_row(estimator, X, y):
    return float((estimator.predict(X[::2]) == y[::2]).mean())


ONE_SIDE = np.where(X[:, 0] > 0, X[:, 1] > 0, RNG.random(len(X)) > 0.5).astype(int)


@pytest.mark.parametrize("table", [X, pd.DataFrame(X, columns=list("abc"))])
def test_a_custom_scorer_receives_the_rows_in_an_ensemble_and_a_report(table):
    study = tune("mlp", table, ONE_SIDE, scoring=weighted, n_trials=3, max_epochs=4)
    check_fold_scores(study)
    assert study.ensemble(verbose=0).info["score"] > 0.5
    assert len(fold_report(Access(study), importance=True).columns) == 3


def test_a_custom_scorer_of_other_rows_cannot_score_an_ensemble():
    study = tune("mlp", X, Y, scoring=of_every_second_row, max_epochs=1)
    with refused("asks for predictions of other rows than X.* Predict only X in the scorer"):
        study.ensemble(verbose=0)


@pytest.mark.filterwarnings("ignore:.*train without rows of a class:UserWarning")
@pytest.mark.parametrize("n_ens", [1, 2])
def test_a_class_that_a_fold_never_saw_has_probability_zero(n_ens):
    y = Y.copy()
    y[80:][X[80:, 1] > 0.5] = 2
    temperatures = []
    for keep in (True, False):
        study = tune(
            "mlp",
            X,
            y,
            cv="time:5",
            n_ens=n_ens,
            max_epochs=2,
            keep_predictions=keep,
            scoring="neg_log_loss",
        )
        predicted = study.oof_predictions()
        early = np.isfinite(predicted[:, 0]) & (np.arange(len(X)) < 80)
        assert (predicted[early, 2] == 0).all()
        losses = -np.log(predicted[20:40][np.arange(20), y[20:40]])
        assert study.best_trial.fold_scores[0] == pytest.approx(-losses.mean(), rel=1e-4)
        temperatures.append(study.best_model().temperature)
        check_fold_scores(study)
    assert temperatures[0] == pytest.approx(temperatures[1], rel=1e-3)


GROUPS = np.repeat(np.arange(24), 5)
ONE_FOLD = (np.arange(90), np.arange(90, 120))


@pytest.mark.parametrize("groups", ["column", "array"])
def test_the_halves_of_one_fold_split_no_group(groups, tmp_path):
    table = pd.DataFrame(X, columns=list("abc"))
    rows = table.assign(g=GROUPS) if groups == "column" else table
    path = tmp_path / "s.db"
    given = "g" if groups == "column" else GROUPS
    options = {"cv": ONE_FOLD, "scoring": "neg_log_loss", "n_trials": 3, "max_epochs": 4}
    study = tune("mlp", rows, ONE_SIDE, groups=given, study=path, **options)
    predictions = predictions_of(search_of(Access(study)), study.trials, Progress(0))
    first, second = _halves(30, GROUPS[90:])
    assert not {*GROUPS[90:][first]} & {*GROUPS[90:][second]}
    assert len(first) == len(second) == 15
    score = pytest.approx(np.mean(predictions.nested_scores(25, GROUPS)))
    assert score != np.mean(predictions.nested_scores(25))
    assert study.ensemble(verbose=0).info["score"] == score
    assert study.ensemble(rows, ONE_SIDE, verbose=0).info["score"] == score
    reopened = gputune.Study.open(path)
    if groups == "column":
        assert reopened.ensemble(rows, ONE_SIDE, verbose=0).info["score"] == score
    else:
        with pytest.warns(UserWarning, match="does not hold the groups.*study that tune"):
            assert "score" not in reopened.ensemble(rows, ONE_SIDE, verbose=0).info


@pytest.mark.parametrize(("n_valid", "scoring"), [(1, "accuracy"), (2, "roc_auc")])
def test_an_ensemble_without_a_score_of_a_half_warns(n_valid, scoring):
    train = np.arange(100)
    valid = np.array([Y.argmin(), Y.argmax()])[:n_valid]
    rows = (np.setdiff1d(train, valid), valid)
    study = tune("mlp", X, Y, cv=rows, scoring=scoring)
    with pytest.warns(UserWarning, match="too few rows, groups or classes"):
        model = study.ensemble(verbose=0)
    assert "score" not in model.info and "std_error" not in model.info
    assert "ensemble" in model.info and len(model.predict(X)) == len(X)


@pytest.mark.filterwarnings("ignore:.*rows of a class:UserWarning")
@pytest.mark.parametrize("model", ["mlp", "logistic"])
@pytest.mark.parametrize("cv", ["time:5", [(np.arange(80), np.arange(80, 120))]])
def test_an_ensemble_of_folds_knows_the_classes_of_each_fold(model, cv, tmp_path):
    y = Y.copy()
    y[80:][X[80:, 1] > 0.5] = 2
    study = tune(model, X, y, cv=cv, max_epochs=2, numbers="none", columns="keep")
    ensemble = study.ensemble(size=1, refit="folds", verbose=0)
    rows = slice(20, 40) if cv == "time:5" else slice(80, 120)
    network = ensemble.module
    alone = Ensemble(network.members[:1], [1.0], "multiclass", present=network.present[:1])
    first = alone(torch.tensor(X[rows], dtype=ensemble.dtype)).softmax(-1)
    assert (first[:, 2] == 0).all()
    (number,) = ensemble.info["ensemble"]
    out_of_fold = study.oof_predictions(trial=int(number))[rows]
    np.testing.assert_allclose(first.detach(), out_of_fold, rtol=1e-3)
    predicted = ensemble.predict_proba(X)
    n_folds = len(network.members)
    assert (predicted[:, 2] > 0).any() == (n_folds > 1)
    ensemble.save(tmp_path / "model")
    loaded = gputune.load_model(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict_proba(X), predicted)
    if model == "mlp":
        ort = pytest.importorskip("onnxruntime")
        ensemble.export(tmp_path / "model.onnx")
        session = ort.InferenceSession(tmp_path / "model.onnx")
        outputs = session.run(None, {"X": ensemble.encoded(X)})
        np.testing.assert_allclose(outputs[-1], predicted, rtol=1e-4, atol=1e-6)
    assert study.ensemble(size=1, verbose=0).module.present is None


@pytest.mark.parametrize("scoring", [weighted, {"own": weighted, "accuracy": "accuracy"}])
def test_a_reopened_study_says_how_to_pass_its_custom_scorer_again(scoring, tmp_path):
    path = tmp_path / "s.db"
    call = partial(tune, "mlp", X, ONE_SIDE, scoring=scoring, max_epochs=2, study=path)
    call()
    study = gputune.Study.open(path)
    words = r"ranked by your own function .*weighted'.* gputune.tune\(..., scoring=..., study="
    for method in (
        study.ensemble,
        study.oof_predictions,
        partial(study.best_model, calibrate=True),
    ):
        with refused(words):
            method(X, ONE_SIDE)
    assert len(study.best_model(X, ONE_SIDE).predict(X)) == len(X)
    assert call().ensemble(verbose=0).info["score"] > 0


def test_a_reopened_study_needs_only_the_scorer_that_ranks(tmp_path):
    path = tmp_path / "s.db"
    scoring = {"accuracy": "accuracy", "own": weighted}
    tune("mlp", X, ONE_SIDE, scoring=scoring, max_epochs=2, study=path)
    assert gputune.Study.open(path).ensemble(X, ONE_SIDE, verbose=0).info["score"] > 0
