"""Losses of torch.nn and torch.nn.functional with other arguments, targets or outputs than
gputune's.
"""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import gputune
from gputune.ground.errors import InputWarning
from gputune.scoring.losses import _WITH_WEIGHTS, kind_of, name_of_loss
from gputune.scoring.objective import make_objective
from gputune.sklearn import NeuralNetClassifier, NeuralNetRegressor
from problems import Linear, variant
from refused import refused

ROWS = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
RATES = np.exp(ROWS[:, 0])
COUNTS = np.random.default_rng(1).poisson(RATES)
SIGNS = np.where(ROWS[:, 0] > 0, 1, -1)
OPTIONS = {"n_trials": 1, "max_epochs": 2, "cv": 2, "verbose": 0}
LEARNS = {"max_epochs": 20, "space": {"lr": [0.1]}}


def tune(model, y, **options):
    return gputune.tune(model, ROWS, y, **{**OPTIONS, **options})


def losses_of_torch():
    """Returns the names of the losses of torch.nn and of torch.nn.functional."""
    names = [name for name in vars(nn) if name.endswith("Loss")]
    functions = [name for name in vars(functional) if name.endswith(("_loss", "_div"))]
    return names, functions


def test_each_loss_of_torch_is_known_by_its_class():
    names, functions = losses_of_torch()
    known = {kind_of(getattr(functional, name)) for name in functions}
    known |= {nn.BCELoss, nn.BCEWithLogitsLoss, nn.CrossEntropyLoss}  # functions with other names
    known |= {nn.NLLLoss2d, *_WITH_WEIGHTS}  # a subclass of NLLLoss, and losses without a function
    assert {getattr(nn, name) for name in names} <= known
    assert (
        kind_of(partial(functional.huber_loss, delta=2)) is kind_of(nn.HuberLoss()) is nn.HuberLoss
    )
    assert name_of_loss(functional.huber_loss) == "torch.nn.functional.huber_loss"
    assert name_of_loss(nn.HuberLoss()) == name_of_loss(nn.HuberLoss) == "torch.nn.HuberLoss"


MORE_ARGUMENTS = {
    nn.GaussianNLLLoss: "means, y and variances, .* log variance as two columns",
    nn.CosineEmbeddingLoss: "two embeddings and y",
    nn.MarginRankingLoss: "the scores of two rows and y",
    nn.TripletMarginLoss: "an anchor, a positive and a negative row",
    nn.TripletMarginWithDistanceLoss: "an anchor, a positive and a negative row",
    nn.CTCLoss: "outputs, y and their lengths",
    **dict.fromkeys(_WITH_WEIGHTS, "hidden features and has weights to train"),
}


@pytest.mark.parametrize("loss", MORE_ARGUMENTS)
def test_a_loss_that_takes_more_than_outputs_and_y_is_refused(loss):
    message = f"{loss.__name__} takes {MORE_ARGUMENTS[loss]}.* training_step|scoring='neg_loss'"
    for task in ("binary", "regression", "custom"):
        with refused(message):
            make_objective(loss, None, None, task)
    with refused("gaussian_nll_loss takes means, y and variances, but gputune calls"):
        make_objective(functional.gaussian_nll_loss, None, None, "custom")
    fixed = partial(functional.gaussian_nll_loss, var=torch.ones(()))
    assert make_objective(fixed, None, None, "regression").loss is fixed


def gaussian(outputs, y):
    return functional.gaussian_nll_loss(outputs[:, 0], y, outputs[:, 1].exp(), reduction="none")


def test_the_remedy_for_a_gaussian_likelihood_works():
    study = tune(
        lambda n_features: nn.Linear(n_features, 2),
        RATES,
        loss=gaussian,
        task="custom",
        scoring="neg_loss",
    )
    assert study.best_model().predict(ROWS).shape == (60, 2)


@pytest.mark.parametrize(
    ("loss", "task", "message"),
    [
        (nn.SoftMarginLoss(), "binary", "takes -1 and 1 as y, .* Give loss='bce', which is the s"),
        (functional.soft_margin_loss, "multilabel", "functional.soft_margin_loss .* loss='bce'"),
        (nn.SoftMarginLoss, "multiclass", "passes the positions of the classes, .*'cross_entropy'"),
        (nn.HingeEmbeddingLoss, "binary", "or pass y in that form with task='custom'"),
        (nn.HingeEmbeddingLoss, "multilabel", "a 0 or a 1 for each label. Give loss='bce', or"),
        (
            nn.MultiLabelMarginLoss,
            "binary",
            "the positions of each row's labels as y, but gputune passes",
        ),
        (nn.MultiLabelMarginLoss(), "multilabel", "Give loss='bce', or pass y in that form with"),
        (
            nn.MultiLabelMarginLoss(),
            "regression",
            "passes floats. Instead, pass y in that form with task=",
        ),
        (
            functional.mse_loss,
            "binary",
            "mse_loss is a loss for numbers, but y holds classes. If the values of y are numbers, say task='reg",
        ),
        (
            nn.MSELoss,
            "multilabel",
            "is a loss for numbers, but y holds labels. If the values of y are numbers, say task='regression'",
        ),
        (
            functional.cross_entropy,
            "multilabel",
            "is a loss for one class per row, but y holds labels",
        ),
        (functional.binary_cross_entropy, "binary", "expects probabilities, .* Give loss='bce'"),
        (
            "mse",
            "multiclass",
            "target. Choose 'cross_entropy'. If the values of y are numbers, say task='regression'",
        ),
        (
            "quantile:0.9",
            "binary",
            "Choose 'cross_entropy', 'bce'. If the values of y are numbers, say task='regression'",
        ),
    ],
)
def test_a_loss_of_other_targets_is_refused(loss, task, message):
    with refused(message):
        make_objective(loss, None, None, task)


def test_a_loss_of_signs_takes_signs_as_a_custom_target():
    def accuracy(outputs, y):
        return (outputs.sign()[:, 0] == y).double().mean()

    def margin(outputs, y):
        return functional.soft_margin_loss(outputs[:, 0], y.to(outputs.dtype), reduction="none")

    study = tune(Linear, SIGNS, loss=margin, task="custom", scoring=accuracy, **LEARNS)
    assert study.best_score > 0.8


def test_the_soft_margin_loss_is_the_binary_cross_entropy():
    outputs = torch.linspace(-3, 3, 7)
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 1.0])
    ones = (signs > 0).float()
    torch.testing.assert_close(
        nn.SoftMarginLoss()(outputs, signs), nn.BCEWithLogitsLoss()(outputs, ones)
    )


class OwnMargin(nn.SoftMarginLoss):
    """A loss of the user's, which makes signs of the positions of classes."""

    def forward(self, outputs, y):
        return super().forward(outputs, 2 * y.to(outputs.dtype) - 1)


def test_a_subclass_with_a_forward_of_its_own_is_taken():
    model = variant(Linear, lambda module, x: nn.Linear.forward(module, x)[:, 0])
    study = tune(lambda n_features: model(n_features, 1), SIGNS, loss=OwnMargin(), **LEARNS)
    assert study.best_score > 0.8


POISSON = [
    nn.PoissonNLLLoss,
    nn.PoissonNLLLoss(),
    functional.poisson_nll_loss,
    partial(functional.poisson_nll_loss, full=True),
]


@pytest.mark.parametrize("loss", POISSON)
def test_log_rates_are_not_compared_with_counts(loss):
    words = (
        "poisson_?nll_?loss makes the outputs log rates, and scoring='{}' would compare these "
        r"with y. End the module with exp\(\) and pass .* with log_input=False, or say "
        "scoring='neg_loss'.* predict returns log rates"
    )
    for scoring in (None, "r2", ["neg_loss", "r2"]):
        with refused("(?i)" + words.format("r2")):
            tune(Linear, COUNTS, loss=loss, task="regression", scoring=scoring)


class Rates(Linear):
    def forward(self, x):
        return super().forward(x).exp()


def deviance(outputs, y):
    return -(outputs[:, 0].exp() - y * outputs[:, 0]).mean()


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_rates_are_predicted_and_ranked_by_r2_and_log_rates_where_the_user_says_so(capsys):
    study = tune(Rates, COUNTS, loss=nn.PoissonNLLLoss(log_input=False), task="regression")
    assert study.record.scoring == "r2" and (study.best_model().predict(ROWS) > 0).all()
    found = []
    for scoring in ("neg_loss", deviance):
        study = tune(
            Linear,
            COUNTS,
            loss=nn.PoissonNLLLoss(),
            task="regression",
            scoring=scoring,
            verbose=1,
        )
        said = " ".join(capsys.readouterr().err.split())
        assert "the outputs are log rates, and predict returns them unchanged" in said
        found.append(study.best_score)
    assert found[0] == pytest.approx(found[1])
    space = {"loss__log_input": [False]}
    study = tune(Rates, COUNTS, loss=nn.PoissonNLLLoss, task="regression", space=space)
    assert study.record.scoring == "r2"


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.BCEWithLogitsLoss(), r"outputs logits, .*sigmoid\(\) and pass loss=torch.nn.BCELoss"),
        (nn.MultiLabelSoftMarginLoss(), "makes the outputs logits, and scoring='r2'"),
        (nn.SoftMarginLoss(), "outputs margins, .* y. Say scoring='neg_loss': then the loss ranks"),
        (nn.HingeEmbeddingLoss(), "makes the outputs distances"),
    ],
)
def test_other_outputs_are_not_compared_with_numbers(loss, message):
    with refused(message):
        tune(Linear, SIGNS, loss=loss, task="regression")
    assert tune(Linear, SIGNS, loss=loss, task="regression", scoring="neg_loss").trials


def test_estimators_name_their_own_words():
    with pytest.warns(InputWarning, match="criterion=.*PoissonNLLLoss makes the outputs log rates"):
        NeuralNetRegressor(Linear, criterion=nn.PoissonNLLLoss, max_epochs=1).fit(ROWS, RATES)
    with refused(
        "criterion=torch.nn.MSELoss .* use NeuralNetRegressor. Otherwise choose criterion='cross"
    ):
        NeuralNetClassifier(Linear, criterion=nn.MSELoss).fit(ROWS, SIGNS)
    with refused("criterion=.*GaussianNLLLoss .* in gputune.sklearn.NeuralNet"):
        NeuralNetRegressor(Linear, criterion=nn.GaussianNLLLoss).fit(ROWS, RATES)
