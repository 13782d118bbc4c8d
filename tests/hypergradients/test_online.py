"""The online optimizers follow their equations, written out by hand, and are optimizers as torch
knows them."""

import copy
import io
import itertools
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from gputune.optim import SGDHD, AdamHD, AdamWHD
from problems import grid
from refused import refused

CLASSES = {
    "sgd": (SGDHD, {"weight_decay": 0.02}),
    "momentum": (SGDHD, {"weight_decay": 0.02, "momentum": 0.8}),
    "nesterov": (SGDHD, {"weight_decay": 0.02, "momentum": 0.8, "nesterov": True}),
    "adam": (AdamHD, {"weight_decay": 0.02}),
    "adamw": (AdamWHD, {"weight_decay": 0.1}),
}
RULES = {"additive": 1e-3, "multiplicative": 0.05, "normalized": 1e-3}  # rule -> hypergrad_lr
LR = {"sgd": 0.1, "momentum": 0.05, "nesterov": 0.05, "adam": 0.01, "adamw": 0.01}
SHAPES = [(3, 4), (4,), (4, 1)]


def start(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_() for shape in SHAPES
    ]


def loss(params, t):
    """The loss of a small network on the minibatch of step t."""
    g = torch.Generator().manual_seed(1000 + t % 7)
    x, y = (torch.randn(8, n, generator=g, dtype=torch.float64) for n in (3, 1))
    weight, bias, out = params
    return (((x @ weight + bias).tanh() @ out - y) ** 2).mean()


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def gradient(w, t):
    """The gradient of ``loss`` at a flat vector."""
    w = w.detach().requires_grad_()
    parts = [
        part.view(shape) for part, shape in zip(w.split([math.prod(s) for s in SHAPES]), SHAPES)
    ]
    return torch.autograd.grad(loss(parts, t), w)[0]


def written_out(name, w, *, rule, beta, steps, decay, lr, mu=0.8, b1=0.9, b2=0.999, eps=1e-8):
    """Yield w and lr after each step, both from the equations."""
    u = before = None
    buffer = m = v = torch.zeros_like(w)
    for t in range(steps):
        g = gradient(w, t) + (0 if name == "adamw" else decay * w)
        if u is not None:
            h = g @ u
            if rule == "additive":
                lr = lr + beta * h
            elif rule == "multiplicative":
                lr = lr * (1 + beta * h / (g.norm() * u.norm()))
            else:
                lr = lr + beta * h / (before.norm() * u.norm())
        buffer = mu * buffer + g
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        adam = (m / (1 - b1 ** (t + 1))) / ((v / (1 - b2 ** (t + 1))).sqrt() + eps)
        directions = {"sgd": g, "momentum": buffer, "nesterov": g + mu * buffer}
        u = (directions | {"adam": adam, "adamw": adam + decay * w})[name]
        w = w - lr * u
        before = g
        yield w, float(lr)


def make(name, params, *, rule="multiplicative", **more):
    kind, keys = CLASSES[name]
    return kind(
        params, **{"lr": LR[name], "hypergrad_lr": RULES[rule], "rule": rule, **keys, **more}
    )


def saved(state_dict):
    """The same after a way through a file."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def take(optimizer, params, *steps):
    for t in steps:
        optimizer.zero_grad()
        loss(params, t).backward()
        optimizer.step()


def steps_with(optimizer, w, grads):
    """Take a step with each of these gradients; return the rate."""
    for grad in grads:
        w.grad = torch.as_tensor(grad, dtype=w.dtype).expand_as(w).clone()
        optimizer.step()
    return optimizer.param_groups[0]["lr"]


FEW = [(name, "multiplicative") for name in CLASSES] + [
    (n, r) for n in ("nesterov", "adamw") for r in RULES
]


@pytest.mark.parametrize(("name", "rule"), grid(CLASSES, RULES, short=FEW))
def test_one_hundred_steps_follow_the_equations(name, rule):
    params = start()
    optimizer = make(name, params, rule=rule, lr=np.float64(LR[name]), lr_min=None, foreach=False)
    decay = CLASSES[name][1]["weight_decay"]
    path = written_out(
        name, flat(params), rule=rule, beta=RULES[rule], steps=100, decay=decay, lr=LR[name]
    )
    for t, (w, lr) in enumerate(path):
        take(optimizer, params, t)
        torch.testing.assert_close(flat(params), w, rtol=1e-12, atol=1e-12)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr, rel=1e-12)
        assert type(optimizer.param_groups[0]["lr"]) is float
    assert abs(lr / LR[name] - 1) > 0.02  # the rate did move


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_a_hypergrad_lr_of_zero_is_torch_optim(name, foreach):
    keys = CLASSES[name][1]
    twin = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}.get(name, torch.optim.SGD)
    ours = start()
    theirs = start()
    optimizer = make(name, ours, hypergrad_lr=0, foreach=foreach)
    plain = twin(theirs, lr=LR[name], **keys)
    take(optimizer, ours, *range(50))
    take(plain, theirs, *range(50))
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-12, atol=1e-12)
    assert optimizer.param_groups[0]["lr"] == LR[name]


@pytest.mark.parametrize("name", CLASSES)
def test_h_is_the_slope_of_the_next_loss_in_the_rate(name):
    params = start()
    optimizer = make(name, params, rule="additive", hypergrad_lr=1.0, lr_min=None)
    optimizer.param_groups[0]["hypergrad_lr"] = 0.0
    for t in range(5):
        before = [p.detach().clone() for p in params]
        take(optimizer, params, t)
    decay = 0.0 if name == "adamw" else CLASSES[name][1]["weight_decay"]
    directions = [optimizer.state[p]["direction"] for p in params]
    lr = torch.tensor(LR[name], dtype=torch.float64, requires_grad=True)
    ahead = [w - lr * u for w, u in zip(before, directions)]
    objective = loss(ahead, 5) + decay / 2 * sum((w**2).sum() for w in ahead)
    (slope,) = torch.autograd.grad(objective, lr)
    optimizer.param_groups[0]["hypergrad_lr"] = 1.0
    take(optimizer, params, 5)
    assert optimizer.param_groups[0]["lr"] - LR[name] == pytest.approx(-float(slope), rel=1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_one_rate_for_all_tensors_whatever_their_order(rule):
    ends = []
    for order in itertools.permutations(range(3)):
        params = start()
        optimizer = make("nesterov", [params[i] for i in order], rule=rule)
        take(optimizer, params, *range(20))
        ends.append(torch.cat([flat(params), torch.tensor([optimizer.param_groups[0]["lr"]])]))
    for end in ends:
        torch.testing.assert_close(end, ends[0], rtol=1e-12, atol=1e-12)


def test_groups_own_their_rates_and_hyperparameters():
    params = start()
    alone = start()
    groups = [
        {"params": params[:2], "lr": 0.02, "momentum": 0.5},
        {"params": params[2:], "hypergrad_lr": 0.0},
    ]
    optimizer = SGDHD(groups, lr=0.05, hypergrad_lr=0.1)
    first = SGDHD(alone[:2], lr=0.02, momentum=0.5, hypergrad_lr=0.1)
    second = torch.optim.SGD(alone[2:], lr=0.05)
    for t in range(20):
        take(optimizer, params, t)
        take(first, alone, t)
        second.step()
        second.zero_grad()
    assert torch.equal(flat(params), flat(alone))
    assert optimizer.param_groups[0]["lr"] == first.param_groups[0]["lr"] != 0.02
    assert optimizer.param_groups[1]["lr"] == 0.05


def test_a_group_may_be_added_later_with_a_rule_of_its_own():
    params = start()
    optimizer = SGDHD(params[:2], lr=0.05)
    take(optimizer, params, 0)
    optimizer.add_param_group(
        {"params": params[2:], "lr": 0.2, "rule": "additive", "hypergrad_lr": 1e-3}
    )
    take(optimizer, params, *range(1, 4))
    assert [group["rule"] for group in optimizer.param_groups] == ["multiplicative", "additive"]
    assert optimizer.param_groups[1]["lr"] not in (0.05, 0.2)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CLASSES)
def test_foreach_equals_the_loop(name, rule):
    # Two dtypes in one group, so that foreach has two lists.
    found = []
    for foreach in (False, True):
        params = start()
        single = torch.ones(5, requires_grad=True)
        optimizer = make(name, [*params, single], rule=rule, foreach=foreach)
        for t in range(20):
            optimizer.zero_grad()
            (loss(params, t) + (single.double() ** 2).sum() * 1e-3).backward()
            optimizer.step()
        found.append((flat(params), single, optimizer.param_groups[0]["lr"]))
    (loop, few, rate), (together, others, other) = found
    torch.testing.assert_close(loop, together, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(few, others, rtol=1e-6, atol=1e-7)
    assert rate == pytest.approx(other, rel=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CLASSES)
def test_a_state_dict_continues_bit_for_bit(name, rule):
    params = start()
    optimizer = make(name, params, rule=rule)
    take(optimizer, params, *range(5))
    others = [p.detach().clone().requires_grad_() for p in params]
    other = make(name, others, rule=rule, lr=0.5)
    for _ in range(2):  # torch adds a default of its own at the first time
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.load_state_dict(saved(other.state_dict()))
    take(optimizer, params, *range(5, 15))
    take(other, others, *range(5, 15))
    assert torch.equal(flat(params), flat(others))
    assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]


def test_a_closure_computes_the_loss_with_gradients():
    params = start()
    plain = start()
    optimizer = make("nesterov", params)
    twin = make("nesterov", plain)

    def closure():
        optimizer.zero_grad()
        value = loss(params, 0)
        value.backward()
        return value

    for _ in range(5):
        expected = loss(params, 0)
        assert torch.equal(optimizer.step(closure), expected)
        take(twin, plain, 0)
    assert torch.equal(flat(params), flat(plain))
    assert twin.step() is None


def test_a_gradient_is_neither_changed_nor_kept():
    w = torch.ones(3, requires_grad=True)
    for name in CLASSES:
        optimizer = make(name, [w])
        w.grad = torch.full((3,), 0.5)
        optimizer.step()
        assert torch.equal(w.grad, torch.full((3,), 0.5))
        kept = [t.data_ptr() for t in optimizer.state[w].values() if isinstance(t, torch.Tensor)]
        assert len({w.grad.data_ptr(), *kept}) == len(kept) + 1


@pytest.mark.parametrize("name", CLASSES)
def test_a_parameter_without_gradient_stays_and_counts_for_nothing(name):
    # It is as if its gradient and its last direction were zero.
    params = start()
    optimizer = make(name, params, rule="additive", hypergrad_lr=1.0, lr_min=None, weight_decay=0.0)
    optimizer.param_groups[0]["hypergrad_lr"] = 0.0
    take(optimizer, params, *range(3))
    here = params[0].detach().clone()
    direction = optimizer.state[params[0]]["direction"]
    optimizer.zero_grad()
    loss(params, 3).backward()
    params[0].grad = None
    optimizer.step()
    assert torch.equal(params[0], here)
    assert direction.any()
    directions = [optimizer.state[p]["direction"] for p in params[1:]]
    optimizer.zero_grad()
    loss(params, 4).backward()
    h = sum(float((p.grad * u).sum()) for p, u in zip(params[1:], directions))
    optimizer.param_groups[0]["hypergrad_lr"] = 1.0
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] - LR[name] == pytest.approx(h, rel=1e-10)


def test_the_cosine_is_that_of_whole_vectors_where_gradients_are_missing():
    a, b = (torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = SGDHD([a, b], lr=1.0, hypergrad_lr=0.5)
    a.grad = torch.tensor([3.0]).double()
    b.grad = torch.tensor([4.0]).double()
    optimizer.step()
    a.grad = torch.tensor([2.0]).double()
    b.grad = None
    optimizer.step()  # g = (2, 0), u = (3, 4): the cosine is 6 / (2 * 5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1 + 0.5 * 0.6, rel=1e-14)


def test_no_gradient_at_all_leaves_everything():
    optimizer = make("adam", params := start())
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == LR["adam"] and torch.equal(
        flat(params), flat(start())
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "grads", [(0.0, 0.0, 1.0, 0.0, 0.0), (1.0, math.nan, 1.0), (1.0, math.inf, 1.0)]
)
def test_a_norm_that_is_zero_or_not_finite_leaves_the_rate(rule, grads):
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = SGDHD([w], lr=0.1, rule=rule, hypergrad_lr=0.5)
    assert [steps_with(optimizer, w, [grad]) for grad in grads] == [0.1] * len(grads)


BOUNDS = [
    (rule, *case)
    for rule in RULES
    for case in (({"lr_min": 0.08}, -1.0, 0.08), ({"lr_max": 0.12}, 1.0, 0.12))
]
BOUNDS += [("additive", {"lr_min": None}, -1.0, -2.6), ("additive", {}, -1.0, 0.0)]


@pytest.mark.parametrize(("rule", "bounds", "sign", "expected"), BOUNDS)
def test_the_rate_stays_within_its_bounds(rule, bounds, sign, expected):
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = SGDHD([w], lr=0.1, rule=rule, hypergrad_lr=0.9, **bounds)
    assert steps_with(optimizer, w, (1.0, sign)) == pytest.approx(expected, abs=1e-15)


def test_a_rate_at_zero_of_the_additive_rule_comes_back():
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = SGDHD([w], lr=0.0, rule="additive", hypergrad_lr=0.25)
    assert steps_with(optimizer, w, (1.0, 1.0)) == 0.25
    assert w.item() == -0.25


def test_a_scheduler_scales_the_adapted_rate():
    params = start()
    alone = start()
    optimizer = make("momentum", params)
    twin = make("momentum", alone)
    scheduler = lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    for t in range(10):
        take(optimizer, params, t)
        scheduler.step()
        take(twin, alone, t)
        twin.param_groups[0]["lr"] *= 0.9
    assert optimizer.param_groups[0]["lr"] == twin.param_groups[0]["lr"]
    assert torch.equal(flat(params), flat(alone))


def test_half_precision_does_not_overflow_in_the_norms():
    w = torch.zeros(100_000, dtype=torch.float16, requires_grad=True)
    optimizer = SGDHD([w], lr=1e-3, hypergrad_lr=0.5)
    assert steps_with(optimizer, w, (1.0, 1.0)) == pytest.approx(1.5e-3)


def test_channels_last_and_contiguous_memory_agree():
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        g = torch.Generator().manual_seed(0)
        w = (
            torch.randn(2, 3, 4, 5, generator=g, dtype=torch.float64)
            .to(memory_format=layout)
            .requires_grad_()
        )
        optimizer = AdamWHD([w], lr=0.1, hypergrad_lr=0.3)
        for _ in range(4):
            w.grad = torch.randn(2, 3, 4, 5, generator=g, dtype=torch.float64)
            optimizer.step()
        found.append(w.detach().contiguous())
    torch.testing.assert_close(found[0], found[1], rtol=1e-13, atol=1e-13)


ERRORS = [
    ({"lr": 0.0}, "lr must be a finite number > 0, got 0.0"),
    (
        {"lr": -1.0, "rule": "additive", "hypergrad_lr": 1},
        "lr must be a finite number >= 0, got -1.0",
    ),
    ({"lr": math.nan}, "lr must be a finite number > 0, got nan"),
    ({"lr": "fast"}, "lr must be a finite number > 0, got 'fast'. For example 0.001."),
    ({"lr": True}, "lr must be a finite number > 0, got True"),
    ({"lr": torch.tensor(0.1)}, "lr must be a finite number > 0, got tensor"),
    ({"hypergrad_lr": 1.0}, "hypergrad_lr must be a finite number >= 0 and < 1, got 1.0"),
    ({"hypergrad_lr": -0.1}, "hypergrad_lr must be a finite number >= 0 and < 1, got -0.1"),
    ({"hypergrad_lr": -1, "rule": "additive"}, "hypergrad_lr must be a finite number >= 0, got -1"),
    (
        {"rule": "additive"},
        "hypergrad_lr must be set with rule='additive', because its scale depends on the model",
    ),
    ({"rule": "normalized"}, "hypergrad_lr must be set with rule='normalized'"),
    ({"rule": "greedy"}, "rule must be one of multiplicative, additive, normalized, got 'greedy'"),
    ({"rule": None}, "rule must be one of multiplicative, additive, normalized, got None"),
    ({"weight_decay": -1}, "weight_decay must be a finite number >= 0, got -1"),
    ({"lr_min": "0"}, "lr_min must be a finite number, got '0'"),
    ({"lr_max": math.inf}, "lr_max must be a finite number, got inf. For example 0.1"),
    ({"lr_min": 0.2}, "lr must be between lr_min=0.2 and lr_max=None, got 0.1"),
    ({"lr_max": 0.05}, "lr must be between lr_min=0.0 and lr_max=0.05, got 0.1"),
]


@pytest.mark.parametrize("kind", [SGDHD, AdamHD, AdamWHD])
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: [m], lambda m: [{"params": m}]])
def test_a_module_in_place_of_its_parameters_is_refused(kind, wrap):
    with refused(rf"got a module\. Pass {kind.__name__}\(module.parameters\(\)\)"):
        kind(wrap(torch.nn.Linear(2, 1)), lr=0.1)


OWN_ERRORS = [
    (SGDHD, {"momentum": 1.0}, "momentum must be a finite number >= 0 and < 1, got 1.0"),
    (
        SGDHD,
        {"momentum": Fraction(10**20 - 1, 10**20)},
        "momentum must be a finite number >= 0 and < 1, got Fraction",
    ),
    (
        SGDHD,
        {"nesterov": True},
        "momentum must be > 0 with nesterov=True, got 0.0. For example momentum=0.9.",
    ),
    (AdamHD, {"betas": (0.9, 1.0)}, "betas[1] must be a finite number >= 0 and < 1, got 1.0"),
    (AdamHD, {"betas": 0.9}, "betas must be two numbers in [0, 1), got 0.9"),
    (AdamWHD, {"betas": (0.9,)}, "betas must be two numbers in [0, 1), got (0.9,)"),
    (AdamWHD, {"eps": -1.0}, "eps must be a finite number >= 0, got -1.0"),
]
ALL_ERRORS = [(kind, *error) for kind in (SGDHD, AdamHD, AdamWHD) for error in ERRORS] + OWN_ERRORS


@pytest.mark.parametrize(("kind", "keys", "message"), ALL_ERRORS, ids=lambda value: str(value)[:40])
def test_bad_values_are_refused(kind, keys, message):
    first, second = (torch.ones(1, requires_grad=True) for _ in range(2))
    with refused(re.escape(message)):
        kind([first], **{"lr": 0.1, **keys})
    optimizer = kind([first], lr=0.1)
    with refused(re.escape(message)):
        optimizer.add_param_group({"params": [second], **keys})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", CLASSES)
def test_sparse_and_complex_gradients_are_refused(name):
    table = torch.nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1, 3])).sum().backward()
    number = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    number.abs().sum().backward()
    for w, kind in ((table.weight, "sparse_coo"), (number, "complex64")):
        with refused(f"params must have dense, real gradients, got .*{kind}"):
            make(name, [w]).step()


def test_the_state_of_another_optimizer_is_refused():
    w = torch.ones(2, requires_grad=True)
    other = torch.optim.SGD([w], lr=0.1)
    with refused("state_dict must be the state of SGDHD, got groups without grad_norm, hyper"):
        SGDHD([w], lr=0.1).load_state_dict(other.state_dict())
