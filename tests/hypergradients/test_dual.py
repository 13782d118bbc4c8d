"""Dual numbers: each operation beside torch's derivative of the same expression."""

import pytest
import torch

from gputune.hypergradients.forward import Dual

P, N, D = 3, 4, 2
COLUMN = torch.tensor([[0.5], [2.0], [3.0]], dtype=torch.float64)

EXPRESSIONS = {
    "sum": lambda a, b: a + b,
    "sum with a constant": lambda a, b: (a + 1.5) + (COLUMN + b) + (2 + a),
    "difference": lambda a, b: a - b,
    "difference from a constant": lambda a, b: (1 - a) + (COLUMN - b) + (a - 3) + (b - COLUMN),
    "product": lambda a, b: a * b,
    "square": lambda a, b: a * a,
    "product with a constant": lambda a, b: (a * 3) + (COLUMN * b) + (2 * a) + (b * COLUMN),
    "quotient": lambda a, b: a / b,
    "quotient by a constant": lambda a, b: a / COLUMN + b / 4,
    "power": lambda a, b: (a + b) ** COLUMN,
    "root": lambda a, b: (a * b).sqrt(),
    "clamp": lambda a, b: a.clamp_min(1.0) * b,
    "where": lambda a, b: torch.where(COLUMN > 1, a * b, a),
}


def numbers(columns, seed):
    g = torch.Generator().manual_seed(seed)
    value = torch.rand(P, columns, generator=g, dtype=torch.float64) + 0.5
    tangents = torch.randn(D, P, columns, generator=g, dtype=torch.float64)
    return value, tangents


@pytest.mark.parametrize("columns", ((N, N), (1, N), (N, 1)), ids=str)
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_tangents_are_torchs(name, columns):
    if name == "where" and columns == (N, 1):
        columns = (N, N)
    expression = EXPRESSIONS[name]
    (a, da), (b, db) = (numbers(n, seed) for seed, n in enumerate(columns))
    found = expression(Dual(a, da), Dual(b, db))
    for d in range(D):
        value, tangent = torch.autograd.functional.jvp(expression, (a, b), (da[d], db[d]))
        assert torch.equal(found.value, value)
        torch.testing.assert_close(found.tangents[d].expand_as(value), tangent, rtol=1e-13, atol=1e-13)


def test_nothing_is_changed_in_place():
    (a, da), (b, db) = numbers(N, 0), numbers(N, 1)
    before = [t.clone() for t in (a, da, b, db)]
    for expression in EXPRESSIONS.values():
        expression(Dual(a, da), Dual(b, db))
    assert all(torch.equal(old, new) for old, new in zip(before, (a, da, b, db)))


def test_no_other_function_of_torch_takes_them():
    with pytest.raises(TypeError, match="exp"):
        torch.exp(Dual(*numbers(N, 0)))
