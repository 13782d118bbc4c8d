"""Chunks of few members train at the same time, and several trials train again together."""

import warnings

import numpy as np
import pandas as pd
import pytest
from torch import nn

import gputune
from gputune.engine import choice
from gputune.engine.member_steps import OneMember
from gputune.engine.members import MemberChunk
from gputune.engine.plan import Plan
from gputune.executors.threads import ChunkThreads
from gputune.tuning import trainer
from problems import make_data

DATA = make_data()
X = DATA.x[0].double()
Y = DATA.y
OPTIONS = {"cv": 2, "max_epochs": 3, "verbose": 0, "dtype": "float64", "include_default": False}
SPACE = {"module__width": [4, 6, 9], "lr": [0.01], "batch_size": [16]}


class Net(nn.Sequential):
    def __init__(self, n_features, n_outputs, width=4):
        super().__init__(nn.Linear(n_features, width), nn.Tanh(), nn.Linear(width, n_outputs))


@pytest.fixture
def compiled(monkeypatch):
    """Modules train in compiled code on two threads, however short the training is."""
    monkeypatch.setattr(choice, "WORTH_SECONDS", 0)
    monkeypatch.setattr(choice, "CODED_SHARE", -np.inf)
    monkeypatch.setattr(choice, "_seconds", lambda *given: 1.0)
    monkeypatch.setattr(trainer, "_BUILT_SECONDS", 0.0)
    monkeypatch.setattr("gputune.engine.plan.cores", lambda: 2)


@pytest.fixture
def at_once(monkeypatch):
    """The numbers of chunks that have trained at the same time."""
    numbers = []
    with_turns = Plan.with_turns

    def noted(plan, memory):
        numbers.append(with_turns(plan, memory))
        return numbers[-1]

    monkeypatch.setattr(Plan, "with_turns", noted)
    return numbers


@pytest.mark.cpu
def test_several_trials_train_again_as_each_trial_does(compiled, at_once):
    study = gputune.tune(Net, X, Y, space=SPACE, n_trials=3, **OPTIONS)
    assert set(at_once) == {2}
    n_plans = len(at_once)
    numbers = [2, 0, 1]
    models = study.best_models(numbers)
    assert at_once[n_plans:] == [2]
    for number, model in zip(numbers, models, strict=True):
        expected = study.best_model(trial=number)
        assert model.info == expected.info
        np.testing.assert_allclose(model.predict_proba(X), expected.predict_proba(X), rtol=1e-9)
    assert study.best_models([]) == []


@pytest.mark.cpu
def test_chunks_in_turns_give_the_scores_of_chunks_one_after_another(compiled, monkeypatch):
    study = gputune.tune(Net, X, Y, space=SPACE, n_trials=3, **OPTIONS)
    submitted = []
    submit = ChunkThreads.submit
    monkeypatch.setattr(
        ChunkThreads, "submit", lambda self, *given: submitted.append(1) or submit(self, *given)
    )
    again = gputune.tune(Net, X, Y, space=SPACE, n_trials=3, **OPTIONS)
    assert submitted
    monkeypatch.setattr(Plan, "with_turns", lambda plan, memory: 1)
    expected = gputune.tune(Net, X, Y, space=SPACE, n_trials=3, **OPTIONS)
    np.testing.assert_array_equal(study.curves, expected.curves)
    np.testing.assert_array_equal(again.curves, expected.curves)


@pytest.mark.cpu
@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_error_in_a_thread_ends_the_search(compiled, monkeypatch, place):
    widths = []
    advance = MemberChunk.advance

    def fail(chunk, epoch):
        width = chunk.configs[0]["module__width"]
        if width not in widths:
            widths.append(width)
        if epoch == 1 and widths.index(width) == place:
            raise ValueError("broken layer")
        advance(chunk, epoch)

    monkeypatch.setattr(MemberChunk, "advance", fail)
    with pytest.raises(ValueError, match="broken layer"):
        gputune.tune(Net, X, Y, space=SPACE, n_trials=3, **OPTIONS)


@pytest.mark.cpu
@pytest.mark.parametrize("memory, most", [("1GB", 2), (1 << 14, 1)])
def test_chunks_do_not_train_at_the_same_time_beyond_the_memory_limit(
    compiled, at_once, memory, most
):
    gputune.tune(Net, X, Y, space=SPACE, n_trials=3, memory=memory, **OPTIONS)
    assert set(at_once) == {most}


@pytest.mark.parametrize(
    "trials, message",
    [
        (3, r"best_models\(trials=3\) must be a list of trial numbers"),
        ("01", r"must be a list of trial numbers"),
        ([0, 7], r"best_models\(trial=7\) must be the number of a trial that has a score"),
    ],
)
def test_wrong_trial_numbers_are_refused(trials, message):
    study = gputune.tune("mlp", X, Y, n_trials=2, **{**OPTIONS, "max_epochs": 1})
    with pytest.raises(ValueError, match=message):
        study.best_models(trials)


class Dropped(Net):
    def __init__(self, n_features, n_outputs, width=4):
        super().__init__(n_features, n_outputs, width)
        self.insert(1, nn.Dropout(0.2))


@pytest.mark.cpu
@pytest.mark.parametrize("module, n_traced", [(Net, 1), (Dropped, 2)])
def test_folds_of_about_equal_length_share_a_traced_member(compiled, monkeypatch, module, n_traced):
    """Modules with dropout have other random numbers for each number of rows."""
    traced = []
    write = OneMember.write
    monkeypatch.setattr(
        OneMember, "write", lambda self, *given: traced.append(self) or write(self, *given)
    )
    rows = 3 * (len(X) // 3) - 1  # two folds have another number of training rows than the third
    options = {"space": {"lr": [0.01], "batch_size": [16]}, "n_trials": 1, **OPTIONS, "cv": 3}
    study = gputune.tune(module, X[:rows], Y[:rows], **options)
    assert len(traced) == n_traced
    expected = gputune.tune(module, X[:rows], Y[:rows], **options, backend="recorded")
    np.testing.assert_allclose(study.curves, expected.curves, rtol=1e-10)


@pytest.mark.parametrize("reopened", [False, True])
def test_the_column_of_the_groups_is_no_feature_of_a_frame_in_memory(reopened, tmp_path):
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(60, 2)), columns=["a", "b"])
    frame["g"] = np.repeat(np.arange(15), 4)
    frame["y"] = frame.a
    path = tmp_path / "study.db"
    study = gputune.tune(
        "mlp", frame, "y", groups="g", cv=2, n_trials=2, max_epochs=1, verbose=0, study=path
    )
    study = gputune.Study.open(path) if reopened else study
    for model in (
        study.best_model(frame, "y", check=False),
        study.best_model(frame, "y"),
        study.best_model(frame.drop(columns="g"), "y"),
        study.ensemble(frame, "y", verbose=0),
    ):
        assert list(model.layout.inputs) == ["a", "b"]
        with warnings.catch_warnings(action="error"):
            model.predict(frame)
