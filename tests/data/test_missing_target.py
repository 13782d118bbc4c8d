"""Rows without a target are an error that names the option, or are left out of everything."""

import json

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from sklearn.model_selection import GroupKFold, KFold

import gputune
from command_line import output, refusal
from gputune.data.source import read_source
from gputune.data.target import check_target
from gputune.ground.errors import InputError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 3))
Y = X @ [1.0, 2.0, 3.0]
LOST = np.array([3, 17, 40])
KEPT = np.setdiff1d(np.arange(48), LOST)
HOW = {"n_trials": 2, "max_epochs": 2, "cv": 3, "verbose": 0}


def with_gaps(y):
    y = np.array(y, dtype=object)
    y[LOST] = None
    return y


def scores(study):
    return [(trial.params, trial.score) for trial in study.trials]


FORMS = {
    "array": (X, np.where(np.isin(np.arange(48), LOST), np.nan, Y)),
    "tensor": (
        torch.from_numpy(X),
        torch.from_numpy(np.where(np.isin(np.arange(48), LOST), np.nan, Y)),
    ),
    "list": (X.tolist(), with_gaps(Y).tolist()),
    "pandas": (pd.DataFrame(X, columns=list("abc")).assign(y=with_gaps(Y).astype(float)), "y"),
    "polars": (
        pl.DataFrame(X, schema=list("abc")).with_columns(y=pl.Series(with_gaps(Y).tolist())),
        "y",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_dropped_rows_take_no_part(form):
    given, y = FORMS[form]
    with pytest.raises(
        InputError, match=r"3 missing values \(the first in row 3\).*missing_target='drop'"
    ):
        gputune.tune("mlp", given, y, **HOW)
    study = gputune.tune("mlp", given, y, missing_target="drop", **HOW)
    inputs = torch.from_numpy(X[KEPT]) if form == "tensor" else X[KEPT]
    assert scores(study) == scores(gputune.tune("mlp", inputs, Y[KEPT], **HOW))
    assert f"3 rows without a value of '{study.record.target}' were left out" in study.record.notes
    rows = (
        given.drop(columns="y")
        if form == "pandas"
        else given.drop("y")
        if form == "polars"
        else given
    )
    assert study.best_model().predict(rows).shape == (48,)


def test_whole_numbers_of_a_column_stay_classes():
    y = with_gaps(RNG.integers(0, 3, 48))
    study = gputune.tune(
        "mlp",
        pd.DataFrame(X).assign(y=y.astype(float)).set_axis(list("abcy"), axis=1),
        "y",
        missing_target="drop",
        **HOW,
    )
    assert study.record.classes == [0, 1, 2] and all(
        type(one) is int for one in study.record.classes
    )


def test_weights_groups_splitters_and_scorers_see_the_rows_that_are_left():
    weights = RNG.uniform(size=48)
    groups = RNG.integers(0, 6, 48)
    gaps = with_gaps(Y)
    how = {**HOW, "sample_weight": weights, "cv": GroupKFold(3)}
    frame = pd.DataFrame(X, columns=list("abc"))
    seen = []

    def scorer(estimator, rows, y):
        seen.append((type(rows), len(rows), len(y)))
        return float(-((estimator.predict(rows) - y) ** 2).mean())

    study = gputune.tune(
        "mlp", frame, gaps, groups=groups, missing_target="drop", scoring=scorer, **how
    )
    how["sample_weight"] = weights[KEPT]
    other = gputune.tune(
        "mlp", frame.iloc[KEPT], Y[KEPT], groups=groups[KEPT], scoring=scorer, **how
    )
    assert scores(study) == scores(other)
    assert {kind for kind, *_ in seen} == {pd.DataFrame} and all(a == b for _, a, b in seen)
    tensors = gputune.tune(
        "mlp", X, gaps, missing_target="drop", **{**HOW, "sample_weight": torch.from_numpy(weights)}
    )
    assert np.isfinite(tensors.best_score)


def test_folds_of_positions_and_wrong_lengths_are_refused():
    gaps = with_gaps(Y)
    pairs = list(KFold(3).split(X))
    with pytest.raises(
        InputError, match="cv holds row positions, but missing_target='drop' changes the positions"
    ):
        gputune.tune("mlp", X, gaps, missing_target="drop", **{**HOW, "cv": pairs})
    with pytest.raises(
        InputError,
        match=r"sample_weight must have one number per row, shape \(48,\), got 45 numbers",
    ):
        gputune.tune("mlp", X, gaps, missing_target="drop", sample_weight=np.ones(45), **HOW)
    with pytest.raises(InputError, match="groups must have one value per row"):
        gputune.tune("mlp", X, gaps, missing_target="drop", groups=np.ones(45), **HOW)
    with pytest.raises(InputError, match="y is missing in every row"):
        gputune.tune("mlp", X, [None] * 48, missing_target="drop", **HOW)
    with pytest.raises(
        InputError, match="missing_target must be one of 'error', 'drop', got 'skip'"
    ):
        gputune.tune("mlp", X, gaps, missing_target="skip", **HOW)


def test_several_numbers_a_row_are_dropped_if_one_is_missing():
    y = np.column_stack([Y, Y])
    y[5, 1] = np.nan
    how = {**HOW, "missing_target": "drop"}
    study = gputune.tune(gputune.models.MLP, X.astype("float32"), y, **how)
    assert study.record.fingerprint["rows"] == 47 and study.best_model().predict(
        X.astype("float32")
    ).shape == (48, 2)


def test_the_command_line_drops_them_and_resumes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = pl.DataFrame(X, schema=list("abc")).with_columns(y=pl.Series(with_gaps(Y).tolist()))
    table.write_csv("rows.csv")
    call = ["tune", "rows.csv", "--target", "y", "--trials", 2, "--epochs", 2, "--cv", 2]
    message = refusal(*call)
    assert "--missing-target drop" in message and "line 5" in message
    text = output(*call, "--missing-target", "drop")
    assert "3 rows without a value of 'y' were left out" in " ".join(text.split())
    assert "36 rows to search on and 9 held out" in " ".join(text.split())
    study = gputune.Study.open("gputune-out/study.db")
    assert study.record.source["missing_target"] == "drop" and study.best_model().predict(
        "rows.csv"
    ).shape == (48,)
    output("resume", "gputune-out", "--trials", 3)
    assert len(gputune.Study.open("gputune-out/study.db").trials) == 3
    evaluate = ["evaluate", "gputune-out/model", "rows.csv"]
    message = refusal(*evaluate)
    assert "--missing-target drop" in message and "line 5" in message
    told = json.loads(output(*evaluate, "--missing-target", "drop", "--format", "json"))
    assert told["rows"] == 45 and "3 rows without a value of 'y' were left out" in told["notes"][0]
    assert "3 rows without" in output(*evaluate, "--missing-target", "drop")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_booleans_of_a_column_stay_booleans(suffix, tmp_path):
    values = [None if i in LOST else i % 2 == 0 for i in range(48)]
    frame = pl.DataFrame(X, schema=list("abc")).with_columns(y=pl.Series(values))
    path = tmp_path / f"t.{suffix}"
    frame.write_csv(path) if suffix == "csv" else frame.write_parquet(path)
    for given in (path, frame, frame.to_pandas()):
        source = read_source(given, "y", missing_target="drop")
        target = check_target(source.y, n_rows=len(source.X))
        assert target.classes.dtype == bool and source.y.tolist() == [i % 2 == 0 for i in KEPT]
