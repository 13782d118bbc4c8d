"""A module trains stacked or one by one, whichever a few steps of both show to be faster, where it is worth trying."""

import pytest
from torch import nn

import gputune
from gputune.engine import timing
from gputune.engine.job import Job
from gputune.engine.timing import slower_stacked
from gputune.population.population import Population
from problems import fill, make_data

CONFIGS = fill(*({"lr": lr, "batch_size": 16} for lr in (1e-3, 1e-2)))


class Net(nn.Linear):
    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)


def found(member_steps):
    job = Job(seed=0, epochs=3, horizon=3, module_class=Net, backend="graph")
    chunk = Population("module", (0, 1), tuple(CONFIGS))
    return slower_stacked(job, make_data(), chunk, member_steps=member_steps)


@pytest.mark.parametrize(
    ("stacked", "steps", "words"),
    [
        (0.002, 1e9, "a step of a member takes 1 ms so, and 2 ms with its members stacked"),
        (0.00105, 1e9, ""),
        (0.0001, 1e9, ""),
        (0.002, 1e3, ""),
    ],
)
def test_the_faster_way_is_kept_where_it_matters(monkeypatch, stacked, steps, words):
    monkeypatch.setattr(
        timing, "_seconds", lambda job, data, chunk, backend: {"loop": 0.001}.get(backend, stacked)
    )
    assert found(steps) == words


def test_both_ways_are_timed():
    assert found(1) == ""
    data, job = make_data(), Job(seed=0, epochs=3, horizon=3, module_class=Net)
    chunk = Population("module", (0, 1), tuple(CONFIGS))
    for backend in ("loop", "graph"):
        assert 0 < timing._seconds(job, data, chunk, backend) < 1


def test_a_search_says_which_way_it_took(monkeypatch, capsys):
    X, y = make_data().x[0].float(), make_data().y
    options = {"n_trials": 2, "cv": 2, "max_epochs": 2, "workers": 1, "verbose": 1}
    stacked = gputune.tune(Net, X, y, **options)
    assert "one by one" not in capsys.readouterr().err
    monkeypatch.setattr("gputune.tuning.context.slower_stacked", lambda *args, **more: "2 ms so")
    alone = gputune.tune(Net, X, y, **options)
    said = capsys.readouterr().err
    assert (
        "note: Net trains one by one, which is faster here: 2 ms so" in said
        and "one by one" in said.split("plan:")[1]
    )
    assert [t.score for t in alone.trials] == pytest.approx([t.score for t in stacked.trials], rel=1e-5)
