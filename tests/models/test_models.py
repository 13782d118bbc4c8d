"""The stacked models equal their plain members."""

import pytest
import torch

from gputune.models import MLP, LogisticRegression, StackedLinear


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_stacked_mlp_equals_its_members(activation, depth):
    torch.manual_seed(0)
    stacked = MLP(5, 3, width=7, depth=depth, activation=activation, members=4).double()
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    together = stacked(x)
    assert together.shape == (4, 6, 3)
    for p in range(4):
        member = stacked.member(p)
        assert not any(isinstance(m, StackedLinear) for m in member.modules())
        torch.testing.assert_close(member(x[p]), together[p], rtol=1e-12, atol=1e-12)


def test_a_stacked_logistic_regression_equals_its_members():
    stacked = LogisticRegression(5, 3, members=4)
    x = torch.randn(4, 6, 5)
    for p in range(4):
        torch.testing.assert_close(stacked.member(p)(x[p]), stacked(x)[p])
    plain = LogisticRegression(5, 3)
    assert plain(x[0]).shape == (6, 3)


def test_members_may_read_the_same_rows():
    stacked = MLP(5, 2, width=4, members=3)
    x = torch.randn(6, 5)
    torch.testing.assert_close(stacked(x), stacked(x.expand(3, 6, 5)))


def test_a_stacked_member_starts_from_the_law_of_nn_linear():
    layer = StackedLinear(50, 16, 40)
    assert layer.weight.abs().max() <= 0.25
    assert layer.weight.abs().max() > 0.24
    assert layer.bias.abs().max() <= 0.25


def test_a_member_is_a_copy():
    stacked = LogisticRegression(2, 2, members=2)
    member = stacked.member(0)
    with torch.no_grad():
        member.layers[0].weight.zero_()
    assert stacked.layers[0].weight[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "width must be at least 1, got width=0"),
        ({"depth": -1}, "depth must be at least 0"),
        ({"members": 0}, "members must be at least 1"),
        ({"activation": "sigmoid"}, "activation must be one of relu, gelu, silu, tanh, got 'sigmoid'"),
        ({"dropout": 1.0}, r"dropout is a probability in \[0, 1\)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MLP(3, 2, **arguments)


def test_outputs_and_members_are_checked():
    with pytest.raises(ValueError, match="n_outputs must be at least 1"):
        LogisticRegression(3, 0)
    with pytest.raises(ValueError, match=r"member\(0\) needs a stacked module"):
        MLP(3, 2).member(0)
