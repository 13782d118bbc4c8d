"""A target of class probabilities is scored by the loss that compares them with the module's
outputs."""

import numpy as np
import pytest
import torch
from torch import nn

import gputune
from gputune.ground.errors import InputError

RNG = np.random.default_rng(0)
X = torch.from_numpy(RNG.normal(size=(60, 3)).astype("float32"))
SOFT = torch.from_numpy(RNG.dirichlet([1.0, 1.0, 1.0], size=60).astype("float32"))
CV = [(np.arange(40), np.arange(40, 60))]
HOW = {"n_trials": 2, "max_epochs": 2, "cv": CV, "verbose": 0}


class LogSoftmax(nn.Module):
    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.last = nn.Linear(n_features, n_outputs)

    def forward(self, x):
        return self.last(x).log_softmax(1)


@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss, nn.CrossEntropyLoss(), nn.functional.cross_entropy]
)
def test_they_are_scored_by_the_log_loss_against_them(loss):
    study = gputune.tune(gputune.models.MLP, X, SOFT, loss=loss, **HOW)
    assert study.record.scoring == "neg_loss" and any(
        "ranked by the loss" in note for note in study.record.notes
    )
    outputs = torch.from_numpy(study.oof_predictions()[40:])
    expected = (SOFT[40:] * outputs.log_softmax(1)).sum(1).mean()
    assert study.best_score == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.filterwarnings("ignore:reduction")
def test_the_kullback_leibler_loss_ranks_too():
    study = gputune.tune(LogSoftmax, X, SOFT, loss=nn.KLDivLoss(reduction="batchmean"), **HOW)
    assert study.record.scoring == "neg_loss" and study.best_score < 0


def test_scores_of_numbers_are_refused_and_other_targets_stay():
    with pytest.raises(
        InputError, match="would compare the module's logits with the probabilities in y. Leave"
    ):
        gputune.tune(gputune.models.MLP, X, SOFT, loss=nn.CrossEntropyLoss, scoring="r2", **HOW)
    own = gputune.tune(
        gputune.models.MLP, X, SOFT, loss=nn.CrossEntropyLoss, scoring=lambda outputs, y: 0.5, **HOW
    )
    assert own.best_score == 0.5
    assert gputune.tune(gputune.models.MLP, X, SOFT, **HOW).record.scoring == "r2"


@pytest.mark.parametrize("loss", [nn.KLDivLoss, nn.functional.kl_div])
@pytest.mark.filterwarnings("ignore:reduction")
def test_the_divergence_of_logits_is_refused(loss):
    """It has no lower bound: training would only make the logits larger."""
    message = (
        "returns logits, but .* takes the logarithms of probabilities. Pass "
        "loss=torch.nn.CrossEntropyLoss"
    )
    with pytest.raises(InputError, match=message):
        gputune.tune(gputune.models.MLP, X, SOFT, loss=loss, **HOW)
