"""Candidates and results with numbers that depend on nothing but the trial, shared by the tests of
the study."""

import sqlite3
from contextlib import closing

import numpy as np

from gputune.study.record import SearchRecord
from gputune.study.store import Candidate, Result, Store


class Canary:
    """An object with a pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def candidates(numbers):
    return [
        Candidate(n, {"lr": 0.1 / (n + 1), "width": 16, "activation": "relu"}, "random")
        for n in numbers
    ]


def result(number, *, epochs=3, folds=2, state="complete", **changed):
    curve = np.random.default_rng(number).normal(size=(epochs, folds))
    values = {
        "number": number,
        "state": state,
        "score": float(curve[-1].mean()),
        "fold_scores": tuple(curve[-1].tolist()),
        "best_epoch": epochs,
        "seconds": 0.1 + number,
        "curve": curve,
    }
    return Result(**{**values, **changed})


def bits(result):
    numbers = np.array([result.score, *result.fold_scores, result.seconds])
    return (
        result.number,
        result.state,
        result.best_epoch,
        numbers.tobytes(),
        result.curve.tobytes(),
        result.curve.shape,
    )


def content(path):
    """Everything that a study holds, in a form that compares bits: options, candidates, results,
    plan."""
    with Store.open(path) as store:
        rows = store.trials()
        return (
            store.meta,
            [c for c, _ in rows],
            {r.number: bits(r) for _, r in rows if r},
            store.plan(),
        )


def make_study(path, trials=0, results=(), meta=None):
    """Write a study with this number of trials, some of them with results, and return its path."""
    with Store.create(path, meta or {}) as store:
        store.add_trials(candidates(range(trials)))
        store.finish(results)
    return path


def change(path, statement, values=()):
    """Change a study file as no program of ours does."""
    with closing(sqlite3.connect(path)) as raw, raw:
        raw.execute(statement, values)


def record(**more):
    """The record of a search as short as they come."""
    data = {"rows": 9, "columns": 2, "sha256": ""}
    return SearchRecord(model="mlp", spec={"kind": "mlp"}, fingerprint=data, seed=0, **more)
