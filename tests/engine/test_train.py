"""Training that stops and goes on: the same numbers, in another company too."""

import numpy as np
import pytest
import torch

from gputune.engine.mlp import StackedMLP
from gputune.ground.types import OPTIMIZERS
from gputune.population.state import State
from problems import (
    fill,
    largest_difference,
    make_data,
    needs_compiled_code,
    scoring_of,
    shape_of,
    train,
)


def configs_of(optimizer, *widths, **more):
    rates = {
        "optimizer": optimizer,
        "lr": 0.02,
        "momentum": 0.5,
        "weight_decay": 0.01,
        "dropout": 0.1,
        **more,
    }
    return fill(*({**rates, "width": width, "batch_size": 10 + width} for width in widths))


def run(data, configs, *, epochs, scoring="neg_log_loss", **more):
    network = StackedMLP("mlp", configs, shape_of(data), seed=0)
    return train(
        network,
        data,
        configs,
        seed=0,
        epochs=epochs,
        horizon=6,
        scoring=scoring_of(data, scoring),
        **more,
    )


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_that_continues_is_training_that_never_stopped(optimizer, schedule):
    data = make_data()
    configs = configs_of(optimizer, 5, 9, 16, schedule=schedule)
    whole, first = (run(data, configs, epochs=n) for n in (6, 2))
    second = run(data, configs, epochs=6, begin=first.state)
    np.testing.assert_array_equal(second.curves[:, 2:], whole.curves[:, 2:])
    assert np.isnan(second.curves[:, :2]).all()
    np.testing.assert_array_equal(first.curves, whole.curves[:, :2])


EACH_WAY = [("eager", "recorded"), ("recorded", "recorded"), ("recorded", "eager")]
COMPILED = [("eager", "compiled"), ("compiled", "eager")]


@pytest.mark.usefixtures("recorded_on_cpu")
@pytest.mark.parametrize(
    ("first", "second"),
    [*EACH_WAY, *(pytest.param(*ways, marks=needs_compiled_code) for ways in COMPILED)],
)
@pytest.mark.parametrize(
    ("optimizer", "ema"),
    [("sgd", 0.5), ("nesterov", 0.0), ("adam", 0.0), ("adamw", 0.0), ("adamw", 0.9)],
)
def test_some_trials_continue_in_another_way(optimizer, ema, first, second):
    data = make_data()
    configs = configs_of(optimizer, 8, 9, 13, 9, schedule="cosine", ema=ema)
    whole, begun = (run(data, configs, epochs=n, backend=first) for n in (6, 3))
    left = (0, 2, 3)
    rest = run(data, configs, epochs=6, backend=second, begin=begun.state.select(left), alive=left)
    np.testing.assert_allclose(rest.curves[left, 3:], whole.curves[left, 3:], rtol=1e-9)
    for c in left:
        assert largest_difference(rest.member(1, c), whole.member(1, c)) <= 1e-10


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trials_continue_among_other_trials(optimizer):
    data = make_data()
    configs = configs_of(optimizer, 5, 9, 16, 12)
    whole = run(data, configs, epochs=6)
    one = run(data, configs[:2], epochs=3)
    two = run(data, configs[2:], epochs=3)
    state = State.stack([one.state.select([1]), two.state])
    assert state.epoch == 3 and {len(buffer) for buffer in state.buffers} == {3}
    rest = run(data, configs[1:], epochs=6, begin=state)
    np.testing.assert_allclose(rest.curves[:, 3:], whole.curves[1:, 3:], rtol=1e-9)
    for c in range(3):
        assert largest_difference(rest.member(1, c), whole.member(1, c + 1)) <= 1e-10


@pytest.mark.parametrize("backend", ["eager", pytest.param("compiled", marks=needs_compiled_code)])
def test_the_state_of_a_chunk_whose_trials_all_diverged_is_empty(backend):
    diverging = configs_of("sgd", 5, 9, lr=1e200)
    found = run(make_data("regression"), diverging, epochs=3, scoring=None, backend=backend)
    assert found.alive == () and {len(buffer) for buffer in found.state.buffers} == {0}
    assert np.isnan(found.curves[:, -1]).all()


def test_rows_give_the_flat_buffer_back():
    data = make_data(folds=3)
    for kind in ("mlp", "linear"):
        network = StackedMLP(kind, configs_of("adam", 5, 9, 16), shape_of(data), seed=0)
        flat = torch.randn(
            network.blocks.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        rows = network.blocks.to_rows(flat)
        assert rows.shape[:2] == (3, 3) and rows.numel() == flat.numel()
        assert torch.equal(network.blocks.from_rows(rows), flat)
