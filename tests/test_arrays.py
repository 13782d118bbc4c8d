"""Images, sequences and several inputs, from tune() to the saved model; each member equals a plain
loop."""

import inspect

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import gputune
from command_line import FAST, run
from reference import train_module
from refused import refused

SMALL = {"n_trials": 2, "cv": 2, "max_epochs": 2, "verbose": 0, "workers": 1}
G = torch.Generator().manual_seed(0)
IMAGES = torch.rand(48, 1, 6, 6, generator=G)
LABELS = (IMAGES[:, 0, 2:4, 2:4].mean((1, 2)) > 0.5).long()
IDS = torch.randint(9, (48, 5), generator=G)


class Images(nn.Module):
    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.AvgPool2d(2)
        )
        self.head = nn.Linear(4 * 9, n_outputs)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


class IdsAndNumbers(nn.Module):
    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.code = nn.Embedding(9, 4)
        self.head = nn.Linear(5, n_outputs)

    def forward(self, ids, number):
        return self.head(torch.cat([self.code(ids).mean(1), number], 1))


def test_a_member_on_images_equals_a_plain_loop():
    options = SMALL | {"cv": [(np.arange(8, 48), np.arange(8))], "dtype": "float64", "n_trials": 1}
    study = gputune.tune(
        Images,
        IMAGES,
        LABELS,
        space={"lr": [0.01], "batch_size": [16]},
        scoring="neg_log_loss",
        **options,
    )
    config = {"lr": 0.01, "batch_size": 16, "optimizer": "adamw", "weight_decay": 0.01}
    rows = IMAGES.double()
    module = train_module(
        lambda: Images(6, 2), rows[8:], LABELS[8:], config, epochs=2, max_epochs=2
    )
    loss = nn.functional.cross_entropy(module(rows[:8]), LABELS[:8])
    assert study.curves[0, -1, 0] == pytest.approx(-loss.item(), abs=1e-9)


def test_a_command_tunes_images_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("images.npz", image=IMAGES.numpy(), label=LABELS.numpy())
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n\n\n" + inspect.getsource(Images)
    )
    code, out, err = run(
        "tune", "images.npz", "--target", "label", "--model", "net.py:Images", *FAST
    )
    assert code == 0 and "Inputs   float32 (rows, 1, 6, 6)" in out, err
    code, out, err = run("predict", "gputune-out/model", "images.npz", "--trust-code")
    assert code == 0 and len(out.splitlines()) == 49, err


def test_a_model_of_images_is_saved_and_predicts(tmp_path):
    X = IMAGES.mul(255).to(torch.uint8)
    model = gputune.tune(Images, X, LABELS, numbers="standard", **SMALL).best_model()
    model.save(tmp_path / "model")
    again = gputune.load_model(tmp_path / "model", module=Images)
    np.testing.assert_array_equal(again.predict_proba(X.numpy()), model.predict_proba(X))
    assert "from uint8 (rows, 1, 6, 6)" in repr(again)
    with refused("X must be as in training"):
        again.predict(IMAGES)


def test_several_inputs_go_by_name_and_in_order():
    number = torch.rand(48, 1, generator=G)
    named = gputune.tune(IdsAndNumbers, {"number": number, "ids": IDS}, LABELS, **SMALL)
    ordered = gputune.tune(IdsAndNumbers, (IDS, number), LABELS, **SMALL)
    assert [t.score for t in named.trials] == [t.score for t in ordered.trials]
    rows = {"ids": IDS, "number": number}
    np.testing.assert_array_equal(
        named.best_model().predict(rows), ordered.best_model().predict((IDS, number))
    )


def test_a_study_of_a_file_continues(tmp_path):
    np.savez(tmp_path / "images.npz", image=IMAGES.numpy(), label=LABELS.numpy())
    whole = gputune.tune(Images, tmp_path / "images.npz", "label", **SMALL)
    options = {**SMALL, "study": tmp_path / "study.db"}
    gputune.tune(Images, tmp_path / "images.npz", "label", **options | {"n_trials": 1})
    more = gputune.tune(Images, tmp_path / "images.npz", "label", **options)
    assert [t.score for t in more.trials] == [t.score for t in whole.trials]
    opened = gputune.Study.open(tmp_path / "study.db").best_model(trust_code=True)
    np.testing.assert_array_equal(
        opened.predict(tmp_path / "images.npz"), more.best_model().predict(IMAGES)
    )


def test_what_is_scaled_is_said(capsys):
    for numbers, words in (
        ("none", "not scaled: X[1]; numbers='standard' scales by channel"),
        ("standard", "scaled by channel: X[1]; not scaled: X[0]"),
    ):
        gputune.tune(
            IdsAndNumbers,
            (IDS, torch.rand(48, 1)),
            LABELS,
            **SMALL | {"numbers": numbers, "verbose": 1},
        )
        assert f"note: {words}\n" in capsys.readouterr().err


def test_a_custom_scorer_sees_the_arrays():
    def scorer(estimator, X, y):
        assert X.shape[1:] == (1, 6, 6) and estimator.predict(X[:3]).shape == (3,)
        return float((estimator.predict(X) == y).mean())

    own = gputune.tune(Images, IMAGES, LABELS, scoring=scorer, **SMALL)
    named = gputune.tune(Images, IMAGES, LABELS, scoring="accuracy", **SMALL)
    assert [t.score for t in own.trials] == pytest.approx([t.score for t in named.trials])


@pytest.mark.parametrize(
    ("model", "X", "message"),
    [
        ("mlp", IMAGES, "the model takes tables .*Choose model='cnn' for images"),
        ("realmlp", IMAGES, "Choose model='cnn' for images, or a custom module"),
        ("mlp", IMAGES[:, 0], "model='cnn' for images, model='gru' for sequences, or"),
        (Images, (), "X is empty. Pass at least one array"),
        ("logistic", (IDS, IDS), "X is a tuple of 2 inputs"),
        (Images, IMAGES.expand(-1, 3, -1, -1), "submodule 'body.0'.* raised RuntimeError"),
        (Images, IMAGES[:40], "y must have one value per row of X, got 48 values and 40 rows"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_trains(model, X, message):
    with refused(message):
        gputune.tune(model, X, LABELS, **SMALL)


class Pairs(Dataset):
    """Items (inputs, target), the inputs a tuple."""

    def __init__(self, X, y):
        self.X = X
        self.y = y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return tuple(x[i] for x in self.X), self.y[i]


def test_a_dataset_is_predicted_as_its_tensors_are():
    model = gputune.tune(Images, IMAGES, LABELS, **SMALL).best_model()
    two = (IDS, torch.rand(48, 1))
    several = gputune.tune(IdsAndNumbers, two, LABELS, **SMALL).best_model()
    for of, X, dataset in (
        (model, IMAGES, TensorDataset(IMAGES)),
        (model, IMAGES, TensorDataset(IMAGES, torch.as_tensor(LABELS))),
        (several, two, TensorDataset(*two)),
        (several, two, Pairs(two, LABELS)),
    ):
        np.testing.assert_array_equal(of.predict_proba(dataset), of.predict_proba(X))
    with refused("X must be as in training, .* got a list"):
        model.predict([[[1, 2], [3]]])
    with refused("IdsAndNumbers raised IndexError: .*must have an entry for every id"):
        several.predict((IDS + 9, torch.rand(48, 1)))
