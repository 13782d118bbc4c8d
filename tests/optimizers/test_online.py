"""Members that adapt their rates take the steps of the drop-in optimizers; the laws have their trainings."""

import itertools
import math

import numpy as np
import pytest
import torch

import reference
from gputune.optimizers.blocks import Block, Blocks
from gputune.optimizers.rules import schedule_factor
from gputune.optimizers.update import OnlineUpdate
from gputune.types import ONLINE

F, C = 2, 3
BLOCKS = Blocks([Block("wide", (F, 4, C, 5), 2), Block("plain", (F, C, 2, 2), 1), Block("one", (F, C), 1)])


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
    flat, keep = torch.randn(BLOCKS.size, generator=g).double(), torch.tensor([0, 2])
    configs = configs_of(name)
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
