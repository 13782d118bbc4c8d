"""The update whose numbers lie on the device equals the one that is told them by the host."""

import numpy as np
import pytest
import torch

from gputune.engine.blocks import Block, Blocks
from gputune.engine.graph_update import GraphUpdate
from gputune.engine.update import Hyper, Update, schedule_factor

F, C = 2, 3
BLOCKS = Blocks([Block("wide", (F, 4, C, 5), 2), Block("plain", (F, C, 2, 2), 1)])
STEPS = np.array([[4, 5, 3], [4, 4, 3]])  # an epoch, of each member


def configs_of(optimizer, *, alike, schedules=("constant",) * C):
    keys = ("lr", "weight_decay", "momentum")
    first = {"lr": 0.01, "weight_decay": 0.03, "momentum": 0.5}
    return [
        {"optimizer": optimizer, "schedule": schedules[c], **{k: first[k] * (1 if alike else 1 + c) for k in keys}}
        for c in range(C)
    ]  # fmt: skip


def hyper_of(configs):
    return Hyper(*(np.tile([c[k] for c in configs], (F, 1)) for k in ("lr", "weight_decay", "momentum")))


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam", "adamw"])
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("schedules", [("constant",) * 3, ("cosine", "constant", "cosine")])
def test_it_equals_the_update_of_the_host(optimizer, alike, schedules):
    g = torch.Generator().manual_seed(0)
    configs = configs_of(optimizer, alike=alike, schedules=schedules)
    theta = torch.randn(BLOCKS.size, generator=g, dtype=torch.float64)
    expected = theta.clone()
    found = GraphUpdate(configs, BLOCKS, theta, steps=torch.from_numpy(STEPS), horizon=3)
    host = Update(optimizer, BLOCKS, hyper_of(configs), expected)
    for epoch in range(2):
        found.begin(epoch)
        for step in range(STEPS.max()):
            grad = torch.randn(BLOCKS.size, generator=g, dtype=torch.float64)
            active = step < STEPS
            done = epoch * STEPS + np.minimum(step, STEPS - 1)
            factors = [schedule_factor(s, done[:, c], 3 * STEPS[:, c]) for c, s in enumerate(schedules)]
            if active.all():
                active = None
            host.step(expected, grad.clone(), count=done + 1, factor=np.stack(factors, 1), active=active)
            found.step(theta, grad, None if active is None else torch.from_numpy(active))
    torch.testing.assert_close(theta, expected, rtol=1e-12, atol=1e-14)
    for moment, other in zip(found.moments, host.state(), strict=True):
        torch.testing.assert_close(moment, other, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam", "adamw"])
@pytest.mark.parametrize("key", ["lr", "weight_decay", "momentum"])
def test_numbers_beyond_the_dtype_neither_fail_nor_touch_a_neighbour(optimizer, key):
    def after(values):
        configs = [{**c, key: v} for c, v in zip(configs_of(optimizer, alike=True), values)]
        theta = torch.ones(BLOCKS.size)
        update = GraphUpdate(configs, BLOCKS, theta, steps=torch.from_numpy(STEPS), horizon=3)
        for _ in range(4):
            update.step(theta, torch.ones(BLOCKS.size), None)
        return BLOCKS.by_member(theta)["plain"]

    alone, beside = after((1e-3, 2e-3, 3e-3)), after((1e300, 2e-3, 1e300))
    assert torch.equal(alone[:, 1], beside[:, 1])
    assert key != "lr" or not beside[:, 0].isfinite().any()
    after((1e300,) * C)


def test_the_state_of_trials_that_stay_is_carried_over():
    configs, keep = configs_of("adamw", alike=False), torch.tensor([0, 2])
    flat = torch.randn(BLOCKS.size, generator=torch.Generator().manual_seed(2))
    update = GraphUpdate(configs, BLOCKS, flat, steps=torch.from_numpy(STEPS), horizon=3)
    update.step(flat, torch.ones(BLOCKS.size), None)
    moments, less = [m.clone() for m in update.moments], BLOCKS.subset(2)
    steps = torch.from_numpy(STEPS[:, [0, 2]])
    update.select([configs[0], configs[2]], less, keep, BLOCKS.select(flat, keep), steps)
    for moment, before in zip(update.moments, moments, strict=True):
        assert torch.equal(moment, BLOCKS.select(before, keep))
    assert update.lr.tolist() == [[0.01, 0.03]] * F
