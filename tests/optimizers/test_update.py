"""The in-place updates equal the pure rules, the pure rules torch.optim, and adapted rates the
drop-in optimizers."""

import itertools
import math

import numpy as np
import pytest
import torch

import reference
from gputune.ground.types import ONLINE
from gputune.optimizers.blocks import Block, Blocks
from gputune.optimizers.rules import MOMENTS, RULES, SCHEDULES, Rates, schedule_factor
from gputune.optimizers.update import IN_PLACE, OnlineUpdate, Update

F = 2
C = 3
BLOCKS = Blocks(
    [Block("wide", (F, 4, C, 5), 2), Block("plain", (F, C, 2, 2), 1), Block("one", (F, C), 1)]
)
STEPS = np.array([[4, 5, 3], [4, 4, 3]])  # an epoch, of each member


def stacked(flat):
    return {k: v.flatten(0, 1).clone() for k, v in BLOCKS.by_member(flat).items()}


def configs_of(optimizer, *, alike=False, schedules=("constant",) * C, **more):
    numbers = {"lr": 0.01, "weight_decay": 0.03, "momentum": 0.3, "hypergrad_lr": 0.1}
    return [
        {"optimizer": optimizer, "schedule": schedules[c], "hypergrad_rule": "multiplicative"}
        | {key: value * (1 if alike else 1 + c) for key, value in numbers.items()}
        | more
        for c in range(C)
    ]


def make_update(configs, flat, kind=Update):
    return kind(configs, BLOCKS, flat, steps=torch.from_numpy(STEPS), horizon=4)


def empty_moments(optimizer, params):
    return {
        name: {k: torch.zeros_like(w) for k, w in params.items()} for name in MOMENTS[optimizer]
    }


def of_members(configs, key):
    return np.tile([config[key] for config in configs], (F, 1))


@pytest.mark.parametrize("name", sorted(RULES))
@pytest.mark.parametrize(
    ("alike", "schedules"),
    [
        (True, ("constant",) * 3),
        (False, ("constant",) * 3),
        (True, ("cosine", "constant", "cosine")),
        (False, ("coslog4", "warmup+cosine", "flat_cos")),
    ],
)
def test_in_place_equals_the_pure_rule(name, alike, schedules):
    g = torch.Generator().manual_seed(0)
    flat = torch.randn(BLOCKS.size, generator=g, dtype=torch.float64)
    configs = configs_of(name, alike=alike, schedules=schedules)
    params = stacked(flat)
    moments = empty_moments(name, params)
    update = make_update(configs, flat)
    for epoch in range(2):
        update.clock.begin(epoch)
        for step in range(STEPS.max()):
            grad = torch.randn(BLOCKS.size, generator=g, dtype=torch.float64)
            active = step < STEPS
            done = epoch * STEPS + np.minimum(step, STEPS)
            factors = [
                schedule_factor(s, done[:, c], 4 * STEPS[:, c]) for c, s in enumerate(schedules)
            ]
            lr = of_members(configs, "lr") * np.stack(factors, 1)
            tables = (
                lr,
                of_members(configs, "weight_decay"),
                of_members(configs, "momentum"),
                done + 1,
            )
            rates = Rates(*(torch.from_numpy(table.flatten().astype(float)) for table in tables))
            new, new_moments = RULES[name](params, stacked(grad), moments, rates)
            on = torch.from_numpy(active.flatten())
            params = _where(on, new, params)
            moments = {m: _where(on, new_moments[m], part) for m, part in moments.items()}
            update.step(flat, grad, None if active.all() else torch.from_numpy(active))
    for k, w in stacked(flat).items():
        torch.testing.assert_close(w, params[k], rtol=1e-12, atol=1e-13)
    for moment, part in zip(update.state(), moments.values()):
        for k, w in stacked(moment).items():
            torch.testing.assert_close(w, part[k], rtol=1e-12, atol=1e-15)


def _where(on, new, old):
    return {k: torch.where(on.view(-1, *[1] * (w.dim() - 1)), new[k], w) for k, w in old.items()}


@pytest.mark.parametrize("optimizer", sorted(RULES))
@pytest.mark.parametrize("key", ["lr", "weight_decay", "momentum"])
def test_numbers_beyond_the_dtype_neither_fail_nor_touch_a_neighbour(optimizer, key):
    def after(values):
        configs = [{**c, key: v} for c, v in zip(configs_of(optimizer, alike=True), values)]
        theta = torch.ones(BLOCKS.size)
        update = make_update(configs, theta)
        for _ in range(4):
            update.step(theta, torch.ones(BLOCKS.size), None)
        return BLOCKS.by_member(theta)["plain"]

    alone = after((1e-3, 2e-3, 3e-3))
    beside = after((1e300, 2e-3, 1e300))
    assert torch.equal(alone[:, 1], beside[:, 1])
    assert key != "lr" or not beside[:, 0].isfinite().any()
    after((1e300,) * C)


@pytest.mark.parametrize("name", [*IN_PLACE, "rmsprop"])
def test_the_pure_rules_equal_torch_optim(name):
    makers = {
        "sgd": lambda w: torch.optim.SGD(w, lr=0.05, momentum=0.9, weight_decay=0.1),
        "nesterov": lambda w: torch.optim.SGD(
            w, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True
        ),
        "adam": lambda w: torch.optim.Adam(w, lr=0.05, weight_decay=0.1),
        "adamw": lambda w: torch.optim.AdamW(w, lr=0.05, weight_decay=0.1),
        "rmsprop": lambda w: torch.optim.RMSprop(w, lr=0.05, momentum=0.9, weight_decay=0.1),
    }
    weight = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain = torch.nn.Parameter(weight[0].clone())
    optimizer = makers[name]([plain])
    params = {"w": weight}
    moments = empty_moments(name, params)
    for step in range(20):
        optimizer.zero_grad()
        (plain.sin().sum() + (plain**2).sum()).backward()
        optimizer.step()
        grads = {"w": params["w"].cos() + 2 * params["w"]}
        rates = Rates(*(torch.tensor([v], dtype=torch.float64) for v in (0.05, 0.1, 0.9, step + 1)))
        params, moments = RULES[name](params, grads, moments, rates)
    torch.testing.assert_close(params["w"][0], plain.detach(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_decay_schedule_adds_no_zeros_to_the_gradient(monkeypatch, optimizer):
    """adamw decays in its step, so a schedule of the decay needs no pass over the gradient."""
    passes = []
    add_product = Blocks.add_product_

    def counted(blocks, total, *others):
        passes.append(total)
        add_product(blocks, total, *others)

    monkeypatch.setattr(Blocks, "add_product_", counted)
    flat = torch.ones(BLOCKS.size)
    configs = configs_of(optimizer, weight_decay_schedule="cosine")
    grad = torch.ones_like(flat)
    make_update(configs, flat).step(flat, grad)
    assert any(total is grad for total in passes) == (optimizer == "adam")


def test_the_state_of_trials_that_stay_is_carried_over():
    configs = configs_of("adamw")
    keep = torch.tensor([0, 2])
    flat = torch.randn(BLOCKS.size, generator=torch.Generator().manual_seed(2))
    update = make_update(configs, flat)
    update.step(flat, torch.ones(BLOCKS.size), None)
    moments = [m.clone() for m in update.moments]
    less = BLOCKS.subset(2)
    steps = torch.from_numpy(STEPS[:, [0, 2]])
    update.select([configs[0], configs[2]], less, keep, BLOCKS.select(flat, keep), steps=steps)
    for moment, before in zip(update.moments, moments, strict=True):
        assert torch.equal(moment, BLOCKS.select(before, keep))
    torch.testing.assert_close(update.lr, torch.tensor([[0.01, 0.03]] * F, dtype=torch.float64))


def _torch_schedule(word, optimizer, total):
    torch_schedules = torch.optim.lr_scheduler
    warmup = total // 10
    cosine = torch_schedules.CosineAnnealingLR
    formulas = {
        "constant": lambda step: 1.0,
        "coslog4": lambda step: (1 - math.cos(2 * math.pi * math.log2(1 + 15 * step / total))) / 2,
        "flat_cos": lambda step: 0.5 * (1 + math.cos(math.pi * max(0.0, 2 * step / total - 1))),
    }
    if word in formulas:
        return torch_schedules.LambdaLR(optimizer, formulas[word])
    if word == "linear":
        return torch_schedules.LinearLR(optimizer, 1.0, 0.0, total)
    if word == "one_cycle":
        return torch_schedules.OneCycleLR(optimizer, 1.0, total, cycle_momentum=False)
    if word == "warmup+cosine" and warmup:
        rising = torch_schedules.LinearLR(optimizer, 1 / (warmup + 1), 1.0, warmup)
        return torch_schedules.SequentialLR(
            optimizer, [rising, cosine(optimizer, total - warmup)], [warmup]
        )
    return cosine(optimizer, total)


@pytest.mark.parametrize("word", sorted(SCHEDULES))
@pytest.mark.parametrize("total", [1, 2, 3, 4, 9, 10, 47])
def test_schedules_equal_those_of_torch(word, total):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = _torch_schedule(word, optimizer, total)
    rates = []
    for step in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step + 1 < total:
            scheduler.step()
    factors = schedule_factor(word, np.arange(total), np.full(total, total))
    np.testing.assert_allclose(factors, rates, rtol=0, atol=1e-12)


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
    # ``ragged``: at every step one member has none. A schedule's factor scales the adapted rate and
    # is forgotten.
    g = torch.Generator().manual_seed(0)
    flat = torch.randn(BLOCKS.size, generator=g, dtype=torch.float64)
    more = {"weight_decay": 0.0} if alike else {"schedule": "cosine"}
    configs = configs_of(name, alike=alike, **more)
    update = make_update(configs, flat, OnlineUpdate)
    members = members_of(flat)
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
        factor = schedule_factor(configs[0]["schedule"], done, 4 * STEPS)
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
    update = make_update(configs_of(name, weight_decay=0.0), flat, OnlineUpdate)
    before = update.rate.clone()
    for value in (0.0, 0.0, math.nan):
        update.step(flat, torch.full_like(flat, value), None)
        assert torch.equal(update.rate, before)


@pytest.mark.parametrize("name", ["sgdhd", "adamwhd"])
def test_the_rates_of_trials_that_stay_are_carried_over(name):
    g = torch.Generator().manual_seed(2)
    flat = torch.randn(BLOCKS.size, generator=g).double()
    keep = torch.tensor([0, 2])
    configs = configs_of(name)
    grads = [torch.randn(BLOCKS.size, generator=g).double() for _ in range(4)]
    less = flat.clone()
    small = make_update(configs, flat, OnlineUpdate)
    whole = make_update(configs, flat, OnlineUpdate)
    for step, grad in enumerate(grads, 1):
        whole.step(flat, grad.clone(), None)
        if step == 3:
            less = BLOCKS.select(less, keep)
            kept = [configs[0], configs[2]]
            done = small.clock.done[:, keep]
            small.select(kept, BLOCKS.subset(2), keep, less, steps=torch.from_numpy(STEPS)[:, keep])
            small.clock.done.copy_(done)  # trials leave between epochs, where begin() counts anew
        small.step(less, grad.clone() if step < 3 else BLOCKS.select(grad, keep), None)
    torch.testing.assert_close(less, BLOCKS.select(flat, keep), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(small.rate, whole.rate[:, keep], rtol=1e-13, atol=0)
