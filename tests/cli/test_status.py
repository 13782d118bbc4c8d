"""``gputune status``: a search looked at from outside, while it runs and after it was killed."""

import os
import platform
import re
import time
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import numpy as np

import gputune
from command_line import run
from gputune.cli import study as commands
from gputune.study.claims import Claims
from gputune.study.store import Store
from study_rows import candidates, result

META = {"model": "mlp", "scoring": "accuracy", "folds": 2}


def status(path, *, watch=None):
    return commands.status(Namespace(study=str(path), watch=watch))


def test_a_running_search(tmp_path):
    path = tmp_path / "study.db"
    with Store.create(path, META) as store:  # stays open, as in a search that runs
        store.add_trials(candidates(range(6)))
        assert "Trials   0 of 6 trials finished: 6 without a result yet\nBest     none yet" in status(path)
        store.finish([result(n, score=0.5 + n / 10) for n in range(2)])
        store.finish([result(2, state="pruned", score=0.9), result(3, state="failed", score=float("nan"))])
        code, out, err = run("status", tmp_path)
        assert (code, err) == (0, "")
        name, trials, best, written = out.rstrip("\n").split("\n")
        assert name == f"Study    {path}"
        assert trials == (
            "Trials   4 of 6 trials finished: 2 trained to the end, 1 sent away early, 1 diverged, "
            "2 without a result yet"
        )
        assert best == "Best     accuracy 0.6000 in trial 1: lr=0.05, width=16, activation=relu"
        assert re.fullmatch(r"Written  \d+\.\d s ago", written)
        store.finish([result(4, score=0.75)])  # the search was not held up
    assert "accuracy 0.7500 in trial 4" in status(path) and "Running" not in status(path)


def test_the_best_of_the_trials_that_train_is_told_by_the_processes(tmp_path):
    path = tmp_path / "study.db"
    with Store.create(path, META) as store, Claims(path) as claims:
        store.add_trials(candidates(range(6)))
        claims.take_search("halving")
        said = {"done": 3, "of": 9, "unit": "trial-epochs", "best": 0.875, "left": 42.5}
        for best, left, words in [
            (None, None, ""),
            (0.875, 42.5, ", best so far accuracy 0.8750, about 42.5 s left"),
        ]:
            claims.show({**said, "best": best, "left": left})
            assert f"Running  process {os.getpid()} on '{platform.node()}': 3 of 9 trial-epochs{words}\n" in (
                status(path)
            )


def test_the_best_of_those_that_were_sent_away_is_said_to_be_one(tmp_path):
    path = tmp_path / "study.db"
    with Store.create(path, META) as store:
        store.add_trials(candidates(range(3)))
        store.finish([result(n, state="pruned", score=0.5 + n / 10) for n in range(2)])
        said = "Best     accuracy 0.6000 in trial 1: lr=0.05, width=16, activation=relu"
        assert f"{said} (sent away early; those that train on are not told yet)\n" in status(path)
        store.finish([result(2, state="pruned", score=0.1)])
    assert f"{said}\n" in status(path)


def test_what_was_cut_short_is_not_finished_and_what_is_too_big_did_not_diverge(tmp_path):
    path = tmp_path / "study.db"
    with Store.create(path, META) as store:
        store.add_trials(candidates(range(4)))
        failed = result(2, state="failed", score=float("nan"))
        store.finish([result(0), result(1, state="stopped"), failed])
        store.finish([replace(failed, number=3, detail={"reason": "out of memory"})])
    assert (
        "Trials   3 of 4 trials finished: 1 trained to the end, 1 cut short, 1 diverged, 1 too big for the memory\n"
        in status(path)
    )


def test_when_it_was_written_is_not_when_it_was_looked_at(tmp_path, monkeypatch):
    path = tmp_path / "study.db"
    with Store.create(path, META) as store:
        store.add_trials(candidates(range(2)))
        store.finish([result(0)])
    now = time.time()
    monkeypatch.setattr("gputune.cli.study.time", SimpleNamespace(time=lambda: now))
    os.utime(path, (now - 3600,) * 2)
    for _ in range(3):
        assert "Written  1 h 0 min ago" in status(path)


def test_a_watch_ends_with_the_search(tmp_path, monkeypatch, capsys):
    path, looks = tmp_path / "study.db", []
    with Store.create(path, {**META, "max_epochs": 3}) as store:
        store.add_trials(candidates(range(4)))

        def sleep(seconds):
            looks.append(seconds)
            first = 2 * len(looks) - 2
            store.finish([replace(result(n, score=0.5 + n / 10), curve=CURVE) for n in (first, first + 1)])

        monkeypatch.setattr(commands.time, "sleep", sleep)
        last = status(path, watch=True)
    first, second = capsys.readouterr().out.split("\n\nStudy")
    assert len(looks) == 2 and "0 of 4 trials" in first and "2 of 4 trials" in second
    assert "\ntrial 1     ▁▅█ 0.6000" in second and "4 of 4 trials" in last


CURVE = np.array([[0.1, 0.1], [0.2, 0.2], [0.3, 0.3]])


def test_a_live_page_reloads_itself_until_the_search_has_ended(tmp_path, monkeypatch):
    path, out, pages = tmp_path / "study.db", tmp_path / "page.html", []
    with Store.create(path, META) as store:
        store.add_trials(candidates(range(1)))

        def sleep(seconds):
            pages.append(out.read_text())
            store.finish([result(0)])

        monkeypatch.setattr(commands.time, "sleep", sleep)
        assert run("report", path, "--live", "--out", out) == (0, f"Report   {out}\n", "")
    (live,) = pages
    reload = '<meta http-equiv="refresh" content="5">'
    assert reload in live and reload not in out.read_text()


def test_results_in_the_log_count_as_written(tmp_path):
    path = tmp_path / "study.db"
    with Store.create(path, META) as store:
        store.add_trials(candidates(range(2)))
        begun = time.time() - 3600
        os.utime(path, (begun,) * 2)
        store.finish([result(0)])
        assert commands.last_written(path) > begun + 1800


def test_a_loss_is_shown_in_its_own_sign_and_no_name_steers_the_terminal(tmp_path):
    path = tmp_path / "study.db"
    with Store.create(path, {**META, "scoring": "neg_log_loss"}) as store:
        store.add_trials([gputune.study.store.Candidate(0, {"module__\x1b[2J": "\x1b]0;x\x07"}, "random")])
        store.finish([result(0, score=-0.25)])
    assert "log_loss (lower is better) 0.2500 in trial 0" in status(path)
    assert "\x1b" not in status(path)
