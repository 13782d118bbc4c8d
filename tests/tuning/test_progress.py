"""The progress display and the time profile of a search: clocks that never count twice, torch's own
count.
"""

import re
import sys
import time
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from optuna.samplers import RandomSampler
from torch.utils.flop_counter import FlopCounterMode

import gputune
import reference
from command_line import run
from gputune.engine import compiled, members
from gputune.engine.job import run_in_parts
from gputune.engine.train import Spent, operations
from gputune.executors.executor import Executor, WorkerProgress
from gputune.ground.within_epoch import Running, report_steps, report_waiting, workers_read_by
from gputune.methods import training
from gputune.modules import calls
from gputune.tuning import progress, trainer
from gputune.tuning.progress import Profile, Progress, product_speed, reading_bar
from problems import fill, make_data, rows_of


class FakePlan:
    workers = 2

    def __init__(self, trials=4):
        self.trials = trials

    def __str__(self):
        return f"{self.trials} trials"


def test_plain_lines_where_there_is_no_terminal(monkeypatch, capsys):
    shown = Progress(1)
    with shown.bar_over(100, 1):
        for _ in range(100):
            shown.advance(1, np.ones((1, 1, 1)))
    assert capsys.readouterr().err == ""  # the lines are far apart
    monkeypatch.setattr(progress, "_LINE_SECONDS", -1)
    shown = Progress(1)
    shown.scoring = "accuracy"
    with shown.bar_over(4, 2):
        shown.advance(4, np.full((4, 1, 3), 0.5))
        shown.finished(4)
    lines = capsys.readouterr().err.split("\n")
    assert lines[0] == "trials 0/4, best -, 0/8 trial-epochs"
    assert re.fullmatch(r"trials 0/4, best accuracy 0\.5000, 4/8 trial-epochs, 0 s left", lines[1])
    assert lines[2].startswith("trials 4/4, best accuracy 0.5000, 4/8 trial-epochs")
    assert not any("|" in line for line in lines)


def test_a_long_epoch_shows_its_finished_share(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_LINE_SECONDS", -1)
    shown = Progress(1)
    with shown.bar_over(8, 1):
        report_steps(1, 4, 8)  # steps that are timed for the plan
        shown.plan(FakePlan(), show=False)
        report_steps(1, 4, 8)  # the epoch has just begun
        monkeypatch.setattr(progress, "_LONG_EPOCH", -1)
        monkeypatch.setattr(progress, "_SHARE_SECONDS", -1)
        shown.advance(4, np.full((4, 1, 1), 0.5))
        report_steps(1, 4, 4)
        assert shown.seconds_left is not None
        report_steps(4, 4, 4)  # the scores follow at once
        shown.advance(4, np.full((4, 1, 1), 0.5))
    report_steps(1, 2, 4)  # nobody listens
    lines = capsys.readouterr().err.split("\n")
    shares = [line for line in lines if "running epoch" in line]
    assert shares == [
        "trials 0/8, best score 0.5000, 25% of the running epoch, 4/8 trials, 0 s left"
    ]


def test_the_bar_counts_epochs_that_workers_have_not_returned(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_LINE_SECONDS", -1)
    monkeypatch.setattr(progress, "_LONG_EPOCH", -1)
    monkeypatch.setattr(progress, "_SHARE_SECONDS", -1)
    running = [Running()]
    shown = Progress(1)
    looks = []
    shown.on_look = looks.append
    with shown.bar_over(8, 2), workers_read_by(lambda: running[0]):
        shown.plan(FakePlan(), show=False)
        report_waiting()
        running[:] = [Running(epochs=4, part=1, trials=4)]
        report_waiting()  # this process trains nothing
        shown.next_look = 0.0
        report_steps(1, 2, 2)
        assert shown.seconds_left is not None
        running[:] = [Running()]
        shown.advance(8, np.full((4, 2, 1), 0.5))
    report_waiting()  # nobody listens
    assert [look["done"] for look in looks] == [0, 4]
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" trial-epochs")[0] for line in lines] == [
        "trials 0/8, best -, 0/16",
        "trials 0/8, best -, 0/16",
        "trials 0/8, best -, 25% of the running epochs, 4/16",
        "trials 0/8, best -, 33% of the running epochs, 4/16",
        "trials 0/8, best score 0.5000, 8/16",
    ]


def test_the_file_of_a_worker_has_the_progress_of_its_chunk(tmp_path):
    parent = WorkerProgress.create(tmp_path / "progress", 5)
    worker = WorkerProgress.open(tmp_path / "progress")
    for index in [(1, 4), (2, 3)]:
        with worker.written(index) as after_epoch:
            after_epoch(2, np.zeros((2, 1, 1)))
            report_steps(1, 4, 2)
    assert parent.running() == Running(epochs=4, part=1, trials=4)
    parent.count((2, 3))
    assert parent.running() == Running(epochs=2, part=0.5, trials=2)
    with worker.written((1, 4)):  # another worker trains the chunk of a lost worker
        assert parent.running() == Running()


@pytest.mark.parametrize("backend", ["compiled", "eager", "loop"])
def test_training_reports_its_steps_within_an_epoch(backend, monkeypatch, iris):
    monkeypatch.setattr(calls, "_DRAW_BYTES", 1)  # random numbers of one step at a time
    shares = []
    monkeypatch.setattr(Progress, "within_epoch", lambda self, *told: shares.append(told))
    options = {"backend": backend, "max_epochs": 1, "cv": 2, "verbose": 0, "workers": 1}
    space = {"batch_size": [25], "module__width": [4], "dropout": [0.1]}
    gputune.tune("realmlp", *iris, space=space, n_trials=1, **options)
    # 75 training rows in each fold: three steps, of which the last ends the epoch. One by one, the
    # second fold trains after the first.
    steps = 6 if backend == "loop" else 3
    expected = [(step / steps, 1) for step in range(1, steps)]
    assert shares == expected


@pytest.mark.parametrize(
    ("model", "space"),
    [
        ("mlp", {"batch_size": [1], "width": [1024]}),
        ("realmlp", {"batch_size": [1], "module__width": [256], "dropout": [0.0]}),
    ],
)
def test_compiled_code_reports_its_steps_while_members_train(model, space, monkeypatch, iris):
    monkeypatch.setattr(compiled, "REPORT_SECONDS", 1e-3)
    monkeypatch.setattr(members, "REPORT_SECONDS", 1e-3)
    monkeypatch.setattr(members, "_COUNTED_STEPS", 4)
    shares = []
    monkeypatch.setattr(Progress, "within_epoch", lambda self, *told: shares.append(told))
    options = {"backend": "compiled", "max_epochs": 1, "cv": 2, "verbose": 0, "workers": 1}
    gputune.tune(model, *iris, space=space, n_trials=1, **options)
    finished = [share for share, trials in shares]
    assert len(set(finished)) > 3
    assert finished == sorted(finished)
    assert 0 <= finished[0] < 0.5 < finished[-1] < 1


class Here(Executor):
    """An executor whose worker is this process."""

    capacity = 1

    def __init__(self, job, data):
        self.train = partial(run_in_parts, job, data)

    def submit(self, chunk, ended):
        ended(chunk, self.train(chunk))
        return True


def test_the_first_epoch_of_trials_in_workers_counts_once(monkeypatch, iris):
    monkeypatch.setattr(training, "_ENOUGH_SHARE", 0)
    monkeypatch.setattr(
        trainer, "chunk_processes", lambda job, data, *_: nullcontext(Here(job, data))
    )
    counts = []
    skip = Progress.finished
    monkeypatch.setattr(
        Progress,
        "finished",
        lambda self, *told, **more: (counts.append(self.epochs_done), skip(self, *told, **more)),
    )
    options = {"n_trials": 4, "cv": 2, "max_epochs": 3, "memory": "1KB", "workers": 2, "verbose": 0}
    space = {"lr": [1e-4, 1e-3, 1e-2, 1e-1]}
    gputune.tune("mlp", *iris, space=space, timeout=1000, **options)
    assert counts == [6, 8, 10, 12]  # four first epochs, then two epochs of each trial


def test_the_best_score_skips_diverged_trials_and_has_the_sign_of_its_name(capsys):
    shown = Progress(0)
    shown.scoring = "neg_log_loss"
    shown.say("nothing")
    with shown.bar_over(2, 1):
        shown.advance(2, np.array([[[np.nan, -1.0]], [[-0.2, -0.4]]]))
        assert abs(shown.best + 0.3) < 1e-12
        assert shown.status == "trials 0/2, best log_loss 0.3000"
        shown.finished(1)
    assert capsys.readouterr() == ("", "")


def test_other_processes_hear_of_the_running_trials_now_and_then():
    shown = Progress(0)
    heard = []
    shown.on_look = heard.append
    with shown.bar_over(4, 1):
        shown.advance(2, np.full((2, 1, 2), 0.5))  # too early
        shown.next_look = 0.0
        shown.advance(1, np.full((1, 1, 2), 0.75))
    first, second = heard
    left = second.pop("left")
    assert first == {"done": 0, "of": 4, "unit": "trials", "best": None, "left": None}
    assert second == {"done": 3, "of": 4, "unit": "trials", "best": 0.75} and left >= 0


def test_batches_share_a_bar_and_the_plan_of_the_first_is_said_once(capsys):
    shown = Progress(1)
    with shown.bar_over(1, 2):
        shown.advance(2, np.ones((1, 2, 2)))
        shown.finished(1)
    with shown.bar_over(5, 2):
        whole = shown.bar
        assert shown.status.startswith("trials 1/6") and (shown.epochs_done, shown.epochs) == (
            2,
            12,
        )
        for batch in (3, 2):
            with shown.bar_over(batch, 2):
                assert shown.bar is whole and shown.trials == 6
                shown.plan(FakePlan(9), show=False)
                shown.plan(FakePlan(batch))
                shown.advance(2 * batch, np.ones((batch, 2, 2)))
                shown.finished(batch)
    assert shown.status.startswith("trials 6/6") and shown.seconds_left == 0
    assert capsys.readouterr().err == "plan: 3 trials\n"


def test_what_leaves_early_shortens_the_time_that_is_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    shown = Progress(0)
    with shown.bar_over(10, 8):
        assert shown.seconds_left is None
        now[0] += 5.0
        shown.advance(10, np.ones((10, 1, 2)))
        assert shown.seconds_left == pytest.approx(35.0)  # 70 trial-epochs at half a second
        shown.finished(6, pruned=6)
        shown.skip(6 * 7)
        assert shown.seconds_left == pytest.approx(14.0)
        assert "6 pruned" in shown.status
        shown.skip(8, trials=1)
        assert shown.status.startswith("trials 6/9")


def test_a_resumed_search_counts_what_is_trained_already(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    shown = Progress(0)
    with shown.bar_over(10, 8, trained=40):
        assert (shown.epochs_done, shown.epochs, shown.seconds_left) == (40, 80, None)
        now[0] += 5.0
        shown.advance(10, np.ones((10, 1, 2)))
        assert shown.seconds_left == pytest.approx(15.0)  # 30 trial-epochs at half a second
    with shown.bar_over(2, 8, trained=4):
        assert (shown.epochs_done, shown.epochs) == (54, 66)


class StopAfter(gputune.callbacks.Callback):
    """Ends the search after some epochs of its trials."""

    def __init__(self, epochs):
        self.left = epochs

    def on_epoch(self, _curves):
        self.left -= 1
        if self.left == 0:
            raise gputune.callbacks.StopSearch


def test_a_search_counts_the_epochs_of_its_checkpoints(tmp_path, monkeypatch, iris):
    made = []
    begin = Progress.__init__
    monkeypatch.setattr(
        Progress, "__init__", lambda self, *rest: (begin(self, *rest), made.append(self))[0]
    )
    space = {"lr": [1e-3, 1e-2], "width": [8]}
    options = {"n_trials": 2, "cv": 2, "max_epochs": 5, "workers": 1, "verbose": 0}
    options |= {"space": space, "study": tmp_path / "study.db"}
    gputune.tune("mlp", *iris, callbacks=[StopAfter(3)], **options)
    gputune.tune("mlp", *iris, **options)
    _, shown = made
    assert shown.epochs_before == 6
    assert shown.epochs_done == shown.epochs == 10
    shown.bar = progress.tqdm(disable=True)
    shown.resume([0, 1], 3)  # a second plan has the same checkpoint
    assert shown.epochs_before == 6


@pytest.mark.parametrize(
    ("method", "epochs"),
    [
        ("random", 3),
        (gputune.PopulationBased(interval=1), 3),
        (gputune.Halving(min_epochs=1), 3),
        (gputune.Hypergradient(outer_steps=2), 2),
        (gputune.OptunaSampler(RandomSampler(seed=0), batch=2), 3),
        (
            gputune.OptunaSampler(
                RandomSampler(seed=0), batch=3, halving=gputune.Halving(min_epochs=1)
            ),
            3,
        ),
    ],
)
def test_every_method_ends_where_its_counts_end(method, epochs, monkeypatch, iris):
    made = []
    begin = Progress.__init__
    monkeypatch.setattr(
        Progress, "__init__", lambda self, *rest: (begin(self, *rest), made.append(self))[0]
    )
    space = {"lr": [0.001, 0.002, 0.003, 0.004, 0.005], "width": [8]}
    how = {"n_trials": 5, "cv": 2, "max_epochs": epochs, "workers": 1, "verbose": 0}
    study = gputune.tune("mlp", *iris, space=space, method=method, **how)
    (shown,) = made
    assert shown.trials_done == shown.trials == len(study.trials)
    assert shown.epochs_done == shown.epochs == study.spent[0]
    assert shown.pruned == sum(trial.state == "pruned" for trial in study.trials)
    assert shown.seconds_left == 0
    assert shown.scoring == study.meta["scoring"]


@pytest.mark.parametrize(("epochs", "unit"), [(1, "1/2 trials"), (2, "1/4 trial-epochs")])
def test_a_terminal_gets_a_bar(monkeypatch, capsys, epochs, unit):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    shown = Progress(1)
    shown.scoring = "accuracy"
    with shown.bar_over(2, epochs):
        shown.bar.ncols = 160
        shown.bar.dynamic_ncols = False
        shown.advance(1, np.ones((2, 1, 1)))
        shown.bar.refresh()
    last = [line for line in capsys.readouterr().err.split("\r") if line.strip()][-1]
    assert f"{unit} [" in last and " left, trials 0/2, best accuracy 1.0000]" in last


def test_the_bar_of_a_terminal_moves_within_an_epoch(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "_LONG_EPOCH", -1)
    shown = Progress(1)
    with shown.bar_over(2, 2), workers_read_by(lambda: Running(epochs=1.0)):
        shown.bar.ncols = 160
        shown.bar.dynamic_ncols = False
        shown.plan(FakePlan(), show=False)
        report_steps(1, 2, 2)
        last = [line for line in capsys.readouterr().err.split("\r") if line.strip()][-1]
    assert "1/4 trial-epochs [" in last and "best -, 50% of the running epoch]" in last


def test_reading_a_dataset_shows_a_bar_and_a_notebook_gets_one(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    for verbose in (1, 0):
        assert list(reading_bar(range(3), verbose=verbose)) == [0, 1, 2]
        assert ("reading X" in capsys.readouterr().err) == bool(verbose)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    assert not Progress(1).plain


class Dead:
    """A standard error without a reader."""

    encoding = "utf-8"

    def isatty(self):
        return True

    def write(self, text):
        raise BrokenPipeError

    flush = fileno = lambda self: self.write("")


@pytest.mark.parametrize("screen", [None, Dead(), "closed"], ids=["none", "dead", "closed"])
def test_a_screen_that_takes_nothing_ends_no_search(monkeypatch, tmp_path, screen):
    if screen == "closed":
        screen = (tmp_path / "screen").open("w")
        screen.close()
    monkeypatch.setattr("sys.stderr", screen)
    shown = Progress(1)
    shown.say("a word")
    with shown.bar_over(2, 1):
        shown.advance(1, np.ones((2, 1, 1)))
        shown.bar.refresh()
        shown.say("another")
    assert shown.plain != isinstance(screen, Dead)


@pytest.fixture
def passes(monkeypatch):
    """Return a function that moves the profile's clock, which otherwise stands still."""
    now = [100.0]
    monkeypatch.setattr(
        "gputune.tuning.progress.time", SimpleNamespace(perf_counter=lambda: now[0])
    )
    return lambda seconds: now.append(now.pop() + seconds)


def test_a_clock_inside_another_is_counted_once(passes):
    profile = Profile()
    with profile.clock("outer"):
        passes(0.25)
        with profile.clock("inner"):
            passes(0.5)
        passes(1.0)
    assert profile.seconds == {"outer": 1.25, "inner": 0.5} and list(profile.seconds) == [
        "outer",
        "inner",
    ]


@pytest.mark.parametrize(("kind", "depth"), [("linear", 0), ("mlp", 1), ("mlp", 3)])
def test_operations_are_those_that_torch_counts(kind, depth):
    data = make_data("multiclass", n=60)
    (config,) = fill({"width": 7, "depth": max(1, depth), "batch_size": 13})
    counted = 0
    for fold in range(data.n_folds):
        x, y, _ = rows_of(data, fold)
        with FlopCounterMode(display=False) as counter:
            plain = {**config, "depth": depth}
            reference.train_mlp(x, y, plain, n_outputs=3, epochs=1, max_epochs=1)
        counted += counter.get_total_flops()
    assert operations(config, kind, data) == counted


def test_the_table(passes, monkeypatch):
    monkeypatch.setattr("gputune.tuning.progress.product_speed", lambda *arguments: 2e11)
    profile = Profile()
    with profile.clock("training"):
        passes(0.05)
    passes(0.05)
    profile.spent += Spent(0.03, 0.01, 3e9)
    text = profile.report(dtype=torch.float64, device=torch.device("cpu"))
    assert re.search(r"training +0\.05 s +50%\n +steps +60% of it\n +scores +20% of it", text)
    assert re.search(
        r"Steps reached 100\.0 GFLOP/s, 50% of the 200.0 that .* on 1 core \(float64\)\.", text
    )


def test_what_is_inside_a_module_is_not_guessed():
    profile = Profile()
    profile.spent += Spent(0.03, 0.01, operations({}, "module", make_data()))
    assert "Steps reached" not in profile.report(dtype=torch.float32, device=torch.device("cpu"))


def test_the_speed_of_a_product_is_above_zero_and_leaves_the_threads_alone():
    before = torch.get_num_threads()
    assert product_speed(2, torch.float32, torch.device("cpu")) > 0
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "more", [[], ["--backend", "eager", "--workers", "2"], ["--method", "halving"]], ids=str
)
def test_the_command(tmp_path, more, monkeypatch):
    if more:  # it takes half a second to be measured
        monkeypatch.setattr("gputune.tuning.progress.product_speed", lambda *arguments: 2e11)
    words = "tune sklearn:iris --trials 3 --epochs 3 --cv 2 --out".split()
    code, out, _ = run(*words, tmp_path / "out", "--profile", *more)
    assert code == 0
    names = "reading and preparing rows, planning, training, steps, scores, storing, the rest"
    for name in names.split(", "):
        assert re.search(rf"^ +{name} +[\d.]+", out, re.M), name
    assert re.search(r"Steps reached [\d.]+ GFLOP/s, \d+% of the", out)
    assert more or "Where the time went" not in run(*words, tmp_path / "other")[1]
