"""The views of a study: scores, hyperparameters, curves, importance, hypergradient paths; axes of
plots and charts.
"""

import math
from dataclasses import replace

import numpy as np
import pytest

from gputune.ground.errors import InputError
from gputune.ground.text import measure_of
from gputune.report.charts import curves_chart
from gputune.views.parameters import (
    MOST,
    Parameter,
    descended,
    descent_paths,
    importance,
    is_log,
    parameter_scale,
    parameters,
    varied_parameters,
)
from gputune.views.scores import axis_scale, curve_view, number_text, score_range, score_view
from made_studies import made_descent, made_study, study_of

ACCURACY = measure_of("accuracy", 0.9)
LOSS = measure_of("neg_log_loss", -0.3)


def test_scores_have_the_sign_of_their_name():
    shown = score_view(study_of([{}] * 4, [-0.5, math.nan, -0.2, -0.4], scoring="neg_log_loss"))
    np.testing.assert_array_equal(shown.values, [0.5, math.nan, 0.2, 0.4])
    np.testing.assert_array_equal(shown.best_so_far, [0.5, 0.5, 0.2, 0.2])
    assert score_view(study_of([{}, {}], [0.0, math.inf])).values.tolist()[0] == 0.0


def test_the_range_of_scores_leaves_out_what_is_far_off_on_the_bad_side():
    good = np.linspace(0.8, 0.9, 21)
    assert score_range(np.append(good, -50.0), ACCURACY)[0] > 0.6
    assert score_range(np.append(good, 0.99), ACCURACY)[1] == 0.99  # the best is always in it
    low, high = score_range(np.append(good, [50.0, 0.1]), LOSS)
    assert low == 0.1 and high < 1.1
    assert score_range(np.array([math.nan]), ACCURACY) == (0.0, 1.0)


def test_pruned_trials_stretch_no_axis():
    study = made_study(80, halved=True)
    late = [t.score for t in study.trials if t.state == "complete"]
    assert score_view(study).range[0] >= min(late) - 1e-12


@pytest.mark.parametrize(
    ("values", "space", "log"),
    [
        ([0.001, 0.2], "", True),
        ([0.1, 0.2, 0.5], "", False),
        ([16, 32, 64], "", True),
        ([16, 32], "", False),
        ([0.1, 0.2, 0.3], "a=loguniform(a=0.1, b=1.0), b=[1]", True),
        ([0.1, 0.2, 0.3], "b=[1], a=log_int(1, 9)", True),
        ([0.0001, 0.2, 0.3], "b=[1], a=uniform(loc=0.0, scale=1.0)", False),
        ([0.0, 100.0], "a=loguniform(a=1, b=100)", False),
        ([0.1, 0.2, 0.3], "data=loguniform(a=1, b=100)", False),
    ],
)
def test_which_scale_a_hyperparameter_has(values, space, log):
    assert is_log("a", np.array(values, dtype=float), space) is log


def test_one_value_has_an_axis_and_few_are_their_own_ticks():
    for scale in (axis_scale(0.5, 0.5), axis_scale(0, 0), axis_scale(3, 3, log=True)):
        assert scale.low < scale.high
    values = np.array([16.0, 32, 64, 128, np.nan])
    scale = parameter_scale(Parameter("batch_size", "batch_size", values, log=True))
    assert [text for _, text in scale.ticks] == ["16", "32", "64", "128"]
    words = parameter_scale(Parameter("a", "a", np.array([0.0, 1.0]), levels=("x", "y")), pad=0.1)
    assert words.ticks == ((0, "x"), (1, "y")) and (words.low, words.high) == (-0.5, 1.5)


def test_numbers_are_short():
    texts = {
        0: "0",
        0.001: "0.001",
        2e4: "20000",
        1e-5: "1e-5",
        2.5e8: "2.5e8",
        1e6: "1e6",
        0.00012345678901234567: "0.0001235",
        123456.789: "123500",
        123457: "123457",
        -1.23456e-7: "-1.235e-7",
        -3e-7: "-3e-7",
    }
    assert {value: number_text(value) for value in texts} == texts


def test_numbers_words_and_what_is_missing():
    study = study_of(
        [
            {"a": 1, "b": "x", "c": 0.5},
            {"a": 3, "b": "y"},
            {"a": 2, "b": "x", "c": math.inf},
            {"b": None},
        ]
    )
    a, b, c = parameters(study)
    np.testing.assert_array_equal(a.values, [1, 3, 2, math.nan])
    assert b.levels == ("x", "None", "y") and b.values.tolist() == [0, 2, 0, 1]
    np.testing.assert_array_equal(c.values, [0.5, math.nan, math.nan, math.nan])
    assert c.hidden == 1 and c.distinct.tolist() == [0.5]
    assert [one.name for one in varied_parameters(study)] == ["a", "b"]


def test_schedules_are_shown_by_their_median_and_tuples_as_words():
    lists = study_of([{"lr": [0.1, 0.2, 0.3]}, {"lr": 0.5}, {"lr": [[0.1, 0.3], [0.5, 0.7]]}])
    (lr,) = parameters(lists)
    np.testing.assert_allclose(lr.values, [0.2, 0.5, 0.4])
    assert lr.label == "lr (median of its values)"
    (sizes,) = parameters(study_of([{"sizes": (8,)}, {"sizes": (4, 4)}]))
    assert sizes.levels == ("(4, 4)", "(8,)")


def test_many_words_share_a_level():
    (words,) = parameters(study_of([{"w": f"word {c}"} for c in range(40)]))
    assert len(words.levels) == 12 and words.levels[-1] == "29 others"
    assert (words.values == 11).sum() == 29


def test_curves_are_means_over_the_folds():
    study = made_study(20, epochs=6, scoring="neg_log_loss")
    curves = curve_view(study)
    np.testing.assert_allclose(curves.mean, -study.curves.mean(2))
    np.testing.assert_allclose(curves.spread, study.curves.std(2, ddof=1))
    assert curves_chart(study_of([{}, {}])) is None


def test_importance_finds_what_matters():
    rng = np.random.default_rng(0)
    params = [
        {"strong": float(s), "weak": float(w), "none": str(n)}
        for s, w, n in rng.uniform(size=(300, 3)).round(2)
    ]
    scores = [3 * abs(p["strong"] - 0.5) + 0.3 * p["weak"] for p in params]
    found = importance(study_of(params, scores))
    assert found.names == ("strong", "weak", "none")
    assert (
        found.drops[0] > 1 > 5 * found.drops[1] > 0
        and abs(found.drops[2]) < 0.05
        and found.fit > 0.75
    )
    assert found.trials == 300


def test_importance_is_seeded_and_ranks_diverged_trials_last():
    study = made_study(120)
    again = importance(study)
    first = importance(study)
    np.testing.assert_array_equal(again.drops, first.drops)
    assert not np.array_equal(importance(study, seed=1).drops, first.drops)
    params = [{"lr": float(c), "x": float(c * 7 % 20)} for c in range(20)]
    found = importance(study_of(params, [0.5 if c < 10 else math.nan for c in range(20)]))
    assert found.names[0] == "lr" and found.fit > 0.5


def test_importance_of_noise_fits_nothing_and_many_trials_are_drawn_from():
    noise = np.random.default_rng(1)
    params = [{"a": float(a)} for a in noise.uniform(size=MOST + 500)]
    found = importance(study_of(params, noise.normal(size=MOST + 500).tolist()))
    assert found.fit < 0.1 and found.trials == MOST


def made_copies(n_trials):
    study = study_of([{"a": 1}] * n_trials)
    copied = {"copies": [[5, 0]]}
    return replace(study, trials=tuple(replace(trial, detail=copied) for trial in study.trials))


@pytest.mark.parametrize(
    ("study", "words"),
    [
        (made_study(9), "got 9 trials and 5 hyperparameters"),
        (made_study(30, waiting=25), "got 5 trials"),
        (study_of([{"a": 1}] * 20), "got 20 trials with equal hyperparameters. Search a space"),
        (
            made_copies(20),
            "got 20 trials with equal hyperparameters. Population based training has",
        ),
        (made_copies(6), "got 6 trials with equal hyperparameters. Population based training has"),
    ],
)
def test_importance_of_too_little(study, words):
    with pytest.raises(
        InputError, match=f"needs 10 finished trials and a hyperparameter that varies, {words}"
    ):
        importance(study)


def test_descents_are_paths_with_the_best_first():
    study = made_descent()
    found = descent_paths(study)
    assert [one.name for one in descended(study)] == ["lr", "weight_decay"]
    assert found[0].start == study.best_trial.origin[0] and len(found) == 6
    for path in found:
        points = [trial for trial in study.trials if trial.origin[0] == path.start]
        assert path.steps.tolist() == [trial.origin[1] for trial in points] == list(range(9))
        np.testing.assert_array_equal(path.scores, [-trial.score for trial in points])
        np.testing.assert_array_equal(path.values["lr"], [trial.params["lr"] for trial in points])
        assert path.usable.tolist() == [trial.detail["usable"] for trial in points]
    assert descent_paths(made_study(20)) == () == descended(made_study(20))
