"""Did tuning help? The comparison of the best trial with the default configuration."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest

import gputune
from command_line import run, searched
from gputune.cli.study import best_json, best_text
from gputune.report.page import page
from gputune.views.default_trial import NO_IMPROVEMENT, improvement_json, improvement_text
from made_studies import made_descent, study_of

FOLDS = {"default": (0.80, 0.90, 0.85), "better": (0.85, 0.91, 0.94), "worse": (0.70, 0.80, 0.75)}


def compared(*kinds, states=(), scoring="accuracy", origin="default"):
    """Return a study of a default trial and others with these fold scores; a loss has the score
    minus 1.
    """
    made = study_of([{"lr": 0.1 * (c + 1)} for c in range(len(kinds))], scoring=scoring, folds=3)
    trials = []
    for trial, kind, state in zip(made.trials, kinds, [*states, *["complete"] * len(kinds)]):
        folds = FOLDS[kind]
        if scoring.startswith("neg_"):
            folds = tuple(score - 1 for score in folds)
        score = math.nan if state in ("failed", "waiting") else float(np.mean(folds))
        of_default = {"origin": origin} if kind == "default" else {}
        trials.append(replace(trial, score=score, fold_scores=folds, state=state, **of_default))
    return replace(made, trials=tuple(trials), curves=np.ones((len(trials), 1, 3)))


@pytest.mark.parametrize(
    ("scoring", "shown"),
    [("accuracy", ("0.8500", "0.9000")), ("neg_log_loss", ("0.1500", "0.1000"))],
)
def test_the_improvement_and_its_paired_standard_error(scoring, shown):
    study = compared("default", "better", "worse", scoring=scoring)
    default = study.default_trial
    differences = np.subtract(FOLDS["better"], FOLDS["default"])
    assert (default.number, default.params, default.score) == (
        0,
        {"lr": 0.1},
        study.trials[0].score,
    )
    assert default.best_score == study.best_score
    assert default.improvement == pytest.approx(differences.mean()) and default.improvement > 0
    assert default.improvement_std_error == pytest.approx(
        np.std(differences, ddof=1) / math.sqrt(3)
    )
    unpaired = math.hypot(default.std_error, study.best_trial.std_error)
    assert default.improvement_std_error != pytest.approx(unpaired)
    assert improvement_text(study) == (
        f"The default configuration (trial 0) scores {shown[0]} on the same folds, the best trial "
        f"{shown[1]}: an improvement of 0.0500 ± 0.0231 (paired standard error over 3 folds)."
    )
    assert default.text == improvement_text(study)


def test_a_search_that_did_not_help_says_so():
    study = compared("default", "worse")
    assert (
        study.default_trial.improvement == 0.0 and study.default_trial.improvement_std_error == 0.0
    )
    assert improvement_text(study) == NO_IMPROVEMENT == "The search did not improve on the default."
    assert study.default_trial.text == NO_IMPROVEMENT
    assert NO_IMPROVEMENT in " ".join(best_text(study).split())
    # A pruned default is never the best trial, even if its score is higher.
    pruned = compared("default", "worse", states=["pruned"])
    assert pruned.best_trial.number == 1 and pruned.default_trial.improvement < 0
    assert improvement_text(pruned) == NO_IMPROVEMENT


@pytest.mark.parametrize(("state", "words"), [("pruned", "pruned"), ("stopped", "cut short")])
def test_a_default_that_did_not_train_to_the_end_is_marked(state, words):
    text = improvement_text(compared("default", "better", states=[state]))
    assert text.endswith(f"The default was {words}, so its score is from a shorter training.")


@pytest.mark.parametrize(
    "study",
    [
        compared("default", "better", origin="include"),
        compared("default", "better", origin="batch 1"),
        compared("default", "better", states=["failed"]),
        compared("default", "better", states=["waiting"]),
        compared("default", states=["failed"]),
        made_descent(),
    ],
    ids=["included", "proposed", "diverged", "waiting", "all failed", "descent"],
)
def test_nothing_is_claimed_without_a_default_that_has_a_score(study):
    assert study.default_trial is None
    assert improvement_text(study) == "" and improvement_json(study) is None
    assert "default" not in Facts(study).names


def test_the_default_alone_is_not_compared_with_itself():
    assert improvement_text(compared("default")) == ""
    assert compared("default").default_trial.improvement == 0.0


def test_one_fold_has_no_standard_error():
    made = compared("default", "better")
    trials = [
        replace(trial, fold_scores=trial.fold_scores[:1], score=trial.fold_scores[0])
        for trial in made.trials
    ]
    study = replace(made, trials=tuple(trials), curves=np.ones((2, 1, 1)))
    assert math.isnan(study.default_trial.improvement_std_error)
    assert improvement_text(study).endswith(
        "scores 0.8000 on the same rows, the best trial 0.8500: an improvement of 0.0500."
    )
    assert improvement_json(study)["improvement_std_error"] is None


def test_another_metric_compares_by_that_metric(iris):
    X, y = iris
    how = {
        "space": {"lr": [0.001, 0.03]},
        "n_trials": 2,
        "max_epochs": 2,
        "cv": 3,
        "workers": 1,
        "verbose": 0,
    }
    study = gputune.tune("mlp", X, y, scoring=["accuracy", "neg_log_loss"], **how)
    for name in study.metrics:
        ranked = study.ranked_by(name)
        best = ranked.best_trial
        default = ranked.trials[0]
        differences = np.subtract(best.metrics[name], default.metrics[name])
        assert ranked.default_trial.improvement == pytest.approx(differences.mean())
        assert ranked.default_trial.improvement >= 0
    assert gputune.tune("mlp", X, y, **how, include_default=False).default_trial is None


@pytest.mark.long
def test_the_points_of_a_hypergradient_search_are_not_the_default(iris):
    X, y = iris
    method = gputune.Hypergradient(outer_steps=1)
    study = gputune.tune(
        "mlp", X, y, method=method, n_trials=1, max_epochs=2, cv=3, workers=1, verbose=0
    )
    assert study.trials[0].params["lr"] == 1e-3 and study.default_trial is None


def the_value(params, report):
    return params["x"]


def test_a_custom_loop_has_no_default():
    study = gputune.search(
        the_value, {"x": [1.0, 2.0]}, direction="maximize", n_trials=2, workers=1, verbose=0
    )
    assert study.default_trial is None and improvement_text(study) == ""


class Facts:
    """The facts in the first card of a study's page: name -> (value, note)."""

    def __init__(self, study):
        card = page(study).partition('<section id="headline"')[2].partition("</section>")[0]
        pattern = r'<dt>(.*?)</dt><dd class="value">(.*?)</dd><dd class="about">(.*?)</dd>'
        self.facts = {name: (value, note) for name, value, note in re.findall(pattern, card, re.S)}
        self.names = " ".join(self.facts)


def test_every_interface_shows_the_comparison():
    study = compared("default", "better", "worse")
    assert improvement_text(study) in " ".join(best_text(study).split())
    shown = json.loads(best_json(study))["default"]
    assert shown == {
        "number": 0,
        "state": "complete",
        "score": pytest.approx(0.85),
        "best_score": pytest.approx(0.9),
        "improvement": pytest.approx(0.05),
        "improvement_std_error": study.default_trial.improvement_std_error,
    }
    value, note = Facts(study).facts["improvement over the default"]
    assert value == "0.0500 ± 0.0231"
    assert (
        note
        == "the default, trial 0, scores 0.8500, the best trial 0.9000; ± paired standard error "
        "over 3 folds"
    )
    value, note = Facts(compared("default", "worse")).facts["improvement over the default"]
    assert (value, note) == ("none", NO_IMPROVEMENT)


def test_the_closing_text_and_best_say_whether_tuning_helped(tmp_path):
    _, out, text = searched(tmp_path, "--test-size", "0")
    study = gputune.Study.open(out / "study.db")
    said = improvement_text(study)
    assert said and said in " ".join(text.split())
    assert said in " ".join(run("best", out)[1].split())
    assert json.loads(run("best", out, "--format", "json")[1])["default"] == improvement_json(study)
    resumed = " ".join(run("resume", out, "--trials", "4")[1].split())
    assert improvement_text(gputune.Study.open(out / "study.db")) in resumed
