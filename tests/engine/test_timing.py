"""A module trains stacked, one by one or in compiled code, as a few steps of each show it, where it
is worth trying."""

import math
from dataclasses import replace

import numpy as np
import pytest
from torch import nn

import gputune
from gputune.engine import choice, member_steps
from gputune.engine.choice import fastest_way
from gputune.engine.job import Job
from gputune.modules.trace import TraceError
from gputune.native.library import build_kernels
from gputune.population.population import Population
from gputune.population.traits import FastestWay, Traits
from problems import fill, make_data

CONFIGS = fill(*({"lr": lr, "batch_size": 16} for lr in (1e-3, 1e-2)))
DATA = make_data()
CHUNK = Population("module", (0, 1), tuple(CONFIGS))
X = DATA.x[0].float()
Y = DATA.y


class Net(nn.Linear):
    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)


JOB = Job(seed=0, epochs=3, horizon=3, module_class=Net, backend="recorded")
SEARCH = {"n_trials": 2, "cv": 2, "workers": 1, "verbose": 0}


@pytest.mark.parametrize(
    ("stacked", "code", "steps", "slow", "gain"),
    [
        (
            0.002,
            0.00095,
            1e9,
            "a training step of one trial on one fold takes 1 ms one by one, and 2 ms in recorded "
            "steps",
            0.0,
        ),
        (0.002, 0.0009, 1e9, "", 0.0001),
        (0.00105, 1.0, 1e9, "", 0.0),
        (0.0001, 0.00008, 1e9, "", 0.00002),
        (0.0001, 0.00008, 5e3, "", 0.0),  # writing the code would take as long
        (0.002, 0.0001, 1e3, "", 0.0),
    ],
)
def test_the_fastest_way_is_kept_where_it_matters(monkeypatch, stacked, code, steps, slow, gain):
    monkeypatch.setattr(choice, "_compiled_seconds", lambda *arguments: code)
    monkeypatch.setattr(
        choice, "_seconds", lambda job, data, chunk, backend: {"loop": 0.001}.get(backend, stacked)
    )
    found = fastest_way(JOB, DATA, CHUNK, member_steps=steps)
    assert (found.slow, found.gain) == (slow, pytest.approx(gain))


@pytest.mark.parametrize(
    ("steps", "build", "is_coded"),
    [
        # Recorded steps take 4 s, so compiled code is estimated to save 2 s.
        (4000, 1.9, True),
        (4000, 2.1, False),
        (40_000, 2.1, True),
        (500, 0.0, False),  # writing the code takes longer
    ],
)
def test_code_is_built_if_the_build_takes_less_time_than_it_saves(
    monkeypatch, steps, build, is_coded
):
    seconds = {"loop": 0.01, "recorded": 0.001}
    monkeypatch.setattr(choice, "_seconds", lambda job, data, chunk, backend: seconds[backend])
    monkeypatch.setattr(member_steps, "build_seconds", lambda bodies, dtype: build)
    built = []
    monkeypatch.setattr(
        member_steps, "build_kernels", lambda *given: built.append(given) or build_kernels(*given)
    )
    found = fastest_way(JOB, DATA, CHUNK, member_steps=steps)
    assert (len(built), "compiled" in found.seconds) == (is_coded, steps > 500)
    if not is_coded:
        assert found.uncoded == "the training is too short for compiled code to pay off"


@pytest.mark.parametrize(("kept", "is_coded"), [((), False), (("gputune_kept_0",), True)])
def test_no_code_is_built_for_large_frozen_layers_that_members_share(monkeypatch, kept, is_coded):
    seconds = {"loop": 0.01, "recorded": 0.001}
    monkeypatch.setattr(choice, "_seconds", lambda job, data, chunk, backend: seconds[backend])
    monkeypatch.setattr(choice, "_compiled_seconds", lambda *arguments: 0.0001)
    traits = Traits(common_rows=True, frozen=1 << 20, parameters=100, convolves=True)
    job = replace(JOB, traits={CHUNK.arguments: traits})
    found = fastest_way(job, replace(DATA, names=kept or None), CHUNK, member_steps=1e9)
    assert ("compiled" in found.seconds) == is_coded
    if not is_coded:
        assert found.uncoded == "compiled code computes the frozen layers again for each trial"


@pytest.mark.parametrize("convolves", [False, True])
def test_members_with_large_frozen_layers_are_timed_only_if_they_convolve(monkeypatch, convolves):
    seconds = {"loop": 0.01, "recorded": 0.02}
    monkeypatch.setattr(choice, "_seconds", lambda job, data, chunk, backend: seconds[backend])
    traits = Traits(common_rows=True, frozen=1 << 20, parameters=100, convolves=convolves)
    job = replace(JOB, traits={CHUNK.arguments: traits})
    found = fastest_way(job, DATA, CHUNK, member_steps=1e9)
    assert (bool(found.seconds), bool(found.slow)) == (convolves, convolves)


CLEAR = FastestWay(gain=0.003, seconds={"loop": 0.004, "recorded": 0.005, "compiled": 0.001})
CLOSE = FastestWay(gain=0.0004, seconds={"loop": 0.0014, "recorded": 0.002, "compiled": 0.001})
UNCODED = FastestWay(seconds={"loop": 0.004, "recorded": 0.0005})


@pytest.mark.parametrize(
    ("earlier", "parameters", "is_like"),
    [
        ([(100, CLEAR)], 400, True),
        ([(100, CLEAR)], 401, False),
        ([(100, CLOSE)], 100, False),
        ([(100, UNCODED)], 100, False),  # compiled code was not timed
        ([(100, UNCODED), (200, CLEAR)], 100, True),
    ],
)
def test_a_clear_result_counts_for_modules_of_about_the_same_size(
    monkeypatch, earlier, parameters, is_like
):
    monkeypatch.setattr(choice, "_seconds", lambda job, data, chunk, backend: 1e-9)
    job = replace(JOB, traits={CHUNK.arguments: Traits(parameters=parameters)})
    timed = [choice.TimedModule(*pair) for pair in earlier]
    found = fastest_way(job, DATA, CHUNK, member_steps=1e6, earlier=timed)
    assert (found is CLEAR) == is_like


def test_merged_rows_are_timed_by_their_name(monkeypatch):
    seconds = {"loop": 0.001, "merged": 0.002}
    monkeypatch.setattr(choice, "_seconds", lambda job, data, chunk, backend: seconds[backend])
    traits = Traits(unstackable="vmap refuses it", merges=(("head", (True,)),))
    told = []
    job = replace(JOB, traits={CHUNK.arguments: traits})
    found = fastest_way(job, DATA, CHUNK, member_steps=1e4, tell=told.append)
    assert found.slow.endswith("takes 1 ms one by one, and 2 ms on merged rows")
    assert found.seconds["merged"] == 0.002 and "recorded" not in found.seconds
    assert told[:2] == ["one by one", "merged"]


def test_all_ways_are_timed():
    found = fastest_way(JOB, DATA, CHUNK, member_steps=1)
    assert found.uncoded == "the training is too short for compiled code to pay off"
    assert (found.slow, found.gain, list(found.seconds)) == ("", 0.0, ["loop"])
    for backend in ("loop", "recorded"):
        assert 0 < choice._seconds(JOB, DATA, CHUNK, backend) < 1
    assert 0 < choice._compiled_seconds(JOB, DATA, CHUNK, math.inf) < 1
    for unknown in ("adamwhd", "torch:Adagrad"):
        other = replace(CHUNK, configs=tuple({**c, "optimizer": unknown} for c in CONFIGS))
        with pytest.raises(TraceError, match=unknown.removeprefix("torch:")):
            choice._compiled_seconds(JOB, DATA, other, math.inf)


@pytest.mark.cpu
def test_a_search_says_which_way_it_took(monkeypatch, capsys):
    scores = []
    note = "note: Net trains one by one, which is faster here: 2 ms so"
    for way, noted, plan in (
        (FastestWay(uncoded="no gain"), False, "recorded (no gain)"),
        (FastestWay("2 ms so"), True, "loop (2 ms so)"),
        (FastestWay(gain=1.0), False, "on 2 threads, compiled"),
    ):
        monkeypatch.setattr(
            "gputune.tuning.context.fastest_way", lambda *args, way=way, **more: way
        )
        study = gputune.tune(Net, X, Y, **{**SEARCH, "max_epochs": 2, "verbose": 1})
        said = capsys.readouterr().err
        assert (note in said) == noted and plan in said.split("plan:")[1]
        scores.append([trial.score for trial in study.trials])
    assert scores[1:] == [pytest.approx(scores[0], rel=1e-5)] * 2


@pytest.mark.cpu
def test_what_is_built_to_be_timed_trains(monkeypatch):
    """The compiled code is built once, and gives the same results as recorded steps."""
    sources = []
    monkeypatch.setattr(
        member_steps, "build_kernels", lambda *given: sources.append(given) or build_kernels(*given)
    )
    for name, value in {
        "WORTH_SECONDS": 0,
        "CODED_SHARE": -np.inf,
        "_seconds": lambda *given: 1.0,
    }.items():
        monkeypatch.setattr(choice, name, value)
    found, expected = (
        gputune.tune(Net, X, Y, **SEARCH, backend=word).curves for word in ("auto", "recorded")
    )
    assert len(sources) == 1
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.cpu
def test_a_larger_chunk_than_the_timed_one_uses_its_code(monkeypatch):
    """The plan for recorded steps has smaller chunks than the plan for compiled code."""
    sources = []
    monkeypatch.setattr(
        member_steps, "build_kernels", lambda *given: sources.append(given) or build_kernels(*given)
    )
    monkeypatch.setattr(
        "gputune.tuning.context.fastest_way",
        lambda job, data, group, **more: fastest_way(job, data, group.part(0, 1), **more),
    )
    for name, value in {
        "WORTH_SECONDS": 0,
        "CODED_SHARE": -np.inf,
        "_seconds": lambda *given: 1.0,
    }.items():
        monkeypatch.setattr(choice, name, value)
    found, expected = (
        gputune.tune(Net, X, Y, **SEARCH, backend=word).curves for word in ("auto", "recorded")
    )
    assert len(sources) == 1
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.cpu
@pytest.mark.parametrize("pays, built", [(0.0, 1), (np.inf, 0)])
def test_a_refit_is_compiled_where_its_search_was_and_it_pays(monkeypatch, pays, built):
    expected = gputune.tune(Net, X, Y, **SEARCH, backend="recorded").best_model()
    monkeypatch.setattr(
        "gputune.tuning.context.fastest_way", lambda *args, **more: FastestWay(gain=1.0)
    )
    monkeypatch.setattr("gputune.tuning.trainer._BUILT_SECONDS", pays)
    study = gputune.tune(Net, X, Y, **SEARCH)
    sources = []
    monkeypatch.setattr(
        member_steps, "build_kernels", lambda *given: sources.append(given) or build_kernels(*given)
    )
    for found, other in zip(
        study.best_model().module.parameters(), expected.module.parameters(), strict=True
    ):
        assert found.allclose(other, rtol=1e-4, atol=1e-6)
    assert len(sources) == built


class Scaled(nn.Linear):
    def __init__(self, n_features, n_outputs, spread=1.0, bias=True):
        super().__init__(n_features, n_outputs, bias=bias)
        nn.init.normal_(self.weight, std=spread)


@pytest.mark.cpu
def test_trials_that_differ_only_in_fractions_are_timed_once(monkeypatch, capsys):
    timed = []

    def timing_of(job, data, chunk, *, member_steps, earlier):
        timed.append((chunk.configs[0].get("module__bias"), member_steps))
        return FastestWay(gain=1.0)

    monkeypatch.setattr("gputune.tuning.context.fastest_way", timing_of)
    space = {
        "lr": [0.01],
        "module__spread": [0.1, 0.2, 0.4],
        "module__bias": [True, False],
        "batch_size": [16],
    }
    gputune.tune(
        Scaled, X, Y, **{**SEARCH, "space": space, "n_trials": 6, "max_epochs": 2, "verbose": 1}
    )
    assert sorted(timed) == [(False, 3 * 2 * len(X) / 16), (True, 3 * 2 * len(X) / 16)]
    assert "recorded" not in capsys.readouterr().err.split("plan:")[1]
