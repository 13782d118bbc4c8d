"""What is shown while a search runs."""

import numpy as np

from gputune import progress
from gputune.progress import Progress


def test_plain_lines_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_LINE_SECONDS", -1)
    shown = Progress(1)
    with shown.bar_over(4, 2):
        shown.advance(4, np.full((4, 1, 3), 0.5))
        shown.finished(4)
    lines = capsys.readouterr().err.split("\n")
    assert "trials 0/4, best 0.5000" in lines
    assert "trials 4/4, best 0.5000" in lines
    assert not any("trial-epochs" in line for line in lines)


def test_the_best_score_skips_diverged_trials():
    shown = Progress(0)
    with shown.bar_over(2, 1):
        shown.advance(2, np.array([[[np.nan, 1.0]], [[0.2, 0.4]]]))
    assert abs(shown.best - 0.3) < 1e-12


def test_silence(capsys):
    shown = Progress(0)
    shown.say("nothing")
    with shown.bar_over(1, 1):
        shown.advance(1, np.ones((1, 1, 1)))
        shown.finished(1)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    shown = Progress(1)
    with shown.bar_over(2, 1):
        shown.advance(2, np.ones((2, 1, 1)))
        shown.bar.refresh()
    assert "trial-epochs" in capsys.readouterr().err
