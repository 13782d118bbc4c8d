"""A best value at the edge of the space is remarked, and nothing is that is not so."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

import gputune
from gputune.methods.distributions import describe, edge_remarks, log_int
from gputune.study.store import Candidate, Result


def study(key, choices, best, others):
    """A study of one hyperparameter whose first trial is the best one."""
    law = None if choices is None else describe(choices)
    meta = {"model": "mlp", "scoring": "accuracy", "distributions": {} if law is None else {key: law}}
    rows = []
    for number, value in enumerate([best, *others]):
        score = 0.9 - number / 100
        result = Result(number, "complete", score, (score, score), 1, 0.1, np.full((1, 2), score), {})
        rows.append((Candidate(number, {key: value}, "random"), result))
    return gputune.Study.from_rows(meta, rows)


SOME = [64, 100, 128]
LIST, LOG, LINE, WHOLE = ([32, 64, 256], stats.loguniform(1e-4, 1e-1), stats.uniform(0, 0.5), stats.randint(16, 257))


@pytest.mark.parametrize(
    ("key", "choices", "best", "others", "words"),
    [
        ("width", LIST, 256, [32, 64], "The best width, 256, lies at the upper end of the space, 32 to 256: no larger"),
        ("width", LIST, 32, [64, 256], "The best width, 32, lies at the lower end of the space, 32 to 256: no smaller"),
        ("width", WHOLE, 256, SOME, "upper end of the space, 16 to 256: no larger one was tried."),
        ("width", log_int(16, 512), 16, SOME, "lower end of the space, 16 to 512"),
        ("lr", LOG, 0.09, [1e-3, 1e-2], "The best lr, 0.09, lies at the upper end of the space, 0.0001 to 0.1"),
        ("lr", LOG, 1.2e-4, [1e-3, 1e-2], "lower end"),
        ("dropout", LINE, 0.49, [0.1, 0.2], "upper end of the space, 0 to 0.5"),
    ],
)
def test_an_edge_is_remarked(key, choices, best, others, words):
    (remark,) = edge_remarks(study(key, choices, best, others))
    assert words in remark


@pytest.mark.parametrize(
    ("key", "choices", "best", "others"),
    [
        ("width", LIST, 64, [32, 256]),
        ("width", LIST, 256, [32]),  # two values were tried
        ("width", [32, 256], 256, [32, 32]),
        ("width", [256], 256, [256, 256]),  # fixed
        ("width", LIST, 512, [32, 64, 256]),  # an included one beyond the space
        ("width", LIST, 256, [32, 64, 512]),  # a larger one was tried
        ("width", WHOLE, 240, SOME),
        ("lr", LOG, 0.05, [1e-3, 1e-2]),  # far from its end on its scale, half of it on another
        ("lr", LOG, 6e-4, [1e-3, 1e-2]),
        ("dropout", LINE, 0.0, [0.1, 0.2]),  # nothing lies below
        ("dropout", [0.0, 0.1, 0.2], 0.0, [0.1, 0.2]),
        ("depth", [1, 2, 3], 1, [2, 3]),
        ("l1_ratio", [0.0, 0.5, 1.0], 1.0, [0.0, 0.5]),
        ("module__p", [0, 1, 2], 0, [1, 2]),
        ("activation", ["relu", "tanh", "silu"], "silu", ["relu", "tanh"]),
        ("module__flag", [False, True], True, [False, True]),
        ("width", None, 256, [32, 64]),  # of several alternatives, or a law that is not known
    ],
)
def test_nothing_is_said_that_is_not_so(key, choices, best, others):
    assert edge_remarks(study(key, choices, best, others)) == ()


def test_a_study_without_a_score_has_none():
    assert edge_remarks(gputune.Study.from_rows({"distributions": {"lr": describe(LOG)}}, [])) == ()


def test_a_trial_elsewhere_with_the_same_score_is_as_good():
    tied = study("width", LIST, 256, [64, 32])
    rows = [dataclasses.replace(trial, score=0.9) if trial.number == 1 else trial for trial in tied.trials]
    assert edge_remarks(tied) and edge_remarks(dataclasses.replace(tied, trials=tuple(rows))) == ()
