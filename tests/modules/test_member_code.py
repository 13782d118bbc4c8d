"""A step in generated C equals the step in PyTorch, up to rounding; operations without C code are
refused.
"""

import ctypes

import pytest
import torch
from torch.nn import functional as F

from gputune.modules.member_code import MemberCode
from gputune.modules.trace import TraceError
from gputune.native import library as built

pytestmark = pytest.mark.skipif(built.find_compiler() is None, reason="no C compiler")
X = torch.rand(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.3
IDS = torch.tensor([[0, 1, 1], [1, 0, 1]])
FOUR = torch.tensor([3, 0, 0, 1])
BIG = torch.linspace(0, 1, 5000, dtype=torch.float64)


def wide(x, down, across):
    return torch.cat([torch.cat([x] * across, 1)] * down)


def slope(function, *inputs):
    """The slope of a function's sum, times the numbers of its outputs' places, in its first
    input."""
    return torch.func.grad(
        lambda x: (lambda y: (y * torch.arange(y.numel()).view(y.shape)).sum())(
            function(x, *inputs[1:])
        )
    )(inputs[0])


STEPS = {
    "nothing": lambda t, x: None,
    "views": lambda t, x: t[:, 1:].copy_((x * 3).view(4, 2).T.reshape(2, 4)[:, 1:]),
    "a copy of another type": lambda t, x: t.add_((x > t).to(x.dtype)),
    "arithmetic": lambda t, x: t.copy_(
        (2 - x) / (x + 3) - x.neg().abs() * x.square() + x**3 + (x + 1) ** 0.3
    ),
    "functions": lambda t, x: t.copy_(
        sum(
            getattr(torch, name)(x + 1)
            for name in "exp log sqrt rsqrt log2 log1p expm1 sin cos erf".split()
        )
        + (9 * x).floor()
    ),
    "activations": lambda t, x: t.copy_(
        sum(f(x) for f in (torch.tanh, torch.sigmoid, F.silu, F.gelu, F.relu, F.selu, F.leaky_relu))
        + x.clamp_min(-0.1)
        + x.clamp_max(0.1)
        + F.mish(30 * x)
        + F.softplus(x, 20, 9)
        + F.elu(x, 0.5)
    ),
    "slopes": lambda t, x: t.copy_(
        sum(slope(f, x) for f in (torch.tanh, torch.sigmoid, F.gelu, F.relu, F.leaky_relu, F.selu))
        + slope(lambda v: F.softplus(v, 20, 9), x)
        + torch.ops.aten.mish_backward(x, 30 * x)
    ),
    "conditions": lambda t, x: t.copy_(
        torch.where((x > 0) & ~(x > 0.5), x, -x).masked_fill(x.eq(x[0, 0]), 7.0)
    ),
    "moments": lambda t, x: t.lerp_(x, 0.1).addcmul_(x, x, value=2.0).lerp_(x, x),
    "sums": lambda t, x: t.copy_(
        x.sum(1, keepdim=True) + x.sum(0, keepdim=True) + x.mean(0) + x.sum() + x.mean(-1)[:, None]
    ),
    "products": lambda t, x: t.copy_(
        torch.addmm(x[0], x @ x.mT, x)
        + torch.addmm(x[:1, :1], x @ x.mT, x)
        + torch.baddbmm(x[None], x[None] @ x.mT, x[None])[0]
        + x @ (x.mT @ x)
    ),
    "sums of products": lambda t, x: t.copy_(
        x + (x @ x.mT) @ x + (x.mT[None] + torch.bmm(x.mT[None], (x @ x.mT)[None]))[0].mT
    ).add_((2 * x @ x.mT) @ x),
    "products with one transposed factor": lambda t, x: t.copy_(
        sum((x * i) @ wide(x, 2, 1).mT for i in range(6))
    ),
    "wide products": lambda t, x: t.copy_(
        (wide(x, 5, 9) @ wide(x, 9, 9).mT @ wide(x, 9, 9))[:2, :4]
    ),
    "softmax": lambda t, x: t.copy_(x.softmax(0) + x.log_softmax(1)),
    "slopes of softmax": lambda t, x: t.copy_(
        slope(lambda v: v.softmax(0), x) + slope(lambda v: v.log_softmax(1), x)
    ),
    "chosen rows": lambda t, x: t.copy_(
        x.index_select(1, FOUR)
        + x.index_select(0, IDS[1, 1:])
        + x.gather(1, FOUR.expand(2, 4))
        + x[:, FOUR]
    ),
    "an embedding": lambda t, x: t.copy_(
        F.embedding(IDS, torch.cat([x, x])).sum(1)
        + slope(lambda w: F.embedding(IDS, w), torch.cat([x, x]))[:2]
    ),
    "added at places": lambda t, x: t.copy_(
        torch.ops.aten.index_put(t, [None, FOUR - 4], x, accumulate=True)
        + x.scatter_add(1, FOUR.expand(2, 4), x * x)
    ).index_put_((IDS[0, 1:],), x[0], accumulate=True),
    "chosen from the end": lambda t, x: t.copy_(x[:, FOUR - 4]),
    "joined": lambda t, x: t.copy_(torch.cat([x[:, 1:], x[:, :1]], 1) + torch.stack([x[1], x[0]])),
    "slopes of parts": lambda t, x: t.copy_(
        slope(lambda v: v[:, 1:4:2], x) + slope(lambda v: v[1], x)
    ),
    "a loss": lambda t, x: t.copy_(
        F.cross_entropy(x, IDS[0, :2], reduction="none")[:, None]
        + slope(lambda v: F.cross_entropy(v, IDS[0, :2], reduction="none"), x)
    ),
    "a slope of a norm": lambda t, x: t.copy_(
        torch.ops.aten.native_layer_norm_backward(
            x, x * x, [4], x[:, :1] + 0, x[:, 1:2] + 0, None, None, [True, False, False]
        )[0]
    ),
    "a batch norm": lambda t, x: t.copy_(
        F.batch_norm(x, t[0], t[1], x[0], x[1], True)
        + slope(lambda v: F.batch_norm(v, None, None, v[0], v[1], True), x)
    ),
    "decompositions": lambda t, x: t.copy_(
        torch.div(x, 0.3, rounding_mode="floor")
        + x % 0.3
        + torch.fmod(x, -0.3)
        + F.gelu(x, approximate="tanh")
        + F.batch_norm(x[None], None, None, training=True)[0]
        + F.batch_norm(x, t[0], t[0] + x[0].abs())
        + F.cross_entropy(x, IDS[0, :2], x[0].abs())
        + (x + (IDS[0, :1] & 1))
    ),
    "slopes by decompositions": lambda t, x: t.copy_(
        slope(lambda v: F.cross_entropy(v, IDS[0, :2], v[0].detach().abs()), x)
        + slope(lambda v: F.layer_norm(v[:, ::2], (2,)), x)
        + slope(lambda v: F.pad(v, (1, -1), value=2.0) * v.flip(1) + v.roll((1, 2), (0, 1)), x)
        + slope(lambda v: v.repeat(3, 1, 1) + v.tril() + v.diagonal().sum(), x)
    ),
    "reductions": lambda t, x: t.copy_(
        x.amax(1, keepdim=True)
        + x.amin(0)
        + x.max()
        + x.min(1, keepdim=True)[0]
        + x.argmax(0)
        + x.prod(1, keepdim=True)
        + x.var(0)
        + x.std(1, keepdim=True, correction=0)
        + torch.var_mean(x, 1, keepdim=True)[1]
        + x.logsumexp(1, keepdim=True)
        + sum(x.norm(p, 1, keepdim=True) for p in (0, 1, 2, 3, float("inf"), -float("inf")))
        + (x > 0).any(1, keepdim=True)
        + (x > 0).all(0)
        + x.cumsum(0)
        + x.cumprod(1)
        + (x > 0).cumsum(1)
    ),
    "sorted": lambda t, x: t.copy_(
        x.sort(1, descending=True)[0]
        + x.argsort(0)
        + x.topk(4, 1, largest=False)[1]
        + x.median(1, keepdim=True)[0]
        + x.kthvalue(2, 0)[0]
        + torch.cat([x, -x, x * x], 1).T.repeat(5, 1).sort(0)[0][:2, :1]
    ),
    "replaced at places": lambda t, x: t.copy_(
        x.scatter(1, FOUR.expand(2, 4), 7.0)
        + x.scatter(1, FOUR[None, :2].expand(2, 2), x * x)
        + x.index_fill(1, FOUR, 3.0)
        + x.index_copy(0, IDS[0, :1], x[1:])
        + x.index_add(1, FOUR, x)
        + x.index_put((IDS[0, :2],), x[:1])
        + x.index_put((IDS[0, :2, None], FOUR[None, 1:3] - 4), x[:, :2], accumulate=True)
        + x[IDS[0], FOUR[:3]].sum()
        + x[:, IDS].sum((1, 2))[:, None]
        + x[IDS[0][:, None], FOUR - 4].sum(0)
    ),
    "a masked softmax": lambda t, x: t.copy_(
        torch.ops.aten._safe_softmax(x.masked_fill(x > x[0, 0], -torch.inf), 1)
    ),
    "an embedding bag": lambda t, x: t.copy_(
        F.embedding_bag(IDS, x)
        + F.embedding_bag(IDS, x, mode="sum")
        + slope(lambda w: F.embedding_bag(IDS, w), x)
        + slope(lambda w: F.embedding_bag(IDS, w, mode="sum"), x)
    ),
    "remainders": lambda t, x: t.copy_(x + torch.remainder(IDS[:, :1] * 7 - 5, 3)),
    "long passes": lambda t, x: (
        BIG.mul_(0.9).add_(x[0, 0]).addcmul_(BIG, BIG).sub_(t.fill_(0.5)[0, 0])
    ),
    "a number of a long pass": lambda t, x: t.copy_(x * (BIG.mul_(0.9).view(-1)[0] * 2)),
}


def taken(step, memories, kernels):
    """Take a step of the code."""
    workspace = torch.empty(step.workspace + 64, dtype=torch.uint8)
    pointers = [
        -(-workspace.data_ptr() // 64) * 64,
        *(storage.data_ptr() for storage in memories.values()),
    ]
    places, calls, numbers = (
        (ctypes.c_void_p * len(own))(*own)
        for own in (pointers, [step.calls.ctypes.data], [step.numbers.ctypes.data])
    )
    kernels.take_steps(ctypes.c_int64(1), calls, kernels.addresses, places, numbers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_step_is_the_step(dtype, monkeypatch):
    """All in one program, which is built once."""
    global BIG
    BIG = BIG.to(dtype)
    monkeypatch.setattr(built, "FLAGS", ("-O1", *built.FLAGS[1:]))
    code = MemberCode(dtype)
    written = []
    with torch.no_grad():
        for name, step in STEPS.items():
            total = torch.zeros(2, 4, dtype=dtype)
            x = X.to(dtype, copy=True)
            memories = {}
            run = lambda total=total, x=x, step=step: step(total, x)  # noqa: E731
            written.append((name, run, (total, BIG), code.add(run, memories), memories))
        kernels = built.build_kernels(list(code.kernels), dtype)
        for name, run, state, step, memories in written:
            before = [tensor.clone() for tensor in state]
            taken(step, memories, kernels)
            found = [tensor.clone() for tensor in state]
            for tensor, value in zip(state, before):
                tensor.copy_(value)
            run()
            assert any(not torch.equal(a, b) for a, b in zip(before, state)) or name == "nothing", (
                name
            )
            for a, b in zip(found, state):
                torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


REFUSED = {
    "aten.convolution.default with three axes": lambda t, x: t.copy_(
        F.conv3d(x.view(1, 1, 2, 4, 1), x[:1, :1].view(1, 1, 1, 1, 1)).view(2, 4)
    ),
    "aten.convolution.default with numbers other than torch.float32": lambda t, x: t.copy_(
        F.conv1d(x[None].double(), x[:, None, :1].expand(2, 2, 1).double())[0]
    ),
    "aten.convolution.default with a bias with gaps": lambda t, x: t.copy_(
        F.conv1d(x[None], x[:, None, :1].expand(2, 2, 1), x[0, ::2])[0]
    ),
    "aten._fft_r2c has no C code": lambda t, x: t.copy_(torch.fft.rfft(x).abs().sum()),
    "aten.linalg_matrix_exp": lambda t, x: t[:, :2].copy_(torch.linalg.matrix_exp(x[:, :2])),
    "aten._embedding_bag has no C code": lambda t, x: t[:, :1].copy_(
        torch.ops.aten._embedding_bag(x, IDS[0], IDS[0, :1], mode=2)[0][:, :1]
    ),
    "torch.bfloat16": lambda t, x: t.copy_(x.bfloat16() * 2),
    "aten.mm.default with numbers of torch.float64": lambda t, x: t.copy_(
        x.double() @ x.double().mT @ x.double()
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_in_no_code_is_refused(what):
    total = torch.zeros(2, 4)
    x = X.float()
    with torch.no_grad(), pytest.raises(TraceError, match=what):
        MemberCode(torch.float32).add(lambda: REFUSED[what](total, x), {})


def test_minibatches_of_all_sizes_and_layers_of_all_widths_share_kernels():
    code = MemberCode(torch.float64)
    counts = []
    for rows, length, width in ((5, 40, 40), (5, 50, 40), (6, 50, 40), (6, 50, 50)):
        y = torch.zeros(rows, width, dtype=torch.float64)
        order = torch.zeros(3, length, dtype=torch.int64)
        layer = torch.ones(width, width, dtype=torch.float64)
        places = torch.arange(rows)

        def step(y=y, order=order, places=places, layer=layer):
            index = order.index_select(1, places)
            y.add_((y @ layer + index[0, :, None]).softmax(1)).sub_(
                y.sum(0) / y.mean(1, keepdim=True)
            )

        with torch.no_grad():
            code.add(step, {})
        counts.append(len(code.kernels))
    # One more for the rows that are chosen for each of three tables: these lie as far apart as
    # there are few rows.
    assert counts == [counts[0], counts[0], counts[0] + 1, counts[0] + 1]
