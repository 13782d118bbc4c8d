"""Many whole numbers are predicted as numbers, which is said, unless the loss or the module is of
classes."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from torch import nn

import gputune
from command_line import run
from gputune.data.folds import hold_out, make_folds
from gputune.data.target import check_target
from gputune.ground.errors import InputError, InputWarning

RNG = np.random.default_rng(0)
HOW = {"n_trials": 1, "max_epochs": 1, "cv": 2, "verbose": 0}
FEW_ROWS = pytest.mark.filterwarnings(
    "ignore:.* has classes with fewer rows", "ignore:.* train without rows of a class"
)


class Net(nn.Module):
    """Reads rows of any shape; its number of outputs is its own."""

    def __init__(self, n_outputs: int = 1, fixed: int = 0):
        super().__init__()
        self.last = nn.LazyLinear(fixed or n_outputs)

    def forward(self, x):
        return self.last(x.float().flatten(1))


def fixed_outputs(number, name):
    """A builder that takes no n_outputs, as most modules of other libraries."""

    def build():
        return Net(fixed=number)

    build.__name__ = name
    return build


X = RNG.normal(size=(100, 3))
IMAGES = RNG.normal(size=(200, 1, 4, 4)).astype("float32")
CODES = np.arange(100) % 50
INPUTS = {
    "array": (X, CODES),
    "tensor": (torch.from_numpy(X), torch.from_numpy(CODES)),
    "images": (IMAGES, np.arange(200) % 100),
    "pandas": (pd.DataFrame(X, columns=list("abc")).assign(y=CODES), "y"),
    "polars": (pl.DataFrame(X, schema=list("abc")).with_columns(y=pl.Series(CODES)), "y"),
}


FORMS = [
    pytest.param(form, marks=() if form in ("tensor", "images", "pandas") else pytest.mark.long)
    for form in INPUTS
]


@pytest.mark.parametrize("form", FORMS)
def test_a_regression_of_whole_numbers_says_so_and_names_the_option(form):
    rows, y = INPUTS[form]
    with pytest.warns(
        InputWarning, match="distinct whole numbers in .* rows.* set task='classification'"
    ):
        study = gputune.tune(Net, rows, y, **HOW)
    assert study.record.task == "regression"
    assert any("set ⟦task='classification'⟧" in note for note in study.record.notes)
    study = gputune.tune(Net, rows, y, task="regression", **HOW)
    assert not any("task=" in note for note in study.record.notes)


def test_numbers_that_hardly_repeat_are_a_note_only():
    study = gputune.tune("mlp", X, np.arange(100) * 7, **HOW)
    assert any("100 distinct whole numbers in 100 rows" in note for note in study.record.notes)


@FEW_ROWS
@pytest.mark.parametrize("form", FORMS)
def test_as_many_outputs_as_distinct_numbers_make_classes(form):
    rows, y = INPUTS[form]
    number = 100 if form == "images" else 50
    study = gputune.tune(fixed_outputs(number, f"net_{form}"), rows, y, **{**HOW, "cv": 5})
    assert study.record.task == "multiclass" and len(study.record.classes) == number
    assert np.isfinite(study.best_score)
    with (
        pytest.warns(InputWarning, match="distinct whole numbers"),
        pytest.raises(InputError, match="must return"),
    ):
        gputune.tune(fixed_outputs(number - 1, f"less_{form}"), rows, y, **HOW)


@FEW_ROWS
@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss,
        nn.CrossEntropyLoss(),
        "cross_entropy",
        "log_loss",
        nn.functional.cross_entropy,
    ],
)
def test_a_loss_of_classes_makes_classes(loss):
    study = gputune.tune(Net, X, CODES, loss=loss, **HOW)
    assert study.record.task == "multiclass" and len(study.record.classes) == 50
    assert study.best_model().predict(X).shape == (100,)


@FEW_ROWS
def test_many_classes_of_a_few_rows_each_train_and_are_held_out(tmp_path):
    y = np.arange(300) % 100
    study = gputune.tune(
        fixed_outputs(100, "net"), RNG.normal(size=(300, 2)), y, **{**HOW, "cv": 4}
    )
    assert study.record.task == "multiclass" and np.isfinite(study.best_score)
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\nclass Net(nn.Module):\n    def __init__(self):\n        "
        "super().__init__()\n        self.last = nn.LazyLinear(100)\n\n    def forward(self, "
        "x):\n        return self.last(x)\n"
    )
    table = pl.DataFrame(RNG.normal(size=(200, 2)), schema=["a", "b"]).with_columns(
        y=pl.Series(np.arange(200) % 100)
    )
    table.write_csv(tmp_path / "t.csv")
    call = [
        "tune",
        tmp_path / "t.csv",
        "--target",
        "y",
        "--trials",
        1,
        "--epochs",
        1,
        "--workers",
        1,
    ]
    code, text, said = run(*call, "--model", f"{tmp_path / 'net.py'}:Net", "--out", tmp_path / "o")
    assert code == 0 and "y has classes with fewer rows than the 5 folds" in said
    assert "100 classes of 'y'" in text and "40 held out" in text
    code, text, said = run(*call, "--out", tmp_path / "p")
    assert code == 0 and "If they are classes, set --task classification. If not" in said
    assert "If they are classes, set --task classification." in " ".join(text.split())


@pytest.mark.parametrize("n_folds", [3, 5])
def test_small_classes_are_spread_over_the_folds(n_folds):
    target = check_target(np.repeat([f"c{k}" for k in range(40)], 2), n_rows=80)
    with pytest.warns(UserWarning, match="fewer rows than the"):
        folds = make_folds(n_folds, target, seed=0)
    sizes = [len(valid) for _, valid in folds]
    assert max(sizes) - min(sizes) <= 1
    np.testing.assert_array_equal(
        np.sort(np.concatenate([valid for _, valid in folds])), np.arange(80)
    )
    for train, valid in folds:
        assert np.bincount(target.values[valid]).max() == 1 and not np.isin(train, valid).any()
    rest, test = hold_out(target, test_size=0.3, seed=0)
    assert len(test) == 24 and np.bincount(target.values[test]).max() == 1
    assert len(np.unique(target.values[rest])) == 40


@FEW_ROWS
@pytest.mark.parametrize("rows", [257, 300])
def test_a_target_of_names_looks_like_an_identifier(rows):
    names = [f"name {k}" for k in range(257)] + [f"name {k}" for k in range(rows - 257)]
    with pytest.raises(
        InputError,
        match=f"The target 'y' looks like an identifier: it has 257 .* in {rows} rows. Cho",
    ):
        gputune.tune("mlp", RNG.normal(size=(rows, 2)), names, n_trials=1, max_epochs=1)
    numbers = [f"{k}.5" for k in range(rows - 1)] + ["abc"]
    with pytest.raises(
        InputError, match="'y' has numbers, but also 1 other value such as 'abc'. Cor"
    ):
        gputune.tune("mlp", RNG.normal(size=(rows, 2)), numbers, n_trials=1, max_epochs=1)
    with pytest.raises(InputError, match="looks like an identifier"):
        hold_out(check_target(names, n_rows=rows), test_size=0.2, seed=0)
