"""A search with Optuna's samplers, through the public tune()."""

import itertools
import re
import sys
import warnings
from typing import ClassVar

import numpy as np
import optuna
import pytest
from scipy.stats import loguniform, truncnorm
from sklearn.datasets import load_iris
from torch import nn

import gputune
from gputune.ground.errors import InputError, MissingExtraError
from gputune.methods import training as sampler
from gputune.study.claims import Claims
from gputune.study.store import Store
from moments import time_is_over
from refused import refused

FAST = {"max_epochs": 3, "cv": 3, "verbose": 0, "workers": 1}
SPACE = {"lr": loguniform(1e-3, 0.1), "width": gputune.log_int(8, 16), "dropout": [0.0, 0.1]}
NARROW = truncnorm(-2, 2, loc=0.1, scale=0.01)  # a law that Optuna lacks
INSIDE = {"include": [{"lr": 0.01, "width": 8, "dropout": 0.0}], "include_default": False}

X, Y = load_iris(return_X_y=True)


def tune(sampler, *, batch=4, halving=None, space=SPACE, n_trials=10, model="mlp", **options):
    method = gputune.OptunaSampler(sampler, batch=batch, halving=halving, refill=False)
    return gputune.tune(
        model, X, Y, space=space, n_trials=n_trials, method=method, **{**FAST, **options}
    )


def tpe(seed=0):
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)


def params(study):
    return [trial.params for trial in study.trials]


class Listening(optuna.samplers.RandomSampler):
    """Records the study's trials whenever it is asked, and the results that it receives."""

    seen: ClassVar[list] = []
    told: ClassVar[list] = []

    def before_trial(self, study, trial):
        self.seen.append([(t.state.name, t.value) for t in study.get_trials(deepcopy=False)[:-1]])

    def after_trial(self, study, trial, state, values):
        self.told.append((state.name, values, dict(trial.intermediate_values)))


@pytest.fixture(autouse=True)
def deaf():
    Listening.seen.clear()
    Listening.told.clear()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "study.db"


@pytest.mark.parametrize("name", ["TPESampler", "GPSampler", "CmaEsSampler", "QMCSampler"])
def test_samplers_propose_batch_by_batch(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        made = getattr(optuna.samplers, name)(seed=0)
    study = tune(made, n_trials=10, include=[{"lr": 0.01}])
    origins = ["default", "include", *["batch 1"] * 4, *["batch 2"] * 4, "batch 3"]
    assert [t.origin for t in study.trials] == origins
    for trial in study.trials[2:]:
        assert trial.params.keys() == SPACE.keys() and trial.state == "complete"
        assert 1e-3 <= trial.params["lr"] <= 0.1 and 8 <= trial.params["width"] <= 16
    assert len({trial.params["lr"] for trial in study.trials[2:]}) == 9
    assert study.meta["method"] == {"name": "optuna", "sampler": name, "halving": None}


def test_the_sampler_receives_every_result_before_the_next_batch():
    study = tune(Listening(seed=0), **INSIDE)
    values = [("COMPLETE", trial.score) for trial in study.trials]
    assert [seen[:1] for seen in Listening.seen] == [values[:1]] * 10
    assert Listening.seen[4][:5] == values[:5] and Listening.seen[8] == values[:9]
    assert {state for state, _ in Listening.seen[7][5:]} == {"RUNNING"}


def test_nothing_comes_between_optuna_and_its_sampler():
    """The same proposals as from Optuna alone, given the same scores."""
    study = tune(tpe(), n_trials=12, **INSIDE)
    alone = optuna.create_study(sampler=tpe(), direction="maximize")
    laws = {
        "lr": optuna.distributions.FloatDistribution(1e-3, 0.1, log=True),
        "width": optuna.distributions.IntDistribution(8, 16, log=True),
        "dropout": optuna.distributions.CategoricalDistribution([0.0, 0.1]),
    }
    first = study.trials[0]
    alone.add_trial(
        optuna.trial.create_trial(params=first.params, distributions=laws, value=first.score)
    )
    for batch in (study.trials[1:5], study.trials[5:9], study.trials[9:]):
        asked = [alone.ask(laws) for _ in batch]
        assert [trial.params for trial in asked] == [trial.params for trial in batch]
        for trial, result in zip(asked, batch):
            alone.tell(trial, result.score)


def test_trials_score_as_by_themselves_and_the_sampler_stays_as_it_was():
    made = tpe()
    study = tune(made)
    again = gputune.tune("mlp", X, Y, space=SPACE, n_trials=1, include=params(study)[1:], **FAST)
    np.testing.assert_allclose(study.curves, again.curves, atol=1e-6)
    assert params(study) == params(tune(made))


def test_a_diverged_trial_is_reported_as_failed():
    space = {"lr": [1e30, 0.01], "optimizer": "sgd", "width": 8}
    study = tune(
        Listening(seed=0), space=space, n_trials=8, include_default=False, scoring="neg_log_loss"
    )
    assert {trial.state for trial in study.trials} == {"complete", "failed"}
    expected = [
        ("COMPLETE", [t.score]) if t.state == "complete" else ("FAIL", None) for t in study.trials
    ]
    assert [told[:2] for told in Listening.told] == expected


def test_halving_within_a_batch_is_reported_as_pruned():
    halving = gputune.Halving(min_epochs=1)
    study = tune(Listening(seed=0), halving=halving, batch=6, n_trials=12, include_default=False)
    assert [trial.state for trial in study.trials].count("pruned") == 8
    for begin in (0, 6):
        assert [t.state for t in study.trials[begin : begin + 6]].count("complete") == 2
    for trial, curve, (state, values, heard) in zip(study.trials, study.curves, Listening.told):
        means = curve.mean(1)
        if trial.state == "pruned":
            assert (state, values, heard) == ("PRUNED", [means[0]], {1: means[0]})
        else:
            assert (state, values) == ("COMPLETE", [trial.score])
    assert study.meta["method"]["halving"]["min_epochs"] == 1


def test_given_trials_outside_the_space_are_run_and_not_told(capsys):
    study = tune(Listening(seed=0), n_trials=2, include=[{"lr": 0.01, "depth": 3}], verbose=1)
    said = capsys.readouterr().err
    assert "trial 1 (include) is outside the space, so the sampler does not receive" in said
    assert "trial 0" not in said.replace(
        "Trial 0 is the default configuration, moved into the space", ""
    )
    assert Listening.seen[0] == [("COMPLETE", study.trials[0].score)]
    assert [t.state for t in study.trials] == ["complete"] * 3


def test_without_given_trials(capsys):
    before = optuna.logging.get_verbosity()
    tune(tpe(), n_trials=2)
    assert optuna.logging.get_verbosity() == before and capsys.readouterr() == ("", "")
    study = tune(tpe(), n_trials=5, include_default=False, verbose=1)
    assert [t.origin for t in study.trials] == ["batch 1"] * 4 + ["batch 2"]
    said = capsys.readouterr().err
    assert said.count("plan:") == 1 and "repeat another" not in said


def interrupted(monkeypatch, at, **options):
    """Run a search that is interrupted before its so-manieth training."""
    count = itertools.count(1)
    name = "train_in_rungs" if "halving" in options else "train_waiting"
    whole = getattr(sampler, name)

    def train(session, *given, **options):
        if session.ledger.waiting() and next(count) == at:
            raise KeyboardInterrupt
        return whole(session, *given, **options)

    with monkeypatch.context() as patched, pytest.raises(gputune.SearchInterrupted):
        patched.setattr(sampler, name, train)
        tune(**options)


HALVED = {
    "halving": gputune.Halving(min_epochs=1),
    "batch": 6,
    "n_trials": 18,
    "include_default": False,
}


@pytest.mark.parametrize(
    ("name", "options"),
    [("TPESampler", {}), ("CmaEsSampler", {}), ("RandomSampler", {}), ("TPESampler", HALVED)],
)
def test_a_stopped_search_continues_as_if_it_had_not_stopped(name, options, path, monkeypatch):
    made = tpe() if name == "TPESampler" else getattr(optuna.samplers, name)(seed=0)
    whole = tune(made, **options)
    interrupted(monkeypatch, 2 if options else 3, sampler=made, study=path, **options)
    if options:  # as if it had died within a batch
        with Store.open(path) as store:
            store._connection.execute("DELETE FROM results WHERE number = 1")
    else:
        assert [t.state for t in gputune.Study.open(path).trials] == ["complete"] * 5 + [
            "waiting"
        ] * 4
    resumed = tune(made, study=path, **options)
    assert params(resumed) == params(whole)
    np.testing.assert_array_equal(resumed.curves, whole.curves)
    assert [(t.origin, t.state) for t in resumed.trials] == [
        (t.origin, t.state) for t in whole.trials
    ]


def test_each_batch_freezes_chunks_of_its_own(path):
    study = tune(tpe(), study=path)
    with Store.open(path) as store:
        plan = store.plan()
    origins = [trial.origin for trial in study.trials]
    assert [chunk.number for chunk in plan] == list(range(len(plan)))
    assert all(len({origins[n] for n in chunk.trials}) == 1 for chunk in plan)
    assert {chunk.stage for chunk in plan} == {0}
    assert sorted(n for chunk in plan for n in chunk.trials) == list(range(10))


def test_one_process_alone_asks_one_sampler(path):
    tune(tpe(), n_trials=2, study=path)
    with refused("holds a different search. It differs from this call in: method"):
        tune(optuna.samplers.RandomSampler(seed=0), n_trials=4, study=path)
    with Claims(path) as other:
        other.take_search("optuna")
        with refused("works on this search, and .* only one process can choose"):
            tune(tpe(), n_trials=4, study=path)
    assert len(gputune.Study.open(path).trials) == 2


def test_more_trials_later(path):
    tune(tpe(), n_trials=6, study=path)
    longer = tune(
        tpe(), n_trials=11, study=path, include=[{"lr": 0.02, "width": 9, "dropout": 0.1}]
    )
    origins = ["default", *["batch 1"] * 4, "batch 2", "include", *["batch 3"] * 4, "batch 4"]
    assert [t.origin for t in longer.trials] == origins
    assert params(tune(tpe(), n_trials=11, study=path)) == params(longer)


def test_a_sampler_without_a_seed_is_told_what_was_tried(path, capsys):
    first = tune(Listening(), n_trials=4, study=path, **INSIDE)
    Listening.seen.clear()
    second = tune(Listening(), n_trials=8, study=path, verbose=1, **INSIDE)
    assert "a reseeded copy of the sampler receives their results" in capsys.readouterr().err
    assert params(second)[:5] == params(first)
    assert Listening.seen[-4] == [("COMPLETE", trial.score) for trial in first.trials]


def test_another_seed_does_not_repeat_its_first_proposals(path):
    tune(optuna.samplers.RandomSampler(seed=1), n_trials=4, study=path)
    study = tune(optuna.samplers.RandomSampler(seed=2), n_trials=8, study=path)
    fresh = tune(optuna.samplers.RandomSampler(seed=2), n_trials=4)
    rates, others = (
        {trial.params["lr"] for trial in trials} for trials in (study.trials[4:], fresh.trials[1:])
    )
    assert not rates & others


def test_a_deadline_ends_it_and_the_next_call_continues(path, monkeypatch):
    with monkeypatch.context() as patch:
        time_is_over(patch, 30)
        begun = tune(tpe(), n_trials=40, max_epochs=20, timeout=600, study=path)
    assert {"complete", "stopped"} <= {trial.state for trial in begun.trials}
    n_trials = len(begun.trials) + 3
    study = tune(tpe(), n_trials=n_trials, max_epochs=20, study=path)
    assert [trial.state for trial in study.trials] == ["complete"] * n_trials


def test_the_solved_logistic_regression_and_its_refit(path):
    study = tune(tpe(), model="logistic", space=None, n_trials=6, study=path)
    assert study.best_trial.params.keys() == {"C", "l1_ratio"}
    model = gputune.Study.open(path).best_model(X, Y)
    np.testing.assert_array_equal(model.predict(X), study.best_model().predict(X))


class Net(nn.Module):
    """A user's module that is given a class."""

    def __init__(self, n_features, n_outputs, act):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(n_features, 8), act(), nn.Linear(8, n_outputs))

    def forward(self, x):
        return self.body(x)


def test_a_module_with_choices_that_optuna_cannot_hold(path):
    space = {"lr": loguniform(1e-3, 1e-1), "module__act": [nn.Tanh, nn.ReLU]}
    study, again = (tune(tpe(), model=Net, space=space, n_trials=8, study=path) for _ in range(2))
    assert {trial.params["module__act"] for trial in study.trials} == {nn.Tanh, nn.ReLU}
    assert params(again) == params(study)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: gputune.OptunaSampler("gp"),
            "must be 'tpe' or an Optuna sampler, got 'gp'. For example",
        ),
        (
            lambda: gputune.OptunaSampler(optuna.samplers.TPESampler),
            "must be 'tpe' or an Optuna sampler",
        ),
        (
            lambda: gputune.OptunaSampler(optuna.samplers.GridSampler({"lr": [0.1]}, seed=0)),
            "cannot be a GridSampler",
        ),
        (
            lambda: gputune.OptunaSampler(tpe(), batch=0),
            "batch=...) must be an integer of at least 1, got 0",
        ),
        (
            lambda: gputune.OptunaSampler(tpe(), batch=True),
            "batch=...) must be an integer of at least 1, got True",
        ),
        (
            lambda: gputune.OptunaSampler(tpe(), halving=3),
            "must be gputune.Halving(...) or None, got 3",
        ),
        (
            lambda: gputune.tune("mlp", X, Y, method="gp", **FAST),
            "or gputune.OptunaSampler(...), got 'gp'",
        ),
    ],
)
def test_what_is_no_sampler_is_refused(make, message):
    with refused(re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"space": [SPACE, SPACE]},
            "space must be one dict for an Optuna sampler, got a list of 2",
        ),
        (
            {"model": "logistic", "space": {"penalty": ["l1"], "C": [1.0]}},
            "'l1_ratio' instead of the older key 'penalty'",
        ),
        ({"space": {"lr": NARROW}}, "must be a list, scipy's uniform"),
        (
            {"model": "logistic", "halving": gputune.Halving(), "space": None},
            "compares trials while they train",
        ),
        (
            {"n_trials": 0, "include_default": False},
            "n_trials must be at least 1 without included configurations",
        ),
        *(
            ({"n_trials": n}, f"n_trials must be an integer of at least 0, got {n!r}")
            for n in (-1, "8", 2.5)
        ),
    ],
)
def test_a_refused_search_leaves_no_study(how, message, path):
    with refused(re.escape(message)):
        tune(tpe(), **how, study=path)
    assert not path.exists()


def test_without_optuna(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna.samplers", None)
    with pytest.raises(
        MissingExtraError, match=r'OptunaSampler needs optuna.*pip install "\.\[optuna\]"'
    ):
        gputune.OptunaSampler(None)
    assert issubclass(MissingExtraError, ImportError) and issubclass(MissingExtraError, InputError)
