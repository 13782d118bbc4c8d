"""Between two rungs, a single group of trials waits in the tensors in which it has trained."""

import pickle

import numpy as np
import optuna
import pytest
import torch
from sklearn.datasets import load_iris

import gputune
from gputune.engine.checkpoint import StateCache
from gputune.engine.job import RungJob
from gputune.engine.mlp import StackedMLP
from gputune.engine.stacked import StackedChunk
from gputune.engine.waiting import WaitingChunk, WaitingState
from gputune.population.state import State
from gputune.scoring.validation import Validation
from problems import Net, fill, make_data, scoring_of, shape_of

IRIS = load_iris(return_X_y=True)
HALVING = gputune.Halving(min_epochs=1, factor=2)


def halved(model, **options):
    space = {"lr": [1e-3, 3e-3, 1e-2, 3e-2], "batch_size": 40, "weight_decay": [0.0, 0.1]}
    options = {"n_trials": 6, "max_epochs": 4, "cv": 2, "verbose": 0, **options}
    options = {"method": HALVING, **options}
    return gputune.tune(model, *IRIS, space=space, workers=1, **options)


@pytest.mark.parametrize(
    ("model", "backend"), [("mlp", "eager"), ("mlp", "auto"), (Net, "graph"), (Net, "loop")]
)
def test_rungs_in_place_give_the_same_bits_and_copy_nothing(model, backend, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(WaitingState, "buffers", property(lambda state: pytest.fail("copied")))
        found = halved(model, backend=backend)
    monkeypatch.setattr(RungJob, "_state", lambda job, trained, chunk: trained.state.cpu())
    expected = halved(model, backend=backend)
    np.testing.assert_array_equal(found.curves, expected.curves)
    assert [trial.state for trial in found.trials] == [trial.state for trial in expected.trials]
    assert {trial.state for trial in found.trials} == {"complete", "pruned"}


@pytest.fixture
def chunk():
    data = make_data()
    configs = fill(*({"lr": lr, "batch_size": 9, "width": 4} for lr in (0.01, 0.02, 0.03)))
    network = StackedMLP("mlp", configs, shape_of(data), seed=0)
    validation = Validation(data, scoring_of(data))
    chunk = StackedChunk(network, validation, seed=0, horizon=4)
    with torch.no_grad():
        chunk.advance(0)
        yield chunk


def test_a_waiting_state_is_a_state(chunk):
    expected = chunk.state
    waiting = WaitingState(WaitingChunk(chunk, is_copied=True), range(3))
    joined = State.stack([waiting.select([2]), waiting.select([0]), waiting.select([2])])
    assert isinstance(joined, WaitingState) and joined.slots == (2, 0, 2)
    assert joined.nbytes == joined.cpu().nbytes
    for state in (joined.cpu(), pickle.loads(pickle.dumps(joined))):
        assert state.epoch == 1 and torch.equal(state.steps, expected.steps[[2, 0, 2]])
        for mine, other in zip(state.buffers, expected.buffers, strict=True):
            assert torch.equal(mine, other[[2, 0, 2]])
    mixed = State.stack([waiting.select([1]), expected.select([0])])
    assert not isinstance(mixed, WaitingState)
    assert torch.equal(mixed.buffers[0], expected.buffers[0][[1, 0]])


def test_a_state_outlives_the_training_in_its_tensors(chunk):
    expected = chunk.state
    whole = WaitingState(WaitingChunk(chunk, is_copied=True), range(3))
    continues = whole.select([2, 2])
    assert continues.continued([chunk.configs[2]] * 2) is chunk
    chunk.advance(1)
    assert torch.equal(continues.buffers[1], expected.buffers[1][[2, 2]])
    with pytest.raises(RuntimeError, match="was overwritten when others continued"):
        _ = whole.buffers


def test_without_a_copy_a_state_ends_with_the_training_in_its_tensors(chunk):
    state = WaitingState(WaitingChunk(chunk, is_copied=False), range(3))
    state.continued(chunk.configs)
    with pytest.raises(MemoryError, match="not enough main memory to continue after epoch 1. Free"):
        _ = state.buffers


def test_groups_of_trials_wait_side_by_side_on_a_cpu(monkeypatch):
    options = {
        "n_trials": 12,
        "space": {"lr": [1e-3, 1e-2, 0.1], "width": [8, 32], "depth": [1, 2]},
    }
    search = {"max_epochs": 8, "cv": 2, "verbose": 0, "workers": 1, "include_default": False}
    rule = gputune.OptunaSampler(
        optuna.samplers.RandomSampler(seed=0), batch=6, halving=gputune.Halving(min_epochs=1)
    )
    copied = []
    rows = WaitingChunk.rows
    with monkeypatch.context() as patch:
        patch.setattr(WaitingChunk, "rows", lambda *args: copied.append(args[1]) or rows(*args))
        found = [gputune.tune("mlp", *IRIS, method=m, **options, **search) for m in (HALVING, rule)]
    n_trials = sum(len(study.trials) for study in found)
    assert sum(map(len, copied)) < n_trials / 3  # most trials are pruned or continue in place
    monkeypatch.setattr(RungJob, "_state", lambda job, trained, chunk: trained.state.cpu())
    for study, method in zip(found, (HALVING, rule)):
        expected = gputune.tune("mlp", *IRIS, method=method, **options, **search)
        np.testing.assert_array_equal(study.curves, expected.curves)


@pytest.mark.parametrize("method", [HALVING, gputune.PopulationBased(interval=1)])
def test_no_state_is_read_after_the_last_epoch(method, monkeypatch):
    epochs = []
    state_of = RungJob._state

    def note(job, trained, chunk):
        epochs.append(trained.epochs)
        return state_of(job, trained, chunk)

    monkeypatch.setattr(RungJob, "_state", note)
    study = halved("mlp", method=method)
    assert max(len(curve) for curve in study.curves) == 4
    assert sorted(set(epochs))[-1] < 4


def test_states_of_a_place_are_copied_before_others_continue_there(chunk):
    expected = chunk.state
    waiting = WaitingChunk(chunk, is_copied=False)
    other = WaitingChunk(chunk, is_copied=False)
    for limit, places, n_copied in ((10**9, [other], 0), (10**9, [waiting], 3), (0, [other], 3)):
        cache = StateCache(10**9)
        for slot in range(3):
            cache.park(slot, WaitingState(waiting, [slot]))
        cache.limit = limit
        cache.settle(places)
        states = [cache.look(slot) for slot in range(3)]
        assert sum(state.place is None for state in states) == n_copied
        for slot, state in enumerate(states):
            assert torch.equal(state.buffers[1], expected.buffers[1][[slot]])
