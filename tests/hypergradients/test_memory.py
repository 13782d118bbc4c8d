"""What the modes need: the estimate beside the bytes that were truly alive, and how both grow with the steps."""

import functools

import pytest
import torch

from gputune.hypergradients.first_step import Need, fastest_that_fits, free_bytes, measure
from gputune.hypergradients.inner import InnerProblem
from gputune.hypergradients.modes import forward, reverse
from inner_problems import OF, StackedNets, rule_of, tables_of
from problems import peak_bytes

checkpointed = functools.partial(reverse, checkpoint=True)


def peak_of(mode, training, optimizer, wanted):
    tables = tables_of(optimizer, training.members)
    return peak_bytes(lambda: mode(InnerProblem(training, rule_of(optimizer), tables), wanted))


def test_forward_mode_needs_no_more_for_more_steps():
    short, long = (peak_of(forward, StackedNets(steps), "adam", ("lr",)) for steps in (10, 30))
    assert long <= 1.1 * short  # and the count does see what grows: reverse mode below


def test_reverse_mode_grows_with_the_steps_and_checkpointed_with_their_root():
    (few, many), (few_blocks, many_blocks) = (
        [peak_of(mode, StackedNets(steps), "adam", ("lr",)) for steps in (16, 144)] for mode in (reverse, checkpointed)
    )
    assert many > 8 * few
    assert 2.5 * few_blocks < many_blocks < 3.5 * few_blocks
    assert many_blocks < many / 4


def test_training_without_derivatives_keeps_nothing():
    few, many = (peak_of(lambda problem, _: problem.train(), StackedNets(steps), "adam", ()) for steps in (5, 25))
    assert many == few


@pytest.mark.parametrize("shape", ({"width": 64}, {"width": 16, "seeds": (0, 1)}))
def test_the_estimate_is_within_a_factor_of_two(shape):
    training = StackedNets(12, **shape)
    tables = tables_of("adam", training.members)
    need = measure(InnerProblem(training, "adam", tables))
    for wanted in (("lr",), OF["adam"]):
        sizes = need.of_modes(12, sum(tables[name][0].numel() for name in wanted))
        for mode, estimate in (
            (reverse, sizes["reverse"]),
            (checkpointed, sizes["checkpointed"]),
            (forward, sizes["forward"]),
        ):
            assert 0.5 < estimate / peak_of(mode, training, "adam", wanted) < 2, mode


def test_measuring_leaves_nothing_behind():
    training, tables = StackedNets(3), tables_of("adam")
    before = [tensor.clone() for tensor in (training.first, *tables.values())]
    first, second = (measure(InnerProblem(training, "adam", tables)) for _ in range(2))
    assert first == second
    assert all(torch.equal(a, b) for a, b in zip(before, (training.first, *tables.values())))
    assert not any(table.requires_grad for table in tables.values())


def test_needs_are_counted_in_steps_and_states():
    need = Need(step=1000, state=10)
    assert need.of_modes(7, 1)["reverse"] == 7000
    checkpointed = [need.of_modes(steps, 1)["checkpointed"] for steps in (1, 9, 10)]
    assert checkpointed == [1010, 3 * 1000 + 3 * 10, 4 * 1000 + 3 * 10]
    assert need.of_modes(7, 2)["forward"] == need.of_modes(9, 1)["forward"] + 40


@pytest.mark.parametrize(
    ("budget", "hyperparameters", "mode"),
    (
        (10**9, 1, "forward"),
        (1079, 1, "forward"),
        (100_000, 2, "reverse"),
        (99_999, 2, "checkpointed"),
        (10_100, 2, "checkpointed"),
        (10_099, 2, "forward"),
        (1, 2, "forward"),
    ),
)
def test_the_fastest_that_fits(budget, hyperparameters, mode):
    sizes = Need(step=1000, state=10).of_modes(100, hyperparameters)
    assert fastest_that_fits(sizes, budget, hyperparameters=hyperparameters) == mode


def test_free_bytes_are_some_of_the_main_memory():
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50
