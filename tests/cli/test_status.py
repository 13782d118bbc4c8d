"""``gputune status``: a search looked at from outside, while it runs and after it was killed."""

import os
import re
import shutil
import subprocess
import threading
import time
from argparse import Namespace
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue
from types import SimpleNamespace

import numpy as np
import pytest

import gputune
from command_line import run
from forked import Fork
from gputune.cli import study as commands
from gputune.errors import StudyCorruptError
from gputune.report.page import page
from gputune.study.claims import Claims
from gputune.study.store import Result, Store
from gputune.study.study import Study
from study_rows import candidates, change, make_study, result

META = {"model": "mlp", "scoring": "accuracy", "folds": 2}


def status(path, *, watch=None):
    return commands.status(Namespace(study=str(path), watch=watch))


def test_a_running_search(tmp_path):
    path = tmp_path / "study.db"
    with Store.create(path, META) as store:  # stays open, as in a search that runs
        store.add_trials(candidates(range(6)))
        assert "Trials   0 of 6 trials finished: 6 waiting\nBest     none yet" in status(path)
        store.finish([result(n, score=0.5 + n / 10) for n in range(2)])
        store.finish([result(2, state="pruned", score=0.9), result(3, state="failed", score=float("nan"))])
        code, out, err = run("status", tmp_path)
        assert (code, err) == (0, "")
        name, trials, best, written = out.rstrip("\n").split("\n")
        assert name == f"Study    {path}"
        assert trials == ("Trials   4 of 6 trials finished: 2 complete, 1 pruned, 1 diverged, 2 waiting")
        assert best == "Best     accuracy 0.6000 in trial 1: lr=0.05, width=16, activation=relu"
        assert re.fullmatch(r"Written  \d+\.\d s ago", written)
        store.finish([result(4, score=0.75)])  # the search was not held up
    assert "accuracy 0.7500 in trial 4" in status(path) and "Running" not in status(path)


@pytest.mark.parametrize(("watch", "best"), [(None, [249]), (True, [245, 246, 247, 248, 249])])
def test_of_many_trials_the_best_alone_are_read(tmp_path, monkeypatch, watch, best):
    path, read = tmp_path / "study.db", []
    with Store.create(path, META) as store:
        store.add_trials(candidates(range(250)))
        store.finish([result(n, score=n / 300) for n in range(250)])
    from_rows = Result.from_rows
    monkeypatch.setattr(Result, "from_rows", lambda *columns: read.extend(columns[0]) or from_rows(*columns))
    text = status(path, watch=watch)
    assert "250 of 250 trials" in text and "accuracy 0.8300 in trial 249: lr=" in text
    assert read == best and text.count("\ntrial ") == (5 if watch else 0)
    change(path, "UPDATE results SET best_epoch = 2 WHERE number = 249")
    with pytest.raises(StudyCorruptError, match="the result of trial 249 does not fit its checksum"):
        status(path)


@pytest.mark.long
def test_a_hundred_thousand_trials(tmp_path):
    path, seconds = tmp_path / "study.db", []
    with Store.create(path, META) as store:
        store.add_trials(candidates(range(100_000)))
        store.finish(result(n, epochs=20, folds=5) for n in range(100_000))
    for look in (Study.open, status):
        begin = time.process_time()
        look(path)
        seconds.append(time.process_time() - begin)
    assert seconds[0] < 3 and seconds[1] < 1.5  # half of that on a machine that does nothing else


def test_the_best_of_the_trials_that_train_is_told_by_the_processes(tmp_path):
    path = tmp_path / "study.db"
    with Store.create(path, META) as store, Claims(path) as claims:
        store.add_trials(candidates(range(6)))
        claims.take_search("halving")
        said = {"done": 3, "of": 9, "unit": "trial-epochs", "best": 0.875, "left": 42.5}
        for best, left, words in [(None, None, ""), (0.875, 42.5, ", best so far accuracy 0.8750, about 42.5 s left")]:
            claims.show({**said, "best": best, "left": left})
            assert f"Running  process {os.getpid()}: 3 of 9 trial-epochs{words}\n" in status(path)


def test_the_best_of_those_that_were_sent_away_is_said_to_be_one(tmp_path):
    path = tmp_path / "study.db"
    with Store.create(path, META) as store:
        store.add_trials(candidates(range(3)))
        store.finish([result(n, state="pruned", score=0.5 + n / 10) for n in range(2)])
        said = "Best     accuracy 0.6000 in trial 1: lr=0.05, width=16, activation=relu"
        assert f"{said} (pruned; those that train on are not told yet)\n" in status(path)
        store.finish([result(2, state="pruned", score=0.1)])
    assert f"{said}\n" in status(path)


def test_what_was_cut_short_is_not_finished_and_what_is_too_big_did_not_diverge(tmp_path):
    path = tmp_path / "study.db"
    with Store.create(path, META) as store:
        store.add_trials(candidates(range(4)))
        failed = result(2, state="failed", score=float("nan"))
        store.finish([result(0), result(1, state="stopped"), failed])
        store.finish([replace(failed, number=3, detail={"reason": "out of memory"})])
    assert "Trials   3 of 4 trials finished: 1 complete, 1 cut short, 1 diverged, 1 too big for the memory\n" in status(
        path
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


def test_a_watch_redraws_a_terminal_while_another_process_writes(tmp_path):
    path, (terminal, other_end) = tmp_path / "study.db", pytest.importorskip("pty").openpty()
    code = f"""
import sys
from gputune.cli import study
from gputune.cli.main import main
sys.stdout, study._WATCH_SECONDS = open({os.ttyname(other_end)!r}, "w"), 0.01
sys.exit(main(["status", {str(path)!r}, "--watch"]))
"""
    with Store.create(path, {**META, "max_epochs": 3}) as store:
        store.add_trials(candidates(range(2)))
        watch, screens = Fork(code), b""
        for n in range(3):
            while f"Trials   {n} of 2 trials".encode() not in screens:
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
                self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\n\r\n" + live.encode())
                pages.put(self.path)

        log_message = print

    live = page(gputune.Study.open(make_study(tmp_path / "study.db", trials=2)), reload_seconds=1)
    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/live.html"
        flags = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}")
        with subprocess.Popen(["chromium", *flags, address], stderr=subprocess.DEVNULL) as browser:
            try:
                for _ in range(3):
                    assert pages.get(timeout=60) == "/live.html"
            finally:
                browser.kill()
        server.shutdown()


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
