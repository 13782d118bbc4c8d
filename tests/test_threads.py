"""Small operations run on one thread of torch, because threads wait long for each other on busy
cores."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import gputune
from gputune.ground import device
from gputune.ground.device import is_small_pass, on_one_thread, on_threads
from gputune.modules.inspection import inspect_module
from gputune.modules.module_trial import ModuleTrial
from gputune.scoring import scoring, validation
from gputune.sklearn import GridSearchCV, LogisticRegression, MLPClassifier, NeuralNetClassifier
from gputune.solver import solve
from problems import data_of, fill

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 3)).astype("float32")
Y = (X[:, 0] > 0).astype(int)


class Watched(nn.Module):
    """A linear model that notes the number of torch's threads in every forward pass."""

    threads: ClassVar = set()

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        self.threads.add(torch.get_num_threads())
        return self.layer(x)


@pytest.mark.parametrize(("if_small", "inside"), [(True, 1), (False, 3)])
def test_threads_are_set_inside_the_block_only(if_small, inside):
    with on_threads(3):
        with pytest.raises(KeyError), on_one_thread(if_small=if_small):
            assert torch.get_num_threads() == inside
            raise KeyError
        assert torch.get_num_threads() == 3


@pytest.mark.parametrize(
    ("module", "shapes", "is_small"),
    [
        (nn.Linear(10, 10), [(100, 10)], True),
        (nn.Linear(1000, 1000), [(10, 1000)], True),
        (nn.Linear(1000, 1000), [(100, 1000)], False),
        (nn.LSTM(10, 100), [(10, 10)], True),
        (nn.LSTM(10, 100), [(10, 1000, 10)], False),
        (nn.Conv1d(1, 1, 1), [(1, 1, 1)], False),
        (nn.LazyLinear(1), [(1, 1)], False),
        (nn.Embedding(10, 2), [(5,)], True),
        (nn.Bilinear(3, 4, 1), [(5, 3), (5, 0)], False),
    ],
)
def test_a_pass_is_small_if_rows_times_weights_is_small(module, shapes, is_small):
    assert is_small_pass(module, [torch.zeros(shape) for shape in shapes]) == is_small


@pytest.mark.parametrize(
    ("layer", "widest", "is_small"),
    [
        # 10 rows of 8 channels of 100 pixels, and 4 x 8 x 3 weights: 96,000 products
        (nn.Conv1d(4, 8, 3, padding=1), 800, True),
        # 10 rows x 8 x 10,000 pixels: 9.6 million products, and ten times as many
        (nn.Conv1d(4, 8, 3, padding=1), 80_000, True),
        (nn.Conv1d(4, 8, 3, padding=1), 800_000, False),
        (nn.ConvTranspose1d(4, 8, 3), 400_000, False),
    ],
)
def test_a_convolution_is_small_if_its_pixels_times_weights_are_few(layer, widest, is_small):
    assert is_small_pass(layer, [torch.zeros(10, 4, 100)], widest) == is_small


class OneConvolution(nn.Module):
    """A convolution that notes the number of torch's threads in each pass."""

    threads: ClassVar = set()

    def __init__(self, n_outputs=2):
        super().__init__()
        self.layer = nn.Conv1d(1, n_outputs, 3)

    def forward(self, x):
        self.threads.add(torch.get_num_threads())
        return self.layer(x[:, None])[:, :, 0]


@pytest.mark.parametrize(("limit", "expected"), [(device.SMALL_PRODUCT, {1, 2}), (10, {2})])
def test_a_small_convolution_is_inspected_on_one_thread_after_its_first_call(
    monkeypatch, limit, expected
):
    monkeypatch.setattr(device, "SMALL_PRODUCT", limit)
    OneConvolution.threads.clear()
    data = data_of(torch.tensor(X), 2)
    with on_threads(2):
        inspect_module(ModuleTrial(OneConvolution, *fill({}), data))
    assert OneConvolution.threads == expected


@pytest.mark.parametrize(("limit", "expected"), [(device.SMALL_LOSS, 1), (10, 2)])
def test_scores_of_few_rows_are_computed_on_one_thread(monkeypatch, limit, expected):
    monkeypatch.setattr(validation, "SMALL_LOSS", limit)
    seen = set()

    def score(outputs, y):
        seen.add(torch.get_num_threads())
        return float(-(outputs[:, 0] - y).abs().mean())

    options = {"n_trials": 2, "max_epochs": 1, "cv": 2, "verbose": 0, "workers": 1}
    with on_threads(2), monkeypatch.context() as patch:
        patch.setattr("gputune.engine.plan.cores", lambda: 2)
        gputune.tune("mlp", X, Y.astype("float32"), scoring=score, **options)
    assert seen == {expected}


def test_stopping_rules_and_predictions_of_estimators_use_one_thread(monkeypatch):
    seen = set()
    row_losses = scoring.Scoring.metrics

    def watched(*arguments):
        seen.add(torch.get_num_threads())
        return row_losses(*arguments)

    monkeypatch.setattr(scoring.Scoring, "metrics", watched)
    with on_threads(2):
        search = GridSearchCV(MLPClassifier(max_iter=2), {"alpha": [0.1, 0.2]}, cv=2)
        search.fit(X, Y)
        assert seen == {1}
        net = NeuralNetClassifier(Watched, max_epochs=1).fit(X, Y)
        Watched.threads.clear()
        net.predict(X)
        assert Watched.threads == {1}
        monkeypatch.setattr(device, "SMALL_PRODUCT", 10)
        Watched.threads.clear()
        net.predict(X)
        assert Watched.threads == {2}
        assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("limit", "expected"), [(solve.SMALL_PRODUCT, 1), (10, 2)])
def test_a_small_logistic_regression_is_solved_on_one_thread(monkeypatch, limit, expected):
    seen = set()
    rows_of = solve.rows_of

    def watched(*arguments, **options):
        seen.add(torch.get_num_threads())
        return rows_of(*arguments, **options)

    monkeypatch.setattr(solve, "rows_of", watched)
    monkeypatch.setattr(solve, "SMALL_PRODUCT", limit)
    with on_threads(2):
        LogisticRegression().fit(X, Y)
        assert torch.get_num_threads() == 2
    assert seen == {expected}
