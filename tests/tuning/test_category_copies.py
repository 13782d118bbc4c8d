"""Columns of numbers that are categories too: studies, saved models and errors."""

from functools import partial

import numpy as np
import pandas as pd
import torch

import gputune
from face_modules import Conv
from gputune.data.table import as_table
from gputune.report.snippet import snippet
from gputune.tuning.refit import Access
from gputune.tuning.validation import fold_report
from refused import refused

tune_one = partial(
    gputune.tune, n_trials=1, include_default=False, max_epochs=3, cv=3, verbose=0, workers=1
)


def with_amounts(rows=120):
    """A table with a column of few frequent amounts, and a target that depends on each."""
    rng = np.random.default_rng(0)
    gain = rng.choice([0.0, 2.5, 7298.0, np.nan], rows)
    frame = pd.DataFrame({"gain": gain, "age": rng.normal(size=rows), "city": ["a", "b"] * 60})
    return frame, np.nan_to_num(gain, nan=1.0) * (gain == 2.5) + rng.normal(size=rows) > 1


def test_numbers_can_be_categories_too(tmp_path):
    frame, y = with_amounts()
    call = partial(tune_one, "mlp", frame, y, study=tmp_path / "study.db", max_epochs=1)
    study = call(category_copies=["gain"])
    model = study.best_model(frame, y)
    assert model.layout.feature_names == (
        *("gain", "gain=0", "gain=2.5", "gain=7298", "gain=(missing)", "age", "city=a", "city=b"),
    )
    assert model.layout.feature_groups == (0, 1, 1, 1, 1, 0, 2, 2)
    expected = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    fresh = pd.DataFrame({"gain": [0, 2.5, 7298, np.nan, 5], "age": 0.0, "city": "a"})
    np.testing.assert_array_equal(model.layout.raw(as_table(fresh))[:, 1:5], expected)
    assert "category_copies=['gain']," in snippet(study)
    with refused(r"in: category_copies \(gain in the study, none now\)"):
        call()
    assert call(study=None).record.category_copies == []


def test_a_saved_model_with_copies_reads_files_and_reports_whole_columns(tmp_path):
    frame, y = with_amounts()
    study = tune_one("mlp", frame, y, category_copies=["gain"], max_epochs=3)
    model = study.best_model(frame, y)
    expected = model.predict_proba(frame)
    model.save(tmp_path / "model")
    loaded = gputune.load_model(tmp_path / "model")
    frame.to_csv(tmp_path / "rows.csv", index=False)
    np.testing.assert_array_equal(loaded.predict_proba(tmp_path / "rows.csv"), expected)
    report = fold_report(Access(study, frame, y), importance=True)
    assert sorted(report.columns) == ["age", "city", "gain"]
    X = frame[["gain"]].to_numpy()
    numbers = tune_one("mlp", X, y, category_copies="x0", max_epochs=1)
    fitted = numbers.best_model(X, y)
    np.testing.assert_array_equal(
        fitted.predict_proba(torch.tensor(X[:9])), fitted.predict_proba(X[:9])
    )


def test_levels_do_not_depend_on_the_precision_of_the_numbers(tmp_path):
    frame, y = with_amounts()
    codes = 0.1 * np.tile(np.arange(1, 5), 30)  # one of them is 0.30000000000000004
    frame = frame.assign(gain=codes)
    model = tune_one("mlp", frame, y, category_copies=["gain"]).best_model(frame, y)
    assert model.layout.feature_names[1:5] == ("gain=0.1", "gain=0.2", "gain=0.3", "gain=0.4")
    frame.round(3).to_csv(tmp_path / "rounded.csv", index=False)
    expected = model.layout.raw(as_table(frame))[:, 1:5]
    np.testing.assert_array_equal(expected.sum(1), 1)
    single = frame.astype({"gain": "float32"})
    for rows in (single, pd.read_csv(tmp_path / "rounded.csv")):
        np.testing.assert_array_equal(model.layout.raw(as_table(rows))[:, 1:5], expected)


def test_large_integers_are_different_levels():
    frame, y = with_amounts()
    frame = frame.assign(gain=20_240_101 + np.tile(np.arange(4), 30))
    model = tune_one("mlp", frame, y, category_copies=["gain"], max_epochs=1).best_model(frame, y)
    assert model.layout.feature_names[1:5] == tuple(f"gain={20_240_101 + j}" for j in range(4))


def test_the_order_of_the_names_makes_no_other_search(tmp_path):
    frame, y = with_amounts()
    frame = frame.assign(code=np.tile(np.arange(4), 30))
    call = partial(tune_one, "mlp", frame, y, study=tmp_path / "study.db", max_epochs=1)
    first = call(category_copies=["gain", "code"])
    assert first.record.category_copies == ["gain", "code"]
    assert call(category_copies=["code", "gain", "code"]).trials == first.trials


def test_a_column_with_one_value_stays_as_it_is():
    frame, y = with_amounts()
    half = frame.assign(gain=np.where(np.arange(120) % 2, np.nan, 5.0))
    for kept in ("drop-constant", "keep"):
        study = tune_one("mlp", half, y, category_copies=["gain"], columns=kept, max_epochs=1)
        assert not any("categor" in note for note in study.record.notes), study.record.notes


def test_columns_that_cannot_be_copied_are_refused():
    frame, y = with_amounts()
    with refused("must name columns of numbers, got 'city', a column of text. A column of text"):
        tune_one("mlp", frame, y, category_copies=["city"])
    flags = frame.assign(flag=frame["age"] > 0, day=pd.Timestamp("2026-01-01"))
    with refused("got 'flag', a column of booleans. Leave it out"):
        tune_one("mlp", flags, y, category_copies=["flag"])
    with refused("got 'day', a column of dates"):
        tune_one("mlp", flags, y, category_copies=["day"])
    with refused("category_copies must be a list of column names"):
        tune_one("mlp", frame, y, category_copies=3)
    for model, rows in (("mlp", torch.zeros(120, 2)), (Conv, np.zeros((120, 1, 8, 8), "f"))):
        with refused("category_copies is only for tables, because their columns have names"):
            tune_one(model, rows, y, category_copies=["x0"])
    rare = frame.assign(gain=np.arange(120) + 0.5)
    study = tune_one("mlp", rare, y, category_copies=["gain"], max_epochs=1)
    assert "Column 'gain': no value is frequent enough to be a category too." in study.record.notes
