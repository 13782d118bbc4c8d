"""Finite differences: equal to the exact modes where training is calm, a trend where it is not."""

import math

import pytest
import torch

from gputune.hypergradients.arguments import from_coordinate, speed, to_coordinate
from gputune.hypergradients.forward import forward
from gputune.hypergradients.inner import HYPERPARAMETERS, InnerProblem
from gputune.hypergradients.reverse import default_width, differences, reverse
from inner_problems import OF, OPTIMIZERS, Quadratics, StackedNets, chaotic, rule_of, tables_of


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_they_equal_reverse_mode(optimizer):
    training, tables = StackedNets(20, widths=(6, 3, 4), seeds=(0, 1, 2)), tables_of(optimizer, 3, segments=2)
    width = default_width(torch.float64)
    found = differences(InnerProblem(training, rule_of(optimizer), tables), OF[optimizer], width=width)
    exact = reverse(InnerProblem(training, rule_of(optimizer), tables), OF[optimizer])
    for name in OF[optimizer]:
        distance = (found.gradients[name] - exact.gradients[name]).abs().flatten(1).amax(1)
        assert (distance <= 1e-6 * exact.gradients[name].abs().flatten(1).amax(1)).all(), name
    torch.testing.assert_close(found.value, exact.value, rtol=1e-13, atol=0)
    torch.testing.assert_close(found.weights, exact.weights, rtol=1e-12, atol=1e-14)


def test_the_ratio_is_the_tangent_ratio_after_the_last_step():
    training, tables = StackedNets(20, widths=(6, 3)), tables_of("sgd", 2)
    tables["lr"] = tables["lr"][:, :, :1]
    found = differences(InnerProblem(training, "sgd", tables), ("lr",), width=1e-5)
    # Plain gradient descent that is calm: the tangent grows to the end, so the largest ratio is the last.
    torch.testing.assert_close(
        found.ratio, forward(InnerProblem(training, "sgd", tables), ("lr",)).ratio, rtol=1e-6, atol=0
    )


def test_only_the_training_at_the_values_themselves_is_watched():
    training, tables, seen = StackedNets(4), tables_of("sgd"), []
    differences(
        InnerProblem(training, "sgd", tables),
        ("lr",),
        width=0.1,
        watch=lambda step, w: seen.append((step, w)),
    )
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert torch.equal(seen[-1][1], InnerProblem(training, "sgd", tables).train())


def test_a_member_that_diverges_leaves_the_others_bit_for_bit():
    training, calm = StackedNets(6, widths=(6, 6, 6)), tables_of("adamw", 3, segments=2)
    wild = {name: table.clone() for name, table in calm.items()}
    wild["lr"][1] = wild["weight_decay"][1] = 1e200
    before, after = (
        differences(InnerProblem(training, "adamw", t), OF["adamw"], width=0.1) for t in (calm, wild)
    )
    assert chaotic(after.ratio).tolist() == [False, True, False]
    for name in OF["adamw"]:
        assert torch.equal(before.gradients[name][[0, 2]], after.gradients[name][[0, 2]])


def test_a_wide_step_sees_over_the_edge_of_stability():
    """At lr a = 2 the loss stays, below it falls, above it rises: a wide difference points down, to smaller rates."""
    a, w0 = torch.tensor([1.0]).double(), torch.tensor([1.0]).double()
    tables = {name: 0 * table for name, table in tables_of("sgd").items()}
    tables["lr"] = torch.tensor([[[1.95]]]).double()
    narrow, wide = (
        differences(InnerProblem(Quadratics(a, w0, 50), "sgd", tables), ("lr",), width=h) for h in (1e-6, 0.2)
    )
    assert 0 < narrow.gradients["lr"] < wide.gradients["lr"] < math.inf


def test_the_width_of_each_dtype():
    assert default_width(torch.float64) == pytest.approx(6.06e-6, rel=1e-2)
    assert default_width(torch.float32) == pytest.approx(4.92e-3, rel=1e-2)


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_coordinates(name):
    value = torch.tensor([1e-5, 0.1, 0.5, 0.999], dtype=torch.float64, requires_grad=True)
    coordinate = to_coordinate(name, value)
    torch.testing.assert_close(from_coordinate(name, coordinate), value)
    (slope,) = torch.autograd.grad(coordinate.sum(), value)
    torch.testing.assert_close(speed(name, value), 1 / slope)
    assert to_coordinate(name, torch.zeros(())) == -math.inf
    far = from_coordinate(name, torch.tensor(30.0, dtype=torch.float64))
    assert far < 1 if name in ("momentum", "beta1", "beta2") else far > 1
