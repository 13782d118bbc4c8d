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


def test_equal_contents_give_equal_digests(tmp_path):
    pl.DataFrame(COLUMNS).write_csv(tmp_path / "t.csv")
    target = check_target(Y, n_rows=3)
    whole = fingerprint(as_table(pd.DataFrame(COLUMNS)), target)
    assert (whole["rows"], whole["columns"], len(whole["sha256"])) == (3, 3, 64)
    for table in (as_table(pl.DataFrame(COLUMNS)), read_table(tmp_path / "t.csv")):
        assert fingerprint(table, target)["sha256"] == digest()
        assert fingerprint(table, Y)["sha256"] == digest()
    assert digest(y=Y.astype(object)) == digest()
    assert digest({"a": [0.0, 1]}, y=Y[:2]) == digest({"a": [-0.0, 1]}, y=Y[:2])


@pytest.mark.parametrize(
    ("columns", "y"),
    [
        (COLUMNS | {"a": [1.0, 2.0, 3.0]}, Y),
        (COLUMNS | {"a": [1.0, None, 3.0 + 1e-15]}, Y),
        (COLUMNS | {"s": ["x", "None", "yz"]}, Y),
        (COLUMNS | {"s": ["xy", None, "z"]}, Y),
        (COLUMNS | {"b": [1, 0, 1]}, Y),
        (COLUMNS | {"c": [1, 2, 3]}, Y),
        ({name.replace("a", "A"): values for name, values in COLUMNS.items()}, Y),
        (dict(reversed(COLUMNS.items())), Y),
        (COLUMNS, np.array(["no", "no", "yes"])),
        (COLUMNS, np.array([0, 1, 0])),
    ],
)
def test_any_change_changes_it(columns, y):
    assert digest(columns, y) != digest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_tensors(dtype):
    X = torch.arange(6).reshape(2, 3).to(dtype)
    y = check_target([0.5, 1.5], n_rows=2)
    found = fingerprint(X, y)
    assert (found["rows"], found["columns"]) == (2, 3) and fingerprint(X.T.contiguous().T, y) == found
    assert found["sha256"] not in [fingerprint(other, y)["sha256"] for other in (X.reshape(3, 2)[:2], X + 1)]
