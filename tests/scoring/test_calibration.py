"""The temperature is scikit-learn's, and the one of a fine grid."""

import numpy as np
import pytest
import sklearn
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.utils.fixes import parse_version
from torch.nn import functional

from gputune.scoring.losses import best_temperature

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("factor", [0.2, 1.0, 7.0])
@pytest.mark.parametrize("classes", [2, 4])
def test_no_temperature_of_a_grid_has_a_smaller_loss(classes, factor):
    logits = torch.tensor(RNG.normal(size=(400, classes)))
    target = torch.tensor([RNG.choice(classes, p=p) for p in logits.softmax(1).numpy()])
    found = best_temperature(factor * logits, target)
    grid = factor * torch.logspace(-1, 1, 400).double()
    losses = [float(functional.cross_entropy(factor * logits / t, target)) for t in (found, *grid.tolist())]
    assert losses[0] <= min(losses[1:]) + 1e-12 and 0.6 < found / factor < 1.6


@pytest.mark.skipif(parse_version(sklearn.__version__) < parse_version("1.8"), reason="scikit-learn has none")
def test_it_is_that_of_scikit_learn():
    y = RNG.integers(0, 3, 300)
    X = np.eye(3)[y] + RNG.normal(size=(300, 3))
    model = LogisticRegression(C=1e3).fit(X[:60], y[:60])
    theirs = CalibratedClassifierCV(FrozenEstimator(model), method="temperature", cv=2, ensemble=False).fit(X, y)
    logits = torch.tensor(model.decision_function(X))
    found = best_temperature(logits, torch.tensor(y))
    np.testing.assert_allclose((logits / found).softmax(1), theirs.predict_proba(X), atol=1e-5)
    # Where every row is right the loss would fall for ever.
    assert best_temperature(torch.eye(3).double(), torch.arange(3)) == 1
