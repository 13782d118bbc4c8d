"""A module that is like an earlier module of the search is timed only in compiled code."""

import math

import pytest
from torch import nn

import gputune
from gputune.engine import choice, similar_timing
from gputune.engine.job import Job
from gputune.engine.similar_timing import TimedModule, way_like_earlier
from gputune.modules.trace import TraceError
from gputune.population.population import Population
from gputune.population.traits import FastestWay, Traits
from problems import fill, make_data

CONFIGS = fill(*({"lr": lr, "batch_size": 16} for lr in (1e-3, 1e-2)))
DATA = make_data()
CHUNK = Population("module", (0, 1), tuple(CONFIGS))
CLEAR = FastestWay(gain=0.003, seconds={"loop": 0.004, "recorded": 0.005, "compiled": 0.001})
CLOSE = FastestWay(gain=0.0004, seconds={"loop": 0.0014, "recorded": 0.002, "compiled": 0.001})
SLOW = FastestWay("slow", seconds={"loop": 0.001, "recorded": 0.005, "compiled": math.inf})
UNCODED = FastestWay(seconds={"loop": 0.004, "recorded": 0.0005})
LIKE = FastestWay(gain=0.003, seconds={"compiled": 0.001})


def job_of(parameters, **traits):
    traits = Traits(parameters=parameters, **traits)
    return Job(seed=0, epochs=3, horizon=3, backend="recorded", traits={CHUNK.arguments: traits})


def timing(monkeypatch, code):
    """Let the timing of compiled code take ``code`` seconds for a step, or raise an error."""

    def seconds(job, data, chunk, check_build):
        check_build(0.5)
        if isinstance(code, Exception):
            raise code
        return code

    monkeypatch.setattr(similar_timing, "compiled_seconds", seconds)


@pytest.mark.parametrize(
    "earlier, parameters, steps, gain",
    [
        ([(100, CLEAR)], 100, 1e4, 0.003),
        ([(100, CLEAR)], 400, 1e4, 0.003),
        ([(100, CLEAR)], 1, 1e4, None),  # the training is too short
        ([(100, CLEAR)], 100, 1e2, None),  # the training is too short
        ([(100, CLOSE)], 100, 1e6, None),
        ([(100, SLOW)], 100, 1e6, None),
        ([(100, LIKE)], 100, 1e6, None),  # it was not timed against other ways
        ([(100, UNCODED)], 100, 1e6, None),  # compiled code was not timed
        ([(100, SLOW), (1000, CLEAR)], 100, 1e6, 0.003),
        ([], 100, 1e6, None),
    ],
)
def test_only_a_clear_result_is_taken_over(monkeypatch, earlier, parameters, steps, gain):
    timing(monkeypatch, 0.001)
    timed = [TimedModule(*pair) for pair in earlier]
    way = way_like_earlier(job_of(parameters), DATA, CHUNK, timed, member_steps=steps)
    if gain is None:
        assert way is None
    else:
        assert way.gain == pytest.approx(gain)
        assert way.seconds == {"compiled": 0.001}
        assert not way.slow and not way.uncoded


@pytest.mark.parametrize("code", [0.0039, TraceError("no code")])
def test_all_ways_are_timed_if_compiled_code_is_slow_or_fails(monkeypatch, code):
    timing(monkeypatch, code)
    timed = [TimedModule(100, CLEAR)]
    assert way_like_earlier(job_of(100), DATA, CHUNK, timed, member_steps=1e6) is None


def test_members_that_share_rows_are_timed_in_all_ways(monkeypatch):
    timing(monkeypatch, 0.001)
    timed = [TimedModule(100, CLEAR)]
    job = job_of(100, common_rows=True)
    assert way_like_earlier(job, DATA, CHUNK, timed, member_steps=1e6) is None


class Deep(nn.Sequential):
    def __init__(self, n_features, n_outputs, depth=1):
        layers = [nn.Linear(n_features, n_features) for _ in range(depth)]
        super().__init__(*layers, nn.Linear(n_features, n_outputs))


@pytest.mark.cpu
def test_a_search_times_all_ways_only_once_for_similar_modules(monkeypatch):
    timed = []

    def seconds(job, data, chunk, backend):
        timed.append((chunk.configs[0]["module__depth"], backend))
        return 10.0

    monkeypatch.setattr(choice, "_seconds", seconds)
    space = {"module__depth": [1, 2, 3], "lr": [0.01], "batch_size": [16]}
    X = DATA.x[0].float()
    options = {"space": space, "n_trials": 3, "cv": 2, "max_epochs": 2, "verbose": 0}
    study = gputune.tune(Deep, X, DATA.y, **options, include_default=False)
    expected = gputune.tune(Deep, X, DATA.y, **options, include_default=False, backend="recorded")
    assert len({depth for depth, _ in timed}) == 1
    assert {backend for _, backend in timed} == {"loop", "recorded"}
    assert [trial.score for trial in study.trials] == pytest.approx(
        [trial.score for trial in expected.trials], rel=1e-4
    )
