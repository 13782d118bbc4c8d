"""Random draws of a module in evaluation depend only on the seed, the epoch and the fold, in every
backend.
"""

import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import gputune
import problems
from gputune.ground.seeding import keyed_draws
from gputune.modules.inspection import traits_of
from gputune.modules.looped import LoopedModule
from gputune.modules.module import StackedModule
from gputune.population.population import Shape
from problems import fill, grid, make_data, scoring_of


class Encoder(nn.Module):
    """The part that the modules here share: it takes (B, 5) to a hidden row."""

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.enter = nn.Linear(n_features, 16)
        self.leave = nn.Linear(16, n_outputs)


class Variational(Encoder):
    """Samples its code in training and in evaluation."""

    def forward(self, x):
        h = self.enter(x)
        mean, log_scale = h.chunk(2, 1)
        code = mean + torch.randn_like(mean) * log_scale.exp()
        return self.leave(torch.cat([code, code], 1))


class MonteCarlo(Encoder):
    """Keeps its dropout on when it is evaluated."""

    def forward(self, x):
        return self.leave(functional.dropout(torch.tanh(self.enter(x)), 0.4, training=True))


class Attention(Encoder):
    """Its attention drops weights in evaluation too, as ``dropout_p`` is not a part of the mode."""

    def forward(self, x):
        h = self.enter(x).view(len(x), 4, 4)
        return self.leave(
            functional.scaled_dot_product_attention(h, h, h, dropout_p=0.3).flatten(1)
        )


class Noise(Encoder):
    """Draws by the shape of its rows when it is evaluated only."""

    def forward(self, x):
        h = torch.tanh(self.enter(x))
        return self.leave(h if self.training else h + 0.3 * torch.randn(len(x), 16, dtype=x.dtype))


class Deciding(Variational):
    """Cannot be stacked, since it decides by a number of a tensor."""

    def forward(self, x):
        return super().forward(x) * (2.0 if float(self.leave.bias[0].detach()) > -9 else 1.0)


class HostNoise(Encoder):
    """Draws from Python and NumPy, and therefore trains one by one."""

    def forward(self, x):
        return self.leave(torch.tanh(self.enter(x)) + random.random() + np.random.rand())


STACKED = [Variational, MonteCarlo, Attention, Noise]
CONFIGS = fill(*({"batch_size": 64, "lr": lr} for lr in (1e-2, 1e-3)))
EPOCHS = 3
ROWS_AT_ONCE = 256


def data():
    return make_data(n=600, folds=2)  # 300 validation rows in each fold, which are two blocks


def train(module, *, configs=CONFIGS, kind=StackedModule, coded=False, **more):
    rows = data()
    traits = replace(traits_of(module, configs[0], rows), coded=coded)
    network = kind(module, configs, Shape.of(rows), seed=0, traits=traits)
    options = {
        "seed": 0,
        "epochs": EPOCHS,
        "horizon": EPOCHS,
        "scoring": scoring_of(rows, "neg_log_loss"),
    }
    return problems.train(network, rows, configs, **{**options, **more})


def plain_score(module, fold):
    """Minus the log loss of a plain module after all epochs, block by block of the fold's
    validation rows."""
    rows = data()
    valid = rows.folds[fold].valid
    outputs = []
    for start in range(0, len(valid), ROWS_AT_ONCE):
        with (
            keyed_draws(torch.device("cpu"), 0, "evaluation", EPOCHS, fold, start, host=True),
            torch.no_grad(),
        ):
            outputs.append(module(rows.x[rows.copies[fold], valid[start : start + ROWS_AT_ONCE]]))
    return -float(functional.cross_entropy(torch.cat(outputs), rows.y[valid]))


WAYS = {
    "stacked": {},
    "recorded": {"backend": "recorded"},
    "one by one": {"kind": LoopedModule},
    "compiled": {"backend": "recorded", "coded": True},
}
SHORT = [
    ("Variational", "stacked"),
    ("MonteCarlo", "recorded"),
    ("Attention", "stacked"),
    ("Noise", "one by one"),
]
CASES = {module.__name__: module for module in STACKED}


@pytest.mark.parametrize(("name", "way"), grid(CASES, WAYS, short=SHORT))
def test_scores_are_those_of_a_plain_module_with_the_draws_of_the_epoch_and_the_fold(name, way):
    module = CASES[name]
    before = torch.get_rng_state()
    traits = traits_of(module, CONFIGS[0], data())
    assert (traits.unstackable, traits.evaluation_draws, traits.alone) == ("", True, True)
    trained = train(module, **WAYS[way])
    for c, fold in product(range(len(CONFIGS)), range(2)):
        assert abs(trained.curves[c, -1, fold] - plain_score(trained.member(fold, c), fold)) < 1e-10
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("module", [Deciding, HostNoise])
def test_scores_of_what_cannot_be_stacked_have_the_same_draws(module):
    assert traits_of(module, CONFIGS[0], data()).unstackable
    trained = train(module, kind=LoopedModule)
    assert abs(trained.curves[1, -1, 1] - plain_score(trained.member(1, 1), 1)) < 1e-10


@pytest.mark.parametrize("kind", [StackedModule, LoopedModule])
def test_other_members_and_a_resume_change_no_draw(kind):
    whole = train(Variational, kind=kind)
    begun = train(Variational, kind=kind, epochs=1)
    resumed = train(Variational, kind=kind, configs=CONFIGS[1:], begin=begun.state.select([1]))
    np.testing.assert_allclose(resumed.curves[0, 1:], whole.curves[1, 1:], rtol=1e-10)
    # each epoch and fold has draws of its own
    assert len(np.unique(whole.curves)) == whole.curves.size


def search(module, **more):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(80, 5, generator=generator)
    options = {
        "n_trials": 3,
        "max_epochs": 2,
        "cv": 2,
        "verbose": 0,
        "scoring": "neg_log_loss",
        "workers": 1,
    }
    space = {"batch_size": [16], "lr": [1e-2, 1e-3, 1e-4]}
    return X, gputune.tune(module, X, (X.sum(1) > 0).long(), space=space, **{**options, **more})


def test_a_search_and_its_model_are_the_same_in_each_call(tmp_path):
    X, study = search(MonteCarlo)
    again = search(MonteCarlo, keep_predictions=False)[1]
    np.testing.assert_array_equal(again.curves, study.curves)
    assert (search(MonteCarlo, random_state=1)[1].curves != study.curves).all()
    # The members that train again draw what they drew in the search.
    np.testing.assert_allclose(again.oof_predictions(), study.oof_predictions(), rtol=1e-5)
    before = torch.get_rng_state()
    model = study.best_model()
    model.save(tmp_path / "model")
    loaded = gputune.load_model(tmp_path / "model")
    ensembles = [study.ensemble(), study.ensemble()]
    assert all(other.info["draws"] for other in (model, loaded, *ensembles))
    np.testing.assert_array_equal(loaded.predict_proba(X), model.predict_proba(X))
    np.testing.assert_array_equal(ensembles[0].predict_proba(X), ensembles[1].predict_proba(X))
    assert torch.equal(torch.get_rng_state(), before)
    assert "draws" not in search(problems.Linear)[1].best_model().info


def test_an_estimator_predicts_the_same_in_each_call():
    X = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    estimator = gputune.sklearn.NeuralNetClassifier(MonteCarlo, max_epochs=2).fit(
        X, (X[:, 0] > 0).astype(int)
    )
    np.testing.assert_array_equal(estimator.predict_proba(X), estimator.predict_proba(X))


@pytest.mark.long
def test_halving_and_worker_processes_change_no_draw():
    expected = search(Variational, max_epochs=8, n_trials=8)[1]
    halved = search(Variational, max_epochs=8, n_trials=8, method="halving")[1]
    for trial, other in zip(halved.trials, expected.trials):
        epochs = np.isfinite(halved.curves[trial.number, :, 0])
        np.testing.assert_allclose(
            halved.curves[trial.number, epochs], expected.curves[other.number, epochs], rtol=1e-4
        )
    several = search(Variational, max_epochs=8, n_trials=8, workers=2)[1]
    np.testing.assert_allclose(several.curves, expected.curves, rtol=1e-4)
