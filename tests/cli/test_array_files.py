"""``gputune predict`` and ``evaluate`` take each kind of file that ``tune`` takes."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

import gputune
from command_line import output, refusal, run

TABLE = np.random.default_rng(0).normal(size=(40, 3))
IMAGES = np.random.default_rng(1).normal(size=(40, 1, 8, 8)).astype(np.float32)
LABELS = np.arange(40) % 2
MODELS = {"table": ("logistic", TABLE), "images": ("net.py:Net", IMAGES)}
NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(64, 2)

    def forward(self, x):
        return self.body(x.flatten(1))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a model of each kind, trained on a .npz that has groups too, and the
    predictions of its rows."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "net.py").write_text(NET)
    expected = {}
    for kind, (model, X) in MODELS.items():
        np.savez(folder / f"{kind}.npz", groups=np.arange(40) // 4, X=X, label=LABELS)
        study = gputune.tune(
            model.replace("net.py", str(folder / "net.py")),
            folder / f"{kind}.npz",
            "label",
            groups="groups",
            n_trials=1,
            max_epochs=1,
            cv=2,
            verbose=0,
        )
        best = study.best_model()
        best.save(folder / kind)
        expected[kind] = best.predict(X)
    return folder, expected


def write(path, X, **more):
    """Write X, and further arrays, as the suffix of the path says."""
    if path.suffix == ".npy":
        np.save(path, X)
    elif path.suffix == ".npz":
        np.savez(path, **more, X=X)
    else:
        torch.save(
            {name: torch.from_numpy(value) for name, value in {**more, "X": X}.items()}, path
        )
    return path


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("suffix", [".npy", ".NPY", ".npz", ".pt", ".pth"])
def test_a_file_of_arrays_is_predicted_and_evaluated(models, tmp_path, kind, suffix):
    folder, expected = models
    X = MODELS[kind][1]
    if suffix == ".NPY":
        path = write(tmp_path / "t.npy", X).rename(tmp_path / "t.NPY")
    else:
        path = write(tmp_path / f"t{suffix}", X, groups=np.arange(40.0) + np.nan, label=LABELS)
    lines = output("predict", folder / kind, path).splitlines()
    assert lines == ["label", *map(str, expected[kind])]
    np.testing.assert_array_equal(gputune.load_model(folder / kind).predict(path), expected[kind])
    np.save(tmp_path / "y.npy", LABELS)
    target = ["--target", tmp_path / "y.npy"] if suffix.lower() == ".npy" else []
    out = run("evaluate", folder / kind, path, "--format", "json", *target)[1]
    assert json.loads(out)["scores"]["accuracy"]["score"] == (expected[kind] == LABELS).mean()


def test_the_inputs_are_found_by_their_shape(models, tmp_path):
    folder, expected = models
    path = write(tmp_path / "t.npz", TABLE, weight=np.ones(40), more=np.ones((40, 7)))
    assert output("predict", folder / "table", path).splitlines()[1:] == [
        *map(str, expected["table"])
    ]
    path = write(tmp_path / "t.npz", TABLE, twin=TABLE)
    words = (
        "holds 'twin', 'X', but the model takes 1 array of shape (rows, 3). Write a file with "
        "the same inputs"
    )
    assert words in refusal("predict", folder / "table", path)


def test_the_right_answers_may_have_another_name(models, tmp_path):
    folder, expected = models
    path = write(tmp_path / "t.npz", TABLE, answers=LABELS)
    out = run("evaluate", folder / "table", path, "--target", "answers", "--format", "json")[1]
    assert json.loads(out)["rows"] == 40
    frame = pd.DataFrame(
        {"x0": TABLE[:, 0], "x1": TABLE[:, 1], "x2": TABLE[:, 2], "answers": LABELS}
    )
    frame.to_csv(tmp_path / "t.csv", index=False)
    out = run(
        "evaluate", folder / "table", tmp_path / "t.csv", "--target", "answers", "--format", "json"
    )[1]
    assert json.loads(out)["scores"]["accuracy"]["score"] == (expected["table"] == LABELS).mean()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["evaluate", "images", "t.npy"],
            "--target is missing. Pass the .npy file with the true value for each",
        ),
        (
            ["evaluate", "images", "t.npy", "--target", "y"],
            "target must be the path of a .npy file with one value per row",
        ),
        (
            ["evaluate", "images", "t.npy", "--target", "short.npy"],
            "has 40 rows, but the target 'short.npy' has shape",
        ),
        (
            ["evaluate", "images", "t.npz"],
            "--target must be the name of an array in 't.npz', which holds 'X', got 'label'.",
        ),
        (
            ["predict", "images", "t.csv"],
            "Arrays are read from .npz, .npy, .pt, .pth files, got 't.csv'",
        ),
        (
            ["predict", "table", "t.npy"],
            "'t.npy' must be two-dimensional (rows, columns), got shape",
        ),
        (
            ["predict", "images", "t.npy", "--keep", "id"],
            "--keep names columns of a table, but 't.npy' holds arrays",
        ),
    ],
)
def test_what_does_not_fit_is_refused(models, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "t.npy", IMAGES)
    write(tmp_path / "t.npz", IMAGES)
    np.save("short.npy", LABELS[:7])
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    command, model, *others = options
    assert words in refusal(command, models[0] / model, *others)


def test_one_column_of_answers_is_read_and_several_are_refused(models, tmp_path):
    folder, expected = models
    np.save(tmp_path / "column.npy", LABELS[:, None])
    np.save(tmp_path / "columns.npy", TABLE)
    path = write(tmp_path / "t.npy", TABLE)
    out = run(
        "evaluate", folder / "table", path, "--target", tmp_path / "column.npy", "--format", "json"
    )[1]
    assert json.loads(out)["scores"]["accuracy"]["score"] == (expected["table"] == LABELS).mean()
    words = (
        "the true labels have the shape (40, 3), but the model predicts one class for each "
        "row. Give one class"
    )
    assert words in refusal(
        "evaluate", folder / "table", path, "--target", tmp_path / "columns.npy"
    )
