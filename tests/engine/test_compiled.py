"""Compiled training beside eager training: the same numbers, whatever the shape, the company and
the threads."""

import itertools
import signal
import threading
import time
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import gputune
import problems
from gputune.data.scaling import Scaling
from gputune.engine import compiled
from gputune.engine.mlp import StackedMLP
from gputune.ground.device import on_threads
from gputune.ground.types import SCHEDULES
from problems import (
    assert_equals_plain_loop,
    fill,
    largest_difference,
    make_data,
    needs_compiled_code,
    scoring_of,
    shape_of,
    train,
    without_class_2,
)

pytestmark = needs_compiled_code


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    monkeypatch.setattr(problems, "BACKEND", "compiled")


def run(data, configs, *, backend="compiled", epochs=3, **options):
    network = StackedMLP("mlp", configs, shape_of(data), seed=0)
    common = {"seed": 0, "epochs": epochs, "horizon": epochs, "backend": backend}
    return train(network, data, configs, **(common | options))


def both(data, configs, **options):
    """The same members, trained eagerly and in compiled code."""
    return [run(data, configs, backend=backend, **options) for backend in ("eager", "compiled")]


@pytest.mark.parametrize(("width", "depth"), [(1, 1), (15, 4), (17, 1), (70, 4), (300, 1)])
def test_any_width_and_depth(width, depth):
    configs = fill(*({"width": width, "depth": depth, "batch_size": size} for size in (1, 7, 33)))
    assert_equals_plain_loop(make_data(folds=2), configs, epochs=1)


@pytest.mark.parametrize(("inputs", "classes"), [(1, 3), (16, 15), (17, 16), (40, 17), (3, 40)])
def test_any_number_of_inputs_and_classes(inputs, classes):
    data = make_data(n=150, d=inputs, k=classes)
    for kind in ("mlp", "linear"):
        configs = fill({"width": 20, "batch_size": 19, "lr": 1e-2}, {"width": 9, "batch_size": 100})
        assert_equals_plain_loop(data, configs, kind=kind, epochs=3)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_other_members_and_threads_change_no_bit(activation):
    data = make_data(n=200, dtype=torch.float32)
    scoring = scoring_of(data, "neg_log_loss")
    sizes = [(3, 8), (16, 64), (9, 200), (12, 33), (16, 16)]
    sizes = [
        {"width": w, "batch_size": b, "ema": ema}
        for (w, b), ema in zip(sizes, (0, 0.9, 0.5, 0, 0.99))
    ]
    configs = fill(*({**size, "activation": activation} for size in sizes))
    with on_threads(1):
        one = run(data, configs, scoring=scoring)
    with on_threads(3):
        three = run(data, configs, scoring=scoring)
    assert torch.equal(one.flat, three.flat)
    np.testing.assert_array_equal(one.curves, three.curves)
    for c, config in enumerate(configs):
        alone = run(data, [config], scoring=scoring)
        for f in range(data.n_folds):
            for a, b in zip(alone.member(f, 0).parameters(), one.member(f, c).parameters()):
                assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["compiled", "eager"])
def test_rows_that_are_scaled_as_they_are_gathered_change_no_bit(backend):
    data = make_data(copies=False, folds=3)
    data.x[0, ::5, 1] = torch.nan
    center = torch.linspace(-1, 1, 15, dtype=torch.float64).view(3, 5)
    shared = replace(data, scaling=(Scaling(center, center.exp(), missing=True),))
    (copies,) = zip(*(shared.rows(fold, torch.arange(data.n_rows)) for fold in range(3)))
    assert (copies[2][::5, 1] == 0).all()
    own = replace(data, inputs=(torch.stack(copies),), copies=(0, 1, 2))
    configs = fill({"width": 8}, {"width": 14, "batch_size": 9})
    one, other = (run(d, configs, backend=backend, scoring=scoring_of(d)) for d in (shared, own))
    assert torch.equal(one.flat, other.flat)
    np.testing.assert_array_equal(one.curves, other.curves)


CLASSES = make_data(folds=3)
NUMBERS = make_data("regression")
EACH_SCORE = [
    *itertools.product(
        [CLASSES, without_class_2(CLASSES)], ["accuracy", "neg_log_loss", "balanced_accuracy"]
    ),
    (CLASSES, "f1_weighted"),
    *((NUMBERS, word) for word in ("r2", "neg_mean_absolute_error", "neg_median_absolute_error")),
]


@pytest.mark.parametrize(("data", "scoring"), EACH_SCORE)
def test_scores_are_those_of_eager_training(data, scoring):
    configs = fill(
        {"width": 8, "lr": 1e-2}, {"width": 14, "batch_size": 9}, {"width": 16, "lr": 3e-2}
    )
    eager, compiled = both(data, configs, scoring=scoring_of(data, scoring))
    np.testing.assert_allclose(compiled.curves, eager.curves, rtol=1e-9)


@pytest.mark.parametrize(
    ("scoring", "lr"), [("accuracy", 1e38), ("neg_log_loss", 1e30), ("neg_log_loss", 1e38)]
)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_a_trial_that_diverges_is_handled(activation, scoring, lr):
    data = make_data(dtype=torch.float32)
    base = {"activation": activation, "optimizer": "sgd", "batch_size": 8, "width": 16}
    configs = fill({**base, "lr": 1e-2}, {**base, "lr": lr})
    eager, trained = both(data, configs, epochs=4, scoring=scoring_of(data, scoring))
    np.testing.assert_array_equal(np.isnan(trained.curves), np.isnan(eager.curves))
    assert trained.alive == eager.alive == ((0, 1) if activation == "tanh" and lr < 1e38 else (0,))


def test_every_schedule():
    data = make_data()
    configs = fill(*({"width": 8, "batch_size": 9, "schedule": word} for word in SCHEDULES))
    eager, trained = both(data, configs, epochs=4)
    for c in range(len(configs)):
        assert largest_difference(trained.member(0, c), eager.member(0, c)) <= 1e-12


def test_averages_that_continue_have_the_same_bits():
    data = make_data(dtype=torch.float32)
    configs = fill(*({"width": 8, "batch_size": 9, "ema": ema} for ema in (0.5, 0.99)))
    whole = run(data, configs, epochs=4)
    half = run(data, configs, epochs=2, horizon=4)
    rest = run(data, configs, epochs=4, begin=half.state)
    assert torch.equal(rest.scored, whole.scored) and not torch.equal(whole.scored, whole.flat)


def test_an_interruption_is_noticed_in_the_middle_of_an_epoch(monkeypatch):
    data = make_data(n=20_000, d=60, dtype=torch.float32)
    configs = fill(*({"width": 256, "depth": 4, "batch_size": 1} for _ in range(20)))  # minutes
    begun = []
    whole = compiled.library(data.dtype)

    class Pressed:
        """The compiled code, and a thread that sends the signal once it has taken a member."""

        def train_members(self, work, taken, stop):
            def press():
                while not taken._obj.value:
                    time.sleep(0.001)
                signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

            begun.append(taken._obj)
            threading.Thread(target=press).start()
            return whole.train_members(work, taken, stop)

    def heard(signum, frame):
        raise InterruptedError

    monkeypatch.setattr(compiled, "library", lambda dtype: Pressed())
    before = signal.signal(signal.SIGUSR1, heard)
    try:
        with pytest.raises(InterruptedError):
            run(data, configs, epochs=1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert begun[0].value < len(configs) * data.n_folds  # members were left


def test_no_memory_for_one_member_is_a_memory_error():
    class Full:
        def train_members(self, *_):
            return 1

    with pytest.raises(MemoryError, match="not enough memory for the activations of one member"):
        compiled._run(Full(), {}, {}, report=Mock())


def test_the_deepest_network_that_is_compiled():
    data = make_data(n=20, d=2)
    (config,) = fill({"width": 3, "depth": 63, "optimizer": "sgd", "activation": "tanh"})
    eager, compiled = (trained.member(0, 0) for trained in both(data, [config], epochs=1))
    assert largest_difference(compiled, eager) <= 1e-10


@pytest.mark.parametrize(
    "method", [pytest.param("random", marks=pytest.mark.long), "halving", "median"]
)
def test_a_search_has_the_same_table_either_way(method):
    rng = np.random.RandomState(0)
    X = rng.randn(90, 4)
    y = (X[:, 0] + X[:, 1] ** 2 > 0.5).astype(int)
    space = {
        "lr": [1e-3, 1e-2],
        "width": [8, 20],
        "batch_size": [8, 16, 30],
        "dropout": [0.0, 0.2],
        "ema": [0.0, 0.9],
    }
    common = {"n_trials": 9, "max_epochs": 9, "cv": 2, "dtype": "float64", "verbose": 0}
    common |= {"space": space, "method": method, "scoring": "neg_log_loss"}
    eager, fast = (gputune.tune("mlp", X, y, backend=b, **common) for b in ("eager", "compiled"))
    assert [t.state for t in eager.trials] == [t.state for t in fast.trials]
    np.testing.assert_allclose(fast.curves, eager.curves, rtol=1e-9)
    assert fast.best_params == eager.best_params
