"""Losses and training steps of the user: shapes that broadcast, dtypes that differ, and
probabilities."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import gputune
from gputune.ground.errors import InputWarning
from gputune.sklearn import NeuralNetClassifier, NeuralNetRegressor
from refused import refused

ROWS = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
NUMBERS = ROWS @ np.array([1.0, 2.0, 3.0])
CLASSES = (ROWS[:, 0] > 0).astype(int)
OPTIONS = {"n_trials": 1, "max_epochs": 1, "cv": 2, "verbose": 0}


def tune(model, y, **options):
    return gputune.tune(model, ROWS, y, **{**OPTIONS, **options})


class Net(nn.Module):
    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.layer = nn.Linear(n_features, n_outputs)

    def forward(self, x):
        return self.layer(x)


class Flat(Net):
    """Returns one number a row, without an axis for it."""

    def forward(self, x):
        return super().forward(x)[:, 0]


class LogProbabilities(Net):
    def forward(self, x):
        return super().forward(x).log_softmax(1)


class Probabilities(Net):
    def forward(self, x):
        return super().forward(x).softmax(1)


def step(loss):
    def training_step(module, batch):
        x, y = batch
        return loss(module(x), y)

    return training_step


COLUMN_WORDS = (
    r"shape \(30, 1\) and y has shape \(30,\), which PyTorch broadcasts to \(30, 30\). "
    r"Take outputs\[:, 0\] or y\[:, None\]"
)
ROW_WORDS = (
    r"shape \(30,\) and y has shape \(30, 1\), .* Take outputs\[:, None\] or y\[:, 0\] in the {place}, "
    "or pass y of shape"
)
PAIRED = {
    "difference": lambda outputs, y: (outputs - y).square().mean(),
    "a target that is computed": lambda outputs, y: (2 * y.float() - outputs).abs().mean(),
    "a loss of torch": functional.mse_loss,
    "a module of torch": nn.SmoothL1Loss(),
    "where": lambda outputs, y: torch.where(y > 0, outputs, -outputs).mean(),
    "broadcast_tensors": lambda outputs, y: (
        torch.stack(torch.broadcast_tensors(outputs, y)).var(0).mean()
    ),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("kind", PAIRED)
def test_a_training_step_that_pairs_all_rows_is_refused(kind):
    loss = PAIRED[kind]
    with refused(
        f"^training_step=.* compares each output with the targets of all rows.*{COLUMN_WORDS}"
    ):
        tune(Net, NUMBERS, training_step=step(loss))
    with refused(ROW_WORDS.format(place="training_step")):
        tune(Flat, NUMBERS[:, None], training_step=step(loss))


def test_losses_and_estimators_that_pair_all_rows_are_refused():
    loss = PAIRED["difference"]
    with refused(COLUMN_WORDS):
        tune(Net, NUMBERS, loss=loss)
    with refused(ROW_WORDS.format(place="loss")):
        tune(Flat, NUMBERS[:, None], loss=loss)
    with refused("compares each output with the targets of all rows"):
        NeuralNetRegressor(Net, training_step=step(loss)).fit(ROWS, NUMBERS)


def centres(module, batch):
    """Compares each output with as many centres as there are rows: by chance, since there are 30 of
    them."""
    x, y = batch
    outputs = module(x)
    distances = (outputs - torch.linspace(-1, 1, 30, device=x.device)).square()
    return (outputs[:, 0] - y).square() + 0 * distances.mean(1)


def ranking(module, batch):
    """Compares each pair of rows, as losses for rankings do."""
    x, y = batch
    outputs = module(x)
    is_higher = y[:, None] > y
    return functional.softplus((outputs.T - outputs)[is_higher]).mean()


@pytest.mark.parametrize(
    "training_step", [centres, ranking, step(lambda o, y: (o - y[:, None]).square().mean())]
)
def test_a_training_step_that_compares_rows_on_purpose_is_taken(training_step):
    assert np.isfinite(tune(Net, NUMBERS, training_step=training_step).best_score)


WEIGHTS = torch.tensor([1.0, 3.0])


BACKENDS = ["auto", pytest.param("eager", marks=pytest.mark.long)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_class_weights_of_a_loss_follow_the_dtype(dtype, backend):
    scores = []
    for weights in (WEIGHTS, WEIGHTS.double()):
        loss = nn.CrossEntropyLoss(weight=weights)
        study = tune(
            Net, CLASSES, loss=loss, dtype=dtype, scoring="neg_loss", max_epochs=3, backend=backend
        )
        scores.append(study.curves)
        assert loss.weight.dtype == weights.dtype and study.best_model().dtype == getattr(
            torch, dtype
        )
    np.testing.assert_array_equal(*scores)
    labels = np.stack([CLASSES, CLASSES & (ROWS[:, 1] > 0)], 1)
    study = tune(Net, labels, loss=nn.BCEWithLogitsLoss(pos_weight=WEIGHTS.double()), dtype=dtype)
    assert np.isfinite(study.best_score)


@pytest.mark.cpu  # a GPU trains tables in single precision
def test_the_class_weights_of_an_estimators_criterion_follow_the_dtype_of_the_rows():
    for weights in (WEIGHTS, WEIGHTS.double()):
        criterion = nn.CrossEntropyLoss(weight=weights)
        estimator = NeuralNetClassifier(Net, criterion=criterion, max_epochs=1)
        assert (
            estimator.fit(ROWS.astype(np.float64), CLASSES).module_.layer.weight.dtype
            == torch.float64
        )
        assert estimator.fit(ROWS, CLASSES).module_.layer.weight.dtype == torch.float32


class DoublePart(nn.Module):
    """Computes a part in double precision, in a dtype that the forward fixes."""

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.first = nn.Linear(n_features, 4).double()
        self.last = nn.Linear(4, n_outputs)

    def forward(self, x):
        return self.last(self.first(x.double()).float())


class DoubleBuffer(Net):
    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)
        self.register_buffer("scale", torch.ones(n_features, n_features, dtype=torch.float64))

    def forward(self, x):
        return super().forward((x.double() @ self.scale).float())


class Following(DoublePart):
    """The remedy that the error names."""

    def forward(self, x):
        hidden = self.first(x.to(self.first.weight.dtype))
        return self.last(hidden.to(self.last.weight.dtype))


def test_a_part_in_another_precision_is_explained_and_the_remedy_works():
    words = (
        r"float32, also 'first.weight', which was created as torch.float64. "
        r".* x.to\(self.first.weight.dtype\)"
    )
    with refused(words):
        tune(DoublePart, CLASSES)
    with refused(r"also 'scale', which was created as torch.float64. .* x.to\(self.scale.dtype\)"):
        tune(DoubleBuffer, CLASSES)
    for dtype in ("float32", "float64"):
        assert tune(
            Following, CLASSES, dtype=dtype
        ).best_model().module.first.weight.dtype == getattr(torch, dtype)


LIKELIHOODS = [
    pytest.param(nn.NLLLoss, marks=pytest.mark.long),
    nn.NLLLoss(),
    functional.nll_loss,
]


@pytest.mark.parametrize("loss", LIKELIHOODS)
def test_the_negative_log_likelihood_takes_only_log_probabilities(loss):
    ending = (
        r"takes the logarithms of probabilities. Pass loss=torch.nn.CrossEntropyLoss{}, "
        r"or end .* in log_softmax\(1\)"
    )
    with refused("Net returns logits, .*" + ending.format("")):
        tune(Net, CLASSES, loss=loss)
    with refused(
        "Probabilities returns probabilities, .*"
        + ending.format(", without the softmax at its end")
    ):
        tune(Probabilities, CLASSES, loss=loss)
    expected = tune(Net, CLASSES, max_epochs=3).best_model().predict_proba(ROWS)
    found = (
        tune(LogProbabilities, CLASSES, loss=loss, max_epochs=3).best_model().predict_proba(ROWS)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # An estimator takes the logarithms itself, as skorch does.
    options = {"criterion": loss, "max_epochs": 3, "random_state": 0}
    nets = [NeuralNetClassifier(m, **options) for m in (Probabilities, LogProbabilities)]
    found, expected = (net.fit(ROWS, CLASSES).predict(ROWS) for net in nets)
    assert (found == expected).all()


@pytest.mark.parametrize(
    "loss", [None, nn.CrossEntropyLoss, nn.CrossEntropyLoss(), functional.cross_entropy]
)
def test_probabilities_under_a_cross_entropy_are_said(loss):
    with pytest.warns(
        InputWarning, match="returns probabilities, .*Leave out the softmax at its end"
    ):
        tune(Probabilities, CLASSES, loss=loss)


@pytest.mark.parametrize(
    "loss",
    [
        lambda outputs, y: (outputs - y).diagonal().square(),
        lambda outputs, y: torch.diag((outputs - y).square()).mean(),
        lambda outputs, y: (outputs - y).square().trace() / len(y),
    ],
)
def test_a_loss_that_takes_the_diagonal_of_all_pairs_is_taken(loss):
    expected = tune(Net, NUMBERS, loss=lambda outputs, y: (outputs[:, 0] - y).square())
    for arguments in ({"loss": loss}, {"training_step": step(loss)}):
        assert tune(Net, NUMBERS, **arguments).best_score == pytest.approx(expected.best_score)


def focal(outputs, y):
    log_p = outputs.log_softmax(1)
    return functional.nll_loss((1 - log_p.exp()) ** 2 * log_p, y)


def policy_gradient(outputs, y):
    gain = torch.where(torch.arange(len(y), device=y.device) % 2 == 0, 1.0, -0.1)
    return functional.nll_loss(outputs.log_softmax(1) * gain[:, None], y)


@pytest.mark.parametrize("place", ["loss", "training_step"])
def test_a_likelihood_of_other_numbers_than_log_probabilities_is_refused(place):
    def in_place(loss):
        return {place: step(loss) if place == "training_step" else loss}

    criterion = nn.NLLLoss()
    for loss in (
        lambda outputs, y: functional.nll_loss(outputs, y),
        lambda outputs, y: criterion(outputs, y),
    ):
        with refused(
            "passes logits to torch.nn.functional.nll_loss, which takes the logarithms of "
            r"probabilities. Use torch.nn.functional.cross_entropy there, or take log_softmax\(1\)"
        ):
            tune(Net, CLASSES, **in_place(loss))
    with refused("passes probabilities to .*nll_loss, .* there, without the softmax before it"):
        tune(Probabilities, CLASSES, **in_place(lambda o, y: functional.nll_loss(o, y)))
    for loss in (focal, policy_gradient, lambda o, y: functional.nll_loss(o.log_softmax(1), y)):
        assert tune(Net, CLASSES, **in_place(loss)).trials


def test_several_outputs_for_one_number_are_told_the_custom_target():
    def quantiles(outputs, y):
        levels = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], device=y.device)
        gap = y[:, None] - outputs
        return torch.maximum(levels * gap, (levels - 1) * gap).mean(1)

    def five(n_features):
        return nn.Linear(n_features, 5)

    with refused(
        r"got \(30, 5\) .* With task='custom' and scoring=callable\(outputs, y\), the module of a custom loss"
    ):
        tune(five, NUMBERS, loss=quantiles)
    study = tune(five, NUMBERS, loss=quantiles, task="custom", scoring="neg_loss")
    assert study.best_model().predict(ROWS).shape == (60, 5)


class Scaled(nn.Module):
    """A loss with a parameter, the logarithm of a temperature."""

    def __init__(self, trained=True):
        super().__init__()
        self.log_t = nn.Parameter(torch.zeros(()), requires_grad=trained)

    def forward(self, outputs, y):
        return functional.cross_entropy(outputs / self.log_t.exp(), y)


@pytest.mark.parametrize("loss", [Scaled(), Scaled])
def test_a_loss_with_a_trained_parameter_is_refused(loss):
    with refused("has the parameter 'log_t', but gputune trains only the parameters of the module"):
        tune(Net, CLASSES, loss=loss)


def test_a_loss_with_a_fixed_parameter_is_taken():
    tune(Net, CLASSES, loss=Scaled(trained=False))


class RunningLoss(nn.Module):
    """A loss that scales outputs by their running mean."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(2))

    def forward(self, outputs, y):
        self.mean = 0.9 * self.mean + 0.1 * outputs.detach().abs().mean(0)
        return functional.cross_entropy(outputs / self.mean, y)


class CountingLoss:
    """A loss that changes after five calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, outputs, y):
        self.calls += 1
        return functional.cross_entropy(outputs, y) * (1 if self.calls < 5 else 2)


@pytest.mark.parametrize("backend", ["auto", "loop"])
@pytest.mark.parametrize(("build", "name"), [(RunningLoss, "mean"), (CountingLoss, "calls")])
def test_a_loss_that_keeps_state_is_refused(build, name, backend):
    loss = build()
    with refused(f"{build.__name__} keeps state in '{name}', which all trials and folds would"):
        tune(Net, CLASSES, loss=loss, backend=backend)
    assert type(getattr(loss, name)) in (torch.Tensor, int)


class CachingLoss:
    """A loss that makes its class weights at the first call."""

    def __init__(self):
        self.weight = None

    def __call__(self, outputs, y):
        if self.weight is None:
            self.weight = torch.ones(outputs.shape[-1])
        return functional.cross_entropy(outputs, y, weight=self.weight)


@pytest.mark.parametrize("backend", ["auto", "loop"])
def test_a_loss_that_caches_a_value_is_taken(backend):
    cached = tune(Net, CLASSES, loss=CachingLoss(), backend=backend)
    plain = tune(Net, CLASSES, loss=functional.cross_entropy, backend=backend)
    assert np.array_equal(cached.curves, plain.curves)
