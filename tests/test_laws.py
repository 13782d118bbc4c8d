"""The laws that must hold for any speed, over a grid of optimizers, widths, batch sizes, depths and
decays.
"""

import itertools
import math

import numpy as np
import pytest
import torch

import problems
from gputune.engine.mlp import StackedMLP
from gputune.ground.types import ONLINE
from gputune.population.kinds import hidden_widths
from gputune.population.population import populations
from problems import (
    assert_equals_plain_loop,
    fill,
    largest_difference,
    make_data,
    needs_compiled_code,
    scoring_of,
    shape_of,
    train,
    train_together,
)

OPTIMIZERS = [
    {"optimizer": "sgd", "weight_decay": 0.0},
    {"optimizer": "sgd", "weight_decay": 0.01, "momentum": 0.9},
    {"optimizer": "nesterov", "weight_decay": 0.01, "momentum": 0.8},
    {"optimizer": "adam", "weight_decay": 0.0},
    {"optimizer": "adam", "weight_decay": 0.01},
    {"optimizer": "adamw", "weight_decay": 0.1},
]
ADAPTIVE = [
    {"optimizer": "sgdhd"},
    {"optimizer": "sgdhd", "weight_decay": 0.01, "momentum": 0.9},
    {"optimizer": "nesterovhd", "weight_decay": 0.01, "momentum": 0.8},
    {"optimizer": "adamhd"},
    {"optimizer": "adamhd", "weight_decay": 0.01},
    {"optimizer": "adamwhd", "weight_decay": 0.1},
]
SIZES = [(8, 16), (8, 7), (19, 23), (48, 500)]  # width, batch size
# A recorded step is the eager one: it is taken through the grid once, in double precision.
BACKENDS = ["eager", pytest.param("compiled", marks=needs_compiled_code), "recorded"]


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request, monkeypatch, recorded_on_cpu):
    """Every law holds for every way to train."""
    monkeypatch.setattr(problems, "BACKEND", request.param)
    return request.param


eagerly = pytest.mark.parametrize("backend", ["eager"], indirect=True)  # as what is adaptive trains
not_recorded = pytest.mark.parametrize("backend", BACKENDS[:2], indirect=True)


def name_of(optimizer):
    return optimizer if isinstance(optimizer, str) else "-".join(map(str, optimizer.values()))


def each(optimizers):
    return pytest.mark.parametrize("optimizer", optimizers, ids=name_of)


def with_backends(optimizers, backends=("eager", "compiled", "recorded")):
    """Every optimizer with every backend that trains it; optimizers that adapt their rate train
    eagerly.
    """
    marks = {"compiled": needs_compiled_code}
    points = [
        pytest.param(
            optimizer, backend, marks=marks.get(backend, ()), id=f"{name_of(optimizer)}-{backend}"
        )
        for optimizer in optimizers
        for backend in (backends[:1] if name_of(optimizer).startswith(ONLINE) else backends)
    ]
    return pytest.mark.parametrize(("optimizer", "backend"), points, indirect=["backend"])


def epochs_of_50_steps(data, size):
    rows = min(len(fold.train) for fold in data.folds)
    return math.ceil(50 / math.ceil(rows / min(size, rows)))


@pytest.mark.parametrize(
    ("task", "dtype"),
    [
        ("multiclass", torch.float64),
        ("regression", torch.float32),
        pytest.param("multiclass", torch.float32, marks=pytest.mark.long),
        pytest.param("regression", torch.float64, marks=pytest.mark.long),
    ],
)
@each(OPTIMIZERS)
def test_law_1_together_equals_alone(optimizer, task, dtype, backend):
    """In double precision compiled code takes every size; of an eager step and a recorded one each
    takes a half."""
    classes = (task, dtype) == ("multiclass", torch.float64)
    if backend == "recorded" and not classes:
        pytest.skip("the step is the eager one")
    sizes = SIZES if classes and backend == "compiled" else SIZES[backend != "recorded" :: 2]
    data = make_data(task, dtype=dtype)
    kinds = [{**optimizer, "depth": depth, "lr": lr} for depth, lr in ((1, 1e-2), (2, 1e-3))]
    for width, size in sizes:
        configs = fill(*({**kind, "width": width, "batch_size": size} for kind in kinds))
        assert_equals_plain_loop(data, configs, epochs=epochs_of_50_steps(data, size))


def unlike(optimizer):
    """Configurations that share no width, no batch size and no rates, in one population."""
    sizes = [(16, 9, 0.01), (12, 11, 0.003), (9, 16, 0.01), (16, 14, 0.001)]
    configs = ({"width": width, "batch_size": size, "lr": lr} for width, size, lr in sizes)
    configs = fill(
        *({**optimizer, **c, "hypergrad_lr": 0.01 * i} for i, c in enumerate(configs, 1))
    )
    assert len(populations(configs, "mlp", rows=31)) == 1
    return configs


@with_backends([*OPTIMIZERS, *ADAPTIVE], ["eager", "compiled"])
def test_law_1_for_unlike_widths_and_batch_sizes_in_one_population(optimizer):
    assert_equals_plain_loop(make_data(), unlike(optimizer), epochs=10)


@with_backends([OPTIMIZERS[1], OPTIMIZERS[5]], ["eager", "compiled"])
def test_law_1_for_layers_of_unlike_widths(optimizer):
    widths = [(16, 3), (5, 14), 12]
    configs = fill(
        *({**optimizer, "width": width, "batch_size": 9, "lr": 0.01} for width in widths)
    )
    assert len(populations(configs, "mlp", rows=31)) == 1
    assert_equals_plain_loop(make_data(), configs, epochs=6)
    assert_equals_plain_loop(
        make_data(), fill({**optimizer, "width": (7, 20, 9), "lr": 0.01}), epochs=6
    )


@eagerly
@each(ADAPTIVE[-1:])
def test_law_1_for_adapted_rates_in_single_precision(optimizer):
    assert_equals_plain_loop(make_data(dtype=torch.float32), unlike(optimizer), epochs=8)


@eagerly
@each(ADAPTIVE)
def test_law_1_for_adapted_rates_of_one_batch_size_and_of_one_trial(optimizer):
    for lrs in ([1e-2, 1e-3], [1e-2]):
        configs = fill(*({**optimizer, "width": 8, "batch_size": 16, "lr": lr} for lr in lrs))
        assert_equals_plain_loop(make_data("regression"), configs, epochs=10)


@pytest.mark.parametrize("rule", ["additive", "normalized"])
@eagerly
@each(ADAPTIVE[1::2])
def test_law_1_for_the_other_rules_of_adapted_rates(optimizer, rule):
    base = {**optimizer, "width": 8, "lr": 1e-2, "hypergrad_rule": rule}
    rates = ((16, 1e-4), (9, 1e-3), (12, 1e-2))
    configs = fill(*({**base, "batch_size": size, "hypergrad_lr": rate} for size, rate in rates))
    assert len(populations(configs, "mlp", rows=31)) == 1
    assert_equals_plain_loop(make_data(), configs, epochs=5)
    mixed = [configs[0], {**configs[1], "hypergrad_rule": "multiplicative"}]
    assert len(populations(mixed, "mlp", rows=31)) == 2
    assert_equals_plain_loop(make_data(), mixed, epochs=3)


@not_recorded
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_law_1_for_activations_and_dropout(activation):
    ways = itertools.product((0.0, 0.3), SIZES[:3])
    configs = ({"dropout": p, "width": width, "batch_size": size} for p, (width, size) in ways)
    configs = fill(*({**config, "activation": activation, "depth": 3} for config in configs))
    assert_equals_plain_loop(make_data(), configs, epochs=6)


@pytest.mark.parametrize("activations", [("relu", "tanh"), ("gelu", "relu"), ("tanh", "silu")])
def test_law_1_for_activations_and_dropout_of_each_layer(activations):
    rates = [(0.3, 0.0), (0.0, 0.5), 0.2, 0.0]
    configs = fill(
        *(
            {"dropout": rate, "width": width, "batch_size": size, "activation": activations}
            for rate, (width, size) in zip(rates, [(8, 16), ((9, 5), 16), ((3, 8), 16), (8, 7)])
        )
    )
    assert len(populations(configs[:3], "mlp", rows=31)) == 1
    assert_equals_plain_loop(make_data(), configs, epochs=4)


@eagerly
def test_one_activation_for_all_layers_is_the_population_of_its_tuple():
    configs = fill({"activation": "tanh"}, {"activation": ("tanh", "tanh")})
    assert len(populations(configs, "mlp", rows=31)) == 1
    configs = fill({"activation": "tanh"}, {"activation": ("tanh", "relu")})
    assert len(populations(configs, "mlp", rows=31)) == 2


@not_recorded
@pytest.mark.parametrize("optimizer", ["adamw", "sgdhd"])
@pytest.mark.parametrize("size", [13, 500])
@pytest.mark.parametrize("weights", [False, True])
def test_law_1_for_weights_and_linear_models(size, weights, optimizer):
    for task in ("binary", "regression"):
        data = make_data(task, weights=weights)
        configs = ({"batch_size": size}, {"batch_size": size, "lr": 0.1}, {"batch_size": size + 1})
        assert_equals_plain_loop(
            data, fill(*configs, optimizer=optimizer), kind="linear", epochs=10
        )
        assert_equals_plain_loop(data, fill({"batch_size": size, "width": 5}), epochs=5)


def test_law_1_for_schedules_that_end_early():
    configs = (
        {"schedule": "cosine", "batch_size": 10},
        {"batch_size": 10},
        {"schedule": "cosine", "batch_size": 13},
    )
    assert_equals_plain_loop(make_data(), fill(*configs), epochs=4, horizon=9)


def mixed_configs(*optimizers):
    ways = itertools.product((1e-3, 1e-2), SIZES, (0.0, 0.2), optimizers)
    return fill(
        *(
            {
                "lr": lr,
                "batch_size": size,
                "width": width,
                "dropout": p,
                "optimizer": name,
                "hypergrad_lr": 0.05,
            }
            for lr, (width, size), p, name in ways
        )
    )


def assert_chunks_and_order_change_no_member(configs, chunk):
    data = make_data()
    scoring = scoring_of(data, "neg_log_loss")
    together, curves = train_together(data, configs, scoring=scoring)
    order = np.random.RandomState(0).permutation(len(configs))
    for start in range(0, len(order), chunk):
        part = order[start : start + chunk]
        alone, alone_curves = train_together(data, [configs[i] for i in part], scoring=scoring)
        np.testing.assert_allclose(alone_curves, curves[part], rtol=1e-9)
        for (f, i), member in alone.items():
            assert largest_difference(member, together[f, part[i]]) <= 1e-10


@pytest.mark.parametrize("chunk", [1, pytest.param(3, marks=pytest.mark.long), 7])
def test_law_2_chunks_and_order_change_no_member(chunk):
    """With chunks of one it is law 4 as well: a trial alone gives its scores again."""
    assert_chunks_and_order_change_no_member(mixed_configs("adamw"), chunk)


@eagerly
def test_law_2_chunks_and_order_change_no_member_with_adapted_rates():
    assert_chunks_and_order_change_no_member(mixed_configs("sgdhd", "adamwhd"), 5)


@with_backends(["sgd", *ONLINE])
def test_law_2_a_diverged_member_leaves_the_others_bit_for_bit(optimizer):
    data = make_data(dtype=torch.float32)
    scoring = scoring_of(data)
    # With sizes that divide no fold, some steps are taken by some members only.
    sizes, lr = ([9, 10, 11, 12], 1e38) if optimizer in ONLINE else ([16] * 4, 1e30)
    calm = fill(*({"lr": 1e-2, "optimizer": optimizer, "batch_size": size} for size in sizes))
    wild = [dict(config) for config in calm]
    wild[1]["lr"] = lr
    expected, _ = train_together(data, calm, epochs=2, scoring=scoring)
    found, curves = train_together(data, wild, epochs=2, scoring=scoring)
    assert np.isnan(curves[1]).any()
    for f, i in itertools.product(range(data.n_folds), (0, 2, 3)):
        for a, b in zip(found[f, i].parameters(), expected[f, i].parameters()):
            assert torch.equal(a, b)


@with_backends(["sgd", "adamw", "nesterov", *ONLINE])
def test_law_2_trials_that_leave_change_no_other(optimizer):
    data = make_data()
    scoring = scoring_of(data)
    wild = fill(
        *({"lr": lr, "optimizer": optimizer, "batch_size": 16} for lr in (1e-2, 1e200, 3e-2))
    )
    calm = [{**config, "lr": min(config["lr"], 3e-2)} for config in wild]
    expected, _ = train_together(data, calm, epochs=6, scoring=scoring)
    found, curves = train_together(data, wild, epochs=6, scoring=scoring)
    assert np.isnan(curves[1]).any()
    assert (0, 1) not in found
    for f, i in itertools.product(range(data.n_folds), (0, 2)):
        assert largest_difference(found[f, i], expected[f, i]) <= 1e-10


@with_backends(["sgd", "adam", "adamw", *ONLINE])
def test_law_3_padded_units_stay_zero(optimizer, backend):
    data = make_data()
    widths = (3, 16, 9, (9, 5))
    configs = fill(*({"width": width, "optimizer": optimizer} for width in widths))
    network = StackedMLP("mlp", configs, shape_of(data), seed=0)
    trained = train(network, data, configs, seed=0, epochs=5, horizon=5, backend=backend)
    params = network.blocks.by_member(trained.flat)
    for c, config in enumerate(configs):
        own = hidden_widths(config)
        for layer, width in enumerate(own):
            assert not params[f"weight{layer}"][:, c, :, width:].any()
            assert not params[f"bias{layer}"][:, c, width:].any()
            assert not params[f"weight{layer + 1}"][:, c, width:].any()
        assert params["weight1"][:, c, : own[0], : own[1]].all()


def test_law_6_a_diverged_trial_is_nan_from_then_on():
    data = make_data()
    configs = fill({"lr": 1e-2, "optimizer": "sgd"}, {"lr": 1e300, "optimizer": "sgd"})
    _, curves = train_together(data, configs, epochs=4, scoring=scoring_of(data))
    assert np.isfinite(curves[0]).all()
    assert np.isnan(curves[1, -1]).all()
