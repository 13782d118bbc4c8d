"""Durations of options: units, and the end of a SLURM job."""

import time

import pytest

from gputune.tuning.checks import duration
from refused import refused


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (90, 90),
        (0.5, 0.5),
        ("90", 90),
        ("60s", 60),
        ("5m", 300),
        ("1h30m", 5400),
        ("1.5h", 5400),
        ("2d", 172_800),
        (float("inf"), float("inf")),
    ],
)
def test_a_duration_has_units(value, expected):
    assert duration("timeout", value) == expected


@pytest.mark.parametrize("value", [0, -1, True, "", "5 minutes", "m", "0s", "-5m", "nan", [5]])
def test_other_durations_are_refused(value):
    with refused("timeout must be a number of seconds above 0, or a time such as '60s'"):
        duration("timeout", value)


@pytest.mark.parametrize(("left", "usable"), [(1000, 940), (36_000, 34_200)])
def test_auto_ends_before_the_job_does(monkeypatch, left, usable):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + left)))
    assert duration("timeout", "auto") == pytest.approx(usable, abs=3)


def test_auto_needs_a_job_with_a_time_limit_that_is_not_over(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    with refused("SLURM_JOB_END_TIME, which SLURM sets.*got no such variable.*such as '30m'"):
        duration("timeout", "auto")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "Unknown")
    with refused("got 'Unknown'"):
        duration("timeout", "auto")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + 30)))
    with refused(r"needs more than 60 s until the SLURM job ends.*longer --time"):
        duration("timeout", "auto")
