"""Rows of different lengths are refused everywhere, and the remedy in the message works."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import gputune
from gputune.data.containers import refuse_ragged
from gputune.sklearn import NeuralNetClassifier
from refused import refused

LENGTHS = [2, 3, 1] * 10
LABELS = np.arange(30) % 2
TENSORS = [torch.ones(length, 3) for length in LENGTHS]
LISTS = [[1.0] * length for length in LENGTHS]
OBJECTS = np.empty(30, dtype=object)
OBJECTS[:] = [np.ones(length) for length in LENGTHS]
FLAT = np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)

NESTED_WORDS = (
    r"is a nested tensor, whose rows have different lengths. "
    r"Pad .* with torch.nested.to_padded_tensor, and pass the padded tensor\."
)
RAGGED_WORDS = r"has rows of different shapes: row 0 has \(2.*\), row 1 has \(3.*\). Pad or crop .*pad_sequence\("
OPTIONS = {"n_trials": 1, "max_epochs": 1, "cv": 2, "verbose": 0}


def nested(layout):
    return torch.nested.nested_tensor(TENSORS, layout=layout)


RAGGED = {
    "nested": (lambda: nested(torch.strided), NESTED_WORDS),
    "jagged": (lambda: nested(torch.jagged), NESTED_WORDS),
    "lists": (lambda: LISTS, RAGGED_WORDS),
    "tensors": (lambda: TENSORS, RAGGED_WORDS),
    "objects": (lambda: OBJECTS, RAGGED_WORDS),
}


def mean_of_rows(n_outputs):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(n_outputs))


@pytest.fixture(scope="module")
def models():
    """A model of a table, and a model of sequences."""
    sequences = torch.ones(30, 3, 3) * torch.arange(30)[:, None, None]
    return [
        gputune.tune(mean_of_rows, X, LABELS, **OPTIONS).best_model() for X in (FLAT, sequences)
    ]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", RAGGED)
def test_rows_of_different_lengths_are_refused_wherever_they_are_passed(kind, models):
    make, words = RAGGED[kind]
    rows = make()
    calls = [
        lambda: gputune.tune("mlp", rows, LABELS, **OPTIONS),
        lambda: gputune.tune(mean_of_rows, rows, LABELS, **OPTIONS),
        lambda: gputune.tune(mean_of_rows, (rows,), LABELS, **OPTIONS),
        lambda: gputune.tune(mean_of_rows, {"x": rows}, LABELS, **OPTIONS),
        lambda: gputune.tune(mean_of_rows, FLAT, rows, **OPTIONS),
        lambda: gputune.tune("mlp", FLAT, rows, **OPTIONS),
        lambda: gputune.tune("mlp", FLAT, LABELS, groups=rows, **OPTIONS),
        lambda: gputune.tune("mlp", FLAT, LABELS, sample_weight=rows, **OPTIONS),
        lambda: NeuralNetClassifier(mean_of_rows).fit(rows, LABELS),
        lambda: models[0].predict(rows),
        lambda: models[1].predict(rows),
    ]
    for call in calls:
        with refused(words):
            call()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_remedies_give_one_tensor():
    X = nested(torch.strided)
    assert torch.nested.to_padded_tensor(X, 0.0).shape == (30, 3, 3)
    padded = torch.nn.utils.rnn.pad_sequence(
        [torch.as_tensor(row) for row in LISTS], batch_first=True
    )
    assert padded.shape == (30, 3)
    refuse_ragged(padded, "X")


def test_a_dataset_of_a_nested_tensor_is_refused():
    with refused(r"X.tensors\[0\] is a nested tensor"):
        gputune.tune(
            mean_of_rows, TensorDataset(nested(torch.jagged), torch.as_tensor(LABELS)), **OPTIONS
        )


def test_an_object_array_of_equal_rows_is_told_to_be_stacked():
    rows = np.empty(30, dtype=object)
    rows[:] = [np.ones(2) for _ in LENGTHS]
    for model in ("mlp", mean_of_rows):
        with refused(r"X is an object array of rows. Pass numpy.stack\(X\)"):
            gputune.tune(model, rows, LABELS, **OPTIONS)
    assert np.stack(rows).shape == (30, 2)


def test_rows_of_one_shape_are_accepted():
    for value in (
        FLAT.tolist(),
        ["a", None, "b"],
        [1, 2.5],
        np.array(["a", None], dtype=object),
        (FLAT, [1]),
    ):
        refuse_ragged(value, "X")


class Tokenized(Dataset):
    """Items as a tokenizer returns them without padding."""

    def __len__(self):
        return 6

    def __getitem__(self, place):
        return {"input_ids": torch.ones(place + 1, dtype=torch.int64), "labels": place % 2}


@pytest.mark.parametrize(
    ("X", "label"),
    [
        ({"input_ids": [[1, 2], [3]] * 3}, "X['input_ids'] has rows of different shapes"),
        ({"input_ids": [[1, 2], [3, 4]] * 3}, "X['input_ids'] must be an array or a tensor, got a"),
        (Tokenized(), "The items of X, a Tokenized, cannot be stacked"),
    ],
    ids=["ragged", "lists", "dataset"],
)
def test_the_remedy_for_texts_is_an_argument_of_the_tokenizer(X, label):
    y = None if isinstance(X, Dataset) else LABELS[:6]
    remedy = 'Pad the rows: tokenizer(texts, padding=True, return_tensors="pt").'
    with pytest.raises(gputune.InputError, match=f"{re.escape(label)}.*{re.escape(remedy)}$"):
        gputune.tune(nn.Identity, X, y, **OPTIONS)
