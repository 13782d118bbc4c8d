"""The plan: memory bounds chunks, work decides on processes, nothing is lost or doubled."""

import pytest

from gputune.engine.cost import trial_cost
from gputune.engine.plan import make_plan, parse_memory
from gputune.engine.population import populations
from gputune.errors import InputError
from problems import fill, make_data


def groups(data, *configs, kind="mlp"):
    return populations(fill(*configs), kind, rows=max(len(fold.train) for fold in data.folds))


def indices(plan):
    return sorted(i for chunk in plan.chunks for i in chunk.index)


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("memory", [None, 1, 100_000])
def test_every_trial_is_in_one_chunk(workers, memory):
    data = make_data()
    found = groups(data, *({"width": w, "batch_size": b} for w in (8, 40, 100) for b in (7, 16, 16, 16, 16)))
    plan = make_plan(found, data, epochs=3, memory=memory, workers=workers)
    assert indices(plan) == list(range(15))
    assert plan.workers == min(workers, len(plan.chunks))


def test_memory_bounds_a_chunk_but_one_trial_always_fits():
    data = make_data()
    found = groups(data, *({"width": 100} for _ in range(12)))
    one = trial_cost(found[0], data).trial_bytes
    assert [len(c.index) for c in make_plan(found, data, epochs=1, memory=3 * one, workers=1).chunks] == [
        3
    ] * 4
    assert [len(c.index) for c in make_plan(found, data, epochs=1, memory=1, workers=1).chunks] == [1] * 12


def test_short_work_stays_in_one_process_and_long_work_is_cut_for_all():
    data = make_data()
    found = groups(data, *({"width": 256} for _ in range(8)))
    short = make_plan(found, data, epochs=1, memory=None, workers=None)
    assert (short.workers, short.threads) == (1, 1)
    forced = make_plan(found, data, epochs=10**6, memory=None, workers=4)
    assert forced.workers == 4 and len(forced.chunks) >= 4
    assert forced.threads == 1


def test_the_longest_chunk_comes_first():
    data = make_data()
    plan = make_plan(
        groups(data, {"width": 8}, {"width": 512}, {"width": 64}), data, epochs=1, memory=None, workers=1
    )
    assert [chunk.configs[0]["width"] for chunk in plan.chunks] == [512, 64, 8]


def test_the_plan_reads_well():
    data = make_data()
    plan = make_plan(groups(data, {"width": 8}), data, epochs=1, memory=None, workers=1)
    assert str(plan) == "1 trial in 1 chunk of 1, about 1 MiB a chunk and 1 MiB of data, in this process"


@pytest.mark.parametrize(
    ("memory", "size"),
    [
        (None, None),
        (1000, 1000),
        ("8GB", 8 * 2**30),
        ("500 mb", 500 * 2**20),
        ("1.5GiB", 3 * 2**29),
        ("64B", 64),
    ],
)
def test_memory_is_read(memory, size):
    assert parse_memory(memory) == size


@pytest.mark.parametrize("memory", ["lots", "", 0, -1, "0GB", True, "infGB", "nan"])
def test_bad_memory_is_named(memory):
    with pytest.raises(InputError, match="memory is a number of bytes or text such as '8GB', above 0, got"):
        parse_memory(memory)
