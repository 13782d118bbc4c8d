"""Ctrl-C, SIGTERM and SIGUSR1, in this process and as real signals to real processes with workers; the
timeout."""

import json
import os
import shlex
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris

import gputune
from command_line import run
from forked import Fork
from gputune.engine import job, stop
from gputune.ground.errors import SearchInterrupted
from gputune.tuning import interrupt
from moments import at_call, at_finish

START = "import sys; from gputune.cli.main import main; sys.exit(main())"
# Training begins, after the network was tried.
TRAINS = """
import pathlib
from gputune.engine import job
from moments import at_call
at_call(job, "train", 1, pathlib.Path("trains").touch, before=True)
"""
# A network that does something in its second step, which is in the middle of the first epoch.
NET = """
import os, pathlib, signal
import torch

class Net(torch.nn.Linear):
    steps = 0

    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)

    def forward(self, x):
        Net.steps += pathlib.Path("trains").exists()
        if Net.steps == 2:
            {do}
        return super().forward(x)
"""
# So little memory makes every trial a chunk of its own.
MANY = "--space lr=1e-4..1e-1:log width=8 --cv 2 --trials 12 --epochs 40 --memory 1KB".split()
# To the group, as a terminal does it.
CTRL_C = "os.killpg(0, signal.SIGINT)"
TERMINATE = "os.killpg(0, signal.SIGTERM)"


def finish(*arguments, cwd, first=""):
    """Run the command in a process group of its own, as a shell does; return its exit code and
    outputs."""
    process = Fork(first + START, *arguments, cwd=cwd, COLUMNS="100")
    out, err = process.communicate()
    return process.returncode, out, err


def finish_many(tmp_path, do, workers):
    """Search many chunks, and do something after the second has finished."""
    command = ["tune", "sklearn:iris", *MANY, "--workers", workers, "--out", "out"]
    code, out, err = finish(*command, cwd=tmp_path, first=at_finish(2, do))
    assert "Traceback" not in err
    return code, out, err


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.long), 2])
def test_ctrl_c_keeps_all_and_says_the_command_that_continues(tmp_path, monkeypatch, workers):
    study_file = tmp_path / "out" / "study.db"
    code, out, err = finish_many(tmp_path, CTRL_C, workers)
    trials = gputune.Study.open(study_file).trials
    states = [trial.state for trial in trials]
    done = states.count("complete")
    assert code == 130 and 2 <= done < 12 and set(states) <= {"complete", "stopped", "waiting"}
    assert f"gputune: interrupted: {done} of 12 trials are finished" in err
    assert (
        f"The results are kept in '{tmp_path}/out/study.db': repeat the command to resume." in err
    )
    assert " by accuracy, mean ± standard error over 2 folds:" in out
    assert f"Trials   {done} complete" in out and f"{states.count('waiting')} waiting; " in out
    if workers == 1:  # one of the two goes on
        return
    (command,) = (
        line.removeprefix("Resume   gputune ")
        for line in out.splitlines()
        if line.startswith("Resume")
    )
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*shlex.split(command))
    assert code == 0 and "Trials   12 complete; " in out, err
    kept = {t.number: t for t in gputune.Study.open(study_file).trials}
    for before in trials:
        if before.state == "complete":
            assert kept[before.number].fold_scores == before.fold_scores
            assert kept[before.number].seconds == before.seconds  # not trained again


def finish_net(tmp_path, do, *options, first=""):
    (tmp_path / "net.py").write_text(NET.format(do=do))
    return finish(
        "tune",
        "sklearn:iris",
        "--model",
        "net.py:Net",
        "--space",
        "lr=1e-3,1e-2",
        "--cv",
        "2",
        "--trials",
        "2",
        "--no-default",
        "--epochs",
        "20",
        "--workers",
        "1",
        "--out",
        "out",
        *options,
        cwd=tmp_path,
        first=TRAINS + first,
    )


def test_the_first_ctrl_c_finishes_the_epoch_and_leaves_the_model_of_the_best_so_far(tmp_path):
    code, out, err = finish_net(tmp_path, CTRL_C)
    assert code == 130 and "Trials   2 cut short" in out
    assert (
        "stopping after the running epoch" in err
        and "training the best trial so far on all rows" in err
    )
    study = gputune.Study.open(tmp_path / "out/study.db")
    model = gputune.load_model(tmp_path / "out/model", trust_code=True)
    assert np.isfinite(study.curves[:, 0]).all() and np.isnan(study.curves[:, 1:]).all()
    assert (model.info["params"], model.info["epochs"]) == (study.best_params, 1)
    assert f"\n  held-out         {model.info['held_out_score']:.4f}  the saved model" in out
    assert "\nModel    out/model\nNext     gputune predict out/model FILE --module" in out
    assert "\nResume   gputune tune" in out


def test_the_second_ctrl_c_does_not(tmp_path):
    do = f"{CTRL_C}; pathlib.Path('once').touch(); {CTRL_C}; pathlib.Path('twice').touch()"
    code, out, err = finish_net(tmp_path, do)
    assert (tmp_path / "once").exists() and not (tmp_path / "twice").exists()
    assert code == 130
    assert (
        "interrupted: 0 of 2 trials are finished. The results are kept" in err
        and "Traceback" not in err
    )
    assert "120 rows to search on and 30 held out" in out
    assert "Trials   2 waiting" in out and not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize(
    ("grace", "do", "words"),
    [(600, TERMINATE, "2 cut short"), (0.01, f"{TERMINATE}; signal.pause()", "2 waiting")],
    ids=["an epoch ends", "an epoch that never ends"],
)
def test_sigterm_ends_within_its_grace_with_143(tmp_path, grace, do, words):
    first = f"from gputune.tuning import interrupt; interrupt.GRACE_SECONDS = {grace}; "
    code, out, err = finish_net(tmp_path, do, first=first)
    assert code == 143 and interrupt.GRACE_SECONDS < 5
    assert words in out and "Traceback" not in err


def test_an_interrupted_command_prints_its_document(tmp_path):
    code, out, _ = finish_net(tmp_path, CTRL_C, "--json")
    answer = json.loads(out)
    assert (code, answer["exit_code"], answer["status"]) == (130, 130, "interrupted")
    assert answer["trials"] == {"stopped": 2} and answer["model"] == "out/model"


WARN = "os.killpg(0, signal.SIGUSR1)"


def test_sigusr1_leaves_the_model_of_the_best_so_far_and_ends_with_138(tmp_path):
    code, out, err = finish_net(tmp_path, WARN)
    assert code == 138 and "Trials   2 cut short" in out and "Model    out/model" in out
    assert "stopping after the running epoch" in err and "Traceback" not in err
    model = gputune.load_model(tmp_path / "out/model", trust_code=True)
    assert model.info["epochs"] == 1


# At the final training on all rows, after the search.
AT_REFIT = """
import os, signal
from gputune.api.study import Study
from moments import at_call
at_call(Study, "best_model", 1, lambda: os.killpg(0, signal.SIGUSR1), before=True)
"""


def test_sigusr1_after_the_search_does_not_cost_the_model(tmp_path):
    command = ["tune", "sklearn:iris", "--trials", "2", "--epochs", "2", "--workers", "1"]
    code, out, err = finish(*command, "--out", "out", cwd=tmp_path, first=AT_REFIT)
    assert code == 0 and "Model    out/model" in out
    assert "note: SIGUSR1 came after the search. gputune still saves the model" in err
    assert gputune.load_model(tmp_path / "out/model").info["epochs"] >= 1


def test_sigusr1_to_all_processes_does_not_end_the_workers(tmp_path):
    code, out, err = finish_many(tmp_path, WARN, 2)
    trials = gputune.Study.open(tmp_path / "out" / "study.db").trials
    done = sum(trial.state == "complete" for trial in trials)
    assert code == 138 and 2 <= done < 12 and f"Trials   {done} complete" in out
    assert "lost" not in err


SCRIPT = """
import os, signal
import gputune

{handler}

def objective(params, report):
    for step in range(100):
        if step == 2:
            os.kill(os.getpid(), signal.{name})
        report(float(step))
    return 0.0

try:
    gputune.search(
        objective, {{"a": [1, 2, 3]}}, direction="maximize", workers=1, study="study.db", n_trials=3
    )
except {caught} as stopped:
    print(type(stopped).__name__, stopped.signal, len(stopped.study.trials))
finally:
    print(signal.getsignal(signal.SIGTERM) == before, signal.getsignal(signal.SIGUSR1) == usr1)
"""
HANDLERS = (
    "before = signal.getsignal(signal.SIGTERM); usr1 = signal.getsignal(signal.SIGUSR1)",
    "before = lambda *_: print('mine')\nsignal.signal(signal.SIGTERM, before)\n"
    "usr1 = signal.getsignal(signal.SIGUSR1)",
)


@pytest.mark.parametrize(("name", "expected"), [("SIGTERM", 143), ("SIGUSR1", 138)])
def test_a_script_ends_with_the_exit_code_of_the_signal(tmp_path, name, expected):
    script = SCRIPT.format(name=name, handler=HANDLERS[0], caught="ZeroDivisionError")
    process = Fork(script, cwd=tmp_path)
    out, err = process.communicate()
    assert process.returncode == expected
    assert out == "True True\n"  # the former handlers are set again
    assert "interrupted: 0 of 3 trials are finished, 1 cut short. The results are kept in" in err
    assert "repeat the call to resume" in err and "Traceback" not in err
    states = [trial.state for trial in gputune.Study.open(tmp_path / "study.db").trials]
    assert states == ["stopped", "waiting", "waiting"]


def test_a_script_may_continue_with_the_results(tmp_path):
    script = SCRIPT.format(name="SIGTERM", handler=HANDLERS[0], caught="gputune.SearchInterrupted")
    process = Fork(script, cwd=tmp_path)
    out, _ = process.communicate()
    assert (process.returncode, out) == (0, "SearchTerminated 15 3\nTrue True\n")


def test_a_handler_of_the_script_stays(tmp_path):
    script = SCRIPT.format(name="SIGTERM", handler=HANDLERS[1], caught="ZeroDivisionError")
    process = Fork(script, cwd=tmp_path)
    out, err = process.communicate()
    assert (process.returncode, out) == (0, "mine\n" * 3 + "True True\n"), err


@pytest.fixture
def default_sigterm():
    # Ray, in a test before, may have set a handler.
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_thread_sets_no_handler(monkeypatch, default_sigterm):
    def objective(params, report):
        return float(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)

    def search():
        return gputune.search(
            objective, {"a": 1}, direction="maximize", n_trials=1, workers=1, verbose=0
        )

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(search).result().best_score == 1.0
    assert search().best_score == 0.0  # in the main thread
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    assert search().best_score == 1.0  # a notebook ends by SIGTERM as usual


def test_sigterm_with_workers(tmp_path):
    code, out, _ = finish_many(tmp_path, TERMINATE, 2)
    trials = gputune.Study.open(tmp_path / "out" / "study.db").trials
    assert code == 143 and f"Trials   {sum(t.state == 'complete' for t in trials)} complete" in out


def test_a_folder_that_is_lost_ends_the_search_in_words(tmp_path):
    code, _, err = finish_many(tmp_path, "shutil.rmtree('out')", 1)
    words = f"study '{tmp_path}/out/study.db' was removed, moved or replaced during its search"
    assert code == 1 and f"gputune: error: {words}" in err
    assert not (tmp_path / "out").exists()


class Pressing(torch.nn.Linear):
    """A network that presses Ctrl-C during its training."""

    steps = 0

    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)

    def forward(self, x):
        Pressing.steps += 1
        if Pressing.steps == 30:
            signal.raise_signal(signal.SIGINT)
        return super().forward(x)


SEARCH = {
    "space": {"lr": [1e-3, 1e-2, 1e-1]},
    "n_trials": 3,
    "include_default": False,
    "cv": 3,
    "workers": 1,
}
IRIS = load_iris(return_X_y=True)


def interrupted_tune(**more):
    """Call ``tune`` and press Ctrl-C while it trains."""
    Pressing.steps = 0
    return gputune.tune(Pressing, *IRIS, **{**SEARCH, "max_epochs": 100_000, "verbose": 0, **more})


def test_a_script_gets_a_keyboard_interrupt_that_has_the_study():
    with pytest.raises(KeyboardInterrupt) as caught:
        interrupted_tune()
    assert isinstance(caught.value, SearchInterrupted) and caught.value.signal == signal.SIGINT
    study = caught.value.study
    assert {t.state for t in study.trials} == {"stopped"} and np.isfinite(study.best_score)
    assert study.best_model().predict(IRIS[0]).shape == (150,)
    assert "No file holds the results. Pass study=FILE to resume a later search." in str(
        caught.value
    )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("method", ["halving", "hypergradient"])
def test_other_methods_hear_it_too(method, tmp_path):
    with pytest.raises(
        SearchInterrupted, match="The results are kept in .*repeat the call to resume"
    ) as caught:
        interrupted_tune(method=method, study=tmp_path / "s.db", max_epochs=300)
    kept = gputune.Study.open(tmp_path / "s.db")
    assert [t.state for t in kept.trials] == [t.state for t in caught.value.study.trials]
    assert "stopped" in {t.state for t in kept.trials}


def test_at_a_prompt_the_study_so_far_is_returned(monkeypatch, capsys):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    study = interrupted_tune(verbose=1)
    assert "stopped" in {t.state for t in study.trials} and np.isfinite(study.best_score)
    err = capsys.readouterr().err
    assert (
        "stopping after the running epoch" in err
        and "interrupted: 0 of 3 trials are finished" in err
    )


def test_a_programs_own_handler_stays():
    heard = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        study = interrupted_tune(max_epochs=20)
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGINT] and {t.state for t in study.trials} == {"complete"}


def test_another_thread_sets_no_handler():
    with ThreadPoolExecutor(1) as thread:
        study = thread.submit(
            gputune.tune, "mlp", *IRIS, **SEARCH, max_epochs=2, verbose=0
        ).result()
    assert [t.state for t in study.trials] == ["complete"] * 3


# A process and its worker wait in their first epoch until both have begun; then their time is over.
LATE = """
import math, os, pathlib, time, types
import torch

class Net(torch.nn.Linear):
    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)

    def forward(self, x):
        from gputune.engine import stop
        here = pathlib.Path({here!r})
        if os.getpid() != {here_pid} or (here / "trains").exists():
            (here / f"begun-{{os.getpid()}}").touch()
            while len(list(here.glob("begun-*"))) < 2:
                time.sleep(0.01)
            stop.time = types.SimpleNamespace(monotonic=lambda: math.inf)
        return super().forward(x)
"""


def test_a_timeout_holds_to_an_epoch_with_workers_too(tmp_path, monkeypatch):
    monkeypatch.setattr(stop, "time", stop.time)  # what the network does to it is undone
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(LATE.format(here=str(tmp_path), here_pid=os.getpid()))
    at_call(job, "train", 1, (tmp_path / "trains").touch, before=True, patch=monkeypatch.setattr)
    code, out, _ = run(
        "tune",
        "sklearn:iris",
        "--model",
        "net.py:Net",
        "--space",
        "lr=1e-3..1e-1:log",
        "--cv",
        "2",
        "--trials",
        "20",
        "--no-default",
        "--epochs",
        "1000",
        "--memory",
        "1KB",
        "--workers",
        "2",
        "--timeout",
        "600",
        "--out",
        "out",
        "--backend",
        "stacked",
    )
    assert code == 0 and "2 cut short, 18 waiting" in " ".join(out.split())
    curves = gputune.Study.open("out/study.db").curves
    assert np.isfinite(curves[:, 0]).all(1).sum() == 2 and np.isnan(curves[:, 1:]).all()
