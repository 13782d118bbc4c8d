"""The closing text about the saved model: the default's model next to it, its calibration, its
intervals.
"""

import re
from dataclasses import replace

import numpy as np
import pytest

import gputune
from command_line import FAST, kinds, run, searched, write_table
from gputune.cli.held_out import (
    HeldOut,
    comparison_text,
    coverage_text,
    is_cheap_to_train,
    same_model_text,
)
from gputune.cli.main import INTERRUPTED
from gputune.data.source import read_source
from gputune.ground.errors import DivergedError
from gputune.ground.text import measure_of
from gputune.report.facts import score_facts
from made_studies import made_study
from study_models import make_model

# the first columns of a table, as ``write_table`` draws
A, B = np.random.default_rng(0).normal(size=(2, 60)).round(3)
PRICES = {"target": "price", "price": (10 + 3 * A + B).round(3).tolist(), "n_rows": 60}
BETTER = ["--space", "lr=0.001,0.03"]  # of which the default has the worse one
COMPARED = r"default (-?[\d.]+) the default configuration, also trained on all rows \(95%"


def text_of(*arguments):
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    return " ".join(out.split())


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A search with a best trial other than the default, and with both models' scores in its
    closing text.
    """
    folder = tmp_path_factory.mktemp("compared")
    _, out, text = searched(folder, *BETTER, "--compare-default", "--intervals", **PRICES)
    study = gputune.Study.open(out / "study.db")
    assert study.default_trial.improvement > 0
    return out, study, " ".join(text.split())


def test_the_defaults_model_is_scored_on_the_held_out_rows(compared):
    out, study, text = compared
    found = re.search(COMPARED, text)
    assert found is not None
    rows = study.best_model().info["rows"]
    assert (
        rows == 48
        and f"held-out {gputune.load_model(out / 'model').info['held_out_score']:.4f} the saved"
        in text
    )
    saved = gputune.load_model(out / "model")
    assert saved.info["params"] == study.best_params  # and the saved model stays the best one


def test_the_choice_is_stored_and_may_be_changed(compared):
    out, _, _ = compared
    assert re.search(COMPARED, text_of("resume", out))
    assert not re.search(COMPARED, text_of("resume", out, "--no-compare-default"))
    assert not re.search(COMPARED, text_of("resume", out))
    assert re.search(COMPARED, text_of("resume", out, "--compare-default"))


def test_it_is_on_by_default_where_it_takes_less_than_a_tenth(tmp_path):
    _, out, text = searched(
        tmp_path, "--trials", "12", "--cv", "3", "--space", "lr=0.001..0.1:log", **PRICES
    )
    study = gputune.Study.open(out / "study.db")
    assert study.default_trial.improvement > 0
    assert re.search(COMPARED, " ".join(text.split()))
    # 3 trials x 2 folds x 2 epochs are too few.
    (tmp_path / "few").mkdir()
    _, out, text = searched(tmp_path / "few", *BETTER, **PRICES)
    assert gputune.Study.open(out / "study.db").default_trial.improvement > 0
    assert not re.search(COMPARED, " ".join(text.split()))


def test_a_tenth_of_the_member_steps(iris):
    X, y = iris
    how = {
        "n_trials": 4,
        "max_epochs": 6,
        "cv": 2,
        "space": {"batch_size": [15]},
        "include_default": False,
    }
    study = gputune.tune("mlp", X, y, **how, workers=1, verbose=0)
    (trial,) = study.trials
    # 2 folds x 6 epochs x 5 steps of 75 rows are 60; an epoch on all 150 rows takes 10 steps.
    assert not is_cheap_to_train(study, replace(trial, best_epoch=1))
    study = gputune.tune("mlp", X, y, **{**how, "max_epochs": 11}, workers=1, verbose=0)
    assert is_cheap_to_train(study, replace(trial, best_epoch=1))
    assert not is_cheap_to_train(study, replace(trial, best_epoch=2))


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--test-size", "0"],
            "No rows are held out to compare the model with the default's model.",
        ),
        (
            ["--no-default"],
            "The model of the default configuration is not compared, because no trial with a",
        ),
    ],
)
def test_a_comparison_that_is_not_possible_says_why(tmp_path, options, words):
    _, _, text = searched(tmp_path, "--compare-default", *options)
    assert words in " ".join(text.split())


def test_the_default_as_the_best_trial_is_not_trained_twice(tmp_path):
    _, out, text = searched(tmp_path, "--compare-default", "--space", "lr=0.001,1e-9", **PRICES)
    text = " ".join(text.split())
    assert "The search did not improve on the default." in text and not re.search(COMPARED, text)
    best = "The best trial is the default configuration, so"
    assert f"{best} the saved model is the default's model." in text
    assert best not in text_of("resume", out, "--no-compare-default")
    text = text_of("resume", out, "--compare-default", "--ensemble")
    assert not re.search(COMPARED, text)
    assert "the best trial (the default configuration) " in text
    saved = gputune.load_model(out / "model")
    alone = "ensemble" in saved.info
    model = "the model of the best trial is" if alone else "the saved model is"
    assert f"{best} {model} the default's model." in text


@pytest.mark.parametrize("ensemble", [True, False])
def test_the_text_names_the_default_as_the_model_of_the_best_trial(ensemble):
    info = {"ensemble": [{"trial": 0}, {"trial": 1}]} if ensemble else {}
    text = same_model_text(replace(make_model(np.stack([A, B], 1), classes=None), info=info))
    expected = "the model of the best trial is" if ensemble else "the saved model is"
    assert (
        text == f"The best trial is the default configuration, so {expected} the default's model."
    )


@pytest.mark.parametrize("error", [DivergedError("it diverged"), KeyboardInterrupt()])
def test_what_goes_wrong_with_the_defaults_model_leaves_the_best_one(tmp_path, monkeypatch, error):
    original = gputune.Study.best_model

    def best_model(study, *arguments, trial=None, **more):
        if trial == 0:
            raise error
        return original(study, *arguments, trial=trial, **more)

    monkeypatch.setattr(gputune.Study, "best_model", best_model)
    table = write_table(tmp_path / "t.csv", 60, price=PRICES["price"])
    words = [
        "tune",
        table,
        "--target",
        "price",
        "--out",
        tmp_path / "o",
        "--compare-default",
        *BETTER,
        *FAST,
    ]
    code, out, err = run(*words)
    assert (tmp_path / "o" / "model" / "model.json").exists() and "Scores   r2\n" in out
    if isinstance(error, KeyboardInterrupt):
        assert (
            code == INTERRUPTED
            and "the comparison with the default was interrupted. The best model is saved" in err
        )
    else:
        assert (
            code == 0
            and "The default's model diverged when it was trained on all rows."
            in " ".join(out.split())
        )


def test_two_scores_within_their_intervals_may_be_chance():
    measure = measure_of("neg_log_loss", -0.3)
    saved, default = (
        HeldOut(score, 50, interval=(score - 0.05, score + 0.05)) for score in (-0.30, -0.33)
    )
    assert comparison_text(measure, saved, default) == (
        "The held-out score of the saved model or of the default lies within the other's 95% "
        "interval, so the difference may be chance."
    )
    far = replace(default, score=-0.5, interval=(-0.55, -0.45))
    assert comparison_text(measure, saved, far) == ""
    nothing = HeldOut(float("nan"), 50, reason="it is undefined on these rows")
    assert (
        comparison_text(measure, saved, nothing)
        == "The default's model has no held-out log_loss to compare with."
    )


def test_intervals_leave_a_line_with_their_coverage(compared, tmp_path):
    out, _, text = compared
    model = gputune.load_model(out / "model")
    found = re.search(r"Intervals with level 90% hold (\d+) of 12 held-out rows \((\d+)%\)\.", text)
    assert found is not None and int(found[2]) == round(100 * int(found[1]) / 12)
    assert model.residuals is not None
    assert "No rows were held out" in coverage_text(model, None)
    _, _, text = searched(tmp_path, "--intervals", "--test-size", "0", **PRICES)
    assert (
        "The model has prediction intervals. No rows were held out to check how many"
        in " ".join(text.split())
    )


def test_the_coverage_counts_the_rows_inside():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(50, 3))
    y = rng.normal(size=50)
    model = replace(make_model(X, classes=None), residuals=np.linspace(0.0, 2.0, 40))
    lower, upper = model.predict_interval(X, 0.9)
    inside = int(((lower <= y) & (y <= upper)).sum())
    source = read_source(X, y)
    assert (
        coverage_text(model, source)
        == f"Intervals with level 90% hold {inside} of 50 held-out rows ({inside / 50:.0%})."
    )
    few = replace(model, residuals=np.linspace(0.0, 2.0, 4))
    assert (
        coverage_text(few, source)
        == "The model has intervals, but the folds have too few rows for a level of 90%."
    )


def test_calibration_leaves_a_line_with_the_temperature(tmp_path):
    _, out, text = searched(tmp_path, "--calibrate")
    temperature = gputune.load_model(out / "model").temperature
    said = (
        "The probabilities are calibrated: the logits are divided by the temperature "
        f"{temperature:.4g}, which"
    )
    assert temperature != 1 and said in " ".join(text.split())
    (tmp_path / "plain").mkdir()
    assert "calibrated" not in searched(tmp_path / "plain")[2]


def test_the_held_out_score_has_a_baseline_on_the_same_rows(tmp_path):
    kind = ["bee" if i % 4 else "ant" for i in range(40)]
    _, out, text = searched(tmp_path, kind=kind)
    text = " ".join(text.split())
    baseline = gputune.load_model(out / "model").info["held_out_baseline"]
    assert baseline == {"answer": "always 'bee'", "score": pytest.approx(0.75)}
    assert "baseline 0.7500 always 'bee' on these rows, without a model" in text
    page = tmp_path / "page.html"
    assert run("report", out, "--out", page)[0] == 0
    assert "without a model 0.7500 (always &#39;bee&#39;)" in page.read_text()


def test_rows_that_chose_the_ensemble_are_not_called_untouched(tmp_path):
    _, out, text = searched(tmp_path, "--ensemble", n_rows=60, kind=kinds(60))
    text = " ".join(text.split())
    assert (
        "that nothing was fitted on, but these rows chose between the ensemble and the best trial"
        in text
    )
    info = gputune.load_model(out / "model").info
    assert info["held_out_chose"] is True
    other = "the best trial" if "ensemble" in info else "an ensemble"
    page = tmp_path / "page.html"
    assert run("report", out, "--out", page)[0] == 0
    assert (
        f"but these rows chose it over {other}, so its score is a little optimistic"
        in page.read_text()
    )


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({}, "the model on 36 rows that nothing was fitted on; the best score is optimistic"),
        # as an earlier version saved it
        ({"ensemble": {"0": 1.0}}, "but these rows chose it over the best trial, so"),
        ({"held_out_chose": True}, "but these rows chose it over an ensemble, so"),
    ],
)
def test_the_page_says_what_the_held_out_rows_chose(info, words):
    study = made_study(5)
    best = study.best_trial
    known = {"params": best.params, "score": best.score, "held_out_score": 0.9, "held_out_rows": 36}
    (note,) = [
        note
        for name, _, note in score_facts(study, {**known, **info})
        if name == "held-out accuracy"
    ]
    assert words in note and ("optimistic; " in note) == bool(info)


def test_an_ensemble_that_diverges_leaves_the_best_trial_as_the_model(tmp_path, monkeypatch):
    def diverges(*_, **__):
        raise DivergedError("Trial 1 diverged when it was trained on all rows.")

    monkeypatch.setattr("gputune.api.study.Study.ensemble", diverges)
    out = tmp_path / "out"
    code, text, err = run(
        *"tune sklearn:iris --trials 2 --epochs 1 --cv 2 --ensemble --out".split(), out
    )
    assert code == 0, err
    assert "No ensemble: Trial 1 diverged" in " ".join(text.split())
    assert gputune.load_model(out / "model").classes.tolist()
