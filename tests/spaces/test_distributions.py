"""log_int draws the promised numbers, a distribution's text is stable, and a best value at the edge
of its range is reported.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

import gputune
from gputune.spaces.distributions import describe, distribution_text, is_distribution, log_int
from gputune.spaces.edges import edge_remarks
from gputune.study.store import Candidate, Result
from refused import refused


def test_log_int_draws_each_integer_with_its_share_in_the_shape_asked_for_from_seeds_and_generators():
    draws = log_int(1, 7).rvs(size=40_000, random_state=0)
    shares = np.bincount(draws, minlength=8)[1:] / len(draws)
    np.testing.assert_allclose(
        shares, [math.log((k + 1) / k) / math.log(8) for k in range(1, 8)], atol=0.01
    )
    assert draws.dtype == np.int64 and draws.min() == 1 and draws.max() == 7
    law = log_int(16, 512)
    assert [np.shape(law.rvs(size=size, random_state=0)) for size in ((), (3,), (2, 5))] == [
        (),
        (3,),
        (2, 5),
    ]
    one = law.rvs(random_state=3)
    assert type(one) is int and one == law.rvs(random_state=np.random.RandomState(3))
    generator = [law.rvs(size=4, random_state=np.random.default_rng(3)).tolist() for _ in range(2)]
    assert generator[0] == generator[1] and all(16 <= k <= 512 for k in generator[0])


class AtAnEnd(np.random.RandomState):
    """A generator with a uniform draw at one end of its interval, which rounding may give."""

    def __init__(self, end):
        super().__init__(0)
        self.end = end

    def uniform(self, low, high, size=None):
        return (low, high)[self.end]


def test_log_int_stays_inside_at_the_ends_of_the_draw():
    for low in range(1, 60):
        law = log_int(low, low + 1)
        assert [law.rvs(random_state=AtAnEnd(end)) for end in (0, 1)] == [low, low + 1]


def test_log_int_is_known_by_its_ends_and_refuses_odd_ones():
    law = log_int(16, np.int64(512))
    assert eval(repr(law)) == law == log_int(16, 512) != log_int(16, 511)
    assert hash(law) == hash(log_int(16, 512))
    for ends in ((0, 8), (8, 8), (9, 8), (-1, 8), (1.5, 8), ("1", 8), (True, 8), (1, 2**53)):
        with refused(r"log_int needs integers 0 < low < high.*got low=.*log_int\(16, 512\)"):
            log_int(*ends)


class Ours:
    """A distribution of the user's own, with no text but its address."""

    def __init__(self, low):
        self.low = low

    def rvs(self, random_state=None):
        return self.low + random_state.uniform()


class Named(stats.rv_continuous):
    def _pdf(self, x):
        return 1.0


def test_what_is_a_distribution():
    assert (
        is_distribution(log_int(1, 2))
        and is_distribution(stats.uniform(0, 1))
        and is_distribution(Ours(0))
    )
    assert not is_distribution(Ours) and not is_distribution([1]) and not is_distribution("rvs")


def test_scipys_distributions_are_reported_by_name_and_parameters_others_by_type_and_draws():
    for law, text in (
        (log_int(1, 5), "log_int(1, 5)"),
        (stats.loguniform(np.float64(1e-4), 0.1), "loguniform(a=0.0001, b=0.1)"),
        (stats.uniform(0, 0.5), "uniform(loc=0.0, scale=0.5)"),
        (stats.uniform(scale=0.5), "uniform(scale=0.5)"),
        (stats.randint(1, 5), "randint(low=1, high=5)"),
        (stats.uniform, "uniform()"),
    ):
        assert distribution_text(law) == text
    assert distribution_text(Ours(0)) == distribution_text(Ours(0)) != distribution_text(Ours(1))
    assert "Ours(draws=[0.5488" in distribution_text(Ours(0))
    # Its name is that of one of scipy's laws, which it is not.
    assert "draws=" in distribution_text(Named(a=0, b=1, name="norm"))


def study(key, choices, best, others):
    """A study of one hyperparameter; its first trial is the best one."""
    law = None if choices is None else describe(choices)
    meta = {
        "model": "mlp",
        "scoring": "accuracy",
        "distributions": {} if law is None else {key: law},
    }
    rows = []
    for number, value in enumerate([best, *others]):
        score = 0.9 - number / 100
        result = Result(
            number, "complete", score, (score, score), 1, 0.1, np.full((1, 2), score), {}
        )
        rows.append((Candidate(number, {key: value}, "random"), result))
    return gputune.Study.from_rows(meta, rows)


SOME = [64, 100, 128]
LIST = [32, 64, 256]
LOG = stats.loguniform(1e-4, 1e-1)
LINE = stats.uniform(0, 0.5)
WHOLE = stats.randint(16, 257)


@pytest.mark.parametrize(
    ("key", "choices", "best", "others", "words"),
    [
        (
            "width",
            LIST,
            256,
            [32, 64],
            "The best width, 256, lies at the upper end of the space, 32 to 256: no larger",
        ),
        (
            "width",
            LIST,
            32,
            [64, 256],
            "The best width, 32, lies at the lower end of the space, 32 to 256: no smaller",
        ),
        ("width", WHOLE, 256, SOME, "upper end of the space, 16 to 256: no larger one was tried."),
        ("width", log_int(16, 512), 16, SOME, "lower end of the space, 16 to 512"),
        (
            "lr",
            LOG,
            0.09,
            [1e-3, 1e-2],
            "The best lr, 0.09, lies at the upper end of the space, 0.0001 to 0.1",
        ),
        ("lr", LOG, 1.2e-4, [1e-3, 1e-2], "lower end"),
        ("dropout", LINE, 0.49, [0.1, 0.2], "upper end of the space, 0 to 0.5"),
        # Nothing is said that is not so.
        ("width", LIST, 64, [32, 256], None),
        ("width", LIST, 256, [32], None),  # two values were tried
        ("width", [32, 256], 256, [32, 32], None),
        ("width", [256], 256, [256, 256], None),  # fixed
        ("width", LIST, 512, [32, 64, 256], None),  # an included one beyond the space
        ("width", LIST, 256, [32, 64, 512], None),  # a larger one was tried
        ("width", WHOLE, 240, SOME, None),
        # far from its end on its scale, half of it on another
        ("lr", LOG, 0.05, [1e-3, 1e-2], None),
        ("lr", LOG, 6e-4, [1e-3, 1e-2], None),
        ("dropout", LINE, 0.0, [0.1, 0.2], None),  # nothing lies below
        ("dropout", [0.0, 0.1, 0.2], 0.0, [0.1, 0.2], None),
        ("depth", [1, 2, 3], 1, [2, 3], None),
        ("l1_ratio", [0.0, 0.5, 1.0], 1.0, [0.0, 0.5], None),
        ("module__p", [0, 1, 2], 0, [1, 2], None),
        ("activation", ["relu", "tanh", "silu"], "silu", ["relu", "tanh"], None),
        ("module__flag", [False, True], True, [False, True], None),
        ("width", None, 256, [32, 64], None),  # of several alternatives, or a law that is not known
    ],
)
def test_an_edge_is_remarked(key, choices, best, others, words):
    remarks = edge_remarks(study(key, choices, best, others))
    assert [words in remark for remark in remarks] == [True] if words else remarks == ()


def test_a_study_without_a_score_has_no_edge_and_a_trial_elsewhere_with_the_same_score_is_as_good():
    assert edge_remarks(gputune.Study.from_rows({"distributions": {"lr": describe(LOG)}}, [])) == ()
    tied = study("width", LIST, 256, [64, 32])
    rows = [replace(trial, score=0.9) if trial.number == 1 else trial for trial in tied.trials]
    assert edge_remarks(tied) and edge_remarks(replace(tied, trials=tuple(rows))) == ()
