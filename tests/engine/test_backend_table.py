"""A backend is one file and one line of the table: a toy backend trains through the public API."""

from typing import get_args

import pytest
import torch

import gputune
from engine.toy_backend import ToyChunk
from gputune.engine.backends.base import Machine, TrialWork
from gputune.engine.backends.selection import choose_backend, way_of
from gputune.engine.backends.table import BACKENDS, backend_named, backend_words
from gputune.engine.plan import backends_text
from gputune.ground.types import BackendWord
from gputune.population.traits import Traits
from problems import Linear, fill
from refused import refused

CPU = torch.device("cpu")
SEARCH = {
    "n_trials": 3,
    "cv": 2,
    "max_epochs": 4,
    "workers": 1,
    "device": "cpu",
    "dtype": "float64",
    "random_state": 0,
}
X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = (X[:, 0] > 0).long()


@pytest.fixture
def toy(monkeypatch):
    """The only change to the product is a line of the table."""
    monkeypatch.setitem(BACKENDS, "toy", "engine.toy_backend")
    monkeypatch.setattr(ToyChunk, "n_epochs", 0)


@pytest.mark.usefixtures("toy")
def test_a_toy_backend_trains_a_search_and_equals_the_loop(capsys):
    study = gputune.tune(Linear, X, Y, **SEARCH, backend="toy")
    assert ToyChunk.n_epochs == 4
    assert ", toy (as requested)" in capsys.readouterr().err
    expected = gputune.tune(Linear, X, Y, **SEARCH, verbose=0, backend="loop")
    assert study.curves.tobytes() == expected.curves.tobytes()


@pytest.mark.usefixtures("toy")
def test_what_the_toy_refuses_trains_in_the_backend_that_it_names(capsys):
    gputune.tune(Linear, X, Y, **{**SEARCH, "optimizer": "lion"}, backend="toy")
    assert ToyChunk.n_epochs == 0
    said = capsys.readouterr().err
    reason = "the toy does not support the optimizer 'lion'"
    assert f", recorded ({reason})" in said.split("plan:")[1]


def test_the_words_are_the_names_of_the_table():
    assert {*get_args(BackendWord)} == {*backend_words(), "graph"}
    assert [backend_named(name).name for name in BACKENDS] == [*BACKENDS]
    with refused("backend must be one of 'auto', .*, got 'grph'"):
        gputune.tune(Linear, X, Y, **SEARCH, backend="grph")


def test_an_earlier_name_is_the_same_backend():
    assert choose_backend("graph", CPU, torch.float32).name == "recorded"
    curves = []
    for word in ("graph", "recorded"):
        curves.append(gputune.tune(Linear, X, Y, **SEARCH, verbose=0, backend=word).curves)
    assert curves[0].tobytes() == curves[1].tobytes()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, ""),
        ({"optimizer": "lion"}, "compiled code supports only the optimizers sgd, nesterov,"),
        ({"clip_norm": 1.0}, "compiled code does not support clip_norm"),
        ({"beta2": 0.9}, "compiled code does not support beta2"),
        ({"depth": 64}, "compiled code supports at most 63 hidden layers"),
    ],
)
def test_the_reason_of_a_trial_is_that_of_the_faster_backend(config, reason):
    way = way_of("compiled", TrialWork("mlp", fill({})[0] | config))
    assert way.reason.startswith(reason) and bool(way.reason) == (way.name != "compiled")


def test_a_module_says_why_it_trains_as_it_does():
    config = fill({})[0]
    for traits, expected in (
        (Traits(coded=True), ("compiled", "")),
        (Traits(uncoded="too short"), ("recorded", "too short")),
        (Traits(slow="2 ms so"), ("loop", "2 ms so")),
        (Traits(unstackable="a hook"), ("loop", "its members cannot be stacked: a hook")),
    ):
        assert way_of("compiled", TrialWork("module", config, traits)) == expected
    name, reason = way_of("compiled", TrialWork("module", config))
    assert name == "recorded" and "has timed it on this machine" in reason
    assert way_of("loop", TrialWork("mlp", config)).name == "eager"


def test_a_gpu_says_why_the_kernel_does_not_train():
    unfit = backend_named("kernel").unfit
    gpu = torch.device("cuda")
    assert "only for float32" in unfit(Machine(gpu, torch.float64, "mlp")).reason
    assert "has not checked" in unfit(Machine(gpu, torch.float32, "mlp")).reason
    assert "only the built-in" in unfit(Machine(gpu, torch.float32, "module")).reason
    assert unfit(Machine(CPU, torch.float32, "mlp")).reason == ""


def test_the_text_of_backends_counts_chunks_only_if_they_differ():
    assert backends_text(["eager"] * 2, ["", ""]) == "eager"
    text = backends_text(["recorded", "compiled", "recorded"], ["a", "", "b"])
    assert text == "1 compiled, 1 recorded (a), 1 recorded (b)"
