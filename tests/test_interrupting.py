"""Ctrl-C and SIGTERM, in this process and as real signals to real processes with workers; the timeout."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris

import gputune
from gputune.errors import SearchInterrupted

START = "import sys; from gputune.report.cli import main; sys.exit(main())"
# A network whose steps take as long as one wants, and that says when it has begun.
SLOW = """
import pathlib, time
import torch

class Slow(torch.nn.Linear):
    def __init__(self, n_features, n_outputs, pause=0.05):
        super().__init__(n_features, n_outputs)
        self.pause = pause

    def forward(self, x):
        if pathlib.Path("out/study.db").exists():  # the class is tried before there is one
            pathlib.Path("begun").touch()
            time.sleep(self.pause)
        return super().forward(x)
"""
# So little memory makes every trial a chunk of its own.
MANY = [
    "--space",
    "lr=1e-4..1e-1:log",
    "width=8",
    "--cv",
    "2",
    "--trials",
    "24",
    "--epochs",
    "40",
    "--memory",
    "1KB",
]


def start(*arguments, cwd):
    """The command in a process group of its own, as a shell starts it, with standard output as a pipe."""
    return subprocess.Popen(
        [sys.executable, "-P", "-c", START, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, start_new_session=True,
        env={**os.environ, "COLUMNS": "100"},
    )  # fmt: skip


def wait_for(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline or process.poll() is not None:
            process.kill()
            pytest.fail(f"waited in vain; exit code {process.poll()}, {process.stderr.read()}")
        time.sleep(0.02)


def finished(study_file):
    return study_file.exists() and sum(t.state == "complete" for t in gputune.Study.open(study_file).trials)


def end(process, number, *, group=True):
    """Send a signal to the group, as a terminal does; return exit code, both outputs and how long it took."""
    begin = time.monotonic()
    (os.killpg if group else os.kill)(process.pid, number)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, err, time.monotonic() - begin


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_keeps_all_and_says_the_command_that_goes_on(tmp_path, workers):
    study_file = tmp_path / "out" / "study.db"
    process = start("tune", "sklearn:iris", *MANY, "--workers", workers, "--out", "out", cwd=tmp_path)
    wait_for(lambda: finished(study_file), process)
    code, out, err, _ = end(process, signal.SIGINT)
    trials = gputune.Study.open(study_file).trials
    states = [trial.state for trial in trials]
    done = states.count("complete")
    assert code == 130 and 1 <= done < 25 and set(states) <= {"complete", "stopped", "waiting"}
    assert "Traceback" not in err
    assert f"gputune: interrupted: {done} of 25 trials are finished" in err
    assert "all is kept in 'out/study.db': repeat this to go on." in err
    assert " by accuracy, mean ± standard error over 2 folds:" in out
    assert f"Trials   {done} complete" in out and f"{states.count('waiting')} not started; " in out
    if workers == 1:  # one of the two goes on
        return
    (go_on,) = (
        line.removeprefix("Go on    gputune ") for line in out.splitlines() if line.startswith("Go on")
    )
    again = start(*shlex.split(go_on), cwd=tmp_path)
    out, err = again.communicate(timeout=100)
    assert again.returncode == 0 and "Trials   25 complete; " in out, err
    kept = {t.number: t for t in gputune.Study.open(study_file).trials}
    for before in trials:
        if before.state == "complete":
            assert kept[before.number].fold_scores == before.fold_scores
            assert kept[before.number].seconds == before.seconds  # not trained again


def slow(tmp_path, pause, *more):
    (tmp_path / "net.py").write_text(SLOW)
    process = start(
        "tune", "sklearn:iris", "--model", "net.py:Slow", "--space", f"module__pause={pause}", "lr=1e-3,1e-2",
        "--cv", "2", "--trials", "2", "--no-default", "--epochs", "500", "--workers", "1", "--out", "out", *more,
        cwd=tmp_path,
    )  # fmt: skip
    wait_for((tmp_path / "begun").exists, process)
    return process


def test_the_first_ctrl_c_finishes_the_epoch_and_the_second_does_not(tmp_path):
    process = slow(tmp_path, 0.3)  # 3 steps an epoch
    code, out, err, _ = end(process, signal.SIGINT)
    assert code == 130 and "Trials   2 cut short" in out
    assert "stopping after the running epoch" in err
    study = gputune.Study.open(tmp_path / "out" / "study.db")
    assert np.isfinite(study.curves[:, 0]).all() and np.isnan(study.curves[:, 100:]).all()
    other = tmp_path / "other"
    other.mkdir()
    process = slow(other, 60)
    begin = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    code, out, err, _ = end(process, signal.SIGINT)
    assert code == 130 and time.monotonic() - begin < 10
    assert "interrupted: 0 of 2 trials are finished; all is kept" in err and "Traceback" not in err
    assert "Trials   2 not started" in out


@pytest.mark.parametrize(("pause", "words"), [(0.05, "2 cut short"), (60, "2 not started")])
def test_sigterm_ends_within_five_seconds_with_143(tmp_path, pause, words):
    process = slow(tmp_path, pause)
    code, out, err, seconds = end(process, signal.SIGTERM)
    assert code == 143 and seconds < 5
    assert words in out and "Traceback" not in err


def test_sigterm_with_workers(tmp_path):
    study_file = tmp_path / "out" / "study.db"
    process = start("tune", "sklearn:iris", *MANY, "--workers", 2, "--out", "out", cwd=tmp_path)
    wait_for(lambda: finished(study_file), process)
    code, out, err, seconds = end(process, signal.SIGTERM)
    assert code == 143 and seconds < 5 and "Traceback" not in err
    assert f"Trials   {finished(study_file)} complete" in out


def test_a_folder_that_is_lost_ends_the_search_in_words(tmp_path):
    study_file = tmp_path / "out" / "study.db"
    process = start("tune", "sklearn:iris", *MANY, "--workers", 1, "--out", "out", cwd=tmp_path)
    wait_for(lambda: finished(study_file), process)
    shutil.rmtree(tmp_path / "out")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err
    assert "gputune: error: study 'out/study.db' was removed, moved or replaced while it was at work" in err
    assert not (tmp_path / "out").exists()


class Pressing(torch.nn.Linear):
    """A network during whose training someone presses Ctrl-C."""

    steps = 0

    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)

    def forward(self, x):
        Pressing.steps += 1
        if Pressing.steps == 30:
            signal.raise_signal(signal.SIGINT)
        return super().forward(x)


SEARCH = {"space": {"lr": [1e-3, 1e-2, 1e-1]}, "n_trials": 3, "include_default": False, "cv": 3, "workers": 1}


def interrupted_tune(**more):
    """Call ``tune`` and press Ctrl-C while it trains."""
    Pressing.steps = 0
    return gputune.tune(
        Pressing, *load_iris(return_X_y=True), **{**SEARCH, "max_epochs": 100_000, "verbose": 0, **more}
    )


def test_a_script_gets_a_keyboard_interrupt_that_has_the_study():
    with pytest.raises(KeyboardInterrupt) as caught:
        interrupted_tune()
    assert isinstance(caught.value, SearchInterrupted) and caught.value.signal == signal.SIGINT
    study = caught.value.study
    assert {t.state for t in study.trials} == {"stopped"} and np.isfinite(study.best_score)
    assert study.best_model().predict(load_iris().data).shape == (150,)
    assert "they are in no file: with study=FILE a later call goes on" in str(caught.value)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("method", ["halving", "hypergradient"])
def test_other_methods_hear_it_too(method, tmp_path):
    with pytest.raises(SearchInterrupted, match="all is kept in .*repeat this to go on") as caught:
        interrupted_tune(method=method, study=tmp_path / "s.db", max_epochs=300)
    kept = gputune.Study.open(tmp_path / "s.db")
    assert [t.state for t in kept.trials] == [t.state for t in caught.value.study.trials]
    assert "stopped" in {t.state for t in kept.trials}


def test_at_a_prompt_the_study_so_far_is_returned(monkeypatch, capsys):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    study = interrupted_tune(verbose=1)
    assert "stopped" in {t.state for t in study.trials} and np.isfinite(study.best_score)
    err = capsys.readouterr().err
    assert "stopping after the running epoch" in err and "interrupted: 0 of 3 trials are finished" in err


def test_a_programs_own_handler_stays():
    heard = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        study = interrupted_tune(max_epochs=20)
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGINT] and {t.state for t in study.trials} == {"complete"}


def test_another_thread_sets_no_handler():
    found = []
    thread = threading.Thread(
        target=lambda: found.append(
            gputune.tune("mlp", *load_iris(return_X_y=True), **SEARCH, max_epochs=2, verbose=0)
        )
    )
    thread.start()
    thread.join()
    assert [t.state for t in found[0].trials] == ["complete"] * 3


def test_a_timeout_holds_to_an_epoch_with_workers_too(tmp_path):
    study_file = tmp_path / "out" / "study.db"
    (tmp_path / "net.py").write_text(SLOW)
    process = start(
        "tune", "sklearn:iris", "--model", "net.py:Slow", "--space", "module__pause=0.1", "lr=1e-3..1e-1:log",
        "--cv", "2", "--trials", "20", "--no-default", "--epochs", "1000", "--memory", "1KB", "--workers", "2",
        "--timeout", "8", "--out", "out", cwd=tmp_path,
    )  # fmt: skip
    wait_for((tmp_path / "begun").exists, process)
    begin = time.monotonic()
    while not any(t.state == "stopped" for t in gputune.Study.open(study_file).trials):
        assert process.poll() is None
        time.sleep(0.05)
    kept = time.monotonic() - begin
    out, err = process.communicate(timeout=60)
    stopped = [t for t in gputune.Study.open(study_file).trials if t.state == "stopped"]
    assert process.returncode == 0 and len(stopped) == 2, err  # one of this process, one of its worker
    assert "2 stopped by the timeout, 18 not started before the timeout" in " ".join(out.split())
    assert kept < 8 + 1.5  # an epoch of 3 steps takes 0.3 s
