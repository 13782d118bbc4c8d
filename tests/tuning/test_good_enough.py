"""A search that ends because it is good enough ends at the same trial after a kill, and in the same
call again."""

import itertools
import random
from dataclasses import replace

import numpy as np
import optuna
import pytest
from sklearn.datasets import load_iris

import gputune
from gputune.engine.stop import Stop
from gputune.executors.executor import Executor, Queue
from gputune.executors.worker import Reports
from gputune.methods.halving import Halving
from gputune.methods.median import Median
from gputune.methods.stopping import ends_in_order
from gputune.study.ledger import Ledger
from gputune.study.store import Candidate, PlannedChunk, Result
from gputune.tuning.session import GoodEnough
from study_processes import table

X, Y = (part[::3] for part in load_iris(return_X_y=True))
SPACE = {"lr": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2], "width": [4, 40], "batch_size": [16, 32]}
COMMON = {"cv": 2, "memory": 1024, "workers": 1, "verbose": 0, "scoring": "neg_log_loss"}


def sampler(**options):
    return gputune.OptunaSampler(optuna.samplers.RandomSampler(seed=0), batch=4, **options)


def tune(study, **options):
    return gputune.tune(
        "mlp", X, Y, space=SPACE, max_epochs=3, study=study, **{**COMMON, "n_trials": 16, **options}
    )


def objective(params, report):
    for epoch in range(1, 5):
        report(params["x"] + epoch * params["slope"])
    return params["x"] + 4 * params["slope"]


def search(study, **options):
    space = {"x": [0.0, 0.3, 0.6, 0.9, 1.2], "slope": [-0.1, 0.0, 0.1, 0.2]}
    common = {"direction": "maximize", "n_trials": 16, "workers": 1, "verbose": 0, "study": study}
    return gputune.search(objective, space, **{**common, **options})


MODES = {
    "random": (tune, {"patience_trials": 3, "random_state": 2}),
    "target": (tune, {"target_score": -1.0}),
    "logistic": (
        lambda study, **options: gputune.tune(
            "logistic",
            X,
            Y,
            space={"C": [0.01, 0.1, 1.0, 10.0, 30.0]},
            study=study,
            n_trials=5,
            **COMMON,
            **options,
        ),
        {"patience_trials": 2},
    ),
    "halving": (tune, {"patience_trials": 2, "method": "halving"}),
    "median": (tune, {"patience_trials": 2, "method": "median"}),
    "optuna": (tune, {"patience_trials": 3, "method": sampler()}),
    "optuna and halving": (
        tune,
        {"patience_trials": 2, "method": sampler(halving=Halving(factor=2))},
    ),
    "hypergradient": (
        tune,
        {
            "patience_trials": 2,
            "n_trials": 2,
            "memory": "4MB",
            "method": gputune.Hypergradient(outer_steps=5),
        },
    ),
    "loop": (search, {"patience_trials": 3}),
    "loop and target": (search, {"target_score": 1.2}),
    "loop and halving": (
        search,
        {"patience_trials": 4, "method": Halving(min_epochs=1), "max_epochs": 4},
    ),
    "loop and optuna": (search, {"patience_trials": 4, "method": sampler()}),
}


class Killed(BaseException):
    """Stands for a SIGKILL."""


def fail_at(monkeypatch, moment):
    """Let the process end before a call of the ledger that keeps results or adds trials, counted
    from 1."""
    numbers = itertools.count(1)

    def watched(original):
        def call(*arguments, **options):
            if next(numbers) == moment:
                raise Killed
            return original(*arguments, **options)

        return call

    for name in ("finish", "add"):
        monkeypatch.setattr(Ledger, name, watched(getattr(Ledger, name)))


def seconds(study):
    return [trial.seconds for trial in gputune.Study.open(study).trials]


SLOW = (
    "target",
    "logistic",
    "halving",
    "median",
    "optuna and halving",
    "hypergradient",
    "loop and target",
    "loop and optuna",
)


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=[pytest.mark.long] * (mode in SLOW)) for mode in MODES]
)
def test_a_search_its_resume_and_its_repetition_give_one_table(tmp_path, monkeypatch, mode):
    run, options = MODES[mode]
    whole = tmp_path / "whole.db"
    run(whole, **options)
    expected = table(whole)
    before = seconds(whole)
    run(whole, **options)
    assert table(whole) == expected
    assert seconds(whole) == before  # nothing was trained again
    study = tmp_path / "killed.db"
    n_kills = 0
    for moment in (2, 1, 2, 1, 3):
        with monkeypatch.context() as patch:
            fail_at(patch, moment)
            try:
                run(study, **options)
            except Killed:
                n_kills += 1
    assert n_kills >= 1
    run(study, **options)
    assert table(study) == expected


def test_trials_are_counted_in_order_of_their_numbers(tmp_path):
    """Wide networks train in chunks of their own, one after the other, in another order than the
    trials' numbers."""
    patience = 3
    study = tune(tmp_path / "study.db", patience_trials=patience)
    ended = {trial.number: trial.score for trial in study.trials if trial.state == "complete"}
    last = max(ended)
    assert sorted(ended) == list(range(last + 1)) and last < len(study.trials) - 1
    since_best = [
        last - int(np.argmax([ended[n] for n in range(last + 1)])) for last in range(last + 1)
    ]
    assert since_best[-1] == patience and max(since_best[:-1]) < patience


class Crowd(Executor):
    """Workers that end their chunks in random order."""

    def __init__(self, capacity, draw):
        self.n_workers = capacity
        self.draw = draw
        self.running = []

    @property
    def capacity(self):
        return self.n_workers

    def submit(self, chunk, ended):
        self.running.append((chunk, ended))
        return True

    def wait(self):
        if self.running:
            chunk, ended = self.running.pop(self.draw.randrange(len(self.running)))
            ended(chunk, [chunk])


class Unit:
    def __init__(self, chunk):
        self.chunk = chunk
        self.index = chunk.trials


def trained_in_a_crowd(scores, chunks, *, seed, kill, **options):
    """Return the trials that are trained by several workers, in a random order, with a kill after
    some chunks."""
    draw = random.Random(seed)
    results = {}
    for most in (draw.randrange(1, len(chunks)) if kill else len(chunks), len(chunks)):
        ledger = Ledger(None)
        ledger.candidates = [Candidate(number, {}, "random") for number in range(len(scores))]
        ledger.plan = list(chunks)
        ledger.results = dict(results)
        good_enough = GoodEnough(ledger, in_rungs=False, **options)
        stop = Stop()
        units = [Unit(chunk) for chunk in chunks if not results.keys() >= set(chunk.trials)]
        queue = Queue(
            units,
            Crowd(3, draw),
            stop,
            lambda unit: True,
            lambda unit, allows=good_enough.allows: allows(unit.chunk),
        )
        if good_enough.is_reached():
            break
        for n, unit in enumerate(queue.run(None, lambda *_: None)):
            if n == most:
                break
            for number in unit.chunk.trials:
                score = scores[number]
                curve = np.array([[score]])
                ledger.results[number] = Result(number, "complete", score, (score,), 1, 0.0, curve)
            if good_enough.is_reached():
                stop.ask()
        results = ledger.results
    return set(results), good_enough.reason


@pytest.mark.parametrize(
    "options",
    [{"patience_trials": 4, "target_score": None}, {"patience_trials": None, "target_score": 0.9}],
)
def test_the_order_in_which_workers_end_does_not_decide(options):
    draw = random.Random(0)
    n_early = 0
    for _ in range(15):
        numbers = list(range(40))
        scores = [draw.random() for _ in numbers]
        chunks = []
        while numbers:
            part = [
                numbers.pop(draw.randrange(min(6, len(numbers))))
                for _ in range(min(len(numbers), 2))
            ]
            chunks.append(PlannedChunk(len(chunks), 0, tuple(part), 1, at_once=3))
        expected = trained_in_a_crowd(scores, chunks, seed=0, kill=False, **options)
        n_early += len(expected[0]) < 40
        for seed in range(8):
            assert (
                trained_in_a_crowd(scores, chunks, seed=seed, kill=seed % 2, **options) == expected
            )
    assert n_early > 8


def test_a_chunk_begins_when_those_that_cannot_train_next_to_it_have_ended():
    ledger = Ledger(None)
    ledger.candidates = [Candidate(number, {}, "random") for number in range(4)]
    ledger.plan = [PlannedChunk(number, 0, (number,), 1, at_once=2) for number in range(4)]
    good_enough = GoodEnough(ledger, target_score=1.0, patience_trials=None, in_rungs=False)
    assert list(map(good_enough.allows, ledger.plan)) == [True, True, False, False]
    ledger.results[1] = Result(1, "complete", 2.0, (2.0,), 1, 0.0, np.array([[2.0]]))
    assert not good_enough.is_reached() and not good_enough.allows(ledger.plan[2])
    ledger.results[0] = replace(ledger.results[1], number=0, score=0.0)
    # it would train beside trial 1
    assert list(map(good_enough.allows, ledger.plan))[2:] == [True, False]
    assert not good_enough.is_reached()
    ledger.results[2] = replace(ledger.results[1], number=2, score=0.0)
    assert good_enough.is_reached() and good_enough.reason.startswith("trial 1 has reached")


@pytest.mark.parametrize(
    "rule", [Halving(min_epochs=1, factor=2), Median(min_epochs=1, min_trials=2)]
)
def test_a_custom_training_loop_is_compared_with_lower_numbers_only(tmp_path, rule):
    reports = Reports(tmp_path / "reports")
    reports.write(0, [0.5], ended=False)
    reports.write(1, (), ended=False)
    reports.write(2, [0.1], ended=False)
    reports.write(3, [9.0, 9.0], ended=True)
    assert ends_in_order(rule, 4, 2, 1, reports) is None  # trial 1 has not come as far
    reports.write(1, [0.4], ended=False)
    assert ends_in_order(rule, 4, 2, 1, reports) is True
    reports.write(2, [0.6], ended=False)
    assert ends_in_order(rule, 4, 2, 1, reports) is False  # whatever trial 3 has reached


@pytest.mark.long
@pytest.mark.parametrize("mode", ["random", "loop and target", "loop and halving"])
def test_several_workers_give_one_table(tmp_path, mode):
    run, options = MODES[mode]
    for name in ("first.db", "second.db"):
        run(tmp_path / name, **options, workers=3)
    expected = table(tmp_path / "first.db")
    assert table(tmp_path / "second.db") == expected
    run(tmp_path / "first.db", **options, workers=3)
    assert table(tmp_path / "first.db") == expected


@pytest.mark.long
@pytest.mark.parametrize("method", [Halving(min_epochs=1), Median(min_epochs=1, min_trials=2)])
def test_several_workers_prune_the_trials_that_one_prunes(tmp_path, method):
    tables = []
    for workers in (1, 3):
        search(tmp_path / f"{workers}.db", method=method, max_epochs=4, workers=workers)
        tables.append(table(tmp_path / f"{workers}.db"))
    assert tables[0] == tables[1]
