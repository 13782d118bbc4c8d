"""The benchmark's part on where the time goes, in a tiny form; no time is asserted."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest

SAID = """\
Trials   4 complete; 10.0 s in all

Where the time went:

  reading and preparing rows         0.50 s    5%
  compiling                          1.00 s   10%
  training                           8.00 s   80%
    steps                                  90% of it
    scores                                  5% of it
    starting, waiting, telling              5% of it
  planning                           0.00 s    0%
  storing                            0.30 s    3%
  the rest                           0.20 s    2%
"""
SPEED = "Steps reached 50.0 GFLOP/s, 25% of the 200.0 that the product reaches here on 2 cores (float32)."


@pytest.fixture
def profile(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    return import_module("benchmark.studies.profile")


def test_what_the_command_says_is_read(profile):
    run = profile.read(f"{SAID}\n{SPEED}\n", 16, 4)
    assert run.seconds == pytest.approx(10) and run.share == 0.25
    assert run.parts["steps"] == pytest.approx(7.2) and run.parts["scores"] == pytest.approx(0.4)
    assert run.beside == pytest.approx((0.5 + 0.4 + 0.3 + 0.2) / 4 * 1e3)


def test_a_share_that_is_not_said_is_no_number(profile):
    run = profile.read(SAID, 16, 4)
    assert run.reached is None and run.share != run.share


@pytest.mark.long
def test_the_report_is_written(profile, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(profile, "WIDE_TRIALS", 2)
    monkeypatch.setattr(profile, "NARROW_TRIALS", 3)
    main = import_module("benchmark.__main__").main
    assert main(["--profile", "--epochs", "1", "--repeats", "1", "--out", str(tmp_path)]) == 0
    (numbers,), (page,) = tmp_path.glob("profile-*.json"), tmp_path.glob("profile-*.md")
    runs = json.loads(numbers.read_text())["runs"]
    assert [(r["width"], r["trials"]) for r in runs] == [(256, 2), (128, 2), (16, 3)]
    assert all(r["reached"] > 0 and r["peak"] > 0 and r["parts"]["steps"] >= 0 for r in runs)
    text = page.read_text()
    assert text in capsys.readouterr().out
    assert re.search(r"^\| 16 \| 3 \| [\d.]+ \| [\d.]+ \| [\d.]+ \| \d+% \| [\d.]+ \|$", text, re.M)
    assert re.search(r"^Width 128: median share \d+%\.$", text, re.M)
