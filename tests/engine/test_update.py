"""The in-place updates equal the pure rules, and the pure rules equal torch.optim."""

import numpy as np
import pytest
import torch

from gputune.engine import update as update_module
from gputune.engine.blocks import Block, Blocks
from gputune.engine.rules import RULES, Rates, empty_moments
from gputune.engine.update import Hyper, Update, schedule_factor

F, C = 2, 3
BLOCKS = Blocks([Block("wide", (F, 4, C, 5), 2), Block("plain", (F, C, 2, 2), 1)])


def stacked(flat):
    return {k: v.flatten(0, 1).clone() for k, v in BLOCKS.by_member(flat).items()}


def hyper(alike):
    values = np.full((F, C), 0.01) if alike else np.linspace(0.001, 0.02, F * C).reshape(F, C)
    return Hyper(lr=values, weight_decay=values * 3, momentum=0.5 + values)


@pytest.mark.parametrize("name", sorted(RULES))
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("all_active", [True, False])
@pytest.mark.parametrize("fused_pays", [0, 10**9])
def test_in_place_equals_the_pure_rule(name, alike, all_active, fused_pays, monkeypatch):
    monkeypatch.setattr(update_module, "_FUSED_PAYS", fused_pays)
    g = torch.Generator().manual_seed(0)
    flat = torch.randn(BLOCKS.size, generator=g, dtype=torch.float64)
    h, params = hyper(alike), stacked(flat)
    moments, update = empty_moments(name, params), Update(name, BLOCKS, h, flat)
    count = np.zeros((F, C))
    for step in range(6):
        grad = torch.randn(BLOCKS.size, generator=g, dtype=torch.float64)
        active = np.ones((F, C), bool)
        if not all_active:
            active[step % F, step % C] = False
        factor = np.full((F, C), 0.5) if alike else np.linspace(0.1, 1, F * C).reshape(F, C)
        rates = Rates(
            *(torch.from_numpy(v.flatten()) for v in (h.lr * factor, h.weight_decay, h.momentum, count + 1))
        )
        new, new_moments = RULES[name](params, stacked(grad), moments, rates)
        on = torch.from_numpy(active.flatten())
        params = {k: torch.where(on.view(-1, *[1] * (w.dim() - 1)), new[k], w) for k, w in params.items()}
        moments = {
            m: {
                k: torch.where(on.view(-1, *[1] * (w.dim() - 1)), new_moments[m][k], w)
                for k, w in part.items()
            }
            for m, part in moments.items()
        }
        update.step(flat, grad, count=count + 1, factor=factor, active=None if all_active else active)
        count += active
    for k, w in stacked(flat).items():
        torch.testing.assert_close(w, params[k], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", sorted(RULES))
def test_the_pure_rules_equal_torch_optim(name):
    makers = {
        "sgd": lambda w: torch.optim.SGD(w, lr=0.05, momentum=0.9, weight_decay=0.1),
        "nesterov": lambda w: torch.optim.SGD(w, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
        "adam": lambda w: torch.optim.Adam(w, lr=0.05, weight_decay=0.1),
        "adamw": lambda w: torch.optim.AdamW(w, lr=0.05, weight_decay=0.1),
    }
    weight = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain = torch.nn.Parameter(weight[0].clone())
    optimizer, params = makers[name]([plain]), {"w": weight}
    moments = empty_moments(name, params)
    for step in range(20):
        optimizer.zero_grad()
        (plain.sin().sum() + (plain**2).sum()).backward()
        optimizer.step()
        grads = {"w": params["w"].cos() + 2 * params["w"]}
        rates = Rates(*(torch.tensor([v], dtype=torch.float64) for v in (0.05, 0.1, 0.9, step + 1)))
        params, moments = RULES[name](params, grads, moments, rates)
    torch.testing.assert_close(params["w"][0], plain.detach(), rtol=1e-11, atol=1e-12)


def test_the_state_of_trials_that_stay_is_carried_over():
    flat = torch.randn(BLOCKS.size, generator=torch.Generator().manual_seed(2))
    update, keep = Update("adamw", BLOCKS, hyper(False), flat), torch.tensor([0, 2])
    grad = torch.randn(BLOCKS.size, generator=torch.Generator().manual_seed(3))
    ones = np.ones((F, C))
    update.step(flat, grad.clone(), count=ones, factor=ones, active=None)
    less, blocks = BLOCKS.select(flat, keep), BLOCKS.subset(2)
    update.step(flat, grad.clone(), count=2 * ones, factor=ones, active=None)
    other = Update("adamw", BLOCKS, hyper(False), flat)
    other.moments = [m.clone() for m in update.moments]
    other.select(blocks, keep, less)
    assert [m.numel() for m in other.moments] == [blocks.size, blocks.size]
    torch.testing.assert_close(other.moments[0], BLOCKS.select(update.moments[0], keep))


def test_the_cosine_falls_from_one_to_zero_as_torch_has_it():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for done in range(10):
        expected = optimizer.param_groups[0]["lr"]
        assert schedule_factor("cosine", np.array(done), np.array(10)) == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        scheduler.step()
    assert schedule_factor("constant", np.array([3.0]), np.array([10])) == 1


def test_one_training_may_use_both_forms(monkeypatch):
    monkeypatch.setattr(update_module, "_FUSED_PAYS", 0)
    both, plain = (
        torch.randn(BLOCKS.size, generator=torch.Generator().manual_seed(4)).double() for _ in range(2)
    )
    fused, unfused = Update("adamw", BLOCKS, hyper(True), both), Update("adamw", BLOCKS, hyper(True), plain)
    unfused.fused = None
    some = np.ones((F, C), bool)
    some[0, 1] = False
    for step in range(1, 7):
        grad = torch.randn(BLOCKS.size, generator=torch.Generator().manual_seed(step)).double()
        active, count = (None, np.full((F, C), step)) if step % 2 else (some, np.full((F, C), step))
        for update, flat in ((fused, both), (unfused, plain)):
            update.step(flat, grad.clone(), count=count.astype(float), factor=np.ones((F, C)), active=active)
    torch.testing.assert_close(both, plain, rtol=1e-12, atol=1e-13)
