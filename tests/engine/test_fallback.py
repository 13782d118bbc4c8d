"""A faster way to train that fails while it is tried ends no search: the next one trains, and the
user reads why."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import gputune
from gputune.engine import choice
from gputune.engine.backends import compiled
from gputune.ground.errors import InputError
from gputune.modules import recorder
from problems import make_data

pytestmark = pytest.mark.cpu

DATA = make_data()
X = DATA.x[0]
Y = DATA.y
SEARCH = {
    "n_trials": 2,
    "cv": 2,
    "workers": 1,
    "max_epochs": 6,
    "dtype": "float64",
    "space": {"lr": [1e-3, 1e-2]},
}


# steps enough to be recorded
MANY = {"max_epochs": 10, "space": {"lr": [1e-3, 1e-2], "batch_size": [8]}}


class Net(nn.Linear):
    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)


def search(model=Net, **options):
    return gputune.tune(model, X, Y, **{"verbose": 0, **SEARCH, **options})


def fail(*args, **options):
    raise IndexError("index 207 is out of bounds.\nMore that nobody reads")


@pytest.fixture
def lenient(monkeypatch):
    monkeypatch.delenv("GPUTUNE_STRICT_BACKENDS")


@pytest.fixture
def all_tried(monkeypatch):
    """As if the search were large: all ways are timed."""
    monkeypatch.setattr(choice, "WORTH_SECONDS", 0)
    monkeypatch.setattr(choice, "CODED_SHARE", -np.inf)


@pytest.mark.parametrize("strict", ["", "0", "1"])
def test_compiled_code_that_fails_is_in_the_plan(monkeypatch, capsys, all_tried, strict):
    monkeypatch.setenv("GPUTUNE_STRICT_BACKENDS", strict)
    monkeypatch.setattr(choice, "MemberChunk", fail)
    if strict == "1":
        with pytest.raises(IndexError, match="207"):
            search(verbose=1)
        return
    found = search(verbose=1)
    plan = capsys.readouterr().err.split("plan:")[1].splitlines()[0]
    assert plan.endswith("; compiled code failed: IndexError: index 207 is out of bounds")
    np.testing.assert_allclose(found.curves, search(backend="loop").curves, rtol=1e-10)


@pytest.mark.parametrize(
    ("way", "says"),
    [
        ("recorded", "note: Net trains one by one, since training stacked failed: IndexError"),
        ("loop", "one by one failed"),
    ],
)
def test_the_way_that_remains_trains(monkeypatch, capsys, lenient, all_tried, way, says):
    seconds = choice._seconds
    monkeypatch.setattr(choice, "MemberChunk", fail)
    monkeypatch.setattr(
        choice, "_seconds", lambda *given: fail() if given[3] == way else seconds(*given)
    )
    found = search(verbose=1)
    said = capsys.readouterr().err
    assert says in said and "compiled code failed" in said
    np.testing.assert_allclose(found.curves, search(backend="loop").curves, rtol=1e-10)


class Weighed(Net):
    """Has a weight for two of the three classes."""

    def loss(self, batch):
        x, y = batch
        weight = torch.ones(2, dtype=x.dtype)
        return (functional.cross_entropy(self(x), y, reduction="none") * weight[y]).mean()


@pytest.mark.parametrize("strict", ["", "1"])
def test_an_error_of_the_module_in_each_backend_ends_the_search(monkeypatch, all_tried, strict):
    monkeypatch.setenv("GPUTUNE_STRICT_BACKENDS", strict)
    y = torch.zeros(500, dtype=torch.int64)
    y[::2] = 1
    y[1::25] = 2
    y[torch.linspace(0, 499, 31).long()] = 0
    with pytest.raises(InputError, match="IndexError"):
        gputune.tune(
            Weighed, torch.randn(500, 3), y, **SEARCH, verbose=0, training_step=Weighed.loss
        )


class OnlyAlone(Net):
    """Uses an operation that stacked members cannot run, for more rows than were tried."""

    def forward(self, x):
        if len(x) > 40:
            x.data.mul_(1.5)
        return super().forward(x)


class Scaled(Net):
    """Does the same by other operations."""

    def forward(self, x):
        return super().forward(x * 1.5 if len(x) > 40 else x)


@pytest.mark.parametrize("backend", ["auto", "stacked"])
def test_members_that_fail_only_when_stacked_train_one_by_one(monkeypatch, lenient, backend):
    rows = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    y = (rows[:, 0] > 0).long()
    given = {**SEARCH, "space": {"lr": [0.01, 0.03], "batch_size": [16]}, "verbose": 0}
    expected = gputune.tune(Scaled, rows, y, **given, backend="loop")
    with pytest.warns(RuntimeWarning, match="trains one by one, because training with stacked"):
        study = gputune.tune(OnlyAlone, rows, y, **given, backend=backend)
    np.testing.assert_allclose(study.curves, expected.curves, rtol=1e-10)
    (note,) = [note for note in study.record.notes if "stacked members failed" in note]
    assert "RuntimeError: accessing `data` under vmap transform is not allowed" in note
    monkeypatch.setenv("GPUTUNE_STRICT_BACKENDS", "1")
    with pytest.raises(InputError, match="it fails on no row of X"):
        gputune.tune(OnlyAlone, rows, y, **given, backend=backend)


@pytest.mark.parametrize("place", ["capture", "replay"])
def test_steps_whose_recording_fails_are_taken_as_they_are(monkeypatch, lenient, place):
    expected = search(backend="loop", **MANY).curves
    compile_trace = recorder.compile_trace
    steps = []

    def half_a_step(trace):
        if place == "capture":
            fail()

        def replay():
            steps.append(1)
            compile_trace(trace)()
            fail()

        return replay

    monkeypatch.setattr(recorder, "compile_trace", half_a_step)
    with pytest.warns(RuntimeWarning, match="recording a step failed: IndexError: index 207"):
        study = search(backend="stacked", **MANY)
    assert bool(steps) == (place == "replay")
    assert any("recording a step failed: IndexError" in note for note in study.record.notes)
    np.testing.assert_allclose(study.curves, expected, rtol=1e-10)
    monkeypatch.setenv("GPUTUNE_STRICT_BACKENDS", "1")
    with pytest.raises(IndexError):
        search(backend="stacked", **MANY)


def test_a_chunk_that_cannot_be_made_is_made_for_the_next_backend(monkeypatch, lenient):
    expected = search("mlp", backend="eager").curves
    monkeypatch.setattr(compiled, "CompiledChunk", fail)
    with pytest.warns(
        RuntimeWarning, match="in recorded steps, which are slower than in compiled code: Index"
    ):
        study = search("mlp")
    assert any("compiled code failed: IndexError" in note for note in study.record.notes)
    np.testing.assert_allclose(study.curves, expected, rtol=1e-10)


def test_memory_that_runs_out_is_none_of_these_errors(monkeypatch, lenient):
    """Chunks are halved then, as long as they have several trials."""
    made = []
    compiled_chunk = compiled.CompiledChunk

    def make(network, *given, **options):
        made.append(len(network.configs))
        if len(network.configs) > 1:
            raise MemoryError("no more")
        return compiled_chunk(network, *given, **options)

    monkeypatch.setattr(compiled, "CompiledChunk", make)
    with warnings.catch_warnings(action="error"):
        search("mlp", space={"lr": [1e-3, 1e-2], "width": [8]})
    assert made == [2, 1, 1]


def loss_alone(outputs, y):
    """Cross entropy, which stacked members cannot compute."""
    if len(y) > 4:
        outputs.data.clamp_(-1e6, 1e6)
    return functional.cross_entropy(outputs, y)


def step_alone(module, batch):
    x, y = batch
    return loss_alone(module(x), y)


def plain_step(module, batch):
    x, y = batch
    return functional.cross_entropy(module(x), y)


@pytest.mark.parametrize(
    ("alone", "plain"),
    [
        ({"loss": loss_alone}, {"loss": functional.cross_entropy}),
        ({"training_step": step_alone}, {"training_step": plain_step}),
    ],
    ids=["loss", "training_step"],
)
def test_a_loss_that_fails_only_when_stacked_trains_one_by_one(lenient, alone, plain):
    expected = search(backend="loop", **plain)
    study = search(**alone)
    np.testing.assert_allclose(study.curves, expected.curves, rtol=1e-10)
    (note,) = [note for note in study.record.notes if "one by one" in note]
    assert "vmap" in note
