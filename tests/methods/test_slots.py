"""Searches with halving in which an Optuna sampler refills the free slots."""

import math
import sys
from functools import partial
from itertools import count
from typing import ClassVar

import numpy as np
import optuna
import pytest
from scipy.stats import loguniform
from sklearn.datasets import load_iris

import gputune
from command_line import output, run
from gputune.engine.stop import Stop
from gputune.ground.errors import MissingExtraError
from gputune.methods.paused import PausedTraining
from gputune.methods.rungs import fill_slots
from gputune.methods.sampling import tpe_sampler
from gputune.tuning.method import check_method, method_from_json
from moments import time_is_over
from refused import refused

X, Y = load_iris(return_X_y=True)
SPACE = {"lr": loguniform(1e-3, 0.1), "width": gputune.log_int(8, 16), "dropout": [0.0, 0.1]}
HALVING = gputune.Halving(min_epochs=1)  # rungs after 1 and 3 of 9 epochs
FAST = {"max_epochs": 9, "cv": 3, "verbose": 0, "workers": 1}


def tune(sampler, *, batch=6, space=SPACE, n_trials=16, refill=True, **options):
    method = gputune.OptunaSampler(sampler, batch=batch, halving=HALVING, refill=refill)
    return gputune.tune(
        "mlp", X, Y, space=space, n_trials=n_trials, method=method, **{**FAST, **options}
    )


def tpe(seed=0):
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=4, multivariate=False)


def lengths(study):
    return np.isfinite(study.curves).all(2).sum(1)


def assert_same(study, other):
    assert [(t.params, t.origin, t.state, t.score) for t in study.trials] == [
        (t.params, t.origin, t.state, t.score) for t in other.trials
    ]
    np.testing.assert_array_equal(study.curves, other.curves)


@pytest.fixture(scope="module")
def whole():
    return tune(tpe())


class Scripted:
    """A search whose trials have the scores 1, 2, 3, ... at every epoch, and which writes down what
    happens."""

    def __init__(self, n_trials, diverged=()):
        self.n_trials = n_trials
        self.diverged = diverged
        self.begun = 0
        self.events = []

    def is_over(self):
        return False

    def propose(self, n_free, running):
        first = self.begun
        self.begun = min(self.n_trials, first + n_free)
        return range(first, self.begun)

    def train(self, arrived, later):
        self.events.append(dict(arrived))
        curves = {}
        for number, epochs in arrived.items():
            score = math.nan if number in self.diverged else number
            # A diverged trial may have any number of stored epochs.
            curves[number] = np.full((1 if number in self.diverged else epochs, 2), score)
        return curves

    def end(self, numbers, rung=None):
        if len(numbers):
            self.events.append((list(numbers), rung))

    def ended_trials(self, rung):
        return set()


def test_free_slots_are_refilled_at_the_next_stop_of_any_trial():
    search = Scripted(n_trials=6)
    assert fill_slots(search, HALVING, n_slots=3, max_epochs=9) == {}
    assert search.events == [
        {0: 1, 1: 1, 2: 1},
        ([0, 1], 1),  # a third of three trials continues
        {3: 1, 4: 1},  # trial 2 has one more epoch to its next rung
        ([3], 1),  # compared with the trials 0 to 4, of which one continues
        {2: 3, 5: 1},
        {4: 3},
        {5: 3},
        {2: 9},
        ([2], None),
        {4: 9},
        ([4], None),
        {5: 9},
        ([5], None),
    ]


def test_a_diverged_trial_counts_at_the_stop_where_its_slot_becomes_free():
    search = Scripted(n_trials=4, diverged={1, 2})
    fill_slots(search, HALVING, n_slots=3, max_epochs=9)
    assert search.events[:4] == [{0: 1, 1: 1, 2: 1}, ([1, 2], None), {3: 1}, {0: 3}]


def test_trials_that_need_the_same_epochs_train_together(monkeypatch):
    calls = []
    train = PausedTraining.train_until

    def recorded(training, trials, until, **options):
        calls.append({(len(trial.curve), until[trial.number]) for trial in trials})
        train(training, trials, until, **options)

    monkeypatch.setattr(PausedTraining, "train_until", recorded)
    study = tune(tpe(), n_trials=12)
    assert {segment for call in calls for segment in call} == {(0, 1), (1, 3), (3, 9)}
    n_segments = sum(map(len, calls))
    n_pauses = sum({1: 1, 3: 2, 9: 3}[length] for length in lengths(study).tolist())
    assert n_segments < n_pauses / 1.5


def test_every_curve_is_that_of_its_trial_alone():
    study = tune(optuna.samplers.RandomSampler(seed=0), space={**SPACE, "depth": [1, 2]})
    assert {len(set(lengths(study))), lengths(study).max()} == {3, 9}
    for trial, curve, length in zip(study.trials, study.curves, lengths(study)):
        alone = gputune.tune(
            "mlp", X, Y, include=[trial.params], n_trials=0, include_default=False, **FAST
        )
        np.testing.assert_array_equal(curve[:length], alone.curves[0][:length])
        assert trial.state == ("pruned" if length < 9 else "complete")


def test_a_trial_is_compared_with_all_that_ever_reached_its_rung(whole):
    means = whole.curves[:, 0].mean(1)
    for trial in whole.trials:
        if trial.origin in ("default", "batch 1"):
            continue
        begun = [other.number for other in whole.trials if other.number <= trial.number]
        n_better = sum(means[other] > means[trial.number] for other in begun)
        if n_better < len(begun) // 3 - 3:
            assert lengths(whole)[trial.number] > 1
    assert [t.origin for t in whole.trials[:6]] == ["default", *["batch 1"] * 5]
    assert len({t.origin for t in whole.trials}) > 4  # not 16 / 6
    assert whole.meta["method"]["refill"] is True


def test_batches_without_refill():
    study = tune(tpe(), refill=False)
    assert [t.origin for t in study.trials] == ["default", *["batch 1"] * 6, *["batch 2"] * 6] + [
        "batch 3"
    ] * 3
    assert study.meta["method"].keys() == {"name", "sampler", "halving"}


class Listening(optuna.samplers.RandomSampler):
    """Records the study's trials whenever it is asked, and the results that it receives."""

    seen: ClassVar[list] = []
    told: ClassVar[list] = []

    def before_trial(self, study, trial):
        trials = study.get_trials(deepcopy=False)[:-1]
        self.seen.append([(t.state.name, dict(t.intermediate_values)) for t in trials])

    def after_trial(self, study, trial, state, values):
        self.told.append((trial.params["lr"], state.name, values))


def test_the_sampler_sees_a_survivor_as_complete_and_a_new_trial_as_running():
    study = tune(Listening(seed=0), n_trials=9, include_default=False)
    assert Listening.seen[5] == [("RUNNING", {})] * 5
    first = Listening.seen[6]
    expected = []
    for curve, length in zip(study.curves[:6], lengths(study)):
        state = "COMPLETE" if length > 1 else "PRUNED"
        expected.append((state, {1: curve[0].mean()}))
    assert first == expected and [state for state, _ in first].count("COMPLETE") == 2
    assert Listening.seen[7] == [*expected, ("RUNNING", {})]
    told = {lr: state for lr, state, _ in Listening.told}
    assert len(told) == len(Listening.told)  # each result once
    for trial in study.trials:
        assert told.get(trial.params["lr"]) in (None, "PRUNED")


class Killed(Exception):
    """Ends a search like a kill: no result is stored on the way out."""


def kill(monkeypatch, at, **options):
    """Run a search that ends right before or right after its n-th training."""
    calls = count(1)
    train = PausedTraining.train_until

    def killed(training, *arguments, **keywords):
        now = next(calls)
        if now == at:
            raise Killed
        train(training, *arguments, **keywords)
        if now + 0.5 == at:
            raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(PausedTraining, "train_until", killed)
        tune(tpe(), **options)


def test_a_killed_search_continues_as_if_it_had_not_stopped(whole, tmp_path, monkeypatch, capsys):
    path = tmp_path / "study.db"
    for at in (1, 2.5, 2, 1.5, 3):
        kill(monkeypatch, at, study=path, checkpoint_seconds=0.01)
    assert_same(tune(tpe(), study=path, verbose=1), whole)
    assert "reseeded" not in capsys.readouterr().err


@pytest.mark.long
def test_a_search_of_128_trials_is_killed_ten_times(tmp_path, monkeypatch, capsys):
    options = {"batch": 16, "n_trials": 128, "random_state": 1}
    path = tmp_path / "study.db"
    n_ended = []
    for at in (2, 3.5, 2.5, 4, 2, 3.5, 3, 2.5, 3.5, 2):
        kill(monkeypatch, at, study=path, checkpoint_seconds=0.01, **options)
        n_ended.append(sum(trial.score is not None for trial in gputune.Study.open(path).trials))
    assert n_ended == sorted(n_ended) and len(set(n_ended)) > 5 and n_ended[-1] < 128
    assert_same(tune(tpe(), study=path, verbose=1, **options), tune(tpe(), **options))
    assert "reseeded" not in capsys.readouterr().err


def test_a_killed_search_with_workers_and_shapes(tmp_path, monkeypatch):
    options = {"space": {**SPACE, "depth": [1, 2]}, "n_trials": 10, "workers": 2}
    path = tmp_path / "study.db"
    kill(monkeypatch, 2, study=path, **options)
    assert_same(tune(tpe(), study=path, **options), tune(tpe(), **{**options, "workers": 1}))


def test_a_deadline_ends_a_search_and_the_next_call_continues(whole, tmp_path, monkeypatch):
    path = tmp_path / "study.db"
    with monkeypatch.context() as patched:
        time_is_over(patched, 25)
        begun = tune(tpe(), timeout=600, study=path)
    assert "stopped" in {trial.state for trial in begun.trials}
    assert_same(tune(tpe(), study=path), whole)


def test_a_user_ends_a_trial_at_its_next_rung(whole, tmp_path, monkeypatch):
    """``gputune stop --trial`` does. The search then continues, also after a kill."""
    number = next(n for n in range(6) if lengths(whole)[n] == 9)
    path = tmp_path / "study.db"
    with monkeypatch.context() as patched:
        patched.setattr(Stop, "ended_trials", lambda stop: {number})
        ended = tune(tpe())
        kill(monkeypatch, 3, study=path)
    trial = ended.trials[number]
    assert (trial.state, trial.detail, lengths(ended)[number]) == ("pruned", {"rung": 1}, 1)
    assert gputune.Study.open(path).trials[number].state == "pruned"
    assert_same(tune(tpe(), study=path), ended)


def test_more_trials_later(whole, tmp_path):
    path = tmp_path / "study.db"
    first = tune(tpe(), n_trials=10, study=path)
    more = tune(tpe(), study=path)
    assert [t.params for t in more.trials[:10]] == [t.params for t in first.trials]
    assert len(more.trials) == 16 and {t.state for t in more.trials} == {"complete", "pruned"}


def test_another_sampler_receives_the_finished_trials(tmp_path, capsys):
    path = tmp_path / "study.db"
    first = tune(tpe(), n_trials=8, study=path)
    more = tune(tpe(seed=1), n_trials=10, study=path, verbose=1)
    assert "a reseeded copy of the sampler receives their results" in capsys.readouterr().err
    assert [t.params for t in more.trials[:8]] == [t.params for t in first.trials]


def test_given_trials_outside_of_the_space_are_run_and_not_seen(capsys):
    Listening.seen.clear()
    given = [{"lr": 0.01, "depth": 3}]
    study = tune(Listening(seed=0), n_trials=4, include=given, include_default=False, verbose=1)
    said = capsys.readouterr().err
    assert said.count("trial 0 (include) is outside the space, so the sampler does not") == 1
    assert Listening.seen[:2] == [[], [("RUNNING", {})]]
    assert [trial.origin for trial in study.trials] == ["include", *["batch 1"] * 4]


def test_earlier_studies_warm_the_sampler(whole):
    Listening.seen.clear()
    tune(Listening(seed=0), n_trials=2, warm_start=[whole])
    n_complete = sum(trial.state == "complete" for trial in whole.trials)
    assert [state for state, _ in Listening.seen[0]].count("COMPLETE") == n_complete


def test_a_batch_is_another_search_than_slots(tmp_path):
    path = tmp_path / "study.db"
    tune(tpe(), n_trials=2, study=path)
    with refused("holds a different search. It differs from this call in: method"):
        tune(tpe(), n_trials=2, refill=False, study=path)


def test_refill_is_true_or_false():
    with refused(r"OptunaSampler\(refill=...\) must be True or False, got 3"):
        gputune.OptunaSampler(tpe(), refill=3)


def test_a_target_score_ends_the_search(whole):
    search = partial(tune, tpe(), target_score=0.5)
    study = search()
    assert study.best_score >= 0.5 and len(study.trials) <= len(whole.trials)
    assert_same(study, search())


def test_tpe_by_its_name(tmp_path):
    path = tmp_path / "study.db"
    search = partial(gputune.tune, "mlp", X, Y, space=SPACE, max_epochs=2, cv=3, verbose=0)
    study = search(method="tpe", n_trials=20, random_state=3, workers=1, study=path)
    made = gputune.OptunaSampler(tpe_sampler(3))
    other = search(method=made, n_trials=20, random_state=3, workers=1)
    assert [t.params for t in study.trials] == [t.params for t in other.trials]
    assert study.record.method == {
        "name": "tpe",
        "sampler": "tpe",
        "batch": 16,
        "halving": None,
        "refill": True,
    }
    assert method_from_json(study.record.method) == check_method("tpe")
    assert gputune.Study.open(path).best_model(X, Y).predict(X[:3]).shape == (3,)


def test_tpe_with_halving_on_the_command_line_resumes_without_its_options(tmp_path):
    words = ["--sampler", "tpe", "--method", "halving", "--rungs", "1", "--keep", "2"]
    out = tmp_path / "out"
    begin = ["tune", "sklearn:iris", *words, "--trials", "4", "--epochs", "3", "--out", out]
    assert "Optuna's TPESampler proposed 3 trials" in output(*begin)
    assert run("resume", out, "--trials", "6")[0] == 0
    method = gputune.Study.open(out / "study.db").record.method
    assert method["sampler"] == "tpe" and method["halving"]["keep"] == 2
    method = method_from_json(method)
    assert method == gputune.OptunaSampler("tpe", halving=gputune.Halving(rungs=[1], keep=2))
    assert method.lacks == ""


def test_tpe_without_optuna(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna.samplers", None)
    path = tmp_path / "study.db"
    with pytest.raises(MissingExtraError, match=r'tpe.* needs optuna.*pip install "\.\[optuna\]"'):
        gputune.tune("mlp", X, Y, method="tpe", study=path, **FAST)
    assert not path.exists()
