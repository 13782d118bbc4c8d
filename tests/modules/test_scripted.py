"""Modules that TorchScript made, from the search to the predictions, the file and the export."""

import numpy as np
import pytest
import torch
from torch import nn

import gputune
from gputune.sklearn import NeuralNetClassifier
from refused import refused

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")

ROWS = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
CLASSES = (ROWS[:, 0] > 0).astype(int)


def plain(n_features, n_outputs):
    return nn.Sequential(nn.Linear(n_features, 4), nn.ReLU(), nn.Linear(4, n_outputs))


def scripted(n_features, n_outputs):
    return torch.jit.script(plain(n_features, n_outputs))


def traced(n_features, n_outputs):
    return torch.jit.trace(plain(n_features, n_outputs), torch.zeros(2, n_features))


class ScriptedPart(nn.Module):
    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.part = scripted(n_features, n_outputs)

    def forward(self, x):
        return self.part(x)


def tuned(module):
    return gputune.tune(module, ROWS, CLASSES, n_trials=2, max_epochs=4, cv=2, verbose=0)


LONG = [pytest.param(module, marks=pytest.mark.long) for module in (traced, ScriptedPart)]


@pytest.mark.parametrize("module", [scripted, *LONG])
def test_a_scripted_module_trains_and_predicts_as_the_plain_one(module, tmp_path):
    study = tuned(module)
    expected = tuned(plain)
    np.testing.assert_allclose(study.curves, expected.curves, atol=1e-6)
    model = study.best_model()
    # TorchScript replaces its code after the second call, with code that autograd takes part in.
    probabilities = [model.predict_proba(ROWS) for _ in range(4)]
    plain_probabilities = expected.best_model().predict_proba(ROWS)
    for found in probabilities:
        np.testing.assert_allclose(found, plain_probabilities, atol=1e-6)
    model.save(tmp_path / "model")
    loaded = gputune.load_model(tmp_path / "model", module=module)
    np.testing.assert_array_equal(loaded.predict_proba(ROWS), probabilities[0])


def test_an_ensemble_of_scripted_modules_predicts_again_and_again():
    study = tuned(scripted)
    model = study.ensemble(size=2, candidates=2, verbose=0)
    found = [model.predict_proba(ROWS) for _ in range(4)]
    assert all((one == found[0]).all() for one in found) and len(study.oof_predictions()) == len(
        ROWS
    )


def test_an_estimator_of_a_scripted_module_predicts_again_and_again():
    estimator = NeuralNetClassifier(scripted, max_epochs=4, random_state=0).fit(ROWS, CLASSES)
    found = [estimator.predict_proba(ROWS) for _ in range(4)]
    assert all((one == found[0]).all() for one in found)


class Keeping(nn.Module):
    """Keeps a table that it makes at the first call, as rotary embeddings do."""

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.layer = nn.Linear(n_features, n_outputs)
        self.table = None

    def forward(self, x):
        outputs = self.layer(x)
        if self.table is None:
            self.table = torch.ones_like(outputs[:1])
        return outputs * self.table


def test_a_module_that_has_predicted_can_be_trained_on():
    model = tuned(Keeping).best_model()
    model.predict(ROWS)
    model.module.train()(torch.from_numpy(ROWS)).sum().backward()
    assert model.module.layer.weight.grad.any()


@pytest.mark.parametrize("module", [scripted, LONG[1]])
def test_the_export_of_a_scripted_module_says_what_to_do(module, tmp_path):
    model = tuned(module).best_model()
    with refused(
        "cannot be exported: it has a part that TorchScript compiled.* Leave out torch.jit"
    ):
        model.export(tmp_path / "model.pt2")
