"""A study written as one of Optuna's: every trial, and what Optuna itself makes of it."""

import gc
import re
import sys

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from scipy.stats import loguniform, truncnorm
from sklearn.datasets import load_iris
from torch import nn

import gputune
from gputune.api.study import Study
from gputune.errors import MissingExtraError
from gputune.methods.optuna import widened_law
from gputune.study.store import Candidate
from refused import refused
from study_rows import result

X, Y = load_iris(return_X_y=True)
FAST = {"max_epochs": 4, "cv": 3, "verbose": 0, "workers": 1}
SPACE = {"lr": loguniform(1e-3, 1e-1), "width": gputune.log_int(4, 16), "batch_size": [16, 32]}
SPACE |= {"dropout": truncnorm(-2, 2, loc=0.2, scale=0.05)}  # a law that Optuna lacks


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    words = {"method": gputune.Halving(min_epochs=2), "include": [{"lr": 0.5, "width": 128}]}
    path = tmp_path_factory.mktemp("optuna") / "study.db"
    return gputune.tune("mlp", X, Y, space=SPACE, n_trials=9, study=path, **words, **FAST)


@pytest.fixture(scope="module")
def written(study):
    return study.to_optuna()


def made(rows, **meta):
    """A study of (params, result) pairs that nobody trained."""
    numbered = [(Candidate(n, params, "random"), found) for n, (params, found) in enumerate(rows)]
    return Study.from_rows({"distributions": {}, **meta}, numbered)


def test_every_trial_with_its_curve_state_and_folds(study, written):
    states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
    assert written.direction.name == "MAXIMIZE" and len(written.trials) == len(study.trials) == 10
    for ours, curve, theirs in zip(study.trials, study.curves, written.trials):
        assert theirs.number == ours.number and theirs.state == states[ours.state]
        assert theirs.params == ours.params and theirs.value == ours.score
        means = {epoch: mean for epoch, mean in enumerate(curve.mean(1), 1) if np.isfinite(mean)}
        assert theirs.intermediate_values == means
        assert theirs.user_attrs["fold_scores"] == list(ours.fold_scores)
        assert theirs.user_attrs["origin"] == ours.origin and theirs.user_attrs["state"] == ours.state
        assert theirs.user_attrs["best_epoch"] == ours.best_epoch
        assert theirs.duration.total_seconds() == pytest.approx(ours.seconds, abs=1e-5)
    assert written.best_params == study.best_params and written.best_value == study.best_score
    assert {t.state for t in written.trials} == set(states.values())
    assert written.user_attrs["model"] == "mlp" and written.user_attrs["scoring"] == "accuracy"


def test_the_space_is_widened_to_what_was_run_outside(study, written):
    laws = written.trials[0].distributions
    assert laws["lr"] == FloatDistribution(1e-3, 0.5, log=True)
    assert laws["width"] == IntDistribution(4, 128, log=True)
    drawn = [trial.params["dropout"] for trial in study.trials]
    assert laws["dropout"] == FloatDistribution(min(drawn), max(drawn))
    assert laws["batch_size"] == CategoricalDistribution([16, 32])
    assert all(trial.distributions == laws for trial in written.trials)


def test_the_same_from_the_studys_file(study, written):
    trials = Study.open(study.file).to_optuna().trials
    for ours, theirs in zip(written.trials, trials, strict=True):
        assert theirs.params == ours.params and theirs.distributions == ours.distributions


def test_optunas_plots_and_importances_work(written):
    importances = optuna.importance.get_param_importances(written, normalize=True)
    assert importances.keys() == SPACE.keys() and sum(importances.values()) == pytest.approx(1)
    pytest.importorskip("plotly")
    for name in (
        "optimization_history", "intermediate_values", "parallel_coordinate", "contour", "slice",
        "param_importances", "edf", "rank", "timeline",
    ):  # fmt: skip
        assert len(getattr(optuna.visualization, f"plot_{name}")(written).data) > 0


def test_failed_stopped_and_waiting_trials():
    assert made([]).to_optuna().trials == []
    rows = [
        ({"lr": 0.1}, result(0, state="failed", score=np.nan, curve=np.array([[0.5, 0.6], [np.nan, 0.6]]))),
        ({"lr": 0.2}, result(1, state="stopped")),
        ({"lr": 0.3}, None),
        ({"lr": 0.4}, result(3)),
    ]
    written = made(rows).to_optuna()
    states = [TrialState.FAIL, TrialState.PRUNED, TrialState.WAITING, TrialState.COMPLETE]
    assert [trial.state for trial in written.trials] == states
    assert written.trials[0].value is None and written.trials[0].intermediate_values == {1: 0.55}
    assert written.ask({"lr": FloatDistribution(0.1, 0.4)}).params == {"lr": 0.3}


def test_a_value_without_a_place_in_its_law_is_an_attribute():
    laws = {"weight_decay": {"kind": "float", "low": 1e-4, "high": 0.1, "log": True}}
    rows = [({"weight_decay": 0.0}, result(0)), ({"weight_decay": 0.01}, result(1))]
    written = made(rows, distributions=laws).to_optuna()
    assert written.trials[0].params == {} and written.trials[0].user_attrs["other_params"] == {"weight_decay": "0.0"}
    assert written.trials[1].params == {"weight_decay": 0.01}
    assert "other_params" not in written.trials[1].user_attrs


STEPS = {"kind": "int", "low": 16, "high": 64, "step": 16}


@pytest.mark.parametrize(
    ("law", "values", "expected"),
    [
        (None, [3, 7], {"kind": "int", "low": 3, "high": 7, "log": False}),
        (None, [3, 0.5], {"kind": "float", "low": 0.5, "high": 3, "log": False}),
        (None, ["relu", "tanh", "relu"], {"kind": "choices", "choices": ["relu", "tanh"]}),
        (None, [nn.ReLU], {"kind": "choices", "choices": ["torch.nn.modules.activation.ReLU"]}),
        (None, [True, False], {"kind": "choices", "choices": [True, False]}),
        (STEPS, [32, 128], {**STEPS, "high": 128, "log": False}),
        (STEPS, [32, 100], {"kind": "int", "low": 16, "high": 100, "log": False}),
        ({"kind": "choices", "choices": [1, 2]}, [2, 3], {"kind": "choices", "choices": [1, 2, 3]}),
    ],
)
def test_what_a_key_is_drawn_from(law, values, expected):
    rows = [({"x": value}, result(n)) for n, value in enumerate(values)]
    study = made(rows, distributions={} if law is None else {"x": law})
    assert widened_law(study, "x") == expected


@pytest.mark.parametrize("storage", ["optuna.db", "sqlite:////no/such/folder/o.db", "nosuch://host/base", 7])
def test_a_storage_that_cannot_be_opened_is_named(study, storage):
    message = f"to_optuna\\(storage='{re.escape(str(storage))}'\\) cannot be opened: .* It is a URL such as 'sqlite:///"
    with refused(message):
        study.to_optuna(storage)


@pytest.fixture
def storage(tmp_path):
    """A file for Optuna, whose connections are open until they are collected: here, not in a later test."""
    yield f"sqlite:///{tmp_path / 'optuna.db'}"
    gc.collect()


@pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")  # by Python 3.13
def test_a_name_that_is_there_already_loses_nothing(storage, study):
    study.to_optuna(storage, name="digits")
    with refused(r"to_optuna\(name='digits'\): the storage has a study of that name"):
        study.to_optuna(storage, name="digits")
    kept = optuna.load_study(study_name="digits", storage=storage)
    assert len(kept.trials) == len(study.trials)
    other = study.to_optuna(storage, name="other")
    assert other.best_params == study.best_params
    assert optuna.get_all_study_names(storage) == ["digits", "other"]


def test_a_study_that_cannot_be_written_whole_goes_again(study, monkeypatch):
    storage, whole = optuna.storages.InMemoryStorage(), optuna.Study.add_trial

    def full(self, trial):
        if len(self.trials) == 3:
            raise OSError("the disk is full")
        whole(self, trial)

    monkeypatch.setattr(optuna.Study, "add_trial", full)
    with pytest.raises(OSError, match="the disk is full"):
        study.to_optuna(storage, name="half")
    assert optuna.get_all_study_names(storage) == []


def test_without_optuna(study, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r'to_optuna\(\) needs optuna.*pip install "gputune\[optuna\]"'):
        study.to_optuna()
