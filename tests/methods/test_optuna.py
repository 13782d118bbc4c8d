"""Optuna's distributions in a space, and a study written as one of Optuna's."""

import gc
import re
import sys

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from scipy import stats
from sklearn.datasets import load_iris
from torch import nn

import gputune
from gputune.api.study import Study
from gputune.ground.errors import MissingExtraError
from gputune.integrations.studies.optuna import widened_description
from gputune.methods.sampling import check_askable
from gputune.spaces.config import legal_keys
from gputune.spaces.distributions import (
    as_optuna,
    choice_of_label,
    describe,
    label,
    space_text,
    to_scipy,
)
from gputune.spaces.space import check_space
from gputune.study.store import Candidate
from refused import refused
from study_rows import result

KEYS = legal_keys("mlp", "adamw")


@pytest.mark.parametrize(
    "distribution",
    [
        FloatDistribution(0.0, 0.5),
        FloatDistribution(1e-4, 1e-1, log=True),
        FloatDistribution(0.0, 0.6, step=0.2),
        IntDistribution(4, 64),
        IntDistribution(4, 64, log=True),
        IntDistribution(16, 64, step=16),
        CategoricalDistribution([16, 32, 64]),
        CategoricalDistribution([0.5]),
    ],
)
def test_a_distribution_of_optunas_there_and_back(distribution):
    (there,) = to_scipy([{"x": distribution}])
    assert as_optuna(describe(there["x"])) == distribution


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        (stats.uniform(0.1, 0.4), FloatDistribution(0.1, 0.5)),
        (stats.uniform, FloatDistribution(0.0, 1.0)),
        (stats.loguniform(1e-3, 1e-1), FloatDistribution(1e-3, 1e-1, log=True)),
        (stats.loguniform(1e-3, 1e-1, scale=2), FloatDistribution(2e-3, 2e-1, log=True)),
        (stats.randint(4, 9), IntDistribution(4, 8)),
        (stats.randint(4, 9, loc=1), IntDistribution(5, 9)),
        (gputune.log_int(4, 64), IntDistribution(4, 64, log=True)),
        ([32, 64, 32], CategoricalDistribution([32, 64])),
        ([nn.ReLU, None], CategoricalDistribution(["torch.nn.modules.activation.ReLU", None])),
    ],
)
def test_lists_and_laws_of_scipy_as_optunas(choices, expected):
    assert as_optuna(describe(choices)) == expected
    choices = [nn.ReLU, 1, True, "relu", (1, 2)]
    assert [choice_of_label(label(choice), choices) for choice in choices] == choices
    assert type(choice_of_label(True, choices)) is bool and type(choice_of_label(1, choices)) is int


@pytest.mark.parametrize(
    "law", [stats.norm(0, 1), stats.loguniform(1, 10, loc=5), stats.poisson(3)]
)
def test_a_law_that_optuna_lacks(law):
    assert describe(law) is None
    with refused("space\\['x'\\] must be a list, scipy's uniform, loguniform or randint"):
        check_askable([{"x": law}])


def test_tune_takes_them():
    space = {
        "lr": FloatDistribution(1e-3, 1e-1, log=True),
        "dropout": FloatDistribution(0.0, 0.4, step=0.2),
        "width": IntDistribution(4, 16, log=True),
        "batch_size": IntDistribution(16, 48, step=16),
        "activation": CategoricalDistribution(["relu", "tanh"]),
        "depth": IntDistribution(1, 1),
    }
    study = gputune.tune(
        "mlp",
        *load_iris(return_X_y=True),
        space=space,
        n_trials=20,
        include_default=False,
        max_epochs=1,
        cv=2,
        verbose=0,
        workers=1,
    )
    drawn = {key: [trial.params[key] for trial in study.trials] for key in space}
    assert all(1e-3 <= lr <= 1e-1 for lr in drawn["lr"]) and set(drawn["dropout"]) == {
        0.0,
        0.2,
        0.4,
    }
    assert all(type(width) is int and 4 <= width <= 16 for width in drawn["width"])
    assert set(drawn["batch_size"]) == {16, 32, 48} and set(drawn["activation"]) == {"relu", "tanh"}
    assert set(drawn["depth"]) == {1}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"width": FloatDistribution(4.0, 16.0, step=0.5)}, "which draws real numbers"),
        ({"width": FloatDistribution(4.0, 16.0)}, "which draws real numbers"),
        (
            {"dropout": FloatDistribution(0.0, 1.0, step=0.5)},
            "which draws from 0 to 1. Narrow its range",
        ),
        ({"batch_size": IntDistribution(0, 16)}, "which draws from 0 to 16. Narrow its range"),
        ({"activation": IntDistribution(0, 3)}, "must be a list of values from relu"),
    ],
)
def test_they_are_checked_as_other_distributions(space, message):
    with refused(message):
        check_space(to_scipy(space), keys=KEYS, module=False)


def test_their_text_is_the_same_in_every_process_and_log_integers_favour_small_ones():
    space = {
        "width": IntDistribution(4, 64, log=True),
        "dropout": FloatDistribution(0.0, 0.5, step=0.25),
    }
    text = space_text(check_space(to_scipy(space), keys=KEYS, module=False))
    assert text == "dropout=Steps(low=0.0, high=0.5, step=0.25), width=LogIntegers(low=4, high=64)"
    law = to_scipy({"width": IntDistribution(1, 64, log=True)})["width"]
    draws = [law.rvs(random_state=np.random.RandomState(i)) for i in range(400)]
    assert min(draws) == 1 and max(draws) > 50 and np.median(draws) < 14


X, Y = load_iris(return_X_y=True)
FAST = {"max_epochs": 4, "cv": 3, "verbose": 0, "workers": 1}
SPACE = {
    "lr": stats.loguniform(1e-3, 1e-1),
    "width": gputune.log_int(4, 16),
    "batch_size": [16, 32],
}
SPACE |= {"dropout": stats.truncnorm(-2, 2, loc=0.2, scale=0.05)}  # a law that Optuna lacks


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
        assert [*theirs.user_attrs.items()] == [
            ("number", ours.number),
            ("origin", ours.origin),
            ("fold_scores", list(ours.fold_scores)),
            ("std_error", ours.std_error),
            ("best_epoch", ours.best_epoch),
            ("seconds", ours.seconds),
            ("state", ours.state),
        ]
        assert theirs.duration.total_seconds() == pytest.approx(ours.seconds, abs=1e-5)
    assert written.best_params == study.best_params and written.best_value == study.best_score
    assert {t.state for t in written.trials} == set(states.values())
    assert written.user_attrs["model"] == "mlp" and written.user_attrs["scoring"] == "accuracy"


def test_the_space_is_widened_to_what_was_run_outside_also_from_the_studys_file(study, written):
    laws = written.trials[0].distributions
    assert laws["lr"] == FloatDistribution(1e-3, 0.5, log=True)
    assert laws["width"] == IntDistribution(4, 128, log=True)
    drawn = [trial.params["dropout"] for trial in study.trials]
    assert laws["dropout"] == FloatDistribution(min(drawn), max(drawn))
    assert laws["batch_size"] == CategoricalDistribution([16, 32])
    assert all(trial.distributions == laws for trial in written.trials)
    trials = Study.open(study.file).to_optuna().trials
    for ours, theirs in zip(written.trials, trials, strict=True):
        assert theirs.params == ours.params and theirs.distributions == ours.distributions


def test_optunas_plots_and_importances_work(written):
    importances = optuna.importance.get_param_importances(written, normalize=True)
    assert importances.keys() == SPACE.keys() and sum(importances.values()) == pytest.approx(1)
    pytest.importorskip("plotly")
    for name in (
        "optimization_history",
        "intermediate_values",
        "parallel_coordinate",
        "contour",
        "slice",
        "param_importances",
        "edf",
        "rank",
        "timeline",
    ):
        assert len(getattr(optuna.visualization, f"plot_{name}")(written).data) > 0


def test_failed_stopped_and_waiting_trials():
    assert made([]).to_optuna().trials == []
    rows = [
        (
            {"lr": 0.1},
            result(0, state="failed", score=np.nan, curve=np.array([[0.5, 0.6], [np.nan, 0.6]])),
        ),
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
    assert written.trials[0].params == {} and written.trials[0].user_attrs["other_params"] == {
        "weight_decay": "0.0"
    }
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
    assert widened_description(study, "x") == expected


@pytest.mark.parametrize(
    "storage", ["optuna.db", "sqlite:////no/such/folder/o.db", "nosuch://host/base", 7]
)
def test_a_storage_that_cannot_be_opened_is_named(study, storage):
    message = (
        f"to_optuna\\(storage='{re.escape(str(storage))}'\\) cannot be opened: .* Pass a URL "
        "such as 'sqlite:///"
    )
    with refused(message):
        study.to_optuna(storage)


@pytest.fixture
def storage(tmp_path):
    """A file for Optuna; its connections stay open until they are collected, here and not in a
    later test.
    """
    yield f"sqlite:///{tmp_path / 'optuna.db'}"
    gc.collect()


@pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")  # by Python 3.13
def test_a_name_that_is_there_already_loses_nothing(storage, study):
    study.to_optuna(storage, name="digits")
    with refused(r"to_optuna\(name='digits'\) is the name of a study that the storage already has"):
        study.to_optuna(storage, name="digits")
    kept = optuna.load_study(study_name="digits", storage=storage)
    assert len(kept.trials) == len(study.trials)
    other = study.to_optuna(storage, name="other")
    assert other.best_params == study.best_params
    assert optuna.get_all_study_names(storage) == ["digits", "other"]


def test_a_study_that_cannot_be_written_whole_goes_again_and_without_optuna_none_is(
    study, monkeypatch
):
    storage = optuna.storages.InMemoryStorage()
    whole = optuna.Study.add_trial

    def full(self, trial):
        if len(self.trials) == 3:
            raise OSError("the disk is full")
        whole(self, trial)

    monkeypatch.setattr(optuna.Study, "add_trial", full)
    with pytest.raises(OSError, match="the disk is full"):
        study.to_optuna(storage, name="half")
    assert optuna.get_all_study_names(storage) == []
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(
        MissingExtraError, match=r'to_optuna\(\) needs optuna.*pip install "\.\[optuna\]"'
    ):
        study.to_optuna()


def test_a_sampler_without_its_wrapper_is_refused():
    words = r"method must be .* Wrap a sampler of Optuna: method=gputune.OptunaSampler\(sampler\)"
    with refused(words):
        gputune.tune("mlp", X, Y, method=optuna.samplers.TPESampler(), verbose=0)
