"""The stand-in for CUDA graphs: it replays a recorded step exactly, and refuses operations that a
graph refuses.
"""

import numpy as np
import pytest
import torch

from stand_in import CaptureError, StandIn

CPU = torch.device("cpu")


@pytest.fixture
def total():
    return torch.zeros(4)


def test_a_recorded_step_happens_at_its_replays_alone(total):
    def step():
        total.add_(1).mul_(2)

    recorded = StandIn(CPU).capture(step)
    assert total.tolist() == [0, 0, 0, 0]
    recorded()
    recorded()
    assert total.tolist() == [6, 6, 6, 6]


def test_temporaries_views_and_counters_on_the_device_are_replayed(total):
    table = torch.arange(12.0).view(3, 4)
    at = torch.zeros((), dtype=torch.int64)

    def step():
        row = table.index_select(0, at.view(1))[0]
        total.add_(torch.cat([row[2:] * 2, row[:2]]))
        at.add_(1)

    recorded = StandIn(CPU).capture(step)
    for _ in range(3):
        recorded()
    assert total.tolist() == [2 * (2 + 6 + 10), 2 * (3 + 7 + 11), 0 + 4 + 8, 1 + 5 + 9]


def test_a_number_of_the_host_is_the_same_in_every_replay(total):
    number = [1.0]
    recorded = StandIn(CPU).capture(lambda: total.add_(number[0]))
    number[0] = 5.0
    recorded()
    assert total.tolist() == [1, 1, 1, 1]


FORBIDDEN = {
    "item": (lambda t: t[0].item(), "_local_scalar_dense.*waits for the device"),
    "bool": (lambda t: bool(t.any()), "_local_scalar_dense.*waits for the device"),
    "float": (lambda t: float(t.sum()), "_local_scalar_dense.*waits for the device"),
    "index by a counter": (
        lambda t: t[torch.zeros_like(t, dtype=torch.int64)[0]],
        "waits for the device",
    ),
    "equal": (lambda t: torch.equal(t, t), "aten.equal.*waits for the device"),
    "tolist": (lambda t: t.tolist(), "Tensor.tolist.*waits for the device"),
    "numpy": (lambda t: t.numpy(), "Tensor.numpy.*waits for the device"),
    "numpy's asarray": (lambda t: np.asarray(t), "Tensor.__array__.*waits for the device"),
    "from numpy": (
        lambda t: t.add_(torch.from_numpy(np.ones(4, np.float32))),
        "numbers of the host",
    ),
    "as_tensor": (lambda t: t.add_(torch.as_tensor(np.ones(4, np.float32))), "numbers of the host"),
    "tensor": (lambda t: t.add_(torch.tensor([1.0])), "numbers of the host"),
    "arange": (lambda t: t.add_(torch.arange(4)), "aten.arange.*out of nothing"),
    "where with a number": (
        lambda t: t.copy_(torch.where(t > 0, t, 1.0)),
        "scalar_tensor.*out of nothing",
    ),
    "to another device": (lambda t: t.to("meta"), "_to_copy.*is not on cpu alone"),
    "copy between devices": (
        lambda t: torch.empty_like(t, device="meta").copy_(t),
        "is not on cpu alone",
    ),
    "mask": (lambda t: t[t > 0], "aten.index.Tensor.*shape of its result depends on numbers"),
    "nonzero": (lambda t: t.nonzero(), "aten.nonzero.*shape of its result depends on numbers"),
    "random numbers": (lambda t: t.add_(torch.rand_like(t)), "rand_like.*draws random numbers"),
    "a generator of the host": (
        lambda t: t.uniform_(generator=torch.Generator()),
        "uniform_.*draws random numbers",
    ),
    "dropout": (lambda t: torch.nn.functional.dropout(t), "bernoulli_.*draws random numbers"),
    "resize": (lambda t: t.resize_(8), "moves or resizes a tensor"),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_a_graph_cannot_do_is_refused_and_undone(name, total):
    forbidden, match = FORBIDDEN[name]

    def step():
        total.add_(1)
        forbidden(total)

    with pytest.raises(CaptureError, match=match):
        StandIn(CPU).capture(step)
    assert total[:4].tolist() == [0, 0, 0, 0]
    forbidden(torch.zeros(4))  # outside a step all of it is allowed


def test_a_result_that_outlives_the_step_is_refused(total):
    kept = []
    with pytest.raises(
        CaptureError, match=r"aten.add.Tensor in a recorded step: its result outlives the step"
    ):
        StandIn(CPU).capture(lambda: kept.append(total + 1))


def test_a_tensor_that_was_replaced_is_missed():
    class Owner:
        total = torch.zeros(4)

    recorded = StandIn(CPU).capture(lambda: Owner.total.add_(1))
    recorded()
    Owner.total = Owner.total + 1
    with pytest.raises(
        CaptureError, match=r"the memory of a \(4,\) tensor .* is gone: keep its tensors"
    ):
        recorded()
