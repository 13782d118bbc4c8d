"""A step recorded on a CPU is the step itself: to the bit, without its views and allocations, on
the memory of then."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gputune.engine.stacked import StackedChunk
from gputune.modules import calls
from gputune.modules.module import StackedModule
from gputune.modules.program import compile_trace
from gputune.modules.recorder import CpuRecorder, Replays
from gputune.modules.trace import TraceError, _OperationRecorder, arrange, trace
from gputune.scoring.metrics import make_scoring
from gputune.scoring.validation import Validation
from problems import fill, make_data, shape_of, variant


def recorded(step):
    with torch.no_grad():
        return compile_trace(trace(step))


@pytest.fixture
def total():
    return torch.zeros(2, 4)


def copied_to_what_is_made_later(t, x):
    first = x * 2
    second = x * 3
    t.add_(second)
    t.add_(torch.empty(2, 4).copy_(first))


STEPS = {
    "copied to what is made later": copied_to_what_is_made_later,
    "in place": lambda t, x: t.add_(x).mul_(2),
    "views": lambda t, x: t[:, 1:].copy_((x * 3).view(4, 2).T.reshape(2, 4)[:, 1:]),
    "two results": lambda t, x: t.copy_(torch.nn.functional.layer_norm(x + t, (4,))),
    "a part of a result": lambda t, x: t.copy_(torch.stack([x + 1, x * 2])[1]),
    "numbers of the host": lambda t, x: t.add_(torch.tensor([1.0, 2.0, 3.0, 4.0]).mul_(2)) * x,
    "memory made and filled": lambda t, x: t.add_(
        torch.zeros(2, 4).add_(x).index_add_(0, torch.tensor([1]), x[:1])
    ),
    "constants": lambda t, x: t.add_(torch.ones(4).cumsum(0) * x),
    "an activation": lambda t, x: t.add_(
        torch.relu(x - 0.5) + torch.full_like(x, float("inf")).reciprocal()
    ),
    "a copy of another type": lambda t, x: t.add_((x > t).to(torch.float32)),
    "a slope of a selection": lambda t, x: t.add_(torch.func.grad(lambda v: (v[1] ** 2).sum())(x)),
    "what nobody reads": lambda t, x: (x.exp(), t.add_(x)),
    "nothing": lambda t, x: None,
}


@pytest.mark.parametrize("name", STEPS)
def test_a_recorded_step_is_the_step(name, total):
    step = STEPS[name]
    x = torch.rand(2, 4)
    expected = total.clone()
    run = recorded(lambda: step(total, x))
    assert not total.any()  # what is recorded has not happened
    for _ in range(3):
        run()
        with torch.no_grad():
            step(expected, x)
        assert torch.equal(total, expected)
        x.uniform_()


@pytest.mark.parametrize("channels", [3, 8])
def test_pooling_takes_the_first_of_equal_numbers(channels):
    x = torch.randn(2, channels, 6, 7).clamp_min(0)
    total = torch.zeros(2, channels, 3, 3)
    where = torch.zeros(2, channels, 3, 3, dtype=torch.int64)

    def step():
        pooled, indices = nn.functional.max_pool2d(x, 2, return_indices=True)
        total.copy_(pooled), where.copy_(indices)

    recorded(step)()
    found = total.clone(), where.clone()
    step()
    assert torch.equal(found[0], total) and torch.equal(found[1], where) and total.any()


REFUSED = {
    "reads a value of a tensor": lambda t: t.sum().item(),
    "returns a tensor with a shape that depends on values": lambda t: t[t > 0],
    "draws random numbers": lambda t: t.add_(torch.rand_like(t)),
    "moves or resizes a tensor": lambda t: t.resize_(8),
    "is not a plain tensor in main memory": lambda t: t.to_sparse(),
    "is read as torch.int32": lambda t: t.copy_(
        nn.functional.layer_norm(t, (4,)).view(torch.int32)
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_recorded_is_said_and_undone(reason, total):
    with pytest.raises(TraceError, match=reason):
        recorded(lambda: REFUSED[reason](total.add_(1)))
    assert not total.any()


def test_a_step_that_cannot_be_recorded_is_taken_as_it_is(total):
    steps = Replays(CpuRecorder(torch.device("cpu")), Counter({"shape": 100}), list, 0.0)
    for _ in range(5):
        steps.take("shape", lambda: total.add_(torch.rand_like(total).ceil()))
    assert total.unique().tolist() == [5] and not steps.steps


def test_a_seldom_shape_is_recorded_when_that_would_have_repaid_it(total):
    steps = Replays(CpuRecorder(torch.device("cpu")), Counter({"often": 9, "seldom": 1}), list, 0.0)
    for taken in range(1, 11):
        for shape in ("often", "seldom"):
            steps.take(shape, lambda: total.add_(1))
        assert set(steps.steps) == {"often"} if 1 < taken < 9 else True
    assert set(steps.steps) == {"often", "seldom"} and total.unique().tolist() == [20]


@pytest.mark.parametrize("limit", [1 << 12, 1 << 40])
def test_a_trace_frees_results_that_nothing_reads_any_more(limit, monkeypatch):
    monkeypatch.setattr("gputune.modules.trace._FREED_BYTES", limit)
    total = torch.zeros(1000)

    def step():
        x = total + 1
        kept = x * 2
        for _ in range(50):
            x = x.sin()
        total.add_(x + kept)

    recorder = _OperationRecorder()
    with recorder:
        step()
    freed = sum(memory.nbytes() == 0 for memory in recorder.made.freed)
    assert freed == len(recorder.made.freed) and (freed > 40) == (limit < 1 << 40)
    total.zero_()
    expected = torch.zeros(1000)
    compiled = compile_trace(trace(step))
    for _ in range(2):
        compiled()
        x = expected + 1
        kept = x * 2
        for _ in range(50):
            x = x.sin()
        expected += x + kept
    assert torch.equal(total, expected)


def test_results_in_use_share_no_memory():
    rng = np.random.default_rng(0)
    uses = [(i, i + int(rng.integers(0, 9)), int(rng.integers(1, 300))) for i in range(60)]
    begins, size = arrange(uses)
    for i, (_, last, wanted) in enumerate(uses):
        assert begins[i] % 64 == 0 and begins[i] + wanted <= size
        for j in range(i + 1, len(uses)):
            if uses[j][0] <= last:
                assert begins[j] + uses[j][2] <= begins[i] or begins[i] + wanted <= begins[j]
    assert size < sum(wanted for *_, wanted in uses) / 3


def small(n_features, n_outputs):
    """Two layers and the operations between them."""
    first = nn.Linear(n_features, 8), nn.LayerNorm(8), nn.GELU()
    return nn.Sequential(*first, nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, n_outputs))


class Drawing(nn.Module):
    """Random draws in the layers and in the forward."""

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.body = small(n_features, n_outputs)
        self.drop = nn.Dropout(0.3)
        self.channel = nn.Dropout1d(0.5)

    def forward(self, x):
        noise = torch.randn(len(x), 1, dtype=x.dtype) if self.training else 0
        h = self.channel(self.body[:3](self.drop(x) + noise)[:, :, None]).squeeze(-1)
        return self.body[3:](h + 0.1 * torch.rand_like(noise) if self.training else h)


def by_chances(n_features, n_outputs):
    def forward(_, x):
        return x * torch.bernoulli(torch.linspace(0.1, 0.9, x.shape[1], dtype=x.dtype))

    return nn.Sequential(variant(nn.Identity, forward)(), small(n_features, n_outputs))


class Attending(nn.Module):
    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.attend = nn.MultiheadAttention(n_features, 1, batch_first=True)
        self.body = small(n_features, n_outputs)

    def forward(self, x):
        x = x[:, None].expand(-1, 3, -1)
        return self.body(self.attend(x, x, x, need_weights=False)[0].mean(1))


def chunk_of(data, configs, *, recorded, module=small):
    network = StackedModule(module, configs, shape_of(data), seed=0)
    scoring = make_scoring(None, data.task, np.arange(3))
    return StackedChunk(network, Validation(data, scoring), seed=0, horizon=9, recorded=recorded)


def recorded_as_eager(data, configs, module=small, *, epochs=4, stays=None):
    """Assert that recorded steps give the bits of those as they are; return their chunk. Trials
    leave after two."""
    before = torch.get_rng_state()
    with torch.no_grad():
        found, expected = (
            chunk_of(data, configs, recorded=recorded, module=module) for recorded in (True, False)
        )
        for epoch in range(epochs):
            for chunk in (found, expected):
                chunk.advance(epoch)
            assert torch.equal(found.flat, expected.flat)
            if epoch == 1 and stays:
                for chunk in (found, expected):
                    chunk.select(np.flatnonzero(stays))
    assert torch.equal(torch.get_rng_state(), before)
    return found


@pytest.mark.parametrize(
    ("optimizer", "task"),
    [
        ("sgd", "multiclass"),
        ("nesterov", "regression"),
        ("adam", "multiclass"),
        ("adamw", "regression"),
    ],
)
def test_a_module_trains_to_the_same_bits(task, optimizer, monkeypatch):
    monkeypatch.setattr(CpuRecorder, "repays", 1)
    rates = (
        {"optimizer": optimizer, "lr": rate, "weight_decay": rate, "batch_size": 9}
        for rate in (1e-3, 1e-2, 0.1)
    )
    data = make_data(task, weights=task == "regression")
    found = recorded_as_eager(data, fill(*rates), stays=[True, False, True])
    assert found.steps.begun and len(found.configs) == 2


@pytest.mark.parametrize("draw_bytes", [1 << 20, 3000])
def test_what_a_module_draws_is_made_ahead_and_the_same(monkeypatch, draw_bytes):
    monkeypatch.setattr(CpuRecorder, "repays", 1)
    monkeypatch.setattr(calls, "_DRAW_BYTES", draw_bytes)
    data = make_data(folds=3)  # folds of 40 and 41 rows
    found = recorded_as_eager(data, fill({"batch_size": 9}, {"batch_size": 9, "lr": 0.1}), Drawing)
    assert len(found.steps.steps) == 2 and (found.draws.ahead < 5) == (draw_bytes < 1 << 20)


@pytest.mark.parametrize("turned", [False, True])
def test_what_compiled_code_draws_lies_as_torch_has_it(turned):
    def build(n_features, n_outputs):
        noisy = variant(
            nn.Identity,
            lambda _, x: x + (torch.rand_like(x.t()).t() if turned else torch.rand_like(x)),
        )
        return nn.Sequential(noisy(), small(n_features, n_outputs))

    found = recorded_as_eager(
        make_data(dtype=torch.float32), fill({"batch_size": 9}), build, epochs=2
    )
    assert bool(found.draws.uniform) != turned


def test_attention_is_recorded_and_draws_by_other_numbers_are_made_in_the_step():
    data = make_data()
    configs = fill({"batch_size": 9})
    assert recorded_as_eager(data, configs, Attending, epochs=1).steps.begun
    assert recorded_as_eager(data, configs, by_chances, epochs=1).draws is None


def test_a_generator_of_a_modules_own_is_refused_before_it_draws():
    own = torch.Generator().manual_seed(1)
    before = own.get_state()
    with pytest.raises(
        TraceError, match="aten.rand.generator makes random numbers that depend on more"
    ):
        calls.draws_of(lambda: torch.rand(3, generator=own))
    assert torch.equal(own.get_state(), before)


class NothingNew(TorchDispatchMode):
    """Adds up the bytes that operations ask of the system."""

    asked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {id(value) for value in (*args, *(kwargs or {}).values())}
        if isinstance(result, torch.Tensor) and id(result) not in known:
            self.asked += result.untyped_storage().nbytes()
        return result


def test_a_recorded_step_asks_for_hardly_any_memory():
    data = make_data(n=400, d=32)
    configs = fill(*({"batch_size": 64} for _ in range(8)))
    with torch.no_grad():
        chunk = chunk_of(data, configs, recorded=False)
        chunk.batches.begin(0)
        run = recorded(lambda: chunk._step(chunk.batches.shapes[0], (0, 0)))
        with NothingNew() as eager:
            chunk._step(chunk.batches.shapes[0], (0, 0))
        with NothingNew() as straight:
            run()
    assert 0 < straight.asked < eager.asked / 10
