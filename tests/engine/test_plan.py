"""The plan: memory bounds chunks, work decides on processes, nothing is lost or doubled.

Memory is measured at two sizes: by what PyTorch allocates on the CPU, where the same code trains as
on a GPU.
"""

from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from gputune.engine import plan
from gputune.engine.backends.selection import choose_backend
from gputune.engine.job import Job, train_chunk
from gputune.engine.need import Need, measure_need
from gputune.engine.plan import Planner, parse_memory, trial_cost
from gputune.ground.types import OPTIMIZERS
from gputune.population.population import Population, is_plain, populations
from problems import fill, make_data, scoring_of
from problems import peak_bytes as peak
from refused import refused


def groups(data, *configs, kind="mlp", optimizer="adamw"):
    return populations(
        fill(*configs, optimizer=optimizer), kind, rows=max(len(fold.train) for fold in data.folds)
    )


def make_plan(found, data, epochs=1, memory=None, workers=1, **more):
    return Planner(data, memory, workers, **more).plan(found, epochs)


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("memory", [None, 1, 100_000])
def test_every_trial_is_in_one_chunk(workers, memory):
    data = make_data()
    found = groups(
        data, *({"width": w, "batch_size": b} for w in (8, 40, 100) for b in (7, 16, 16, 16, 16))
    )
    plan = make_plan(found, data, epochs=3, memory=memory, workers=workers)
    assert sorted(i for chunk in plan.chunks for i in chunk.index) == list(range(15))
    assert plan.workers == min(workers, len(plan.chunks))


def test_memory_bounds_a_chunk_but_one_trial_always_fits():
    data = make_data()
    found = groups(data, *({"width": 100} for _ in range(12)))
    one = trial_cost(found[0], data).trial_bytes
    for memory, sizes in ((3 * one, [3] * 4), (1, [1] * 12)):
        plan = make_plan(found, data, memory=memory)
        assert [len(chunk.index) for chunk in plan.chunks] == sizes


def test_short_work_stays_in_one_process_and_long_work_is_cut_for_all():
    data = make_data()
    found = groups(data, *({"width": 256} for _ in range(8)))
    short = make_plan(found, data, workers=None)
    assert (short.workers, short.threads) == (1, 1)
    forced = make_plan(found, data, epochs=10**6, workers=4)
    assert forced.workers == 4 and len(forced.chunks) >= 4
    assert forced.threads == 1


def test_a_trial_with_dropout_takes_longer_in_compiled_code():
    data = make_data()
    for width, least in ((32, 1.05), (256, 1.01)):
        configs = [{"width": width, "dropout": rate} for rate in (0.0, 0.2)]
        without, dropped = (
            trial_cost(groups(data, config)[0], data, backend="compiled") for config in configs
        )
        assert least < dropped.trial_seconds / without.trial_seconds < 1.3
        assert dropped.state_bytes == without.state_bytes


def test_the_longest_chunk_comes_first():
    data = make_data()
    plan = make_plan(groups(data, {"width": 8}, {"width": 512}, {"width": 64}), data)
    assert [chunk.configs[0]["width"] for chunk in plan.chunks] == [512, 64, 8]


def test_the_first_answer_comes_early():
    data = make_data()  # of four folds
    configs = [{"width": w} for w in (64, 8, 512, 64, 64, 64, 64, 64, 64, 64)]
    find = partial(make_plan, groups(data, *configs, optimizer="adam"), data)
    plan = replace(find(workers=1, backend="compiled"), threads=4)
    assert [chunk.index for chunk in plan.chunks] == [(2,), (0, *range(3, 10)), (1,)]
    early = plan.answering_early(4)
    assert [chunk.index for chunk in early.chunks] == [(0, 3, 4), (1,), tuple(range(5, 10)), (2,)]
    assert len(early.ways) == 4 and "10 trials in 4 chunks of 1 to 5" in str(early)
    # as many as give each of the threads two members; what is not compiled pays for each cut, and
    # stays whole
    assert [len(c.index) for c in replace(plan, threads=8).answering_early(4).chunks] == [
        4,
        1,
        4,
        1,
    ]
    assert [c.index[0] for c in find(workers=1).answering_early(4).chunks] == [0, 1, 2]
    several = find(workers=3)
    assert several.answering_early(4).chunks[1:] == tuple(
        c for c in several.chunks if 0 not in c.index
    )


class Net(nn.Linear):
    """A user's module, with a parameter that is not trained."""

    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)
        self.still = nn.Parameter(self.bias.detach().clone(), requires_grad=False)


@pytest.mark.parametrize(
    "backend", sorted({"eager", choose_backend("auto", torch.device("cpu"), torch.float64)[0]})
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["mlp", "linear", "module"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_waiting_states_are_counted_to_the_byte(optimizer, kind, momentum, backend):
    data = make_data()
    own = {} if kind == "module" else {"width": 20, "depth": 1}
    configs = ({**own, "lr": lr, "momentum": momentum} for lr in (0.1, 0.2))
    found = groups(data, *configs, kind=kind, optimizer=optimizer)
    parameters = (data.n_features + 1) * data.n_outputs
    plan = make_plan(found, data, parameters=parameters, backend=backend)
    job = Job(
        seed=0, epochs=1, horizon=1, module_class=Net if kind == "module" else None, backend=backend
    )
    states = [train_chunk(job, data, chunk).state for chunk in plan.chunks]
    assert plan.state_bytes == sum(buffer.nbytes for state in states for buffer in state.buffers)


@pytest.mark.parametrize(
    ("cache_bytes", "words"),
    [
        (None, ""),
        (
            4096,
            "; the states of paused trials take up to 4.0 KiB in main memory and 6.0 KiB in files",
        ),
        (10240, "; the states of paused trials take up to 10.0 KiB in main memory"),
    ],
)
def test_the_plan_says_what_trains_and_where_states_wait(cache_bytes, words):
    data = make_data(folds=3)
    plan = make_plan(groups(data, {"width": 8}), data)
    assert (
        str(plan)
        == "1 trial in 1 chunk of 1, about 217.0 KiB a chunk and 7.1 KiB of data, in this "
        "process, eager"
    )
    assert str(replace(plan, state_bytes=10240, cache_bytes=cache_bytes)) == f"{plan}{words}"


@pytest.mark.parametrize(
    ("memory", "size"),
    [
        (None, None),
        (1000, 1000),
        ("8GB", 2**33),
        ("500 mb", 500 * 2**20),
        ("1.5GiB", 3 * 2**29),
        ("64B", 64),
    ],
)
def test_memory_is_read(memory, size):
    assert parse_memory(memory) == size


@pytest.mark.parametrize("memory", ["lots", "", 0, -1, "0GB", True, "infGB", "nan"])
def test_bad_memory_is_named(memory):
    with refused("memory must be a positive number of bytes, or text such as '8GB', got"):
        parse_memory(memory)


def test_the_plan_says_how_its_chunks_train():
    data = make_data()
    found = groups(data, {"width": 8}, {"width": 20}, {"width": 40, "optimizer": "adamhd"})
    assert str(make_plan(found, data)).endswith(", in this process, eager")
    for backend, word in (("compiled", "compiled"), ("recorded", "recorded")):
        assert str(make_plan(found[:2], data, backend=backend)).endswith(f", {word}")
        text = str(make_plan(found, data, backend=backend))
        assert f", 2 {word}, 1 eager (" in text
        assert text.endswith("steps of the optimizer 'adamhd' cannot be recorded)")


def test_compiled_members_share_threads_of_one_process_whatever_their_batch_sizes(monkeypatch):
    monkeypatch.setattr(plan, "cores", lambda: 4)
    data = make_data()
    configs = fill(*({"width": 8 + i, "batch_size": 3 + i} for i in range(8)))
    (one,) = populations(configs, "mlp", rows=41, own_steps=lambda config: True)
    made = make_plan([one], data, epochs=10**6, workers=None, backend="compiled")
    assert [len(chunk.index) for chunk in made.chunks] == [8]
    assert (made.workers, made.threads, made.ways) == (1, 4, ("compiled",))
    assert "in this process on 4 threads, compiled" in str(made)
    forced = make_plan([one], data, epochs=10**6, workers=3, backend="compiled")
    assert (forced.workers, forced.threads) == (3, 1)


def test_each_trial_says_whether_it_takes_steps_of_its_own():
    # of one shape; compiled code knows no other beta
    configs = fill({"beta2": 0.999}, {"beta2": 0.5})
    found = populations(configs, "mlp", rows=41, own_steps=is_plain)
    assert [group.index for group in found] == [(0,), (1,)]


DATA = make_data(n=120, d=20, dtype=torch.float32)


def job(module_class=None, epochs=9):
    return Job(
        seed=0, epochs=epochs, horizon=epochs, scoring=scoring_of(DATA), module_class=module_class
    )


def population(*configs, kind="mlp"):
    return Population(kind, tuple(range(len(configs))), tuple(fill(*configs)))


def whole_peak(group, module_class=None):
    """The peak of all trials of a population in one chunk, trained for a whole epoch."""
    return peak(lambda: train_chunk(job(module_class, epochs=1), DATA, group))


class Wide(nn.Module):
    """A module with activations that are far larger than its parameters suggest."""

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.inner = nn.Linear(1, 1)
        self.outer = nn.Linear(n_features, n_outputs)

    def forward(self, x):
        seen = self.inner(x.unsqueeze(-1).repeat(1, 1, 50).unsqueeze(-1)).tanh()
        return self.outer(seen.squeeze(-1).mean(-1))


@pytest.mark.parametrize(("width", "sizes"), [(16, [16]), (100, [64]), (100, [8, 11, 16, 13])])
def test_a_line_through_two_sizes_foretells_the_peak_of_many_trials(width, sizes):
    group = population(*({"width": width, "batch_size": sizes[i % len(sizes)]} for i in range(30)))
    need = measure_need(job(), DATA, group, peak)
    assert need.once + 30 * need.trial == pytest.approx(whole_peak(group), rel=0.05)


def test_a_module_is_measured_too():
    group = population(*({"batch_size": 32} for _ in range(16)), kind="module")
    need = measure_need(job(Wide), DATA, group, peak)
    assert need.once + 16 * need.trial == pytest.approx(whole_peak(group, Wide), rel=0.05)
    size = sum(p.numel() for p in Wide(20, 3).parameters())
    # what an estimate cannot know
    assert need.trial > 5 * trial_cost(group, DATA, size).trial_bytes


def test_the_largest_batches_are_measured():
    large, small = (
        population(*({"batch_size": size if i == 9 else 20} for i in range(10)))
        for size in (60, 20)
    )
    assert (
        measure_need(job(), DATA, large, peak).trial > measure_need(job(), DATA, small, peak).trial
    )


def test_the_plan_goes_by_what_was_measured():
    group = population(*({"batch_size": 32} for _ in range(16)), kind="module")
    need = measure_need(job(Wide), DATA, group, peak)
    limit = need.once + 4 * need.trial + 1
    measure = partial(measure_need, job(Wide), DATA, peak=peak)
    planner = Planner(DATA, None, 1, parameters=65, free=round(limit / 0.8))
    made = replace(planner, measure=lambda found, most: measure(found, most=most)).plan([group], 3)
    assert [len(chunk.index) for chunk in made.chunks] == [4] * 4
    assert whole_peak(made.chunks[0], Wide) <= 1.01 * limit
    assert len(planner.plan([group], 3).chunks) == 1  # the estimate would have taken them all


def test_a_search_that_is_far_from_the_limit_is_not_measured():
    asked = []
    group = population(*({"width": 16} for _ in range(10)))
    one = trial_cost(group, DATA).trial_bytes

    def measure(found, most):
        asked.append(most)

    for free in (25 * one * 2, 5 * one * 2):
        made = Planner(DATA, None, 1, free=free, measure=measure).plan([group], 1)
    assert asked == [8]  # of 0.8 x 10
    assert [len(chunk.index) for chunk in made.chunks] == [5, 5]  # None: the estimate stands


def test_what_cannot_be_measured_is_left_to_the_estimate():
    alone = population({"width": 16})
    two = population({"width": 16}, {"width": 16})
    assert (
        measure_need(job(), DATA, alone, peak)
        is measure_need(job(), DATA, two, peak, most=1)
        is None
    )
    assert (
        measure_need(
            job(), DATA, two, Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory."))
        )
        is None
    )
    with pytest.raises(RuntimeError, match="x"):
        measure_need(job(), DATA, two, Mock(side_effect=RuntimeError("x")))
    # A trial that leaves nothing over needs a byte at least.
    assert measure_need(job(), DATA, two, lambda work: 100) == Need(once=99, trial=1)
