"""Inputs that stay in main memory: the same minibatches, gathered a step ahead. No GPU is needed: a
CPU stands in."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import gputune
from gputune.data import dataset
from gputune.data.arrays import as_arrays
from gputune.population.batches import HostRows
from gputune.population.pieces import make_batches
from problems import make_data


@pytest.mark.parametrize(
    ("sizes", "exact"), [([16, 16], True), ([16, 16], False), ([16, 7], False), ([16, 7], True)]
)
def test_minibatches_are_the_same(sizes, exact, monkeypatch):
    data = make_data(weights=True, n=203)
    ahead = []
    begun = HostRows.take

    def take(self, folds, step, rows, taken, *, last):
        ahead.append((folds.start, step, rows) in self.ahead)
        return begun(self, folds, step, rows, taken, last=last)

    monkeypatch.setattr(HostRows, "take", take)
    here, there = (
        make_batches(d, sizes, data.y[None], seed=0, exact=exact)
        for d in (data, replace(data, on_host=True))
    )
    for epoch in range(2):
        for step in range(len(here.shapes)):
            for a, b in zip(here.at(epoch, step), there.at(epoch, step), strict=True):
                assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)
    assert sum(ahead) >= len(ahead) // 2
    fold = data.folds[1].valid
    assert torch.equal(data.rows(1, fold)[0], replace(data, on_host=True).rows(1, fold)[0])


@pytest.mark.parametrize(("free", "on_host"), [(1000, True), (100_000, False)])
def test_inputs_stay_where_a_gpu_has_no_room_for_them(free, on_host, monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free, free))
    arrays = as_arrays(torch.zeros(10, 5, 5))  # 1000 bytes
    assert dataset._stays_on_host(arrays, torch.device("cuda")) == on_host
    assert not dataset._stays_on_host(arrays, torch.device("cpu"))


def rows(n_outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(6, n_outputs))


@pytest.mark.parametrize("backend", ["recorded", "loop"])
def test_a_search_gives_the_same_scores(backend, monkeypatch):
    X = torch.rand(60, 2, 3, generator=torch.Generator().manual_seed(0))
    y = [0, 1] * 30
    options = {
        "cv": 3,
        "n_trials": 2,
        "max_epochs": 3,
        "verbose": 0,
        "workers": 1,
        "scoring": "neg_log_loss",
    }
    search = partial(gputune.tune, rows, X, y, backend=backend, **options)
    here = search()
    monkeypatch.setattr(dataset, "_stays_on_host", lambda arrays, device: True)
    there = search()
    np.testing.assert_allclose(there.curves, here.curves, atol=1e-6)
