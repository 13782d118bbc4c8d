"""Members that adapt their rates together equal the same networks alone with the drop-in optimizers."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris

import gputune
import reference
from gputune.engine import eager
from gputune.engine.blocks import Block, Blocks
from gputune.engine.cost import trial_cost
from gputune.engine.mlp import StackedMLP
from gputune.engine.online import OnlineHyper, OnlineUpdate
from gputune.engine.population import populations
from gputune.engine.scoring import make_scoring
from gputune.engine.train import train
from gputune.errors import InputError
from gputune.search.config import legal_keys
from gputune.search.random import default_space
from gputune.types import ONLINE
from problems import Linear, fill, largest_difference, make_data, rows_of, shape_of, train_together

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


def hyper(**more):
    values = np.linspace(0.001, 0.02, F * C).reshape(F, C)
    tables = {"lr": values, "weight_decay": values * 3, "momentum": 0.5 + values, "hypergrad_lr": 10 * values}
    return OnlineHyper(**tables | more)


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
    same = {"weight_decay": np.zeros((F, C)), "momentum": np.full((F, C), 0.9)} if alike else {}
    tables = hyper(**same)
    update, members, count = OnlineUpdate(name, BLOCKS, tables, flat), members_of(flat), np.ones((F, C))
    keys = ("lr", "weight_decay", "momentum", "hypergrad_lr")
    optimizers = {
        at: reference.make_optimizer(
            torch.nn.ParameterList(params), {"optimizer": name} | {k: getattr(tables, k)[at] for k in keys}
        )
        for at, params in members.items()
    }
    for step in range(12):
        grad = torch.randn(BLOCKS.size, generator=g, dtype=torch.float64)
        active = np.ones((F, C), bool)
        if ragged:
            active[step % F, step % C] = False
        factor = np.ones((F, C)) if alike else np.linspace(0.1, 1, F * C).reshape(F, C) / (1 + step)
        for at, others in members_of(grad).items():
            if active[at]:
                group = optimizers[at].param_groups[0]
                group["lr"] *= factor[at]
                for p, own in zip(optimizers[at].param_groups[0]["params"], others):
                    p.grad = own.detach()
                optimizers[at].step()
                group["lr"] /= factor[at]
        update.step(flat, grad, count=count.copy(), factor=factor, active=active if ragged else None)
        count += active
    found = members_of(flat)
    for at, optimizer in optimizers.items():
        for a, b in zip(found[at], optimizer.param_groups[0]["params"]):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
        assert update.rate[at].item() == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-11)
    assert len(set(update.rate.flatten().tolist())) == F * C


@pytest.mark.parametrize("name", ONLINE)
def test_zero_and_nan_gradients_leave_the_rate(name):
    flat = torch.ones(BLOCKS.size, dtype=torch.float64)
    tables = hyper(weight_decay=np.zeros((F, C)))
    update, ones = OnlineUpdate(name, BLOCKS, tables, flat), np.ones((F, C))
    for step, value in enumerate((0.0, 0.0, math.nan), 1):
        grad = torch.full_like(flat, value)
        update.step(flat, grad, count=step * ones, factor=ones, active=None)
        assert torch.equal(update.rate, torch.as_tensor(tables.lr))


@pytest.mark.parametrize("name", ["sgdhd", "adamwhd"])
def test_the_state_of_trials_that_stay_is_carried_over(name):
    g = torch.Generator().manual_seed(2)
    flat, ones, keep = torch.randn(BLOCKS.size, generator=g).double(), np.ones((F, C)), torch.tensor([0, 2])
    grads = [torch.randn(BLOCKS.size, generator=g).double() for _ in range(4)]
    less, small = flat.clone(), OnlineUpdate(name, BLOCKS, hyper(), flat)
    whole = OnlineUpdate(name, BLOCKS, hyper(), flat)
    for step, grad in enumerate(grads, 1):
        whole.step(flat, grad.clone(), count=step * ones, factor=ones, active=None)
        if step == 3:
            less, blocks = BLOCKS.select(less, keep), BLOCKS.subset(2)
            small.select(blocks, keep, less)
        here = ones if step < 3 else ones[:, :2]
        part = grad.clone() if step < 3 else BLOCKS.select(grad, keep)
        small.step(less, part, count=step * here, factor=here, active=None)
    torch.testing.assert_close(less, BLOCKS.select(flat, keep), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(small.rate, whole.rate[:, keep], rtol=1e-13, atol=0)


def test_sums_and_products_are_each_members_own():
    flat = torch.randn(BLOCKS.size, generator=torch.Generator().manual_seed(3)).double()
    total, values = BLOCKS.total(flat), torch.arange(6).double().view(F, C)
    ones = torch.ones_like(flat)
    BLOCKS.add_product_(ones, flat, values)
    assert torch.equal(ones, 1 + flat * BLOCKS.expand(values))
    for at, params in members_of(flat).items():
        assert total[at].item() == pytest.approx(sum(p.sum().item() for p in params), rel=1e-12)


def test_a_search_adapts_a_rate_per_member_and_refits(monkeypatch):
    seen = []

    class Seen(OnlineUpdate):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.begin = self.rate.clone()
            seen.append(self)

    monkeypatch.setattr(eager, "OnlineUpdate", Seen)
    X, y = load_iris(return_X_y=True)
    space = {"lr": [1e-3, 1e-2, 0.1], "momentum": [0.0, 0.9]}
    study = gputune.tune(
        "mlp",
        X,
        y,
        optimizer="sgdhd",
        space=space,
        n_trials=6,
        include_default=False,
        cv=3,
        max_epochs=8,
        workers=1,
        verbose=0,
    )
    assert all(trial.state == "complete" for trial in study.trials)
    rates = torch.cat([update.rate.flatten() for update in seen])
    assert len(set(rates.tolist())) == len(rates) == 6 * 3
    assert not any((update.rate == update.begin).any() for update in seen)
    model = study.best_model()
    assert model.predict(X).shape == y.shape
    assert study.best_score > 0.8


def test_a_user_module_adapts_its_rate():
    X, y = load_iris(return_X_y=True)
    scores = [
        gputune.tune(
            Linear, X, y, optimizer=name, space={"lr": 1e-4}, n_trials=1, include_default=False, cv=3, max_epochs=8,
            scoring="neg_log_loss", workers=1, verbose=0,
        ).best_score
        for name in ("sgdhd", "sgd")
    ]  # fmt: skip
    assert scores[0] > scores[1]


def test_hypergrad_lr_is_a_key_of_the_optimizers_that_read_it():
    X, y = load_iris(return_X_y=True)
    for name in ONLINE:
        assert "hypergrad_lr" in legal_keys("mlp", name)
        assert set(default_space("module", name)) == {"lr", "batch_size", "weight_decay", "hypergrad_lr"}
        assert "hypergrad_rule" in legal_keys("mlp", name)
    message = "must have only the keys .*, got 'hypergrad_lr'. Only the optimizers sgdhd, nesterovhd, adamhd, adamwhd"
    with pytest.raises(InputError, match=message):
        gputune.tune("mlp", X, y, space={"hypergrad_lr": [0.01]}, verbose=0)
    with pytest.raises(
        InputError, match=r"hypergrad_lr'\] must be a number in \[0, 1\), got 1.5. For example 0.02"
    ):
        gputune.tune("mlp", X, y, optimizer="adamhd", space={"hypergrad_lr": [1.5]}, verbose=0)


def test_momentum_and_weight_decay_default_as_those_of_the_plain_optimizers():
    names = ("sgd", "nesterov", "adam", "adamw")
    plain, online = fill(*({"optimizer": n} for n in names)), fill(*({"optimizer": f"{n}hd"} for n in names))
    for a, b in zip(plain, online):
        assert (a["weight_decay"], a["momentum"]) == (b["weight_decay"], b["momentum"])


def test_the_plan_counts_the_last_direction():
    data = make_data()
    (plain,), (online,) = (
        populations(fill({"optimizer": name, "width": 16, "depth": 1}), "mlp", rows=41)
        for name in ("adam", "adamhd")
    )
    more = trial_cost(online, data).trial_bytes - trial_cost(plain, data).trial_bytes
    size = (data.n_features + 1) * 16 + 17 * data.n_outputs
    assert more == data.n_folds * size * 8


def test_a_rule_whose_unit_depends_on_the_model_needs_a_value():
    X, y = load_iris(return_X_y=True)
    message = "must have a value for 'hypergrad_lr' beside hypergrad_rule='additive', whose unit depends on the model"
    with pytest.raises(InputError, match=message):
        gputune.tune("mlp", X, y, optimizer="sgdhd", space={"hypergrad_rule": "additive"}, verbose=0)


def test_a_space_that_never_draws_an_optimizer_that_adapts():
    X, y = load_iris(return_X_y=True)
    for optimizers in (["adam", "sgd"], "adam"):
        space = {"optimizer": optimizers, "hypergrad_lr": 0.1}
        with pytest.raises(
            InputError, match="'hypergrad_lr', which only the optimizers sgdhd, .* read, and draws"
        ):
            gputune.tune("mlp", X, y, optimizer="sgdhd", space=space, verbose=0)
