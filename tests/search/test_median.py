"""The median rule against plain Python, its epochs, and what is refused."""

import math
import statistics

import numpy as np
import pytest

import gputune
from gputune.search.stopping import below_the_median
from refused import refused


def plainly(epoch, curves, least):
    """The rule, trial by trial."""
    if len(curves) < least:
        return set()
    now = []
    for curve in curves.values():
        value = curve[epoch - 1] if len(curve) >= epoch else curve[-1] if curve else -math.inf
        now.append(-math.inf if math.isnan(value) else value)
    middle = statistics.median(now)
    leave = set()
    for number, curve in curves.items():
        if len(curve) >= epoch:
            seen = curve[:epoch]
            if any(map(math.isnan, seen)) or max(seen) < middle:
                leave.add(number)
    return leave


def test_decisions_are_those_of_the_plain_rule():
    rng = np.random.default_rng(0)
    for _ in range(300):
        curves = {}
        for number in rng.permutation(12)[: rng.integers(1, 12)]:
            length = rng.choice([0, 2, 4, 6])
            curves[int(number)] = (rng.integers(0, 6, length) / 5).tolist()
            if length and rng.random() < 0.1:
                curves[int(number)][-1] = math.nan
        epoch, least = int(rng.choice([2, 4, 6])), int(rng.integers(1, 7))
        found = below_the_median(epoch, {n: np.array(c) for n, c in curves.items()}, least)
        assert found == plainly(epoch, curves, least)


def test_equal_trials_all_stay_and_half_of_unlike_ones_leave():
    assert below_the_median(1, {n: np.array([0.5]) for n in range(8)}, 5) == set()
    assert below_the_median(1, {n: np.array([n / 10]) for n in range(8)}, 5) == {0, 1, 2, 3}
    assert below_the_median(2, {n: np.array([n / 10, 0.0]) for n in range(8)}, 5) == set()  # the best so far


def test_epochs_of_the_decisions():
    assert gputune.Median().stops(50) == list(range(5, 50, 5))
    assert gputune.Median(min_epochs=4, every=10).stops(27) == [4, 14, 24]
    assert gputune.Median().stops(1) == []
    with refused(r"Median\(min_epochs=...\) must be below max_epochs=9, got 9; lower it"):
        gputune.Median(min_epochs=9).stops(9)


@pytest.mark.parametrize(
    ("name", "value"), [("min_epochs", 0), ("every", 2.0), ("min_trials", None), ("min_trials", True)]
)
def test_options_are_checked(name, value):
    with refused(rf"Median\({name}=...\) must be an integer >= 1, got {value}"):
        gputune.Median(**{name: value})
