"""Where the time went: clocks that never count twice, an arithmetic that is torch's own count, and the command."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import reference
from command_line import run
from gputune.engine.cost import operations
from gputune.engine.train import Spent
from gputune.tuning.progress import Profile, product_speed
from problems import fill, make_data, rows_of


@pytest.fixture
def passes(monkeypatch):
    """Return a function that lets so many seconds pass on the profile's clock, on which none pass otherwise."""
    now = [100.0]
    monkeypatch.setattr("gputune.tuning.progress.time", SimpleNamespace(perf_counter=lambda: now[0]))
    return lambda seconds: now.append(now.pop() + seconds)


def test_a_clock_inside_another_is_counted_once(passes):
    profile = Profile()
    with profile.clock("outer"):
        passes(0.25)
        with profile.clock("inner"):
            passes(0.5)
        passes(1.0)
    assert profile.seconds == {"outer": 1.25, "inner": 0.5} and list(profile.seconds) == ["outer", "inner"]


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
    assert re.search(r"Steps reached 100\.0 GFLOP/s, 50% of the 200.0 that .* on 1 core \(float64\)\.", text)


def test_what_is_inside_a_module_is_not_guessed():
    profile = Profile()
    profile.spent += Spent(0.03, 0.01, operations({}, "module", make_data()))
    assert "Steps reached" not in profile.report(dtype=torch.float32, device=torch.device("cpu"))


def test_the_speed_of_a_product_is_above_zero_and_leaves_the_threads_alone():
    before = torch.get_num_threads()
    assert product_speed(2, torch.float32, torch.device("cpu")) > 0
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("more", [[], ["--backend", "eager", "--workers", "2"], ["--method", "halving"]], ids=str)
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
