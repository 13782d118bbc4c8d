"""The median rule through the public tune() and the command line."""

import numpy as np
import pytest
from scipy.stats import loguniform

import gputune
from command_line import FAST, run
from gputune.errors import InputError
from gputune.methods.stopping import below_the_median
from gputune.tuning.choices import method_from_json, method_to_json

SPACE = {"lr": loguniform(1e-4, 0.1), "batch_size": [8, 16, 32], "width": [8, 16, 20]}
COMMON = {"space": SPACE, "n_trials": 18, "max_epochs": 9, "cv": 3, "verbose": 0, "workers": 1}
METHOD = gputune.Median(min_epochs=2, every=3)


@pytest.fixture(scope="module")
def both(iris):
    return [gputune.tune("mlp", *iris, method=method, **COMMON) for method in ("random", METHOD)]


def lengths(study):
    return np.isfinite(study.curves).all(2).sum(1)


def test_survivors_have_the_curves_of_the_full_search(both):
    full, found = both
    for a, b, length in zip(full.curves, found.curves, lengths(found)):
        np.testing.assert_allclose(b[:length], a[:length], atol=2e-6)
        assert np.isnan(b[length:]).all()


def test_the_decisions_are_those_of_the_rule_on_the_full_curves(both):
    full, found = both
    ended = dict.fromkeys(range(18), 9)
    for epoch in (2, 5, 8):
        means = {n: full.curves[n, : min(9, ended[n])].mean(1) for n in range(18)}
        for number in below_the_median(epoch, means, 5):
            ended[number] = min(ended[number], epoch)
    assert lengths(found).tolist() == list(ended.values())
    assert 2 < list(ended.values()).count(9) < 18
    for trial, length in zip(found.trials, lengths(found)):
        assert trial.state == ("complete" if length == 9 else "pruned")
        assert trial.detail == ({} if length == 9 else {"rung": length})
    assert found.best_trial.state == "complete" and found.spent[0] == sum(ended.values()) < found.spent[1]


def test_it_is_milder_than_halving(both, iris):
    halved = gputune.tune("mlp", *iris, method=gputune.Halving(min_epochs=2), **COMMON)
    assert lengths(both[1]).sum() > lengths(halved).sum()


def test_few_trials_all_stay(iris):
    study = gputune.tune("mlp", *iris, method="median", **{**COMMON, "n_trials": 3})
    assert {t.state for t in study.trials} == {"complete"}


def test_a_study_keeps_its_options(iris, tmp_path):
    assert method_from_json(method_to_json(METHOD)) == METHOD
    path = tmp_path / "s.db"
    gputune.tune("mlp", *iris, method=METHOD, study=path, **COMMON)
    with pytest.raises(InputError, match="holds another search, which differs from this call in: method"):
        gputune.tune("mlp", *iris, method="median", study=path, **COMMON)


def test_the_solved_logistic_regression_is_refused(iris):
    with pytest.raises(InputError, match="method='median' judges trials while they train, and the solved"):
        gputune.tune("logistic", *iris, method="median", verbose=0)


def test_the_command_says_what_was_spent(tmp_path):
    options = "--trials 13 --epochs 6 --method median --min-epochs 2 --every 1".split()
    code, out, err = run("tune", "sklearn:iris", *FAST, *options, "--out", tmp_path)
    assert (code, err) == (0, "")
    said = " ".join(out.split())
    study = gputune.Study.open(tmp_path / "study.db")
    spent, full = study.spent
    assert study.meta["method"] == {"name": "median", "min_epochs": 2, "every": 1, "min_trials": 5}
    assert "Median of 13 trials these were pruned: " in said
    assert f"{spent} of {full} trial-epochs were trained ({spent / full:.0%})" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "median", "--factor", "2"], "--factor belongs to --method halving, got --method median"),
        (["--method", "halving", "--every", "2"], "--every belongs to --method median, got --method halving"),
        (["--min-epochs", "2"], "--min-epochs belongs to --method halving, got --method random"),
    ],
)  # fmt: skip
def test_options_of_another_method_are_refused(tmp_path, options, words):
    code, _, err = run("tune", "sklearn:iris", *FAST, *options, "--out", tmp_path / "o")
    assert code == 2 and words in err
