"""Reverse and forward mode and finite differences: closed forms, each other, memory; populations as
inner trainings."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gputune.engine.job import train_chunk
from gputune.engine.mlp import StackedMLP
from gputune.hypergradients.chunk import HypergradientJob, PopulationTraining, inner_problem
from gputune.hypergradients.first_step import MemoryNeed, fastest_that_fits, free_bytes, measure
from gputune.hypergradients.inner import (
    HYPERPARAMETERS,
    InnerProblem,
    from_coordinate,
    leaves_of,
    segment_at,
    slope,
    speed,
    to_coordinate,
)
from gputune.hypergradients.modes import default_width, differences, forward, reverse
from gputune.modules.inspection import traits_of
from gputune.population.population import Population
from inner_problems import (
    OF,
    OPTIMIZERS,
    Quadratics,
    StackedNets,
    chaotic,
    rule_of,
    tables_of,
    usable,
)
from problems import (
    Net,
    fill,
    grid,
    largest_difference,
    make_data,
    peak_bytes,
    shape_of,
    train_together,
)
from refused import refused

LOSSES = {"cross_entropy": torch.tanh, "mse_loss": torch.nn.functional.gelu}
checkpointed = partial(reverse, checkpoint=True)
MODES = (reverse, checkpointed, forward)
STEP = 1e-5  # of the logarithm, in central differences


def central_differences(training_of, optimizer, tables, wanted):
    """d validation / d log hyperparameter of one member; all the trainings that it takes are
    members of one."""
    columns = [
        (name, s, layer) for name in wanted for s, layer in np.ndindex(tables[name].shape[1:])
    ]
    many = {name: table.repeat(2 * len(columns), 1, 1) for name, table in tables.items()}
    for j, (name, s, layer) in enumerate(columns):
        many[name][2 * j, s, layer] *= math.exp(STEP)
        many[name][2 * j + 1, s, layer] *= math.exp(-STEP)
    training = training_of(2 * len(columns))
    values = training.validation(InnerProblem(training, optimizer, many).train()).view(-1, 2)
    found = {name: torch.zeros_like(tables[name]) for name in wanted}
    for (name, s, layer), (up, down) in zip(columns, values):
        found[name][0, s, layer] = (up - down) / (2 * STEP)
    return found


def assert_same(found, expected, tables):
    """To 1e-12 of the largest entry of each hyperparameter's log gradient, and 1e-15 where the
    truth is 0."""
    for name, table in expected.items():
        a = found[name] * tables[name]
        b = table * tables[name]
        assert (a - b).abs().max() <= 1e-12 * b.abs().max() + 1e-15, name


FEW = [("sgd", "mse_loss", 25), ("adamw", "mse_loss", 25)]
FEW += [
    (name, loss, steps)
    for name in OPTIMIZERS
    for loss, steps in (("cross_entropy", 25), ("mse_loss", 1))
]


@pytest.mark.parametrize(
    ("optimizer", "loss", "steps"), grid(OPTIMIZERS, LOSSES, (1, 25), short=FEW)
)
def test_all_modes_equal_finite_differences(optimizer, loss, steps):
    def training_of(members):
        return StackedNets(steps, seeds=(0,) * members, loss=loss, activation=LOSSES[loss])

    rule = rule_of(optimizer)
    wanted = OF[optimizer]
    tables = tables_of(optimizer, segments=min(3, steps))
    whole, blocks, tangents = (
        mode(InnerProblem(training_of(1), rule, tables), wanted) for mode in MODES
    )
    assert tangents.ratio < 10
    for name, expected in central_differences(training_of, rule, tables, wanted).items():
        found = whole.gradients[name] * tables[name]
        assert ((found - expected).abs() <= 1e-6 * expected.abs() + 1e-9).all(), name
        if steps > 1:  # before, momentum, the betas and Adam's L2 have no effect
            assert expected.abs().max() > 1e-6, name
    assert_same(blocks.gradients, whole.gradients, tables)
    assert_same(tangents.gradients, whole.gradients, tables)
    for other in (blocks, tangents):
        torch.testing.assert_close(other.value, whole.value, rtol=1e-13, atol=0)
        torch.testing.assert_close(other.weights, whole.weights, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", (*MODES, partial(differences, width=0.1)))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_member_that_diverges_leaves_the_others_bit_for_bit(optimizer, mode):
    training = StackedNets(6, seeds=(0, 1, 2))
    wanted = OF[optimizer]
    calm = tables_of(optimizer, 3, segments=2)
    wild = {name: table.clone() for name, table in calm.items()}
    wild["lr"][1] = wild["weight_decay"][1] = 1e200
    before, after = (
        mode(InnerProblem(training, rule_of(optimizer), tables), wanted) for tables in (calm, wild)
    )
    others = [0, 2]
    assert usable(after)[others].all()
    # Adam takes steps of the length of its rate, however large it is: differences of them are
    # finite.
    assert not usable(after)[1] or (mode not in MODES and optimizer == "adam")
    assert torch.equal(before.value[others], after.value[others])
    for name in wanted:
        assert torch.equal(before.gradients[name][others], after.gradients[name][others])


class Silent(StackedNets):
    """No minibatch has a gradient, so that only weight decay moves the weights."""

    def losses(self, weights: Tensor, step: int) -> Tensor:
        return 0 * super().losses(weights, step)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", ("sgd", "adamw"))
def test_zero_gradients_give_the_closed_form_of_weight_decay(optimizer, mode):
    training = Silent(7)
    tables = tables_of("sgd")
    tables["lr"], tables["weight_decay"] = (
        torch.full((1, 1, 1), x, dtype=torch.float64) for x in (0.1, 0.3)
    )
    tables["momentum"] *= 0
    found = mode(InnerProblem(training, optimizer, tables), ("lr", "weight_decay"))
    lr, decay = (tables[name].clone().requires_grad_() for name in ("lr", "weight_decay"))
    value = training.validation((1 - lr * decay).view(1, 1) ** 7 * training.start())
    expected = torch.autograd.grad(value.sum(), (lr, decay))
    assert_same(found.gradients, dict(zip(("lr", "weight_decay"), expected)), tables)


@pytest.mark.parametrize("mode", MODES)
def test_a_dead_network_has_finite_gradients_with_adam(mode):
    def dead(x):
        return torch.relu(x - 100)

    training = StackedNets(5, activation=dead)
    tables = tables_of("adam", segments=2)
    found = mode(InnerProblem(training, "adam", tables), OF["adam"])
    assert usable(found).all()
    assert (found.gradients["lr"][0, :, 1] != 0).all()  # the last layer's bias lives


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_step_back_from_the_next_minibatch_is_the_formula_of_hypergradient_descent(optimizer):
    """Baydin et al. (2018): the slope of the next loss in the rate is minus its gradient times the
    last direction."""
    two = StackedNets(2)
    tables = tables_of(optimizer)
    tables["lr"] = tables["lr"].mean((1, 2), keepdim=True)
    momentum = tables["momentum"][0, 0, 0]
    decay = tables["weight_decay"][0, 0][two.layer][None]

    class One(StackedNets):
        def validation(self, weights):
            return two.losses(weights, 1)

    found = reverse(InnerProblem(One(1), rule_of(optimizer), tables), ("lr",))
    w = two.start()
    g = slope(two, w.clone().requires_grad_(), 0, graph=False)
    l2 = g + decay * w
    u = {
        "sgd": l2,
        "momentum": l2,
        "nesterov": (1 + momentum) * l2,
        "adam": l2 / (l2.abs() + 1e-8),
        "adamw": g / (g.abs() + 1e-8) + decay * w,
    }[optimizer]
    following = slope(two, (w - tables["lr"].view(1, 1) * u).requires_grad_(), 1, graph=False)
    expected = -(following * u).sum()
    assert abs(found.gradients["lr"].item() - expected) <= 1e-12 * abs(expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", (1, 2, 5, 40))
def test_a_quadratic_has_its_closed_form(mode, steps):
    product = torch.tensor([0.01, 0.5, 1.0, 1.3, 1.99], dtype=torch.float64)  # lr a, in (0, 2)
    a = torch.linspace(0.5, 4, 5).double()
    w0 = torch.linspace(1, -2, 5).double()
    tables = tables_of("sgd", 5)
    tables["lr"] = (product / a).view(5, 1, 1)
    tables["momentum"], tables["weight_decay"] = 0 * tables["momentum"], 0 * tables["weight_decay"]
    found = mode(InnerProblem(Quadratics(a, w0, steps), "sgd", tables), ("lr",))
    contraction = 1 - product
    torch.testing.assert_close(
        found.value, a / 2 * (contraction**steps * w0) ** 2, rtol=1e-12, atol=1e-30
    )
    expected = -steps * a**2 * w0**2 * contraction ** (2 * steps - 1)
    torch.testing.assert_close(found.gradients["lr"].flatten(), expected, rtol=1e-12, atol=1e-30)


@pytest.mark.parametrize("checkpoint", (False, True))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_truncated_is_the_derivative_of_the_last_steps_from_a_fixed_state(optimizer, checkpoint):
    training = StackedNets(11, seeds=(0, 1))
    rule = rule_of(optimizer)
    wanted = OF[optimizer]
    tables = tables_of(optimizer, 2, segments=3)
    problem = InnerProblem(training, rule, tables)
    leaves = {name: table.clone().requires_grad_() for name, table in tables.items()}
    last = InnerProblem(training, rule, leaves)
    state = leaves_of(problem.advance(problem.start(), range(6)))
    for step in range(6, 11):
        state = last.step(state, step, graph=True)
    value = training.validation(state[0]).sum()
    expected = dict(zip(wanted, torch.autograd.grad(value, [leaves[name] for name in wanted])))
    found = reverse(InnerProblem(training, rule, tables), wanted, truncate=5, checkpoint=checkpoint)
    assert_same(found.gradients, expected, tables)
    assert (found.gradients["lr"][:, 0] == 0).all()  # the first segment was over before


@pytest.mark.parametrize("steps", (1, 2, 3, 4, 9, 10))
def test_checkpoints_at_every_edge_and_truncated_to_all_steps_are_the_whole(steps):
    problem = InnerProblem(StackedNets(steps, seeds=(0, 1)), "adam", tables_of("adam", 2))
    whole = reverse(problem, OF["adam"])
    for truncate, checkpoint in ((None, True), (steps, False), (1000, True)):
        found = reverse(problem, OF["adam"], truncate=truncate, checkpoint=checkpoint)
        assert_same(found.gradients, whole.gradients, problem.tables)
        torch.testing.assert_close(found.ratio, whole.ratio)


def test_a_segment_covers_the_steps_from_its_floor_on():
    for steps in range(1, 30):
        for segments in range(1, steps + 1):
            begins = [s * steps // segments for s in range(segments)]
            expected = [
                max(s for s in range(segments) if begins[s] <= done) for done in range(steps)
            ]
            assert (
                segment_at(np.arange(steps), np.full(steps, steps), segments).tolist() == expected
            )


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_of_a_segment_is_the_sum_over_its_steps(mode):
    training = StackedNets(7)
    few = tables_of("momentum", segments=3)
    many = {name: table.clone() for name, table in few.items()}
    for name in ("lr", "momentum"):
        many[name] = few[name][:, [0, 0, 1, 1, 2, 2, 2]]
    found, each = (
        mode(InnerProblem(training, "sgd", tables), ("lr", "momentum")) for tables in (few, many)
    )
    for name in ("lr", "momentum"):
        parts = [each.gradients[name][:, i:j].sum(1) for i, j in ((0, 2), (2, 4), (4, 7))]
        assert_same({name: found.gradients[name]}, {name: torch.stack(parts, 1)}, few)
    torch.testing.assert_close(found.weights, each.weights, rtol=1e-13, atol=1e-15)


def test_layers_share_a_value_or_have_their_own():
    training = StackedNets(5)
    own = tables_of("sgd", segments=2)
    own["lr"] = own["lr"].mean(2, keepdim=True).expand(-1, -1, 2).clone()
    shared = own | {"lr": own["lr"][:, :, :1]}
    for mode in MODES:
        found, each = (
            mode(InnerProblem(training, "sgd", tables), ("lr",)) for tables in (shared, own)
        )
        assert_same(found.gradients, {"lr": each.gradients["lr"].sum(2, keepdim=True)}, shared)


@pytest.mark.parametrize("mode", MODES)
def test_every_step_is_watched_once_and_in_order(mode):
    training = StackedNets(10)
    tables = tables_of("sgd")
    seen = []
    found = mode(
        InnerProblem(training, "sgd", tables),
        ("lr",),
        watch=lambda step, weights: seen.append((step, weights)),
    )
    assert [step for step, _ in seen] == list(range(1, 11))
    plain = []
    InnerProblem(training, "sgd", tables).train(watch=lambda _, weights: plain.append(weights))
    for (_, weights), expected in zip(seen, plain):
        torch.testing.assert_close(weights, expected, rtol=1e-13, atol=1e-15)
        assert not weights.requires_grad
    assert torch.equal(seen[-1][1], found.weights)


def test_many_steps_do_not_overflow_the_stack():
    tables = tables_of("sgd")
    found = reverse(InnerProblem(StackedNets(1000), "sgd", tables), ("lr",))
    assert usable(found).all()


@pytest.mark.parametrize("mode", MODES)
def test_single_precision_is_within_a_thousandth_of_double(mode):
    def slopes(dtype):
        problem = InnerProblem(StackedNets(50, dtype=dtype), "adam", tables_of("adam", dtype=dtype))
        return mode(problem, ("lr",)).gradients["lr"]

    found = slopes(torch.float32)
    exact = slopes(torch.float64)
    assert found.dtype == torch.float32
    assert ((found - exact).abs() <= 1e-3 * exact.abs().max()).all()


def test_the_ratio_is_zero_where_the_loss_depends_on_no_weight():
    class Indifferent(StackedNets):
        def validation(self, weights):
            return torch.ones(self.members, dtype=weights.dtype, requires_grad=True) * 2

    for mode in MODES:
        found = mode(
            InnerProblem(Indifferent(3, seeds=(0, 1)), "sgd", tables_of("sgd", 2)), ("lr",)
        )
        assert (found.gradients["lr"] == 0).all() and not chaotic(found.ratio).any()
        assert found.value.tolist() == [2, 2]
    assert (
        reverse(InnerProblem(Indifferent(3), "sgd", tables_of("sgd")), ("lr",)).ratio == 0
    ).all()


def test_a_network_of_zeros_that_stays_so_is_not_chaotic():
    class Zero(Silent):
        def start(self):
            return 0 * super().start()

    for mode in MODES:
        found = mode(InnerProblem(Zero(3), "sgd", tables_of("sgd")), ("lr",))
        assert found.ratio.item() == 0


def test_a_loss_that_is_linear_in_the_weights():
    class Linear(StackedNets):
        def losses(self, weights, step):
            return weights.sum(1)

    tables = tables_of("sgd", segments=2)
    training = Linear(4)
    whole, blocks, tangents = (
        mode(InnerProblem(training, "sgd", tables), ("lr", "weight_decay")) for mode in MODES
    )
    assert_same(blocks.gradients, whole.gradients, tables)
    assert_same(tangents.gradients, whole.gradients, tables)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_differences_equal_reverse_mode(optimizer):
    training = StackedNets(8, seeds=(0, 1, 2))
    tables = tables_of(optimizer, 3, segments=2)
    width = default_width(torch.float64)
    found = differences(
        InnerProblem(training, rule_of(optimizer), tables), OF[optimizer], width=width
    )
    exact = reverse(InnerProblem(training, rule_of(optimizer), tables), OF[optimizer])
    for name in OF[optimizer]:
        distance = (found.gradients[name] - exact.gradients[name]).abs().flatten(1).amax(1)
        assert (distance <= 1e-6 * exact.gradients[name].abs().flatten(1).amax(1)).all(), name
    torch.testing.assert_close(found.value, exact.value, rtol=1e-13, atol=0)
    torch.testing.assert_close(found.weights, exact.weights, rtol=1e-12, atol=1e-14)


def test_the_ratio_of_differences_is_the_tangent_ratio_after_the_last_step():
    training = StackedNets(20, seeds=(0, 1))
    tables = tables_of("sgd", 2)
    tables["lr"] = tables["lr"][:, :, :1]
    found = differences(InnerProblem(training, "sgd", tables), ("lr",), width=1e-5)
    # Plain gradient descent that is calm: the tangent grows to the end, so the largest ratio is the
    # last.
    torch.testing.assert_close(
        found.ratio,
        forward(InnerProblem(training, "sgd", tables), ("lr",)).ratio,
        rtol=1e-6,
        atol=0,
    )


def test_of_differences_only_the_training_at_the_values_themselves_is_watched():
    training = StackedNets(4)
    tables = tables_of("sgd")
    seen = []
    differences(
        InnerProblem(training, "sgd", tables),
        ("lr",),
        width=0.1,
        watch=lambda step, w: seen.append((step, w)),
    )
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert torch.equal(seen[-1][1], InnerProblem(training, "sgd", tables).train())


def test_a_wide_step_sees_over_the_edge_of_stability():
    """At lr a = 2 the loss stays, below it falls, above it rises: a wide difference points down, to
    smaller rates."""
    a = torch.tensor([1.0]).double()
    w0 = torch.tensor([1.0]).double()
    tables = {name: 0 * table for name, table in tables_of("sgd").items()}
    tables["lr"] = torch.tensor([[[1.95]]]).double()
    narrow, wide = (
        differences(InnerProblem(Quadratics(a, w0, 50), "sgd", tables), ("lr",), width=h)
        for h in (1e-6, 0.2)
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


def peak_of(mode, training, optimizer, wanted):
    tables = tables_of(optimizer, training.members)
    return peak_bytes(lambda: mode(InnerProblem(training, rule_of(optimizer), tables), wanted))


def test_forward_mode_needs_no_more_for_more_steps():
    short, long = (peak_of(forward, StackedNets(steps), "adam", ("lr",)) for steps in (10, 30))
    assert long <= 1.1 * short  # and the count does see what grows: reverse mode below


def test_reverse_mode_grows_with_the_steps_and_checkpointed_with_their_root():
    (few, many), (few_blocks, many_blocks) = (
        [peak_of(mode, StackedNets(steps), "adam", ("lr",)) for steps in (16, 144)]
        for mode in (reverse, checkpointed)
    )
    assert many > 8 * few
    assert 2.5 * few_blocks < many_blocks < 3.5 * few_blocks
    assert many_blocks < many / 4


def test_training_without_derivatives_keeps_nothing():
    few, many = (
        peak_of(lambda problem, _: problem.train(), StackedNets(steps), "adam", ())
        for steps in (5, 25)
    )
    assert many == few


@pytest.mark.parametrize("shape", ({"width": 64}, {"width": 16, "seeds": (0, 1)}))
def test_the_estimate_is_within_a_factor_of_two(shape):
    training = StackedNets(12, **shape)
    tables = tables_of("adam", training.members)
    need = measure(InnerProblem(training, "adam", tables))
    for wanted in (("lr",), OF["adam"]):
        sizes = need.of_modes(12, sum(tables[name][0].numel() for name in wanted))
        for mode, estimate in zip(MODES, sizes.values()):
            assert 0.5 < estimate / peak_of(mode, training, "adam", wanted) < 2, mode


def test_measuring_leaves_nothing_behind():
    training = StackedNets(3)
    tables = tables_of("adam")
    before = [tensor.clone() for tensor in (training.first, *tables.values())]
    first, second = (measure(InnerProblem(training, "adam", tables)) for _ in range(2))
    assert first == second
    assert all(torch.equal(a, b) for a, b in zip(before, (training.first, *tables.values())))
    assert not any(table.requires_grad for table in tables.values())


def test_needs_are_counted_in_steps_and_states():
    need = MemoryNeed(step=1000, state=10)
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
    sizes = MemoryNeed(step=1000, state=10).of_modes(100, hyperparameters)
    assert fastest_that_fits(sizes, budget, hyperparameters=hyperparameters) == mode


def test_free_bytes_are_some_of_the_main_memory():
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50


TASKS = ["multiclass", "binary", "regression"]
RULES = ["sgd", "nesterov", "adam", "adamw"]


def unlike(optimizer, **common):
    """Three trials of one population that share nothing else: widths, batch sizes, rates,
    decays."""
    rows = ((8, 16, 0.01, 0.1), (13, 10, 0.03, 0.02), (16, 12, 0.02, 0.01))
    return fill(
        *(
            {
                "optimizer": optimizer,
                "width": w,
                "batch_size": b,
                "lr": lr,
                "weight_decay": wd,
                "activation": "tanh",
                **common,
            }
            for w, b, lr, wd in rows
        )
    )


def population_problem(data, configs, *, segments=1):
    """A population's training of three epochs, at rates that rise from segment to segment."""
    network = StackedMLP("mlp", configs, shape_of(data), seed=0)
    training = PopulationTraining(network, data, configs, seed=0, epochs=3)
    rising = [{**c, "lr": (c["lr"] * np.linspace(1, 1.5, segments)).tolist()} for c in configs]
    job = HypergradientJob(seed=0, epochs=3, horizon=3, segments=segments)
    return InnerProblem(training, configs[0]["optimizer"], job.tables(training, rising))


SCHEDULES = ["constant", "cosine"]
FEW_TASKS = [
    (task, name, SCHEDULES[(i + j) % 2])
    for i, task in enumerate(TASKS)
    for j, name in enumerate(RULES)
]


@pytest.mark.parametrize(
    ("task", "optimizer", "schedule"), grid(TASKS, RULES, SCHEDULES, short=FEW_TASKS)
)
def test_members_equal_those_of_plain_training(task, optimizer, schedule):
    data = make_data(task, weights=True, folds=3)
    configs = unlike(optimizer, dropout=0.1, schedule=schedule)
    inner = population_problem(data, configs)
    weights, (expected, _) = inner.train(), train_together(data, configs, epochs=3)
    for f, c in itertools.product(range(data.n_folds), range(len(configs))):
        assert largest_difference(inner.training.member(weights, f, c), expected[f, c]) <= 1e-12


@pytest.mark.parametrize("optimizer", RULES)
def test_each_member_has_the_slope_that_it_has_alone(optimizer):
    """All modes agree, and neighbours, members of other lengths and padding change nothing (law 2
    and law 3)."""
    data = make_data(weights=True, folds=3)
    configs = unlike(optimizer)
    names = ("lr", "weight_decay")
    configs[1]["schedule"] = "cosine"
    whole = population_problem(data, configs, segments=2)
    assert len(set(whole.training.totals.tolist())) > 1
    first, *others = found = [mode(whole, names) for mode in MODES]
    for name, other in itertools.product(names, others):
        bound = 1e-12 * float(first.gradients[name].abs().max())
        torch.testing.assert_close(other.gradients[name], first.gradients[name], rtol=0, atol=bound)
    for mode, together in zip(MODES, found):
        for c, config in enumerate(configs):
            alone = mode(population_problem(data, [config], segments=2), names)
            for name in names:
                own = together.gradients[name].view(3, 3, -1)[:, c]
                torch.testing.assert_close(
                    own, alone.gradients[name].view(3, -1), rtol=1e-11, atol=1e-15
                )
            torch.testing.assert_close(
                together.value.view(3, 3)[:, c], alone.value, rtol=1e-12, atol=0
            )
            torch.testing.assert_close(together.ratio.view(3, 3)[:, c], alone.ratio)


@pytest.mark.parametrize("task", TASKS)
def test_slopes_equal_finite_differences(task):
    inner = population_problem(
        make_data(task, folds=3), unlike("adam", schedule="cosine"), segments=2
    )
    found = reverse(inner, ("lr",))
    expected = differences(inner, ("lr",), width=1e-5)
    for a, b in zip(found.gradients["lr"].flatten(), expected.gradients["lr"].flatten()):
        assert a == pytest.approx(float(b), rel=1e-6, abs=1e-7)


def test_padded_units_have_no_slope_of_nan():
    """A unit that is padding has gradient and squares of zero, where the root's slope would be
    infinite."""
    data = make_data(folds=3)
    configs = fill({"optimizer": "adam", "width": 3}, {"optimizer": "adam", "width": 16})
    for mode in (forward, reverse):
        found = mode(population_problem(data, configs), ("lr", "beta1", "beta2"))
        for table in found.gradients.values():
            assert table.isfinite().all() and table.abs().min() > 0


class Sequence(nn.Module):
    kind = nn.GRU

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.cell = self.kind(1, 3, batch_first=True)
        self.leave = nn.Linear(3, n_outputs)

    def forward(self, x):
        return self.leave(self.cell(x[..., None])[0][:, -1])


class WithLSTM(Sequence):
    kind = nn.LSTM


class Convolution(nn.Sequential):
    def __init__(self, n_features, n_outputs, **options):
        first = (
            nn.Unflatten(1, (1, -1)),
            nn.Conv1d(1, 3, 3),
            nn.BatchNorm1d(3, **options),
            nn.Tanh(),
        )
        super().__init__(
            *first, nn.Dropout(0.1), nn.Flatten(), nn.Linear(3 * (n_features - 2), n_outputs)
        )


def module_problem(kind, data, *configs):
    """A module's job and chunk, and its training for two epochs at the hyperparameters of the
    configurations."""
    chunk = Population("module", tuple(range(len(configs))), tuple(fill(*configs)))
    traits = {chunk.arguments: traits_of(kind, chunk.configs[0], data)}
    job = HypergradientJob(
        seed=0, epochs=2, horizon=2, module_class=kind, traits=traits, backend="eager"
    )
    return job, chunk, inner_problem(job, data, chunk)


@pytest.mark.parametrize(
    ("kind", "layers", "kept"),
    [
        (Net, 2, 0),
        (Sequence, 2, 0),
        (WithLSTM, 2, 0),
        (Convolution, 3, 7),
        (partial(Convolution, momentum=None), 3, 7),
    ],
)
def test_modules_are_differentiated_twice(kind, layers, kept):
    """Members equal plain training; forward and reverse agree, and their slope equals central
    differences.
    """
    data = make_data(folds=3, weights=kind is Net)
    optimizer = "adamw" if kind is Net else "sgd"
    config = {"optimizer": optimizer, "lr": 0.3, "batch_size": 16}
    job, chunk, inner = module_problem(kind, data, config, config | {"lr": 0.1})
    assert (inner.training.kept, int(inner.training.layer.max()) + 1) == (kept, layers)
    weights = inner.train()
    plain = train_chunk(job, data, chunk)
    for f, c in itertools.product(range(3), range(2)):
        assert largest_difference(inner.training.member(weights, f, c), plain.member(f, c)) <= 1e-12
    a, b = (mode(inner, ("lr",)).gradients["lr"] for mode in (forward, reverse))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(
        b, differences(inner, ("lr",), width=1e-5).gradients["lr"], rtol=1e-5, atol=1e-9
    )


class Counting(Net):
    """Remembers how often it was called."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + self.training
        return super().forward(x)


def test_other_state_is_refused():
    with refused("model must keep no state .*, but its 'calls' changes in training"):
        module_problem(Counting, make_data(folds=3), {"batch_size": 16})


def test_a_class_that_a_fold_has_not_trained_on():
    """Its outputs take no part: the losses of the other rows, and all slopes, stay finite."""
    data = make_data("multiclass", folds=3)
    present = torch.ones(3, 3, dtype=torch.bool)
    present[0, 2] = False
    folds = tuple(
        type(fold)(
            fold.train[data.y[fold.train] != 2] if f == 0 else fold.train,
            fold.valid[data.y[fold.valid] != 2] if f == 0 else fold.valid,
        )
        for f, fold in enumerate(data.folds)
    )
    data = type(data)(**{**data.__dict__, "present": present, "folds": folds})
    found = reverse(population_problem(data, unlike("adam")), ("lr",))
    assert found.value.isfinite().all() and found.gradients["lr"].isfinite().all()
