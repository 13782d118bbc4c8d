"""Modules that override ``train()``, as the idiom that freezes batch norms does."""

import pytest
import torch
from torch import nn

import gputune

ROWS = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
CLASSES = (ROWS[:, 0] > 0).long()


class FrozenNorm(nn.Module):
    """Keeps its batch norm in evaluation mode. Its ``train`` returns nothing."""

    def __init__(self, n_features=6, n_outputs=2):
        super().__init__()
        self.first = nn.Linear(n_features, 8)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, n_outputs)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))))


@pytest.mark.parametrize("backend", ["auto", "loop"])
def test_a_module_whose_train_returns_nothing_trains(backend, tmp_path):
    result = gputune.tune(
        FrozenNorm, ROWS, CLASSES, n_trials=2, max_epochs=2, cv=2, verbose=0, backend=backend
    )
    model = result.best_model()
    assert int(model.module.norm.num_batches_tracked) == 0
    assert not model.module.training
    outputs = model.predict(ROWS)
    model.save(tmp_path / "model")
    loaded = gputune.load_model(tmp_path / "model")
    assert (loaded.predict(ROWS) == outputs).all()


def test_a_frozen_body_whose_train_returns_nothing_trains():
    body = FrozenNorm(6, 5)
    model = gputune.frozen(body)
    result = gputune.tune(model, ROWS, CLASSES, n_trials=1, max_epochs=1, cv=2, verbose=0)
    assert result.best_score is not None
