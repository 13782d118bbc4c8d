"""A search with n_ens: each trial is the mean of several networks, in its scores, in its model, in an
ensemble, in a study file and on the command line."""

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_iris
from sklearn.metrics import log_loss, r2_score

import gputune
import reference
from command_line import run, write_table
from gputune.ground.seeding import replica_seed
from gputune.population.population import Ensemble, complete
from gputune.report.snippet import snippet
from problems import Linear, largest_difference
from refused import refused

IRIS = load_iris(return_X_y=True)
DIABETES = load_diabetes(return_X_y=True)
tune = partial(gputune.tune, n_trials=3, max_epochs=4, cv=3, verbose=0, workers=1, n_ens=3)


def sum_of_squares(outputs, y):
    return (outputs[:, 0] - y).square()


def neg_sum_of_squares(outputs, y):
    return -float(sum_of_squares(outputs, y).mean())


SMALL = {"space": {"lr": [0.01, 0.03], "module__width": 8, "module__depth": 1}, "n_trials": 2}


def test_the_tuned_model_averages_the_networks_of_plain_loops(tmp_path):
    X, y = IRIS
    params = {"lr": 0.03, "batch_size": 16, "width": 8}
    study = tune("mlp", X, y, space=params, n_trials=1, dtype="float64")
    study.best_model().save(tmp_path / "model")
    model = gputune.load_model(tmp_path / "model")
    x = torch.tensor((X - X.mean(0)) / X.std(0))
    config = complete(params, optimizer="adamw", schedule="constant")
    assert isinstance(model.module, Ensemble) and len(model.module.members) == 3
    probabilities = []
    for number, network in enumerate(model.module.members):
        alone = reference.train_mlp(
            x,
            torch.tensor(y),
            config,
            n_outputs=3,
            seed=replica_seed(0, number),
            epochs=study.best_trial.best_epoch,
            max_epochs=4,
        )
        assert largest_difference(network, alone) <= 1e-10
        probabilities.append(alone(x).softmax(-1).detach().numpy())
    np.testing.assert_allclose(model.predict_proba(X), np.mean(probabilities, 0), rtol=1e-9)


@pytest.mark.parametrize(("model", "words"), [("mlp", {}), ("realmlp", SMALL)])
def test_the_score_is_that_of_the_mean_prediction(model, words):
    study = tune(model, *IRIS, scoring="neg_log_loss", **words)
    assert study.curves.shape[1:] == (4, 3)
    # Folds of equal size: the mean of their log losses is that of all rows.
    of_all = log_loss(IRIS[1], study.oof_predictions())
    assert -study.best_score == pytest.approx(of_all, rel=1e-5)


def test_stored_predictions_are_those_of_the_networks_that_train_again():
    stored = tune("mlp", *DIABETES).oof_predictions()
    again = tune("mlp", *DIABETES, keep_predictions=False).oof_predictions()
    np.testing.assert_allclose(stored, again, rtol=1e-4)


@pytest.mark.parametrize(("refit", "runs"), [("all", 1), (2, 2), ("folds", 3)])
def test_an_ensemble_has_all_networks_of_its_trials(refit, runs, tmp_path):
    study = tune("mlp", *DIABETES)
    model = study.ensemble(refit=refit, verbose=0)
    n_trials = len(model.info["ensemble"])
    assert len(model.module.members) == 3 * runs * n_trials
    assert float(model.module.weights.sum()) == pytest.approx(1)
    flat = [
        w.detach().numpy().tobytes() for w in model.module.state_dict().values() if w.dim() == 2
    ]
    assert len(set(flat)) == len(flat)  # no two networks are the same
    model.save(tmp_path / "model")
    again = gputune.load_model(tmp_path / "model")
    np.testing.assert_array_equal(again.predict(DIABETES[0]), model.predict(DIABETES[0]))
    if refit == "all":
        share = model.info["ensemble"][next(iter(model.info["ensemble"]))]
        assert model.module.weights[:3].tolist() == pytest.approx([share / 3] * 3)


def test_calibration_and_intervals_use_the_mean_of_the_networks():
    study = tune("mlp", *IRIS, max_epochs=2)
    assert study.best_model(calibrate=True).temperature != 1
    model = tune("mlp", *DIABETES).best_model(intervals=True)
    lower, upper = model.predict_interval(DIABETES[0], 0.9)
    covered = (lower <= DIABETES[1]) & (DIABETES[1] <= upper)
    assert 0.8 < covered.mean() < 1


def test_a_custom_scorer_asks_the_mean_of_the_networks():
    differences = []

    def scorer(estimator, X, y):
        # The rows of X are known. Other rows run through the networks.
        others = estimator.predict(np.concatenate([X, X[:1]]))[:-1]
        differences.append(np.abs(others - estimator.predict(X)).max())
        return r2_score(y, others)

    study = tune("mlp", *DIABETES, n_trials=1, max_epochs=1, scoring=scorer)
    named = tune("mlp", *DIABETES, n_trials=1, max_epochs=1, scoring="r2")
    np.testing.assert_allclose(study.best_score, named.best_score, rtol=1e-4)
    assert len(differences) == 3 and max(differences) < 1e-3


@pytest.mark.parametrize("method", ["halving", "pbt", "median"])
def test_methods_rank_the_mean_of_the_networks(method):
    study = tune("mlp", *IRIS, method=method, n_trials=4, max_epochs=9)
    assert np.isfinite(study.best_score) and len(study.best_model().module.members) == 3


@pytest.mark.parametrize("model", ["mlp", "realmlp"])
def test_a_search_that_was_stopped_continues_with_all_networks(model, tmp_path):
    words = SMALL if model == "realmlp" else {}
    path = tmp_path / "study.db"
    whole = tune(model, *IRIS, patience=3, **words)
    tune(model, *IRIS, patience=3, timeout=1e-9, checkpoint_seconds=1e-9, study=path, **words)
    resumed = tune(model, *IRIS, patience=3, study=path, **words)
    np.testing.assert_array_equal(resumed.curves, whole.curves)
    with refused(r"differs from this call in: n_ens \(3 in the study, 2 now\)"):
        tune(model, *IRIS, patience=3, n_ens=2, study=path, **words)


def test_processes_train_all_networks():
    together = tune("mlp", *IRIS, workers=2)
    np.testing.assert_allclose(together.curves, tune("mlp", *IRIS).curves, rtol=1e-6)


def test_the_snippet_of_a_study_has_n_ens():
    assert "n_ens=3," in snippet(tune("mlp", *IRIS))
    assert "n_ens" not in snippet(tune("mlp", *IRIS, n_ens=1))


@pytest.mark.parametrize("model", ["mlp", pytest.param("realmlp", marks=pytest.mark.long)])
def test_an_export_predicts_the_mean(model, tmp_path):
    X, y = DIABETES
    tuned = tune(model, X, y, **(SMALL if model == "realmlp" else {})).best_model()
    tuned.export(tmp_path / "model.pt2")
    exported = torch.export.load(str(tmp_path / "model.pt2")).module()
    values = exported(torch.tensor(tuned.encoded(X)))
    np.testing.assert_allclose(values.numpy(), tuned.predict(X), rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        (Linear, {}, r"n_ens=3.* supports only the models mlp and realmlp.* the model is Linear"),
        ("cnn", {}, "supports only the models mlp and realmlp, because the mean prediction"),
        ("logistic", {}, r"has no effect for .*logistic.* every solved logistic regression"),
        ("mlp", {"method": "hypergradient"}, "hypergradient.* differentiates the loss of each"),
        (
            "realmlp",
            {"task": "custom", "loss": sum_of_squares, "scoring": neg_sum_of_squares},
            "n_ens=3.* needs predictions with a mean, but .*task='custom'.* may have any outputs",
        ),
        ("mlp", {"n_ens": 0}, "n_ens.* must be an integer of at least 1"),
        (
            "mlp",
            {"n_ens": 101},
            r"n_ens=101.* must be at most the number of training rows of a fold, .* has only 100 "
            "training rows. Pass .*n_ens=100.* or less",
        ),
    ],
)
def test_what_cannot_be_averaged_is_refused(model, words, message):
    with refused(message):
        tune(model, *IRIS, **words)


def test_the_command_line_saves_resumes_and_predicts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    X, y = DIABETES
    write_table(tmp_path / "t.csv", a=X[:, 0], b=X[:, 2], c=X[:, 8], y=y)
    words = "--target y --n-ens 2 --trials 2 --epochs 2 --cv 2 --ensemble --out out".split()
    code, out, err = run("tune", "t.csv", *words)
    assert code == 0 and "2 trials x 2 folds x 2 networks x 2 epochs" in out, err
    code, _, err = run("report", "out", "--out", "report.html")
    assert code == 0 and "networks per trial and fold" in (tmp_path / "report.html").read_text()
    assert gputune.Study.open(tmp_path / "out" / "study.db").record.n_ens == 2
    code, _, err = run("resume", "out", "--trials", "3", "-q")
    assert code == 0, err
    model = gputune.load_model(tmp_path / "out" / "model")
    assert len(model.module.members) % 2 == 0
    code, _, err = run("predict", "out/model", "t.csv", "--out", "p.csv")
    assert code == 0, err
    code, _, err = run("tune", "t.csv", "--target", "y", "--model", "logistic", "--n-ens", "2")
    assert code == 2 and "--n-ens 2 has no effect for --model logistic" in err, err
