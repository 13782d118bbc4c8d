"""Neighboring formulas of a step in C share a kernel, and the step stays equal to PyTorch's."""

import ctypes

import pytest
import torch
from torch.nn import functional as F

from gputune.modules.member_code import MemberCode
from gputune.native import library as built

pytestmark = pytest.mark.skipif(built.find_compiler() is None, reason="no C compiler")
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(40, 80, generator=GENERATOR, dtype=torch.float64)
ROW = torch.randn(80, generator=GENERATOR, dtype=torch.float64)
LARGE = torch.randn(200, 200, generator=GENERATOR, dtype=torch.float64)


def shifted(t, x):
    """Each entry reads a neighbor that an earlier formula has written."""
    t.mul_(2)
    t[1:].copy_(x[1:] + t[:-1])


def halves(t, x):
    """Two formulas write different parts of one memory."""
    t[:20].copy_(x[:20] * 2)
    t[20:].copy_(x[20:] + t[:20])


def reused_memory(t, x):
    """The result of a later formula may lie where an earlier argument was."""
    a = x * 2
    b = a.T.contiguous() + 1
    c = b.T * a
    t.copy_(c.exp() + c.T.contiguous().T)


STEPS = {
    "a chain": (lambda t, x: t.copy_(F.mish(x * 2 + ROW) * 0.5 - x.abs().sqrt()), 1),
    "in place": (lambda t, x: t.add_(x).mul_(x).sub_(1).div_(x + 3), 1),
    "a mask": (lambda t, x: t.copy_(torch.where(x > 0.5, x, -x) * (x < 1)), 1),
    "a row of a chain": (lambda t, x: t.copy_((x + ROW).exp() * (x - ROW)), 1),
    "no chain": (lambda t, x: t.copy_(x.abs().pow(1.3) * 2), 3),
    "a sum between": (lambda t, x: t.copy_((x * 2) * (x * 2).sum(0) + 1), 3),
    "a shift": (shifted, 3),
    "halves": (halves, 1),
    "reused memory": (reused_memory, None),
    "a part that is read later": (lambda t, x: t.copy_((x * 2).add(1) @ (x * 2).T @ x), None),
    "a large product": (lambda t, x: t.copy_((LARGE.T @ LARGE)[:40, :80]), None),
    "a product of many rows": (lambda t, x: t.copy_((LARGE @ LARGE)[:40, :80]), None),
    "a product of columns": (
        lambda t, x: t.copy_((LARGE[:, :99].T @ LARGE[:, :131])[:40, :80]),
        None,
    ),
}
"""Steps that change a tensor, and the number of their kernels if it matters."""


def take_step(step, memories, kernels):
    room = torch.empty(step.workspace + 64, dtype=torch.uint8)
    first = -(-room.data_ptr() // 64) * 64
    pointers = [first, *(storage.data_ptr() for storage in memories.values())]
    arrays = []
    for addresses in (pointers, [step.calls.ctypes.data], [step.numbers.ctypes.data]):
        arrays.append((ctypes.c_void_p * len(addresses))(*addresses))
    places, calls, numbers = arrays
    kernels.take_steps(ctypes.c_int64(1), calls, kernels.addresses, places, numbers)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_with_joint_kernels_is_the_step(name):
    step, n_kernels = STEPS[name]
    target = X.clone()
    code = MemberCode(torch.float64)
    memories = {}
    with torch.no_grad():
        coded = code.add(lambda: step(target, X), memories)
        take_step(coded, memories, built.build_kernels(list(code.kernels), torch.float64))
        found = target.clone()
        target.copy_(X)
        step(target, X)
    torch.testing.assert_close(found, target, rtol=1e-12, atol=1e-12)
    assert not torch.equal(found, X)
    if n_kernels is not None:
        assert len(code.kernels) == n_kernels


def test_a_joint_kernel_stores_only_results_that_are_read_later():
    target = X.clone()
    code = MemberCode(torch.float64)
    with torch.no_grad():
        code.add(lambda: target.copy_((X * 2 + ROW).exp() - 1), {})
    (kernel,) = code.kernels
    assert kernel.count("] = y") == 1
    assert "p0[" in kernel and "p1[" in kernel and "p2[" in kernel and "p3[" not in kernel
