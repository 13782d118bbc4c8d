"""Losses and targets of the user's own, from tune() to predictions; members equal a plain loop."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    brier_score_loss,
    f1_score,
    get_scorer,
    log_loss,
    r2_score,
    roc_auc_score,
)
from torch import nn
from torch.nn import functional

import gputune
from gputune.ground.seeding import stream, stream_seed
from gputune.population.outputs import first_output
from gputune.sklearn import NeuralNetClassifier, NeuralNetRegressor
from refused import refused

G = torch.Generator().manual_seed(0)
X = torch.randn(60, 5, generator=G)
SEVERAL = torch.stack([X[:, 0] * 3 + 7, X[:, 1] - X[:, 2]], 1) + 0.1 * torch.randn(
    60, 2, generator=G
)
LABELS = (SEVERAL.mean(0) < SEVERAL).long()
LABELS = torch.cat([LABELS, (X[:, 3:4] > 0.3).long()], 1)
CUT = [(np.arange(20, 60), np.arange(20))]
ONE = {
    "space": {"lr": [0.01], "batch_size": [16]},
    "n_trials": 1,
    "cv": CUT,
    "max_epochs": 3,
    "verbose": 0,
    "workers": 1,
    "numbers": "none",
    "dtype": "float64",
    "epoch": "last",
}


class Net(nn.Module):
    def __init__(self, n_features, n_outputs, hidden=8):
        super().__init__()
        self.first = nn.Linear(n_features, hidden)
        self.last = nn.Linear(hidden, n_outputs)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


class Heads(Net):
    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return self.last(hidden), hidden


class Single(Net):
    def forward(self, x):
        return super().forward(x)[:, 0]


def plain_loop(build, y, loss, *, augment=lambda x, step: x):
    """Train ``build()``, or a Net with the given outputs, on rows 20 to 59 by a plain loop."""
    with torch.random.fork_rng():
        torch.manual_seed(stream_seed(0, "module"))
        module = (Net(5, build) if isinstance(build, int) else build()).double()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    x = X[20:].double()
    y = y[20:]
    for epoch in range(3):
        order = torch.randperm(40, generator=stream(0, "rows", 40, epoch))
        for step, batch in enumerate(order.split(16)):
            optimizer.zero_grad()
            loss(module(augment(x[batch], (epoch, step))), y[batch]).backward()
            optimizer.step()
    return module.eval()


@torch.no_grad()
def outputs_of(module):
    return module(X[:20].double())


def score(y, **options):
    return gputune.tune(options.pop("model", Net), X, y, **{**ONE, **options}).trials[0].score


def test_several_numbers_are_each_standardised_and_scored_as_scikit_learn_does():
    names = ["r2", "neg_root_mean_squared_error", "neg_median_absolute_error", "explained_variance"]
    study = gputune.tune(Net, X, SEVERAL, scoring=names, **ONE)
    train = SEVERAL[20:].double()
    center = train.mean(0)
    scale = train.std(0, correction=0)
    module = plain_loop(2, (SEVERAL.double() - center) / scale, functional.mse_loss)
    predicted = (outputs_of(module) * scale + center).numpy()
    for name in names:
        metric = get_scorer(name)
        expected = metric._sign * metric._score_func(SEVERAL[:20].numpy(), predicted)
        assert study.trials[0].scores[name] == pytest.approx(expected, abs=1e-6)
    assert study.trials[0].score == pytest.approx(r2_score(SEVERAL[:20], predicted), abs=1e-8)
    assert study.best_model().predict(X).shape == (60, 2)


def test_several_labels_are_scored_and_their_model_is_saved(tmp_path):
    loss = functional.binary_cross_entropy_with_logits
    logits = outputs_of(plain_loop(3, LABELS.double(), loss))
    y = LABELS[:20].numpy()
    guess = (logits > 0).numpy()
    expected = {
        "accuracy": accuracy_score(y, guess),
        "f1_samples": f1_score(y, guess, average="samples", zero_division=0),
        "f1_macro": f1_score(y, guess, average="macro"),
        "roc_auc": roc_auc_score(y, logits.sigmoid().numpy()),
    }
    study = gputune.tune(Net, X, LABELS, scoring=list(expected), **ONE)
    assert study.trials[0].scores == pytest.approx(expected)
    assert 0 < score(LABELS[:, :2], scoring="roc_auc") < 1
    model = study.best_model()
    model.save(tmp_path / "model")
    again = gputune.load_model(tmp_path / "model", module=Net)
    assert set(np.unique(again.predict(X))) <= {0, 1} and again.predict_proba(X).shape == (60, 3)
    np.testing.assert_array_equal(again.predict(X), model.predict(X))


class OneLogit(nn.Module):
    """The usual module for two classes: one output, (n, 1) or ``flat`` (n,)."""

    def __init__(self, n_features, flat=False):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(n_features, 8), nn.Tanh(), nn.Linear(8, 1))
        self.flat = flat

    def forward(self, x):
        return self.body(x)[:, 0] if self.flat else self.body(x)


TWO = np.where(X[:, 0] > 0.2, "yes", "no")
IS_YES = torch.as_tensor(TWO == "yes").double()
FLAT = partial(OneLogit, flat=True)


def own_bce(outputs, y):
    return functional.binary_cross_entropy_with_logits(
        outputs.flatten(), y.double(), reduction="none"
    )


@pytest.fixture(scope="module")
def one_logit():
    """The probability of "yes" for each row, of a plain loop."""
    module = plain_loop(partial(OneLogit, 5), IS_YES, lambda outputs, y: own_bce(outputs, y).mean())
    return module(X.double()).sigmoid().detach().numpy()[:, 0]


@pytest.mark.parametrize("model", [OneLogit, FLAT], ids=["column", "flat"])
@pytest.mark.parametrize(
    ("backend", "loss"),
    [
        ("loop", None),
        ("recorded", None),
        ("recorded", "bce"),
        ("eager", nn.BCEWithLogitsLoss()),
        ("recorded", own_bce),
    ],
    ids=["loop", "none", "bce", "torch", "own"],
)
def test_one_logit_of_two_classes_is_what_a_plain_loop_makes(model, backend, loss, one_logit):
    study = gputune.tune(
        model, X, TWO, scoring="neg_log_loss", loss=loss, **ONE | {"backend": backend}
    )
    assert study.best_score == pytest.approx(-log_loss(TWO[:20], one_logit[:20]), abs=1e-8)
    if loss is None:
        best = study.best_model()
        assert best.predict_proba(X).shape == (60, 2) and set(best.predict(X)) <= {"yes", "no"}


def test_scores_of_one_logit(one_logit):
    p = one_logit[:20]
    y = TWO[:20]
    guess = np.where(p > 0.5, "yes", "no")
    scorers = {name: name for name in ("accuracy", "roc_auc", "f1", "neg_brier_score")}
    scorers["own"] = lambda estimator, X, y: estimator.predict_proba(X)[:, 1].mean()
    scorers["outputs"] = lambda outputs, y: float(outputs[:, 0].sum())
    expected = {
        "accuracy": accuracy_score(y, guess),
        "roc_auc": roc_auc_score(y, p),
        "f1": f1_score(y, guess, pos_label="yes"),
        "neg_brier_score": -brier_score_loss(y, p, pos_label="yes"),
        "own": p.mean(),
        "outputs": float(torch.logit(torch.tensor(p)).sum()),
    }
    study = gputune.tune(FLAT, X, TWO, scoring=scorers, positive="yes", **ONE)
    assert study.trials[0].scores == pytest.approx(expected, abs=1e-8)


def test_a_loss_that_is_chosen_by_its_one_logit_is_said_and_kept(tmp_path, capsys):
    options = {**ONE, "verbose": 1, "study": tmp_path / "study.db"}
    study = gputune.tune(OneLogit, X, TWO, **options)
    said = (
        "OneLogit is trained on the loss bce: its one logit per row is for y = 'yes' against 'no'"
    )
    assert said in capsys.readouterr().err and said in study.record.notes
    assert study.record.objective == "bce"
    gputune.tune(OneLogit, X, TWO, **options)
    again = gputune.Study.open(tmp_path / "study.db").best_model(X, TWO, trust_code=True)
    np.testing.assert_array_equal(again.predict(X), study.best_model().predict(X))
    again.save(tmp_path / "model")
    loaded = gputune.load_model(tmp_path / "model", module=OneLogit)
    np.testing.assert_array_equal(loaded.predict_proba(X), again.predict_proba(X))
    assert "bce" in str(loaded.info["loss"])


@pytest.mark.parametrize("model", [OneLogit, FLAT], ids=["column", "flat"])
def test_one_logit_is_exported_as_two_classes(model, tmp_path):
    tuned = gputune.tune(model, X, TWO, **ONE).best_model()
    tuned.export(tmp_path / "model.pt2")
    label, p = torch.export.load(tmp_path / "model.pt2").module()(X[:7].double())
    np.testing.assert_allclose(p.detach(), tuned.predict_proba(X[:7]), atol=1e-6)
    np.testing.assert_array_equal(tuned.classes[label], tuned.predict(X[:7]))


@pytest.mark.filterwarnings("ignore:.* train without rows of a class")
def test_a_class_without_training_rows_does_not_stop_one_logit():
    cut = [(20 + np.flatnonzero(TWO[20:] == "yes"), np.arange(20))]
    assert score(TWO, model=OneLogit, cv=cut, scoring="neg_log_loss") < 0
    assert score(TWO, model=OneLogit, cv=cut, scoring="neg_log_loss", loss=own_bce) < 0


class Sigmoid(OneLogit):
    def forward(self, x):
        return super().forward(x).sigmoid()[:, 0]


class Softmax(Net):
    def forward(self, x):
        return super().forward(x).softmax(1)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Sigmoid, "but the cross-entropy takes logits. Leave out the sigmoid"),
        (Softmax, "Softmax returns probabilities, but the cross-entropy takes logits"),
    ],
)
def test_probabilities_before_the_cross_entropy_are_said(model, words):
    with pytest.warns(gputune.InputWarning, match=words):
        gputune.tune(model, X, TWO, **ONE)


def pinball(outputs, y, q=0.5):
    gap = y - outputs[:, 0]
    return torch.maximum(q * gap, (q - 1) * gap)


def poisson(outputs, y):
    return torch.exp(outputs[:, 0]) - y * outputs[:, 0]


def mean_poisson(outputs, y):
    return poisson(outputs, y).mean()


def distance(outputs, y):
    return (outputs - y).abs().sum(1)


def weighed_poisson(outputs, y):
    return (poisson(outputs, y[:, 0]) * y[:, 1]).sum() / y[:, 1].sum()


def weighed_bce(outputs, y):
    return (own_bce(outputs, y) * (1 + 2 * y)).sum() / (1 + 2 * y).sum()


def total(outputs, y):
    return float(outputs.sum())


COUNTS = torch.poisson(torch.exp(0.5 * X[:, 0]), generator=G)
WEIGHTS = torch.rand(60, generator=G).double()
CODES = (X[:, :2] > 0).sum(1)
UNSEEN = CODES.masked_fill(X[:, 2] > 0, -100)
HIGH = (X[:, 0] * 3 + 7).double()
FIXED = {"space": {**ONE["space"], "loss__q": 0.9}, "scoring": "neg_loss"}
THREE = partial(Net, n_outputs=3)
LEAVES_0 = nn.CrossEntropyLoss(ignore_index=0)
NUMBERS = {"task": "regression", "scoring": total}


@pytest.mark.parametrize(
    ("y", "options", "build", "targets", "loss"),
    [
        (COUNTS, {**NUMBERS, "loss": poisson}, 1, COUNTS, mean_poisson),
        (COUNTS, {**NUMBERS, "loss": mean_poisson}, 1, COUNTS, mean_poisson),
        (COUNTS, {**NUMBERS, "loss": nn.PoissonNLLLoss, "model": Single}, 1, COUNTS, mean_poisson),
        (
            COUNTS,
            {**NUMBERS, "loss": poisson, "sample_weight": WEIGHTS},
            1,
            torch.stack([COUNTS, WEIGHTS], 1),
            weighed_poisson,
        ),
        (
            TWO,
            {"model": OneLogit, "class_weight": {"yes": 3.0}, "scoring": total},
            partial(OneLogit, 5),
            IS_YES,
            weighed_bce,
        ),
        (X, {"task": "custom", "loss": distance}, 5, X, lambda o, y: distance(o, y).mean()),
        # Rows that a loss ignores are not in its mean.
        (CODES, {"model": THREE, "loss": LEAVES_0, "scoring": "neg_loss"}, 3, CODES, LEAVES_0),
        (
            UNSEEN,
            {"model": THREE, "loss": nn.CrossEntropyLoss(), "task": "custom"},
            3,
            UNSEEN,
            nn.CrossEntropyLoss(),
        ),
        # The value of a loss that the space fixes.
        (HIGH, {**FIXED, "loss": pinball}, 1, HIGH, lambda o, y: pinball(o, y, 0.9).mean()),
        (
            HIGH,
            {**FIXED, "loss": "quantile"},
            1,
            (HIGH - HIGH[20:].mean()) / HIGH[20:].std(correction=0),
            lambda o, y: pinball(o, y, 0.9).mean(),
        ),
    ],
    ids="rows mean class row-weights class-weights custom ignored ignored-in-custom fixed "
    "fixed-by-name".split(),
)
def test_a_custom_loss_trains_and_scores_as_a_plain_loop(y, options, build, targets, loss):
    targets = targets.double() if targets.is_floating_point() else targets
    outputs = outputs_of(plain_loop(build, targets, loss))
    expected = (
        total(outputs, None)
        if options.get("scoring") is total
        else -float(loss(outputs, targets[:20]))
    )
    assert score(y, **options) == pytest.approx(expected, rel=1e-8)


def test_too_few_outputs_for_two_numbers_are_not_taken_for_logits():
    with pytest.raises(
        gputune.InputError, match=r"must return a tensor of shape \(rows, 2\)"
    ) as raised:
        gputune.tune(partial(Net, n_outputs=1), X, SEVERAL, **ONE)
    assert "two classes" not in str(raised.value)


def needed(outputs, y, power):
    return powered(outputs, y, power)


def test_losses_of_several_values_are_ranked_by_the_default(capsys):
    space = {**ONE["space"], "loss__q": [0.1, 0.9]}
    how = {**ONE, "space": space, "n_trials": 2, "scoring": "neg_loss", "verbose": 1}
    study = gputune.tune(Net, X, X[:, 0], loss=pinball, **how)
    assert (
        "neg_loss scores each trial by the loss with loss__q=0.5, the default"
        in capsys.readouterr().err
    )
    for trial in study.trials:
        module = plain_loop(
            1, X[:, 0].double(), lambda o, y, q=trial.params["loss__q"]: pinball(o, y, q).mean()
        )
        expected = pinball(outputs_of(module), X[:20, 0].double()).mean()
        assert trial.score == pytest.approx(-float(expected), rel=1e-6)


def zero_start(n_features):
    module = OneLogit(n_features)
    nn.init.zeros_(module.body[-1].weight)
    return module


FAR = X[:, 0] * 3 + 1000
BINARY = (X[:, 0] > 0).long()


def mean_square(outputs, y):
    return (outputs - y).square().mean()


def brier(outputs, y):
    return (outputs.sigmoid() - y).square().mean()


BROADCASTS = [
    (mean_square, FAR), (functional.mse_loss, FAR), (brier, BINARY),
    (lambda o, t: (o - t).square().mean(1), FAR), (lambda o, t: (o - t).square().mean(0), FAR),
    (mean_square, torch.arange(60) // 40),
]  # fmt: skip


@pytest.mark.filterwarnings("error:Using a target size")
@pytest.mark.parametrize(("loss", "y"), BROADCASTS)
@pytest.mark.parametrize("face", ["tune", "net"])
def test_a_loss_that_broadcasts_outputs_and_target_is_refused(loss, y, face):
    with refused(
        r"shape \((\d+), 1\) and y has shape \(\1,\), .* PyTorch broadcasts to \(\1, \1\). Take outputs\[:, 0\] or y\["
    ):
        if face == "tune":
            gputune.tune(zero_start if y is FAR else OneLogit, X, y, loss=loss, **ONE)
        else:
            net = NeuralNetRegressor if y.is_floating_point() else NeuralNetClassifier
            net(OneLogit, criterion=loss, max_epochs=1).fit(X.numpy(), y.numpy().ravel())


@pytest.mark.parametrize("task", [None, "custom"])
@pytest.mark.parametrize("steps", [False, True])
def test_a_column_is_seen_as_it_was_given(task, steps):
    def loss(outputs, y):
        assert outputs.shape == y.shape
        return (outputs - y).square().mean()

    def score(outputs, y):
        return -float(loss(outputs, y))

    how = (
        {"training_step": lambda module, batch: loss(module(batch[0]), batch[1])}
        if steps
        else {"loss": loss}
    )
    column, rows = (
        gputune.tune(model, X, y, task=task, scoring=score, **how, **ONE).trials[0].score
        for model, y in ((OneLogit, FAR[:, None]), (lambda n_features: Single(n_features, 1), FAR))
    )
    assert math.isfinite(column) and math.isfinite(rows)
    if task is None:
        named = gputune.tune(OneLogit, X, FAR[:, None], scoring=score, **ONE)
        assert named.best_model().predict(X).shape == (60,)


@pytest.mark.cpu
@pytest.mark.filterwarnings("error:Using a target size")
@pytest.mark.parametrize("y", [FAR, BINARY])
@pytest.mark.parametrize(
    "loss",
    [
        lambda o, t: (o[:, 0] - t).square().mean(),
        lambda o, t: (o - t[:, None]).square().mean(),
        lambda o, t: 1 - torch.corrcoef(torch.stack([o[:, 0], t.to(o)]))[0, 1],
        lambda o, t: o.square().mean(),
    ],
)
def test_a_loss_that_does_not_broadcast_is_taken(loss, y):
    assert gputune.tune(OneLogit, X, y, loss=loss, **ONE).trials[0].score is not None


@pytest.mark.filterwarnings("error:Using a target size")
def test_a_loss_of_torch_fits_one_output_to_the_target():
    losses = nn.MSELoss(), lambda o, t: (o[:, 0] - t).square().mean()
    theirs, own = (score(FAR, model=OneLogit, loss=loss, scoring=total) for loss in losses)
    assert theirs == pytest.approx(own, rel=1e-10)


def test_a_custom_loss_is_told_of_the_units(capsys):
    gputune.tune(Net, X, X[:, 0] * 9 + 100, loss=nn.L1Loss, **{**ONE, "verbose": 1})
    assert "L1Loss receives y unscaled (mean " in capsys.readouterr().err


class Named(Heads):
    def forward(self, x):
        return dict(zip(("logits", "hidden"), super().forward(x)))


@pytest.mark.parametrize("heads", [Heads, Named])
def test_a_training_step_of_two_heads(heads):
    def loss(outputs, y):
        logits, hidden = outputs if heads is Heads else outputs.values()
        return functional.cross_entropy(logits, y) + 0.1 * hidden.square().mean()

    def step(module, batch):
        return loss(module(batch[0]), batch[1])

    study = gputune.tune(heads, X, BINARY, training_step=step, scoring="neg_log_loss", **ONE)
    module = plain_loop(partial(heads, 5, 2), BINARY, loss)
    expected = -float(functional.cross_entropy(first_output(outputs_of(module)), BINARY[:20]))
    assert study.trials[0].score == pytest.approx(expected, abs=1e-8)
    assert study.best_model().predict(X).shape == (60,)


@pytest.mark.cpu
def test_augmentation_changes_minibatches_of_training_only():
    def noise(x, generator):
        return x + 0.1 * torch.randn(x.shape, generator=generator)

    def augment(x, key):
        return noise(
            x.float(), torch.Generator().manual_seed(stream_seed(0, "augment", *key))
        ).double()

    module = plain_loop(2, BINARY, functional.cross_entropy, augment=augment)
    found = score(BINARY, augment=lambda x, g: noise(x.float(), g).double(), scoring="neg_log_loss")
    assert found == pytest.approx(
        -float(functional.cross_entropy(outputs_of(module), BINARY[:20])), abs=1e-8
    )


def test_numbers_of_a_loss_are_searched_and_train_together():
    space = {"loss__label_smoothing": [0.0, 0.2], "lr": [0.01], "batch_size": [16]}
    study = gputune.tune(
        Net, X, BINARY, **{**ONE, "space": space, "n_trials": 2, "scoring": "neg_log_loss"}
    )
    for trial in study.trials:
        smoothing = trial.params["loss__label_smoothing"]
        module = plain_loop(2, BINARY, partial(functional.cross_entropy, label_smoothing=smoothing))
        expected = -float(functional.cross_entropy(outputs_of(module), BINARY[:20]))
        assert trial.score == pytest.approx(expected, abs=1e-8)


def powered(outputs, y, power=1.5):
    return (outputs[:, 0] - y).abs() ** power


@pytest.mark.parametrize(
    ("loss", "key", "default"),
    [(powered, "power", 1.5), (nn.HuberLoss, "delta", 1.0), ("quantile", "q", 0.5)],
)
def test_the_first_trial_has_the_default_of_a_loss(loss, key, default):
    space = {f"loss__{key}": [0.1, 0.25, default, 3.0 if key != "q" else 0.9]}
    study = gputune.tune(Net, X, SEVERAL[:, 0].exp(), **{**ONE, "loss": loss, "space": space})
    assert study.trials[0].params[f"loss__{key}"] == default


def test_a_study_stores_its_loss(tmp_path):
    options = {**ONE, "study": tmp_path / "study.db"}
    for _ in range(2):
        gputune.tune(Net, X, SEVERAL[:, 0], loss="huber", **options)
    with refused("differs from this call in: loss"):
        gputune.tune(Net, X, SEVERAL[:, 0], loss="mae", **options)


ONE_LOGIT = "For one logit per row and two classes pass loss='bce'"


@pytest.mark.parametrize(
    ("y", "options", "message"),
    [
        (X[:, None].expand(60, 2, 5), {}, "A custom target has no default loss"),
        (
            TWO,
            {"model": OneLogit, "loss": nn.BCELoss()},
            "BCELoss expects probabilities, .* Give loss='bce', which",
        ),
        (
            TWO,
            {"model": OneLogit, "loss": "cross_entropy"},
            r"got \(31, 1\) .* or one logit with loss='bce'",
        ),
        (TWO, {"model": FLAT, "loss": nn.CrossEntropyLoss()}, f"raised .* {ONE_LOGIT}"),
        (BINARY, {"model": OneLogit, "loss": nn.CrossEntropyLoss()}, ONE_LOGIT),
        (
            TWO,
            {"loss": "bce", "model": lambda n_features: Net(n_features, 2)},
            "pass loss='cross_entropy'",
        ),
        (LABELS, {"scoring": "r2"}, "does not fit a multilabel task"),
        (
            X,
            {"task": "custom", "loss": poisson, "scoring": "r2"},
            "scoring='r2' does not fit a custom target",
        ),
        (SEVERAL, {"model": "mlp"}, "predicts one class or one number per row, but y has shape"),
        (
            LABELS[:, 0],
            {"model": "mlp", "loss": torch.nn.CrossEntropyLoss},
            "loss must be 'cross_entropy' for model='mlp', not your own",
        ),
        (
            SEVERAL,
            {"loss": lambda o, y: o[:, :3] @ y},
            "the loss .*<lambda> raised RuntimeError: .* shape",
        ),
        (
            SEVERAL,
            {"loss": lambda o, y: o},
            r"return row losses of shape \(rows,\), or their mean .* got \(31, 2\)",
        ),
        (
            SEVERAL[:, 0],
            {"loss": nn.CrossEntropyLoss()},
            "CrossEntropyLoss is a loss for classes, but y has one number per row",
        ),
        (
            SEVERAL[:, 0],
            {"loss": functional.cross_entropy},
            "functional.cross_entropy is a loss for classes, but y has one number per row",
        ),
        (
            LABELS[:, 0],
            {"loss": functional.mse_loss},
            "mse_loss is a loss for numbers, but y holds classes. If the values of y are numbers, "
            "say task='regression'",
        ),
        (SEVERAL, {"loss": lambda o, y: (o * math.inf).mean(1)}, "is not finite on the first rows"),
        (
            SEVERAL,
            {"loss": lambda o, y: (o - y).detach().square().mean(1)},
            "gives no gradient: its result",
        ),
        (
            SEVERAL,
            {"training_step": lambda m: 0},
            r"TypeError: .* calls training_step\(module, \(x, y\)\), where x is ",
        ),
        (
            SEVERAL,
            {"augment": lambda x: x},
            r"raised TypeError: .* calls augment\(x, generator\)",
        ),
        (
            SEVERAL,
            {"scoring": lambda o, y: o @ y},
            "gputune calls scoring.outputs, y., with tensors",
        ),
        (
            LABELS,
            {"loss": nn.CrossEntropyLoss()},
            "is a loss for one class per row, .* Give loss=torch.nn.BCEWithLogits",
        ),
        (
            LABELS[:, 0],
            {
                "model": lambda n_features: Net(n_features, 7),
                "training_step": lambda m, b: m(b[0]).mean(),
            },
            r"must return a tensor of shape .* With task='custom' and scoring=callable\(outputs, y\)",
        ),
        (
            None,
            {},
            "y is missing. .* If the loss reads only X, as for an autoencoder, pass y=X and task='custom'",
        ),
        (
            SEVERAL[:, 0],
            {"loss": needed, "space": {"loss__power": [1, 2]}, "scoring": "neg_loss"},
            "loss__power has several values in the space and no default. Give the argument a default, or "
            "pass scoring=callable",
        ),
        (
            X,
            {"task": "custom", "training_step": lambda m, b: m(b[0]).square().mean()},
            "scoring is required for a custom target if a training_step .* scoring=lambda outputs, y",
        ),
        (
            COUNTS,
            {"loss": mean_poisson, "sample_weight": WEIGHTS, **NUMBERS},
            "sample_weight and class_weight weight rows, but .*:mean_poisson returns the mean",
        ),
        (
            FAR,
            {"model": OneLogit, "scoring": lambda o, t: -mean_square(o, t)},
            r"compares each output .* shape \(20, 1\) and y \(20,\), .* Take outputs\[:, 0\]",
        ),
        (
            SEVERAL,
            {"loss": lambda o, y: o.mean(1), "method": "hypergradient"},
            "must be the name of a loss",
        ),
    ],
)
def test_what_does_not_fit_is_refused(y, options, message):
    with refused(message):
        score(y, **options)
