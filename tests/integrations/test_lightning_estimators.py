"""The training step of a LightningModule in the estimators of scikit-learn and in gputune check.

Skipped without Lightning.
"""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import gputune
from gputune.check.module import _Measurement, made_table
from gputune.sklearn import NeuralNetClassifier, NeuralNetRegressor
from gputune.tuning.choices import choose_model
from gputune.tuning.options import make_options
from gputune.tuning.pipeline import prepared
from gputune.tuning.progress import Progress
from gputune.tuning.record import SearchCall, read_rows

lightning = pytest.importorskip("lightning.pytorch")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 4)).astype(np.float32)
Y = (X[:, 0] > 0).astype(int)
OPTIONS = {"lr": 0.1, "max_epochs": 3, "random_state": 0}


def smoothed(module, batch):
    return nn.functional.cross_entropy(module(batch[0]), batch[1], label_smoothing=0.2)


class OneLayer:
    """A part of a LightningModule of either package."""

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.layer = nn.Linear(n_features, n_outputs)

    def forward(self, x):
        return self.layer(x)


class Network(OneLayer, lightning.LightningModule):
    calls = 0

    def training_step(self, batch, batch_idx):
        type(self).calls += 1
        return smoothed(self, batch)


class WithoutStep(Network):
    training_step = lightning.LightningModule.training_step


class Number(Network):
    def training_step(self, batch, batch_idx):
        return (self(batch[0])[:, 0] - batch[1]).abs().mean()


class Manual(Network):
    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)
        self.automatic_optimization = False


def make(n_features, n_outputs):
    return Network(n_features, n_outputs)


def probabilities(module, **more):
    return NeuralNetClassifier(module, **OPTIONS, **more).fit(X, Y).predict_proba(X)


def test_a_classifier_trains_with_the_step_of_a_module_of_pytorch_lightning():
    package = pytest.importorskip("pytorch_lightning")

    class Old(OneLayer, package.LightningModule):
        def training_step(self, batch, batch_idx):
            return smoothed(self, batch)

    class Plain(Old):
        training_step = package.LightningModule.training_step

    expected = probabilities(Plain, training_step=smoothed)
    assert not np.allclose(expected, probabilities(Plain))
    assert np.array_equal(probabilities(Old), expected)


def test_a_classifier_trains_with_the_step_of_its_module():
    expected = probabilities(WithoutStep, training_step=smoothed)
    plain = probabilities(WithoutStep)
    assert not np.allclose(expected, plain)
    assert np.array_equal(probabilities(Network), expected)
    assert np.array_equal(probabilities(partial(Network)), expected)
    # A criterion replaces the step, as the argument loss of gputune.tune does.
    assert np.array_equal(probabilities(Network, criterion="cross_entropy"), plain)


def test_a_regressor_receives_the_target_as_its_step_reads_it():
    y = 100 + 10 * X[:, 0]
    net = NeuralNetRegressor(Number, **{**OPTIONS, "lr": 5.0, "max_epochs": 60}).fit(X, y)
    assert net.score(X, y) > 0.7


def test_a_step_that_the_estimator_cannot_use():
    message = (
        "module returns a Network, whose training_step an estimator uses only if it receives the "
        r"class, got make. Pass Network or functools.partial\(Network, ...\), or pass criterion for"
    )
    with pytest.raises(gputune.InputError, match=message):
        probabilities(make)
    assert np.isfinite(probabilities(make, criterion="cross_entropy")).all()
    with pytest.raises(gputune.InputError, match="^Manual sets automatic_optimization = False"):
        probabilities(Manual)


def test_the_plain_loop_of_a_check_runs_the_step():
    choice = choose_model(Network, None)
    options = make_options(
        n_trials=0, include_default=False, include=[{}], verbose=0, workers=1, device="cpu"
    )
    source = read_rows(choice, options.rows, *made_table())
    with prepared(SearchCall(choice, source, options), Progress(0)) as (setup, context):
        measurement = _Measurement(context, setup.first, print)
        before = Network.calls
        with torch.enable_grad():
            measurement._plain_seconds(0.0)
    assert Network.calls > before + 1  # each minibatch of at least two epochs
