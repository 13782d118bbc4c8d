"""Products in compiled steps add matrices, and share one copy of a transposed factor."""

from collections import Counter

import pytest
import torch

from gputune.modules.member_code import with_added_products, with_copied_factors
from gputune.modules.program import simplify_trace
from gputune.modules.trace import trace


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64)


A = zeros(3, 4)
B = zeros(4, 5)
X = zeros(3, 5)
SQUARE = zeros(5, 5)
TARGET = zeros(3, 5)


def names_of(step, change):
    """How often each operation is in a traced step that was changed."""
    with torch.no_grad():
        simple = simplify_trace(trace(step))
    return Counter(op.name for op in change(simple))


def written_before_the_sum():
    product = A @ B
    A.add_(1)
    TARGET.copy_(X + product)


def used_twice():
    product = A @ B
    TARGET.copy_((X + product) * product)


JOINED = {
    "an added matrix": (lambda: TARGET.copy_(X + A @ B), 1),
    "an added matrix on the right": (lambda: TARGET.copy_(A @ B + X), 1),
    "in place": (lambda: TARGET.add_(A @ B), 1),
    "a batch": (lambda: TARGET.copy_((X[None] + torch.bmm(A[None], B[None]))[0]), 1),
    "a sum of products": (lambda: TARGET.copy_(X + A @ B + (2 * A) @ B), 2),
    "two products": (lambda: TARGET.copy_(A @ B + (2 * A) @ B), 1),
    "a factor": (lambda: TARGET.copy_(torch.add(X, A @ B, alpha=2)), 0),
    "a bias": (lambda: TARGET.copy_(X[0] + A @ B), 0),
    "a matrix with gaps": (lambda: TARGET.copy_(SQUARE.T[:3] + A @ B), 0),
    "a product that is used twice": (used_twice, 0),
    "a factor that is written before the sum": (written_before_the_sum, 0),
    "a factor that the sum replaces": (lambda: TARGET.add_(TARGET @ SQUARE), 0),
    "another part of the target": (lambda: SQUARE[2:4].copy_(SQUARE[:2] + A[:2] @ B), 0),
}


@pytest.mark.parametrize("name", JOINED)
def test_a_product_adds_a_matrix_if_nothing_else_needs_the_product(name):
    step, joined = JOINED[name]
    found = names_of(step, lambda simple: with_added_products(simple.operations))
    assert found["addmm"] + found["baddbmm"] == joined


def recurrent(times, *, changes_weight=False):
    def step():
        state = TARGET
        for _ in range(times):
            state = (state @ SQUARE.T).tanh()
            if changes_weight:
                SQUARE.mul_(0.5)
        TARGET.copy_(state)

    return step


@pytest.mark.parametrize(
    ("step", "copies"),
    [
        (recurrent(4), 1),
        (recurrent(3), 0),
        (recurrent(4, changes_weight=True), 0),
    ],
)
def test_several_products_share_one_copy_of_a_transposed_factor(step, copies):
    assert names_of(step, with_copied_factors)["clone"] == copies
