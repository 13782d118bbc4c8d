"""``gputune status`` and ``report``: a search looked at from outside, while it runs, after it was
killed or ended."""

import os
import re
import shutil
import subprocess
import threading
import time
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue
from types import SimpleNamespace

import numpy as np
import pytest

import gputune
from command_line import output, refusal, run, searched
from forked import Fork
from gputune.cli import study as commands
from gputune.ground.errors import StudyCorruptError
from gputune.report.page import page
from gputune.study.claims import Claims
from gputune.study.store import Candidate, Store
from gputune.study.study import Study
from study_rows import candidates, change, make_study, result

META = {"model": "mlp", "scoring": "accuracy", "folds": 2}


CURVE = np.array([[0.1, 0.1], [0.2, 0.2], [0.3, 0.3]])


def status(path, *, watch=None):
    return commands.status(Namespace(study=str(path), watch=watch))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "study.db"


@contextmanager
def searching(path, trials, *results, **meta):
    """Yield the store of a running search with this number of trials and these results."""
    with Store.create(path, {**META, **meta}) as store:
        store.add_trials(candidates(range(trials)))
        store.finish(results)
        yield store


def test_a_running_search(path):
    with searching(path, 6) as store:
        assert "Trials   0 of 6 trials finished: 6 waiting\nBest     none yet" in status(path)
        store.finish([result(n, score=0.5 + n / 10) for n in range(2)])
        store.finish(
            [result(2, state="pruned", score=0.9), result(3, state="failed", score=float("nan"))]
        )
        out = output("status", path.parent)
        name, trials, best, written = out.rstrip("\n").split("\n")
        assert name == f"Study    {path}"
        assert trials == (
            "Trials   4 of 6 trials finished: 2 complete, 1 pruned, 1 diverged, 2 waiting"
        )
        assert best == "Best     accuracy 0.6000 in trial 1: lr=0.05, width=16, activation=relu"
        assert re.fullmatch(r"Written  \d+\.\d s ago", written)
        store.finish([result(4, score=0.75)])  # the search was not held up
    assert "accuracy 0.7500 in trial 4" in status(path) and "Running" not in status(path)


@pytest.mark.parametrize("watch", [None, True])
def test_of_many_trials_the_best_are_shown(path, watch):
    with searching(path, 250, *(result(n, score=n / 300) for n in range(250))):
        pass
    text = status(path, watch=watch)
    assert "250 of 250 trials" in text and "accuracy 0.8300 in trial 249: lr=" in text
    assert text.count("\ntrial ") == (5 if watch else 0)
    change(path, "UPDATE results SET best_epoch = 2 WHERE number = 249")
    with pytest.raises(
        StudyCorruptError, match="the result of trial 249 does not fit its checksum"
    ):
        status(path)


@pytest.mark.long
def test_a_hundred_thousand_trials(path):
    seconds = []
    with searching(path, 100_000, *(result(n, epochs=20, folds=5) for n in range(100_000))):
        pass
    for look in (Study.open, status):
        begin = time.process_time()
        look(path)
        seconds.append(time.process_time() - begin)
    assert seconds[0] < 3 and seconds[1] < 1.5  # half of that on a machine that does nothing else


def test_the_best_of_the_trials_that_train_is_reported_by_the_processes(path):
    with searching(path, 6), Claims(path) as claims:
        claims.take_search("halving")
        said = {"done": 3, "of": 9, "unit": "trial-epochs"}
        for best, left, words in [
            (None, None, ""),
            (0.875, 42.5, ", best so far accuracy 0.8750, about 42.5 s left"),
        ]:
            claims.show({**said, "best": best, "left": left})
            assert f"Running  process {os.getpid()}: 3 of 9 trial-epochs{words}\n" in status(path)


def test_the_best_of_those_that_were_sent_away_is_said_to_be_one(path):
    with searching(
        path, 3, *(result(n, state="pruned", score=0.5 + n / 10) for n in range(2))
    ) as store:
        said = "Best     accuracy 0.6000 in trial 1: lr=0.05, width=16, activation=relu"
        assert f"{said} (pruned; trials that still train have no score yet)\n" in status(path)
        store.finish([result(2, state="pruned", score=0.1)])
    assert f"{said}\n" in status(path)


def test_what_was_cut_short_is_not_finished_and_what_is_too_big_did_not_diverge(path):
    failed = result(2, state="failed", score=float("nan"))
    big = replace(failed, number=3, detail={"reason": "out of memory"})
    with searching(path, 4, result(0), result(1, state="stopped"), failed, big):
        states = "1 complete, 1 cut short, 1 diverged, 1 too big for the memory"
        assert f"Trials   3 of 4 trials finished: {states}\n" in status(path)


def test_when_it_was_written_is_not_when_it_was_looked_at(path, monkeypatch):
    with searching(path, 2, result(0)):
        pass
    now = time.time()
    monkeypatch.setattr("gputune.cli.study.time", SimpleNamespace(time=lambda: now))
    os.utime(path, (now - 3600,) * 2)
    for _ in range(3):
        assert "Written  1 h 0 min ago" in status(path)


def test_a_watch_ends_with_the_search(path, monkeypatch, capsys):
    looks = []
    with searching(path, 4, max_epochs=3) as store:

        def sleep(seconds):
            looks.append(seconds)
            first = 2 * len(looks) - 2
            store.finish(
                [replace(result(n, score=0.5 + n / 10), curve=CURVE) for n in (first, first + 1)]
            )

        monkeypatch.setattr(commands.time, "sleep", sleep)
        last = status(path, watch=True)
    first, second = capsys.readouterr().out.split("\n\nStudy")
    assert len(looks) == 2 and "0 of 4 trials" in first and "2 of 4 trials" in second
    assert "\ntrial 1     ▁▅█ 0.6000" in second and "4 of 4 trials" in last


def test_a_watch_redraws_a_terminal_while_another_process_writes(path):
    terminal, other_end = pytest.importorskip("pty").openpty()
    code = f"""
import sys
from gputune.cli import study
from gputune.cli.main import main
sys.stdout, study._WATCH_SECONDS = open({os.ttyname(other_end)!r}, "w"), 0.01
sys.exit(main(["status", {str(path)!r}, "--watch"]))
"""
    with searching(path, 2, max_epochs=3) as store:
        watch = Fork(code)
        screens = b""
        for n in range(3):
            while f"   {n} of 2 trials".encode() not in screens:
                screens += os.read(terminal, 4096)
            if n < 2:
                store.finish([replace(result(n, score=0.5), curve=CURVE)])
    while not screens.endswith(b" 0.5000\r\n"):
        screens += os.read(terminal, 4096)
    assert watch.wait() == 0
    os.close(terminal)
    os.close(other_end)
    first, second, *_ = screens.decode().split("\x1b[H\x1b[J")[1:]
    assert first.startswith("Study    ") and "Trials   0 of 2" in first and "Trials" in second
    assert "\r\ntrial 0     ▁▅█ 0.5000\r\n" in screens.decode()


@pytest.mark.long
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium on this machine")
def test_a_live_page_reloads_itself_in_a_browser(tmp_path):
    pages = Queue()

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/live.html":
                self.wfile.write(
                    b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\n\r\n" + live.encode()
                )
                pages.put(self.path)

        log_message = print

    live = page(gputune.Study.open(make_study(tmp_path / "study.db", trials=2)), reload_seconds=1)
    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/live.html"
        flags = (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
        )
        with subprocess.Popen(["chromium", *flags, address], stderr=subprocess.DEVNULL) as browser:
            try:
                for _ in range(3):
                    assert pages.get(timeout=60) == "/live.html"
            finally:
                browser.kill()
        server.shutdown()


def test_a_live_page_reloads_itself_until_the_search_has_ended(path, monkeypatch):
    out = path.with_name("page.html")
    pages = []
    with searching(path, 1) as store:

        def sleep(seconds):
            pages.append(out.read_text())
            store.finish([result(0)])

        monkeypatch.setattr(commands.time, "sleep", sleep)
        assert run("report", path, "--live", "--out", out) == (0, f"Report   {out}\n", "")
    (live,) = pages
    reload = '<meta http-equiv="refresh" content="5">'
    assert reload in live and reload not in out.read_text()


def test_results_in_the_log_count_as_written(path):
    with searching(path, 2) as store:
        begun = time.time() - 3600
        os.utime(path, (begun,) * 2)
        store.finish([result(0)])
        assert commands.last_written(path) > begun + 1800


def test_a_loss_is_shown_in_its_own_sign_and_no_name_steers_the_terminal(path):
    with Store.create(path, {**META, "scoring": "neg_log_loss"}) as store:
        store.add_trials([Candidate(0, {"module__\x1b[2J": "\x1b]0;x\x07"}, "random")])
        store.finish([result(0, score=-0.25)])
    assert "log_loss (lower is better) 0.2500 in trial 0" in status(path)
    assert "\x1b" not in status(path)


def test_the_page_has_the_held_out_score_of_the_model_next_to_the_study(tmp_path):
    _, out, _ = searched(tmp_path, n_rows=60)
    assert (
        output("report", out, "--out", tmp_path / "report.html")
        == f"Report   {tmp_path / 'report.html'}\n"
    )
    model = gputune.load_model(out / "model")
    study = gputune.Study.open(out / "study.db")
    assert (tmp_path / "report.html").read_text() == page(study, model=model.info)
    score = model.info["held_out_score"]
    assert f'<dd class="value">{score:.4f}</dd><dd class="about">the model on 12 rows' in page(
        study, model=model.info
    )
    study.report(tmp_path / "same.html", model=model)
    assert (tmp_path / "same.html").read_text() == (tmp_path / "report.html").read_text()
    assert run("report", out, "--live", "--confusion", "--out", tmp_path / "live.html")[0] == 0
    assert "Confusion matrix" in (tmp_path / "live.html").read_text()


def test_a_model_of_an_earlier_best_trial_has_no_say(tmp_path):
    _, out, _ = searched(tmp_path, n_rows=60)
    with Store.open(out / "study.db") as store:
        store.add_trials(candidates([90]))
        store.finish([result(90, score=2.0)])
    assert run("report", out / "study.db", "--out", tmp_path / "report.html")[0] == 0
    assert "not known here" in (tmp_path / "report.html").read_text()


def test_the_default_place_is_next_to_the_study_and_is_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for name in ("study.db", "out/study.db", "out/other.db"):
        Store.create(name, {"model": "mlp", "scoring": "accuracy", "folds": 2}).close()
    (tmp_path / "out/report.html").write_text("older")
    places = {
        "study.db": "report.html",
        "out": "out/report.html",
        "out/other.db": "out/other.report.html",
    }
    for study, place in places.items():
        assert run("report", study) == (0, f"Report   {place}\n", "")
        assert "There is no best trial" in (tmp_path / place).read_text()


def test_bad_places_are_refused_and_nothing_is_lost(tmp_path):
    study = tmp_path / "study.db"
    Store.create(study, {}).close()
    before = study.read_bytes()
    words = f"error: --out {str(study)!r} must not be the file of the study. Give another name"
    assert words in refusal("report", study, "--out", study)
    assert "there is no study file" in refusal(
        "report", tmp_path / "none.db", "--out", tmp_path / "x.html"
    )
    assert study.read_bytes() == before and not (tmp_path / "x.html").exists()
