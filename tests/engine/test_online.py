"""Members that adapt their rates together equal the same networks alone with the drop-in optimizers."""

import itertools
import math

import numpy as np
import pytest
import torch

import reference
from gputune.engine.blocks import Block, Blocks
from gputune.engine.mlp import StackedMLP
from gputune.engine.online import OnlineUpdate
from gputune.engine.population import populations
from gputune.engine.scoring import make_scoring
from gputune.engine.train import train
from gputune.engine.update import schedule_factor
from gputune.types import ONLINE
from problems import fill, largest_difference, make_data, rows_of, shape_of, train_together

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
OPTIMIZERS = [
    {"optimizer": "sgdhd"},
    {"optimizer": "sgdhd", "weight_decay": 0.01, "momentum": 0.9},
    {"optimizer": "nesterovhd", "weight_decay": 0.01, "momentum": 0.8},
    {"optimizer": "adamhd"},
    {"optimizer": "adamhd", "weight_decay": 0.01},
    {"optimizer": "adamwhd", "weight_decay": 0.1},
]
each_optimizer = pytest.mark.parametrize(
    "optimizer", OPTIMIZERS, ids=lambda o: "-".join(str(value) for value in o.values())
)

F, C = 2, 3
BLOCKS = Blocks([Block("wide", (F, 4, C, 5), 2), Block("plain", (F, C, 2, 2), 1), Block("one", (F, C), 1)])


def assert_equals_plain_loop(data, configs, *, kind="mlp", epochs):
    together, _ = train_together(data, configs, kind=kind, epochs=epochs)
    for (f, i), member in together.items():
        x, y, weights = rows_of(data, f)
        config = configs[i] if kind == "mlp" else {**configs[i], "depth": 0}
        alone = reference.train_mlp(x, y, config, n_outputs=data.n_outputs, epochs=epochs, weights=weights)
        worst = largest_difference(member, alone)
        assert worst <= TOLERANCE[data.dtype], f"fold {f}, {configs[i]}: {worst:.1e}"
    assert len(together) == data.n_folds * len(configs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@each_optimizer
def test_law_1_for_unlike_widths_batch_sizes_and_rates_in_one_population(optimizer, dtype):
    data = make_data(dtype=dtype)
    sizes = [(16, 9, 0.01), (12, 11, 0.003), (9, 16, 0.01), (16, 14, 0.001)]
    configs = fill(
        *(
            {**optimizer, "width": width, "batch_size": size, "lr": lr, "hypergrad_lr": 0.01 * (1 + i)}
            for i, (width, size, lr) in enumerate(sizes)
        )
    )
    assert len(populations(configs, "mlp", rows=41)) == 1
    assert_equals_plain_loop(data, configs, epochs=12)


@each_optimizer
def test_law_1_for_one_batch_size_and_one_trial(optimizer):
    data = make_data("regression")
    for lrs in ([1e-2, 1e-3], [1e-2]):
        assert_equals_plain_loop(
            data, fill(*({**optimizer, "width": 8, "batch_size": 16, "lr": lr} for lr in lrs)), epochs=15
        )


@pytest.mark.parametrize("rule", ["additive", "normalized"])
@each_optimizer
def test_law_1_for_the_other_rules(optimizer, rule):
    data = make_data()
    configs = fill(
        *(
            {
                **optimizer,
                "width": 8,
                "batch_size": size,
                "lr": 1e-2,
                "hypergrad_lr": rate,
                "hypergrad_rule": rule,
            }
            for size, rate in ((16, 1e-4), (9, 1e-3), (12, 1e-2))
        )
    )
    assert len(populations(configs, "mlp", rows=41)) == 1
    assert_equals_plain_loop(data, configs, epochs=8)
    mixed = [configs[0], {**configs[1], "hypergrad_rule": "multiplicative"}]
    assert len(populations(mixed, "mlp", rows=41)) == 2
    assert_equals_plain_loop(data, mixed, epochs=3)


@pytest.mark.parametrize("weights", [False, True])
def test_law_1_for_linear_models(weights):
    data = make_data("binary", weights=weights)
    configs = fill(*({"optimizer": "sgdhd", "batch_size": 8, "lr": lr} for lr in (0.1, 0.01)))
    assert_equals_plain_loop(data, configs, kind="linear", epochs=8)


def mixed_configs():
    shapes = [(8, 16), (8, 7), (19, 33)]
    return fill(
        *(
            {"lr": lr, "batch_size": size, "width": width, "optimizer": name, "hypergrad_lr": 0.05}
            for lr, (width, size), name in itertools.product((1e-3, 1e-2), shapes, ("sgdhd", "adamwhd"))
        )
    )


@pytest.mark.parametrize("chunk", [1, 5])
def test_law_2_chunks_and_order_change_no_member(chunk):
    data, configs = make_data(), mixed_configs()
    together, _ = train_together(data, configs)
    order = np.random.RandomState(0).permutation(len(configs))
    for start in range(0, len(order), chunk):
        part = order[start : start + chunk]
        alone, _ = train_together(data, [configs[i] for i in part])
        for (f, i), member in alone.items():
            assert largest_difference(member, together[f, part[i]]) <= 1e-10


@pytest.mark.parametrize("name", ONLINE)
def test_law_2_a_diverged_member_leaves_the_others_bit_for_bit(name):
    data = make_data(dtype=torch.float32)
    # With sizes that divide no fold, some steps are taken by some members only.
    calm = fill(*({"lr": 1e-2, "optimizer": name, "batch_size": size} for size in (9, 10, 11, 12)))
    wild = [dict(config) for config in calm]
    wild[1]["lr"] = 1e38
    expected, _ = train_together(data, calm, epochs=2)
    found, _ = train_together(data, wild, epochs=2)
    for f in range(data.n_folds):
        assert not all(bool(w.isfinite().all()) for w in found[f, 1].parameters())
    for f, i in itertools.product(range(data.n_folds), (0, 2, 3)):
        for a, b in zip(found[f, i].parameters(), expected[f, i].parameters()):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ONLINE)
def test_law_2_trials_that_leave_change_no_other(name):
    data = make_data()
    scoring = make_scoring(None, data.task, np.arange(3))
    lrs = (1e-2, 1e200, 3e-2)
    wild = fill(*({"lr": lr, "optimizer": name, "batch_size": 16} for lr in lrs))
    calm = [{**config, "lr": min(config["lr"], 3e-2)} for config in wild]
    expected, _ = train_together(data, calm, epochs=6, scoring=scoring)
    found, curves = train_together(data, wild, epochs=6, scoring=scoring)
    assert np.isnan(curves[1]).any()
    assert (0, 1) not in found
    for f, i in itertools.product(range(data.n_folds), (0, 2)):
        assert largest_difference(found[f, i], expected[f, i]) <= 1e-10


@pytest.mark.parametrize("name", ONLINE)
def test_law_3_padded_units_stay_zero(name):
    data = make_data()
    configs = fill(*({"width": width, "optimizer": name} for width in (3, 16, 9)))
    network = StackedMLP("mlp", configs, shape_of(data), seed=0)
    params = network.blocks.by_member(train(network, data, configs, seed=0, epochs=5, horizon=5).flat)
    for c, width in enumerate((3, 16, 9)):
        for outgoing, bias, incoming in (("weight0", "bias0", "weight1"), ("weight1", "bias1", "weight2")):
            assert not params[outgoing][:, c, :, width:].any()
            assert not params[bias][:, c, width:].any()
            assert not params[incoming][:, c, width:].any()


STEPS = torch.full((F, C), 100)  # an epoch, of each member


def configs_of(name, *, alike=False, **more):
    """Configurations of trials that all differ, or in their rates alone."""
    values = np.linspace(0.001, 0.02, C)
    decay, momentum = (np.zeros(C), np.full(C, 0.9)) if alike else (values * 3, 0.5 + values)
    return [
        {"optimizer": name, "schedule": "constant", "hypergrad_rule": "multiplicative", "lr": values[c],
         "weight_decay": decay[c], "momentum": momentum[c], "hypergrad_lr": 10 * values[c]} | more
        for c in range(C)
    ]  # fmt: skip


def make_update(configs, flat, horizon=1):
    return OnlineUpdate(configs, BLOCKS, flat, steps=STEPS, horizon=horizon)


def members_of(flat):
    """The parameters of each member, as plain parameters of their own."""
    views = BLOCKS.by_member(flat)
    return {
        (f, c): [view[f, c].clone().requires_grad_() for view in views.values()]
        for f, c in itertools.product(range(F), range(C))
    }


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("name", ONLINE)
def test_each_member_steps_like_the_drop_in_optimizer(name, alike, ragged):
    # ``ragged``: at every step one member has none. A schedule's factor scales the adapted rate and is forgotten.
    g = torch.Generator().manual_seed(0)
    flat = torch.randn(BLOCKS.size, generator=g, dtype=torch.float64)
    configs = configs_of(name, alike=alike, schedule="constant" if alike else "cosine")
    update, members = make_update(configs, flat), members_of(flat)
    done = np.zeros((F, C))
    optimizers = {
        (f, c): reference.make_optimizer(torch.nn.ParameterList(params), configs[c])
        for (f, c), params in members.items()
    }
    for step in range(12):
        grad = torch.randn(BLOCKS.size, generator=g, dtype=torch.float64)
        active = np.ones((F, C), bool)
        if ragged:
            active[step % F, step % C] = False
        factor = schedule_factor(configs[0]["schedule"], done, STEPS.numpy())
        for at, others in members_of(grad).items():
            if active[at]:
                group = optimizers[at].param_groups[0]
                group["lr"] *= factor[at]
                for p, own in zip(optimizers[at].param_groups[0]["params"], others):
                    p.grad = own.detach()
                optimizers[at].step()
                group["lr"] /= factor[at]
        update.step(flat, grad, torch.from_numpy(active) if ragged else None)
        done += active
    found = members_of(flat)
    for at, optimizer in optimizers.items():
        for a, b in zip(found[at], optimizer.param_groups[0]["params"]):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
        assert update.rate[at].item() == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-11)
    assert len(set(update.rate.flatten().tolist())) == F * C


@pytest.mark.parametrize("name", ONLINE)
def test_zero_and_nan_gradients_leave_the_rate(name):
    flat = torch.ones(BLOCKS.size, dtype=torch.float64)
    update = make_update(configs_of(name, weight_decay=0.0), flat)
    before = update.rate.clone()
    for value in (0.0, 0.0, math.nan):
        update.step(flat, torch.full_like(flat, value), None)
        assert torch.equal(update.rate, before)


@pytest.mark.parametrize("name", ["sgdhd", "adamwhd"])
def test_the_state_of_trials_that_stay_is_carried_over(name):
    g = torch.Generator().manual_seed(2)
    flat, keep, configs = (
        torch.randn(BLOCKS.size, generator=g).double(),
        torch.tensor([0, 2]),
        configs_of(name),
    )
    grads = [torch.randn(BLOCKS.size, generator=g).double() for _ in range(4)]
    less, small = flat.clone(), make_update(configs, flat)
    whole = make_update(configs, flat)
    for step, grad in enumerate(grads, 1):
        whole.step(flat, grad.clone(), None)
        if step == 3:
            less, kept, done = BLOCKS.select(less, keep), [configs[0], configs[2]], small.clock.done[:, keep]
            small.select(kept, BLOCKS.subset(2), keep, less, steps=STEPS[:, keep])
            small.clock.done.copy_(done)  # trials leave between epochs, where begin() counts anew
        small.step(less, grad.clone() if step < 3 else BLOCKS.select(grad, keep), None)
    torch.testing.assert_close(less, BLOCKS.select(flat, keep), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(small.rate, whole.rate[:, keep], rtol=1e-13, atol=0)
