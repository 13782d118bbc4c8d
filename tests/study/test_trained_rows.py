"""A model knows about which share of some rows it was trained on, by a small sample of its training
rows."""

import numpy as np
import pandas as pd
import pytest
import torch

import gputune
from gputune.data.arrays import ArrayLayout, as_arrays
from gputune.data.columns import fit_layout
from gputune.data.source import read_source
from gputune.data.table import as_table
from gputune.study.model_files import SAMPLE_SIZE, _digests, sample_of_rows, share_of_rows

N = 3 * SAMPLE_SIZE
ROWS = np.random.default_rng(0).normal(size=(N, 3))
Y = np.arange(N) % 2
TABLE = as_table(ROWS)
LAYOUT = fit_layout(TABLE)


@pytest.mark.parametrize("n_trained", [50, SAMPLE_SIZE - 1, SAMPLE_SIZE, 2 * SAMPLE_SIZE])
def test_the_share_is_exact_for_few_rows_and_close_for_many(n_trained):
    trained = np.arange(n_trained)
    others = np.arange(n_trained, N)
    sample = sample_of_rows(LAYOUT, TABLE.select(trained), Y[trained])
    assert len(sample) == 12 * min(n_trained, SAMPLE_SIZE)

    def share(rows):
        return share_of_rows(sample, LAYOUT, TABLE.select(rows), Y[rows])

    assert share(trained) == 1 and share(trained[::-2]) == 1
    assert share(others) == 0
    found = share(np.arange(N))
    expected = n_trained / N
    assert found == expected if n_trained < SAMPLE_SIZE else abs(found - expected) < 0.05


def test_rows_with_other_answers_are_other_rows():
    sample = sample_of_rows(LAYOUT, TABLE, Y)
    assert share_of_rows(sample, LAYOUT, TABLE, 1 - Y) == 0


def test_equal_rows_and_no_others_have_equal_digests():
    codes = np.random.default_rng(1).integers(0, 3, size=(2000, 4)).astype(float)
    table = as_table(codes)
    digests = _digests(fit_layout(table), table, np.zeros(2000))
    assert len(np.unique(digests)) == len(np.unique(codes, axis=0)) == 81
    twins = as_table(np.array([[0.0, np.nan, 1], [-0.0, -np.nan, 1], [0.0, np.nan, 2]]))
    layout = fit_layout(as_table(np.array([[0.0, np.nan, 1], [1.0, 2.0, 3]])))
    first, second, third = _digests(layout, twins, np.zeros(3))
    assert first == second != third


def test_it_does_not_matter_how_the_rows_were_given(tmp_path):
    frame = pd.DataFrame({"a": ROWS[:99, 0].round(3), "b": [None, "x", "y"] * 33, "y": Y[:99]})
    frame.to_csv(tmp_path / "t.csv", index=False)
    of_frame = read_source(frame, "y")
    of_file = read_source(tmp_path / "t.csv", "y")
    layout = fit_layout(of_frame.X)
    sample = sample_of_rows(layout, of_frame.X, of_frame.y)
    assert share_of_rows(sample, layout, of_file.X, of_file.y) == 1
    tensor = torch.from_numpy(ROWS).float()
    assert sample_of_rows(LAYOUT, tensor, Y) == sample_of_rows(LAYOUT, as_table(tensor.numpy()), Y)


def test_arrays_of_any_shape():
    images = as_arrays(np.arange(20 * 12, dtype=np.uint8).reshape(20, 3, 2, 2))
    ids = as_arrays((torch.arange(40).view(20, 2), torch.arange(20.0)))
    for arrays in (images, ids):
        layout = ArrayLayout.of(arrays)
        sample = sample_of_rows(layout, arrays.select(np.arange(15)), Y[:15])
        assert share_of_rows(sample, layout, arrays, Y[:20]) == 0.75


def test_a_saved_model_has_the_sample_and_a_model_without_one_loads(tmp_path):
    study = gputune.tune("logistic", ROWS[:60], Y[:60], n_trials=1, cv=2, verbose=0)
    model = study.best_model()
    model.save(tmp_path / "new")
    sample = gputune.load_model(tmp_path / "new").info["row_sample"]
    assert share_of_rows(sample, model.layout, TABLE.select(np.arange(80)), Y[:80]) == 0.75
    del model.info["row_sample"]
    model.save(tmp_path / "old")
    assert "row_sample" not in gputune.load_model(tmp_path / "old").info
