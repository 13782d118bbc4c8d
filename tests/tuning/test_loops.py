"""search(): a training loop of the user's own, its trials, its study, and how it ends and goes
on."""

import math
import os
import random
import re
import shutil
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import optuna
import pytest
import torch
from scipy.stats import loguniform, randint

import gputune
from forked import Fork
from gputune.executors.worker import SetupError
from gputune.modules.construction import build_module
from gputune.population.population import Shape
from refused import refused

SPACE = {"lr": loguniform(1e-3, 1.0), "layers": [(32, 16), (8,)]}

LOCK = threading.Lock()


def curve(params, epochs=9):
    return [-params["lr"] - 1 / epoch for epoch in range(1, epochs + 1)]


def train(params, report):
    for value in curve(params):
        report(value)
    return value


def search(objective=train, space=SPACE, **more):
    given = {"direction": "maximize", "n_trials": 8, "workers": 1, "verbose": 0, "max_epochs": 9}
    return gputune.search(objective, space, **{**given, **more})


def test_every_trial_is_trained_and_its_curve_kept():
    study = search(include=[{"lr": 0.5, "layers": (64, 64, 64)}])
    assert len(study.trials) == 9 and study.curves.shape == (9, 9, 1)
    assert study.trials[0].params == {"layers": (64, 64, 64), "lr": 0.5}
    for trial, values in zip(study.trials, study.curves[:, :, 0]):
        assert values.tolist() == curve(trial.params)
        assert (trial.score, trial.best_epoch, trial.state) == (values[-1], 9, "complete")
    assert study.best_params == min(study.trials, key=lambda trial: trial.params["lr"]).params
    assert repr(study).startswith("Study(train, 9 trials, best objective -0.1")


def test_lower_is_better_where_the_search_is_told_so():
    study = search(lambda params, report: params["lr"], direction="minimize")
    assert study.best_score == -min(trial.params["lr"] for trial in study.trials)
    assert (study.record.scoring, study.curves.shape) == ("neg_objective", (8, 1, 1))


def test_workers_find_what_this_process_finds():
    """A function of a test, with its captured values, that no other process could import; its
    errors too.
    """
    factor = 2.0

    def objective(params, report):
        report(factor)
        if params["lr"] > 0.05:
            raise ValueError("too large")
        return params["lr"] * factor + torch.rand(()).item() + np.random.rand() + random.random()

    found = [search(objective, **options).trials for options in ({}, {"workers": 2})]
    here, there = ([(t.state, repr(t.score), t.detail) for t in trials] for trials in found)
    assert here == there and 0 < sum(state == "failed" for state, *_ in here) < 8
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    search(objective)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == (before[0], before[2])
    assert torch.equal(torch.get_rng_state(), before[1])


def draw_all():
    return torch.rand(()).item() + np.random.rand() + random.random()


def search_in_another_thread():
    """Its only trial is not done yet when the first thread draws again."""

    def objective(params, report):
        draw_all()
        time.sleep(0.2)
        return draw_all()

    search(objective, n_trials=1, random_state=1)


def build_in_another_thread():
    """A tune makes a module there, which draws from all three generators."""

    def build(n_features, n_outputs):
        draw_all()
        return torch.nn.Linear(n_features, n_outputs)

    build_module(build, {}, Shape(3, 2), seed=1)


@pytest.mark.parametrize("call", [search_in_another_thread, build_in_another_thread])
def test_a_search_draws_the_same_numbers_next_to_another_thread(call):
    """Each trial waits between two draws, which gives the other thread the time to draw."""
    is_between = threading.Event()
    has_ended = threading.Event()

    def objective(params, report):
        first = draw_all()
        is_between.set()
        has_ended.wait(0.15)
        return params["lr"] + first - draw_all()

    def run_call():
        assert is_between.wait(60)
        call()
        has_ended.set()

    thread = threading.Thread(target=run_call)
    thread.start()
    together = search(objective, n_trials=3)
    thread.join()
    alone = search(objective, n_trials=3)
    assert [trial.score for trial in together.trials] == [trial.score for trial in alone.trials]


@pytest.mark.parametrize("method", ["halving", "median"])
def test_a_method_prunes_what_is_worse_than_those_before_it(method):
    lrs = [0.1, 0.5, 0.4, 0.6, 0.7, 0.01]
    study = search(
        space={"lr": [1.0]}, n_trials=0, include=[{"lr": lr} for lr in lrs], method=method
    )
    states = {
        "halving": "complete pruned pruned pruned pruned complete",
        "median": "complete complete complete complete pruned complete",
    }[method]  # the median waits for five trials
    assert [trial.state for trial in study.trials] == states.split()
    assert study.trials[4].score == study.curves[4, 0, 0]
    assert study.best_params == {"lr": 0.01}


def test_a_sampler_of_optunas_proposes_and_receives_scores():
    method = gputune.OptunaSampler(optuna.samplers.TPESampler(seed=0, n_startup_trials=4), batch=4)
    study = search(method=method, n_trials=12, include=[{"lr": 0.1, "layers": (8,)}])
    assert [trial.origin for trial in study.trials] == ["include"] + [
        f"batch {i // 4 + 1}" for i in range(12)
    ]
    assert all(
        1e-3 <= trial.params["lr"] <= 1 and trial.state == "complete" for trial in study.trials
    )


def test_a_failed_trial_keeps_its_error_and_the_search_continues(capsys):
    def objective(params, report):
        report(1.0)
        if params["lr"] > 0.05:
            raise ValueError("too large")
        return math.nan if params["lr"] > 0.01 else 1.0

    study = search(objective, verbose=1)
    failed = [trial for trial in study.trials if trial.params["lr"] > 0.05]
    assert {trial.state for trial in failed} == {"failed"} and 0 < len(failed) < 8
    line = objective.__code__.co_firstlineno + 3
    assert failed[0].detail["error"] == f"ValueError: too large (line {line} of objective)"
    assert (
        f"note: trial {failed[0].number} failed: ValueError: too large" in capsys.readouterr().err
    )
    assert {t.state for t in study.trials if 0.01 < t.params["lr"] <= 0.05} <= {"failed"}
    with pytest.raises(
        gputune.SearchFailedError,
        match="8 of 8 trials raised an error, the first TypeError: the value that the",
    ):
        search(lambda params, report: None)


def mistaken(params, report):
    """Fails with the error of a trainer's callback, except for a great learning rate."""
    if params["lr"] < 1:
        raise SetupError("monitor='acc'", "names no metric", remedy="Log the metric.")
    return params["lr"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_mistake_of_all_trials_ends_the_search_at_the_first(workers, tmp_path, capsys):
    study = tmp_path / "study.db"
    space = {"lr": [0.1, 0.2, 0.3, 0.4]}
    with pytest.raises(gputune.InputError) as error:
        search(mistaken, space, workers=workers, study=study, verbose=1)
    assert type(error.value) is gputune.InputError
    assert str(error.value) == "monitor='acc' names no metric. Log the metric."
    assert "failed" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # the corrected search may use the same file
    assert search(space=SPACE, study=study).best_trial.state == "complete"


def test_a_mistake_after_a_success_fails_its_trial_only(tmp_path):
    study = search(mistaken, {"lr": [0.1, 0.2]}, include=[{"lr": 2.0}], study=tmp_path / "s.db")
    assert {trial.state for trial in study.trials} == {"complete", "failed"}


def test_more_reports_than_max_epochs_are_noted_once(capsys):
    def objective(params, report):
        for epoch in range(3):
            report(epoch * params["lr"])
        return params["lr"]

    for max_epochs in (1, 3, None):
        options = {"direction": "maximize", "max_epochs": max_epochs, "n_trials": 2}
        gputune.search(objective, {"lr": [0.1, 0.2]}, workers=1, **options)
        notes = capsys.readouterr().err.count(
            "called report more often than max_epochs=1. No trial is pruned after report 1. Pass the "
            "number of reports of a full training."
        )
        assert notes == (max_epochs == 1)


def test_a_value_that_is_no_number_ends_the_training():
    seen = []

    def objective(params, report):
        report(1.0)
        seen.append(params)
        report(math.nan)
        raise AssertionError

    with pytest.raises(
        gputune.SearchFailedError,
        match="the objective .* reported NaN .* in 8 of 8 trials. Check",
    ):
        search(objective)
    assert len(seen) == 8


def test_an_objective_that_catches_the_end_of_its_trial_changes_nothing():
    def objective(params, report):
        try:
            train(params, report)
        except BaseException:
            with pytest.raises(BaseException, match="^$"):
                report(100.0)  # ends the trial again
            raise FileNotFoundError("the model of a full training") from None
        return 100.0

    lrs = [0.1, 0.5, 0.05]
    include = [{"lr": lr} for lr in lrs]
    options = {"n_trials": 0, "include": include, "space": {"lr": [1.0]}, "method": "halving"}
    study = search(objective, **options)
    assert [trial.state for trial in study.trials] == ["complete", "pruned", "complete"]
    assert study.trials[1].score == curve(include[1])[0]
    assert study.curves[1, 1:].size and np.isnan(study.curves[1, 1:]).all()
    assert "error" not in study.trials[1].detail


@pytest.mark.long
def test_a_worker_that_is_killed_costs_only_its_trial(tmp_path):
    def objective(params, report):
        with (tmp_path / "calls").open("a") as file:
            file.write("x")
        if params["lr"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return params["lr"]

    with pytest.warns(UserWarning, match="a worker process was lost while it trained 1 trial"):
        study = search(objective, {"lr": [1, 2, 3]}, workers=2, n_trials=3)
    assert {t.params["lr"]: t.state for t in study.trials} == {
        1: "failed",
        2: "complete",
        3: "complete",
    }
    (error,) = [trial.detail["error"] for trial in study.trials if trial.detail]
    assert error.startswith("it has lost 3 worker processes, the last because SIGKILL")
    assert (tmp_path / "calls").read_text() == "x" * 5


SCRIPT = """
import sys, time, gputune
def objective(params, report):
    print(params["n"], flush=True)
    if len(sys.argv) < 3 and params["n"] > 3:
        time.sleep(100)
    return params["n"]
study = gputune.search(objective, {"n": list(range(8))}, direction="maximize", n_trials=8, study=sys.argv[1],
                       workers=WORKERS, verbose=0)
print(study.best_params)
"""


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.long)])
def test_a_killed_search_continues_where_it_was(tmp_path, workers):
    path = tmp_path / "study.db"
    command = [SCRIPT.replace("WORKERS", workers), path]

    def finished():
        trials = gputune.Study.open(path).trials if path.exists() else ()
        return {trial.params["n"] for trial in trials if trial.state == "complete"}

    killed = Fork(*command, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not finished() and time.monotonic() < deadline:
        time.sleep(0.1)
    killed.kill()
    killed.communicate()
    before = finished()
    done = Fork(*command, "on", cwd=tmp_path)
    out, err = done.communicate()
    assert done.returncode == 0, err
    *trained, best = out.splitlines()
    assert before and sorted(map(int, trained)) == sorted(set(range(8)) - before)
    assert best == "{'n': 7}"


def test_an_objective_whose_code_has_changed_is_another_search(tmp_path):
    def objective(params, report):
        return params["lr"]

    first = objective
    how = {"direction": "maximize", "study": tmp_path / "study.db", "workers": 1, "verbose": 0}
    gputune.search(first, {"lr": [0.1, 0.2]}, n_trials=1, **how)

    def objective(params, report):
        return 100 - params["lr"]

    with refused(r"in: objective \(its code has changed\)"):
        gputune.search(objective, {"lr": [0.1, 0.2]}, n_trials=2, **how)
    with refused(r"in: direction \('maximize' in the study, 'minimize' now\)"):
        gputune.search(first, {"lr": [0.1, 0.2]}, **{**how, "direction": "minimize"})
    assert len(gputune.search(first, {"lr": [0.1, 0.2]}, n_trials=2, **how).trials) == 2


def test_it_stops_at_a_report_when_time_is_over_and_continues_later(tmp_path):
    calls = []
    steps = 50

    def objective(params, report):
        calls.append(report.number)
        for _ in range(steps):
            time.sleep(0.02)
            report(params["lr"])
        return params["lr"]

    path = tmp_path / "study.db"
    study = search(objective, n_trials=2, timeout=0.2, study=path)
    assert [trial.state for trial in study.trials] == ["stopped", "waiting"]
    assert 1 < study.trials[0].best_epoch < 50

    steps = 0
    for _ in range(2):  # nothing is trained by the second
        assert [trial.state for trial in search(objective, n_trials=2, study=path).trials] == [
            "complete"
        ] * 2
    assert calls == [0, 0, 1]
    with pytest.raises(gputune.InputError, match="differs from this call in: objective. Pass"):
        search(train, n_trials=2, study=path)


def test_ctrl_c_keeps_what_is_finished():
    def objective(params, report):
        os.kill(os.getpid(), signal.SIGINT)
        report(1.0)

    with pytest.raises(gputune.SearchInterrupted) as stopped:
        search(objective, n_trials=2)
    assert [trial.state for trial in stopped.value.study.trials] == ["stopped", "waiting"]


def test_the_study_is_shown_and_what_it_has_not_is_refused(tmp_path):
    study = search(method="halving", study=tmp_path / "study.db")
    study.report(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert (
        "best objective" in page
        and "fold" not in page.split("<body")[1].split("<script")[0].lower()
    )
    assert "score = train({" in page
    assert len(study.to_pandas()) == 8 and len(study.to_optuna().trials) == 8
    with refused("best_model.* study.best_params"):
        gputune.Study.open(tmp_path / "study.db").best_model()
    with refused("ensemble.* Keep the predictions of your objective"):
        study.ensemble()


class Impatient(gputune.callbacks.Callback):
    def on_trials_end(self, trials):
        if trials.trials[0].number == 3:
            raise gputune.callbacks.StopSearch


@pytest.mark.parametrize(
    "given, trained",
    [
        ({"target_score": 0.2}, 5),
        ({"target_score": 0.0}, 8),
        ({"patience_trials": 2}, 4),
        ({"callbacks": [Impatient()]}, 4),
    ],
)
def test_a_search_ends_when_it_is_good_enough(tmp_path, given, trained, capsys):
    lrs = [{"lr": lr} for lr in (0.6, 0.4, 0.5, 0.45, 0.2, 0.1, 0.15, 0.3)]
    call = {
        "direction": "minimize",
        "n_trials": 0,
        "include": lrs,
        "study": tmp_path / "s.db",
        "verbose": 1,
    }

    def objective(params, report):
        return params["lr"]

    for _ in range(1 if "callbacks" in given else 2):  # the same call again trains no more
        study = search(objective, {"lr": [1.0]}, **call, **given)
        assert [trial.state for trial in study.trials].count("complete") == trained
    words = {
        "target_score": "trial 4 has reached the target score",
        "patience_trials": "2 trials in a row were no",
    }
    shown = capsys.readouterr().err
    assert all(
        (f"note: the search ends: {words[name]}" in shown) == (trained < 8)
        for name in words.keys() & given
    )


def test_the_best_of_earlier_studies_are_tried_first(tmp_path):
    old = search(n_trials=12, study=tmp_path / "old.db")
    best = [trial.params for trial in old.ranking()[:5]]
    shutil.copy(tmp_path / "old.db", tmp_path / "study.db")
    for warm in (old, tmp_path / "old.db", [str(tmp_path / "old.db")], tmp_path):
        new = search(warm_start=warm, random_state=1)
        assert [(trial.params, trial.origin) for trial in new.trials[:5]] == [
            (params, "include") for params in best
        ]
        assert len(new.trials) == 13
    with refused(
        r"warm_start: study '.*old.db' was searched in another space, .* the keys layers, width. Leave "
        "warm_start out, or search that space"
    ):
        search(space={"lr": SPACE["lr"], "width": [1]}, warm_start=tmp_path / "old.db")
    with refused("warm_start: a study in memory was searched in another space, .* values, such as"):
        search(space={**SPACE, "lr": [5.0]}, warm_start=search())
    with refused(
        "warm_start must have only studies with direction='minimize', got a study with "
        "direction='maximize'. Its best"
    ):
        search(warm_start=old, direction="minimize")
    with refused("warm_start must be a study, the path of a study, or a list of studies, got 3"):
        search(warm_start=3)


def test_a_search_draws_what_no_earlier_study_has_trained(tmp_path):
    old = search(n_trials=8, study=tmp_path / "old.db")
    new = search(n_trials=8, warm_start=old, study=tmp_path / "new.db")
    more = search(n_trials=10, warm_start=[old], study=tmp_path / "new.db").trials
    drawn = [trial.params for trial in more if trial.origin == "random"]
    assert len(new.trials) == 13 and list(new.trials) == list(more[:13]) and len(drawn) == 10
    assert drawn == [trial.params for trial in search(n_trials=18).trials][8:]
    few = {"space": {"k": randint(0, 8)}, "objective": lambda params, report: params["k"]}
    old = search(n_trials=5, **few)
    new = search(n_trials=2, warm_start=old, **few)
    assert len(old.trials) == 5 and len({trial.params["k"] for trial in new.trials}) == 7


def test_a_sampler_receives_earlier_scores(capsys):
    heard = []

    class Listening(optuna.samplers.RandomSampler):
        def sample_relative(self, study, trial, space):
            heard.append(
                [t.value for t in study.get_trials(states=[optuna.trial.TrialState.COMPLETE])]
            )
            return super().sample_relative(study, trial, space)

    old = search()
    method = gputune.OptunaSampler(Listening(seed=0), batch=1)
    search(method=method, n_trials=1, warm_start=old)
    assert heard[-1] == [t.score for t in (*old.trials, *old.ranking()[:5])]
    vars(old)["record"] = replace(old.record, scoring="accuracy")
    search(method=method, n_trials=1, warm_start=old, verbose=1)
    assert (
        "does not use a study that was ranked by accuracy, because this search is ranked by objective"
        in capsys.readouterr().err
    )
    assert len(heard[-1]) == 5


@pytest.mark.parametrize(
    "given, words",
    [
        ({"objective": 3}, ["objective", "(params, report)", "3"]),
        (
            {"objective": lambda params: 1.0},
            ["objective", "two arguments", "too many positional arguments", "Write def objective("],
        ),
        ({"direction": "up"}, ["direction", "'minimize'", "'up'"]),
        ({"space": {}}, ["space", "at least one key", "{}"]),
        ({"space": {"x": []}}, ["space['x']", "at least one value", "leave the key out"]),
        ({"space": {3: [1]}}, ["space", "strings as keys", "3"]),
        ({"include": [{"lr": 1.0}]}, ["include[0]", "lr, layers", "{'lr': 1.0}"]),
        ({"include": {"lr": 1.0}}, ["include", "list of dicts"]),
        ({"n_trials": 0}, ["n_trials must be at least 1", "got 0", "n_trials=64"]),
        ({"n_trials": -1}, ["n_trials", "at least 0", "-1"]),
        ({"method": "hypergradient"}, ["method", "gputune.tune", "'halving'"]),
        ({"method": "halving", "max_epochs": None}, ["max_epochs", "method='halving'", "None"]),
        ({"method": gputune.Halving(min_epochs=9)}, ["min_epochs", "max_epochs=9"]),
        ({"workers": "ray"}, ["workers", "'ray'", "a number of processes"]),
        (
            {"workers": 2, "objective": lambda params, report, lock=LOCK: 1.0},
            ["objective", "workers=1"],
        ),
    ],
)
def test_bad_input_is_refused(given, words):
    with refused(".*".join(map(re.escape, words))):
        search(**given)
