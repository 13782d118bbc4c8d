"""The short form of scripts/torture.py: real processes, killed by real signals, and nothing is
lost."""

import sys

import pytest

import gputune


@pytest.fixture
def torture(script):
    return script("torture")


def only(counts, *words):
    """Return some counts, after a check that all bad counts are zero."""
    assert {
        word: number for word in sys.modules["torture"].BAD if (number := counts.pop(word, 0))
    } == {}
    return tuple(counts[word] for word in words)


def test_a_study_survives_kills_at_random_moments(torture, tmp_path):
    killed, trials = only(torture.kills(tmp_path, 2, 20), "kills", "trials")
    assert killed == 2 and trials == 20


def test_a_study_survives_a_kill_between_every_two_calls_of_the_store(torture, tmp_path):
    # A trial is added, planned, claimed and finished, and what is left is given up at the end.
    (points,) = only(torture.fault_points(tmp_path, 1), "fault points")
    assert points >= 6


@pytest.mark.parametrize(
    "method",
    ["random", pytest.param(gputune.Halving(min_epochs=10), id="halving", marks=pytest.mark.long)],
)
def test_a_search_that_is_killed_within_its_chunks_continues(torture, tmp_path, method):
    counts = torture.kills_in_chunks(tmp_path, 1, method, 0, 20)
    killed, kept, trials = only(counts, "kills", "with a state", "trials")
    assert killed == 1 and kept > 0 and trials == 6


def test_a_full_disk_keeps_what_was_finished(torture, tmp_path):
    counts = torture.full_disk(tmp_path, 40)
    errors, kept = only(counts, "clear errors", "results kept then")
    assert errors == 1 and 0 < kept < 40


def test_the_counts_of_damage_and_of_storing(torture, tmp_path):
    counts = torture.flips(tmp_path, 30, 0)
    count, opened, errors, repaired = only(counts, "flips", "opened", "clear errors", "repaired")
    assert count == opened + errors == 30 and min(opened, errors, repaired) > 0
    assert torture.storing(tmp_path, 200)["trials"] == 200


def test_a_part_that_goes_wrong_ends_with_1(torture, monkeypatch, capsys):
    for name in (
        "kills",
        "fault_points",
        "kills_in_chunks",
        "good_enough",
        "good_enough_on_ray",
        "command",
        "crowd",
        "cuts",
        "full_disk",
        "storing",
    ):
        monkeypatch.setattr(torture, name, lambda *arguments: {"lost": 0})
    monkeypatch.setattr(torture, "flips", lambda *arguments: {"flips": 3, "wrong values": 1})
    assert torture.main([]) == 1
    assert "flipped bits: 3 flips, 1 wrong values (0 s)" in capsys.readouterr().out
    monkeypatch.setattr(torture, "flips", lambda *arguments: {"flips": 3, "wrong values": 0})
    assert torture.main([]) == 0
    assert capsys.readouterr().out.count("\n") == len(torture.PARTS)
    assert torture.main(["flips", "cuts"]) == 0
    said = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["flipped bits", "cut at every sector"]
    with pytest.raises(SystemExit):
        torture.main(["flood"])


@pytest.mark.long
def test_the_night(torture):
    assert torture.main([]) == 0
