"""The stopping rules and the trials that they keep: successive halving, and the median rule
compared with plain Python.
"""

import math
import statistics

import numpy as np
import pytest
from sklearn.datasets import load_iris

import gputune
from gputune.methods.halving import Halving, survivors
from gputune.tuning.method import method_from_json
from refused import refused


@pytest.mark.parametrize(
    ("options", "max_epochs", "rungs"),
    [
        ({}, 54, [[2, 6, 18]]),
        ({}, 27, [[1, 3, 9]]),
        ({}, 1, [[]]),
        ({"factor": 2, "min_epochs": 4}, 20, [[4, 8, 16]]),
        ({"factor": 1.5, "min_epochs": 1}, 6, [[1, 2, 3, 5]]),
        ({"brackets": 4}, 54, [[2, 6, 18], [6, 18], [18], []]),
        ({"rungs": [5, 7]}, 8, [[5, 7]]),
    ],
)
def test_rungs_grow_by_the_factor_and_end_before_the_last_epoch(options, max_epochs, rungs):
    assert Halving(**options).bracket_rungs(max_epochs) == rungs


def test_brackets_get_about_the_same_number_of_epochs_and_more_trials_move_no_other_to_another_one():
    method = Halving(brackets=4)
    found = np.bincount(method.brackets_of(2000, 54), minlength=4)
    costs = np.array([2 + 4 / 3 + 12 / 9 + 36 / 27, 6 + 12 / 3 + 36 / 9, 18 + 36 / 3, 54])
    np.testing.assert_allclose(found * costs / (found * costs).mean(), 1, atol=0.05)
    assert method.brackets_of(100, 54)[:40] == method.brackets_of(40, 54)
    assert set(Halving().brackets_of(10, 54)) == {0}


@pytest.mark.parametrize(
    ("means", "factor", "stay"),
    [
        ([0.1, 0.9, 0.5, 0.7, 0.2, 0.3, 0.8], 3, [1, 6]),
        ([0.1, 0.9], 3, [1]),
        ([0.5, 0.5, 0.5, math.nan], 2, [0, 1]),  # the earlier trial wins a tie
        ([math.nan, 0.1, math.nan, math.nan], 2, [1]),
        ([math.nan, math.nan], 3, []),
    ],
)
def test_the_best_stay_and_nan_never_does(means, factor, stay):
    assert np.flatnonzero(survivors(np.array(means), factor)).tolist() == stay


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (
            gputune.Halving,
            {"factor": 1},
            r"Halving\(factor=...\) must be a finite number > 1, got 1",
        ),
        (gputune.Halving, {"factor": math.inf}, "got inf"),
        (gputune.Halving, {"factor": "3"}, "got '3'"),
        (
            gputune.Halving,
            {"min_epochs": 0},
            r"Halving\(min_epochs=...\) must be .* at least 1, or None, got 0",
        ),
        (gputune.Halving, {"min_epochs": 2.5}, "got 2.5"),
        (
            gputune.Halving,
            {"brackets": 0},
            r"Halving\(brackets=...\) must be an integer of at least 1, got 0",
        ),
        (gputune.Halving, {"brackets": True}, "got True"),
        *(
            (
                gputune.Halving,
                {"rungs": rungs},
                r"Halving\(rungs=...\) must be a list of rising epochs, each at least 1, got",
            )
            for rungs in (3, [], [0], [3, 3], [2.0], [True], "27")
        ),
        (
            gputune.Halving,
            {"rungs": [3], "min_epochs": 2},
            r"Halving\(rungs=...\) sets all rungs, so min_epochs and brackets would have no effect",
        ),
        (gputune.Halving, {"rungs": [3], "brackets": 2}, "Leave them out"),
        (
            gputune.Halving,
            {"keep": 3},
            r"Halving\(keep=...\) needs the epochs after which trials are compared, got 3",
        ),
        (gputune.Halving, {"rungs": [1], "keep": 0}, r"Halving\(keep=...\) must be .* got 0"),
        (
            gputune.Halving,
            {"rungs": [1], "keep": 2, "factor": 4},
            r"Halving\(factor=...\) has no effect, because keep=2 sets the number of trials that "
            r"continue, got 4. Leave one out",
        ),
        (
            gputune.Median,
            {"min_epochs": 0},
            r"Median\(min_epochs=...\) must be .* at least 1, or None, got 0",
        ),
        (
            gputune.Median,
            {"every": 2.0},
            r"Median\(every=...\) must be an integer of at least 1, or None, got 2.0",
        ),
        (
            gputune.Median,
            {"min_trials": None},
            r"Median\(min_trials=...\) must be an integer of at least 1, got None",
        ),
        (gputune.Median, {"min_trials": True}, "got True"),
    ],
)
def test_bad_options_are_named(rule, options, message):
    with refused(message):
        rule(**options)


def test_epochs_of_the_medians_decisions_and_options_that_do_not_fit_the_epochs():
    assert gputune.Median().stops(50) == list(range(5, 50, 5))
    assert gputune.Median(min_epochs=4, every=10).stops(27) == [4, 14, 24]
    assert gputune.Median().stops(1) == []
    for rule, epochs, words in (
        (
            gputune.Median(min_epochs=9),
            9,
            r"Median\(min_epochs=...\) must be below max_epochs=9, got 9. Lower it",
        ),
        (Halving(rungs=[3, 9]), 9, r"Halving\(rungs=...\) must be below max_epochs=9, got 9"),
        (
            Halving(min_epochs=10),
            10,
            r"Halving\(min_epochs=...\) must be below max_epochs=10, got 10. Lower it",
        ),
        (
            Halving(brackets=4),
            5,
            r"must be at most 3 for max_epochs=5, which has rungs at \[1, 3\], got 4",
        ),
    ):
        with refused(words):
            rule.stops(epochs)


def plainly(epoch, curves, least):
    """The rule, trial by trial."""
    if len(curves) < least:
        return set()
    now = []
    for curve in curves.values():
        value = curve[epoch - 1] if len(curve) >= epoch else curve[-1] if curve else -math.inf
        now.append(-math.inf if math.isnan(value) else value)
    middle = statistics.median(now)
    reached = {number: curve[:epoch] for number, curve in curves.items() if len(curve) >= epoch}
    return {n for n, seen in reached.items() if any(map(math.isnan, seen)) or max(seen) < middle}


def leave(epoch, curves, least=5):
    """The trials that the rule stops, among trials of one fold."""
    columns = {number: np.array(curve, dtype=float)[:, None] for number, curve in curves.items()}
    return gputune.Median(min_trials=least).trials_to_stop(epoch, columns, 100)


def test_decisions_are_those_of_the_plain_rule():
    rng = np.random.default_rng(0)
    for _ in range(300):
        curves = {}
        for number in rng.permutation(12)[: rng.integers(1, 12)]:
            length = rng.choice([0, 2, 4, 6])
            curves[int(number)] = (rng.integers(0, 6, length) / 5).tolist()
            if length and rng.random() < 0.1:
                curves[int(number)][-1] = math.nan
        epoch = int(rng.choice([2, 4, 6]))
        least = int(rng.integers(1, 7))
        assert leave(epoch, curves, least) == plainly(epoch, curves, least)


def test_equal_trials_all_stay_and_half_of_unlike_ones_leave():
    assert leave(1, {n: [0.5] for n in range(8)}) == set()
    assert leave(1, {n: [n / 10] for n in range(8)}) == {0, 1, 2, 3}
    assert leave(2, {n: [n / 10, 0.0] for n in range(8)}) == set()  # the best so far


def test_only_the_best_of_a_fixed_number_continue_after_a_rung():
    X, y = load_iris(return_X_y=True)
    search = {"cv": 3, "n_trials": 8, "max_epochs": 6, "verbose": 0, "workers": 1}
    rule = gputune.Halving(rungs=[2], keep=3)
    study = gputune.tune("mlp", X, y, method=rule, **search)
    means = study.curves[:, 1].mean(1)
    best = sorted(np.argsort(-means, kind="stable")[:3].tolist())
    assert [t.number for t in study.trials if t.state == "complete"] == best
    assert {t.detail.get("rung") for t in study.trials} == {None, 2}
    assert study.spent == (8 * 2 + 3 * 4, 8 * 6)
    assert study.record.method["rungs"] == [2] and study.record.method["keep"] == 3
    assert method_from_json(study.record.method) == rule
    assert Halving().to_json().keys() == {"name", "factor", "min_epochs", "brackets"}


def test_the_summary_says_that_no_trial_was_pruned():
    X, y = load_iris(return_X_y=True)
    search = {"cv": 2, "n_trials": 2, "max_epochs": 3, "verbose": 0, "workers": 1}
    study = gputune.tune("mlp", X, y, method=gputune.Halving(rungs=[1], keep=2), **search)
    assert Halving.summary(study)[0][1] == "no trial was pruned"
    sampler = gputune.OptunaSampler(halving=gputune.Halving(rungs=[1], keep=3))
    study = gputune.tune("mlp", X, y, method=sampler, **search)
    assert sampler.summary(study)[1] == ("Halving", "no trial was pruned")
