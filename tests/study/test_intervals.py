"""Intervals from the folds' residuals: coverage, rank and requirements, in both interfaces."""

import csv
import io
from dataclasses import replace

import numpy as np
import pytest
from sklearn.model_selection import KFold, RepeatedKFold

import gputune
from command_line import kinds, run, write_table
from gputune.models import MLP
from gputune.study.model import TunedModel
from refused import refused

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2600, 3))
NOISE = RNG.normal(size=2600)
KNOWN = slice(0, 600)
NEW = slice(600, None)
TARGETS = {None: X[:, 0] + 0.3 * NOISE, "log": np.exp(X[:, 0] + 0.3 * NOISE)}
HOW = {"n_trials": 1, "max_epochs": 10, "cv": KFold(4), "verbose": 0, "workers": 1}


@pytest.fixture(scope="module", params=[None, "log"])
def case(request):
    """A study, its model with residuals, and its target."""
    y = TARGETS[request.param]
    study = gputune.tune("mlp", X[KNOWN], y[KNOWN], target_transform=request.param, **HOW)
    return study, study.best_model(intervals=True), y


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_intervals_cover_rows_that_nothing_was_fitted_on(case, level):
    _, model, y = case
    lower, upper = model.predict_interval(X[NEW], level)
    assert lower.shape == upper.shape == (2000,)
    covered = ((lower <= y[NEW]) & (y[NEW] <= upper)).mean()
    assert abs(covered - level) < 3 * np.sqrt(level * (1 - level) * (1 / 600 + 1 / 2000))
    if model.transform is not None:
        assert (lower > 0).all() and np.ptp(upper / lower) < 1e-9


def test_the_half_width_is_the_corrected_rank_of_the_residuals(case):
    study, model, y = case
    inverse = np.log if model.transform is not None else np.asarray
    residuals = np.sort(np.abs(inverse(y[KNOWN]) - inverse(study.oof_predictions())))
    np.testing.assert_allclose(model.residuals, residuals, rtol=1e-9)
    lower, upper = model.predict_interval(X[:2], 0.9)
    # ceil(601 * 0.9) = 541
    np.testing.assert_allclose(inverse(upper) - inverse(lower), 2 * residuals[540])


def test_they_are_saved_and_an_ensemble_has_them(case, tmp_path):
    _, model, y = case
    model.save(tmp_path / "model")
    loaded = gputune.load_model(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict_interval(X, 0.8), model.predict_interval(X, 0.8))
    study = gputune.tune("mlp", X[KNOWN], y[KNOWN], **{**HOW, "n_trials": 2, "max_epochs": 4})
    together = study.ensemble(verbose=0, candidates=2)
    lower, upper = together.predict_interval(X[:5])
    np.testing.assert_allclose((lower + upper) / 2, together.predict(X[:5]))
    assert len(together.residuals) == 600


def test_many_residuals_are_kept_evenly_and_rows_of_several_folds_count_once(monkeypatch):
    monkeypatch.setattr("gputune.tuning.predictions._RESIDUALS", 5)
    folds = RepeatedKFold(n_splits=2, n_repeats=2, random_state=0)
    study = gputune.tune("mlp", X[:20], TARGETS[None][:20], **{**HOW, "cv": folds, "max_epochs": 2})
    few = study.best_model(intervals=True).residuals
    monkeypatch.undo()
    all_rows = study.best_model(intervals=True).residuals
    assert len(all_rows) == 20
    np.testing.assert_array_equal(few, all_rows[3::4])


@pytest.mark.parametrize("case", [None], indirect=True)
def test_what_is_refused(case):
    study, model, y = case
    for level in (0, 1, 90, True, "0.9"):
        with refused(
            r"predict_interval\(level=.*\) must be a share between 0 and 1, such as 0.9 for 90%"
        ):
            model.predict_interval(X, level)
    with refused(r"level=0.999\) needs more than the 600 rows .* a level of at most 0.9983"):
        model.predict_interval(X, 0.999)
    with refused(
        r"needs the residuals .* study.best_model\(intervals=True\), or with gputune resume FOLDER --int"
    ):
        replace(model, residuals=None).predict_interval(X)
    for task, words in {
        "multilabel": "labels. Use predict_proba.",
        "custom": "custom outputs. Use predict.",
    }.items():
        with refused(f"but this model predicts {words}"):
            replace(model, task=task).predict_interval(X)
    with refused(
        r"best_model\(intervals=True\) needs the rows of the search.* Leave check=False out"
    ):
        study.best_model(X, y, intervals=True, check=False)
    classes = gputune.tune("mlp", X[:40], X[:40, 0] > 0, **{**HOW, "max_epochs": 1})
    with refused(
        "is for studies that predict a number, but this study predicts classes. Leave it out"
    ):
        classes.best_model(intervals=True)
    with refused(
        "predict_interval is only for regression with one target, .* predicts classes. Use predict_proba"
    ):
        classes.best_model().predict_interval(X)
    two = gputune.tune(MLP, X[:40], X[:40, :2], **{**HOW, "max_epochs": 1})
    with refused("supports only one number per row, but the target has several. Run one search"):
        two.best_model(intervals=True)
    with refused("this model predicts several numbers. Run a separate search for each column"):
        two.best_model().predict_interval(X)
    points = gputune.tune(
        "mlp", X[:40], X[:40, 0], method=gputune.Hypergradient(outer_steps=1), **HOW
    )
    words = (
        r"best_model\(intervals=True\) trains a trial again on its folds, "
        r"but this is a study of a hypergradient search"
    )
    with refused(words):
        points.best_model(intervals=True)


def test_the_command_line(tmp_path, monkeypatch):
    prices = np.exp(RNG.normal(size=40)).round(3)
    file = write_table(tmp_path / "houses.csv", price=prices, kind=kinds())
    out = tmp_path / "out"
    words = [
        "--trials",
        "1",
        "--epochs",
        "2",
        "--cv",
        "2",
        "--workers",
        "1",
        "--target-transform",
        "log",
    ]
    assert run("tune", file, "--target", "price", *words, "--out", out)[::2] == (0, "")
    code, _, err = run("predict", out / "model", file, "--interval", "0.9")
    assert (
        code == 2
        and "--interval needs the residuals" in err
        and "Make the model with gputune resume FOLDER --int" in err
    )
    # which keeps them
    assert run("resume", out, "--intervals")[0] == run("resume", out, "--trials", "2")[0] == 0
    outputs = TunedModel._outputs
    calls = []
    monkeypatch.setattr(
        TunedModel, "_outputs", lambda model, X: calls.append(1) or outputs(model, X)
    )
    rows = list(
        csv.reader(
            io.StringIO(run("predict", out / "model", file, "--interval", "0.9", "--keep", "a")[1])
        )
    )
    assert calls == [1]
    assert rows[0] == ["a", "price", "price_lower", "price_upper"] and len(rows) == 41
    assert all(
        0 < float(lower) < float(price) < float(upper) for _, price, lower, upper in rows[1:]
    )
    predict = ["predict", out / "model", file, "--interval"]
    tune = ["tune", file, "--intervals", "--out", tmp_path / "no"]
    for words, said in (
        ([*predict, "90"], "--interval 90.0 must be a share between 0 and 1"),
        ([*predict, "0.9", "--proba"], "--interval and --proba exclude each other"),
        (
            [*tune, "--target", "kind"],
            "--intervals needs a model that predicts one number, but the target is 2 classes. "
            "Leave",
        ),
        (
            [*tune, "--target", "price", "--method", "hypergradient"],
            "but this is not possible for a hypergradient search. Leave it out",
        ),
    ):
        code, _, err = run(*words)
        assert code == 2 and said in err
