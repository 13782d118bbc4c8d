"""The same contents give the same digest, any change another."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch

from gputune.data.files import read_table
from gputune.data.source import fingerprint
from gputune.data.table import as_table
from gputune.data.target import check_target

COLUMNS = {"a": [1.0, None, 3.0], "s": ["x", None, "yz"], "b": [True, False, True]}
Y = np.array(["no", "yes", "no"])


def digest(columns=COLUMNS, y=Y):
    return fingerprint(as_table(pd.DataFrame(columns)), check_target(y, n_rows=len(y)))["sha256"]


def test_what_it_holds():
    found = fingerprint(as_table(pd.DataFrame(COLUMNS)), check_target(Y, n_rows=3))
    assert (found["rows"], found["columns"]) == (3, 3)
    assert len(found["sha256"]) == 64
    assert int(found["sha256"], 16)


def test_equal_contents_give_equal_digests(tmp_path):
    pl.DataFrame(COLUMNS).write_csv(tmp_path / "t.csv")
    target = check_target(Y, n_rows=3)
    for table in (as_table(pl.DataFrame(COLUMNS)), read_table(tmp_path / "t.csv")):
        assert fingerprint(table, target)["sha256"] == digest()
        assert fingerprint(table, Y)["sha256"] == digest()
    assert digest(y=Y.astype(object)) == digest()
    assert digest({"a": [0.0, 1]}, y=Y[:2]) == digest({"a": [-0.0, 1]}, y=Y[:2])


@pytest.mark.parametrize(
    "change",
    [
        {"a": [1.0, 2.0, 3.0]},
        {"a": [1.0, None, 3.0 + 1e-15]},
        {"s": ["x", "None", "yz"]},
        {"s": ["xy", None, "z"]},
        {"b": [1, 0, 1]},
        {"c": [1, 2, 3]},
    ],
)
def test_any_change_of_x_changes_it(change):
    assert digest({**COLUMNS, **change}) != digest()


def test_names_order_and_target_count():
    renamed = {"A" if name == "a" else name: values for name, values in COLUMNS.items()}
    assert digest(renamed) != digest()
    assert digest(dict(reversed(COLUMNS.items()))) != digest()
    assert digest(y=np.array(["no", "no", "yes"])) != digest()
    assert digest(y=np.array([0, 1, 0])) != digest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_tensors(dtype):
    X = torch.arange(6).reshape(2, 3).to(dtype)
    y = check_target([0.5, 1.5], n_rows=2)
    found = fingerprint(X, y)
    assert (found["rows"], found["columns"]) == (2, 3)
    assert fingerprint(X.T.contiguous().T, y) == found
    assert fingerprint(X.reshape(3, 2)[:2], y)["sha256"] != found["sha256"]
    assert fingerprint(X + 1, y)["sha256"] != found["sha256"]
