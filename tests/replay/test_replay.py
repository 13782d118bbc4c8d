"""Every search of searches.py gives the table that is kept: how a move of code is seen to be only a
move.

In ``tests/``, ``python -m replay.test_replay NAME ...`` records tables anew, where a change of
numbers is meant.
"""

import inspect
import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import sklearn
import torch

from gputune.modules.recorder import RECORDERS
from problems import needs_compiled_code
from replay.searches import SEARCHES
from stand_in import StandIn

TABLES = Path(__file__).with_name("tables.json")
# tables are of float64, and keep 13 digits
RELATIVE = 1e-9
ABSOLUTE = 1e-11

SINGLE = ("face regressor", "face descent")
"""What a GPU trains in single precision."""


def plain(value):
    """Return a value as JSON holds it, numbers with 13 significant digits."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.13g}")
    return value.item() if isinstance(value, np.generic) else value


def run(name, folder):
    search = SEARCHES[name]
    return plain(search(folder) if inspect.signature(search).parameters else search())


def assert_same(found, kept, place):
    """Assert that two values of JSON are equal, numbers to rounding."""
    if isinstance(kept, dict):
        assert isinstance(found, dict) and list(found) == list(kept), place
        for key, value in kept.items():
            assert_same(found[key], value, f"{place}/{key}")
    elif isinstance(kept, list):
        assert isinstance(found, list) and len(found) == len(kept), place
        for i, value in enumerate(kept):
            assert_same(found[i], value, f"{place}/{i}")
    elif isinstance(kept, float) and isinstance(found, float):
        same = math.isclose(found, kept, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
        assert same or (math.isnan(found) and math.isnan(kept)), f"{place}: {found} is not {kept}"
    else:
        assert (type(found), found) == (type(kept), kept), place


@pytest.mark.usefixtures("recorded_on_cpu")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[pytest.mark.cpu] * (name in SINGLE)
            + [needs_compiled_code] * (name == "mlp compiled"),
        )
        for name in SEARCHES
    ],
)
def test_a_search_gives_the_table_that_is_kept(name, tmp_path):
    if name == "groups and include" and sklearn.__version__.startswith("1.6."):
        pytest.skip("scikit-learn 1.6 shares groups out to folds in another way")
    assert_same(run(name, tmp_path), json.loads(TABLES.read_text())[name], name)


def test_backends_agree():
    tables = json.loads(TABLES.read_text())
    assert list(tables) == list(SEARCHES)
    for other, first in (
        ("mlp eager", "mlp compiled"),
        ("mlp graph", "mlp compiled"),
        ("module graph", "module"),
    ):
        assert_same(tables[other], tables[first], other)


def record(names):
    """Write the tables of these searches, or of all."""
    RECORDERS["cpu"] = StandIn
    tables = json.loads(TABLES.read_text()) if TABLES.exists() else {}
    for name in names or SEARCHES:
        with tempfile.TemporaryDirectory() as folder:
            tables[name] = run(name, Path(folder))
    lines = (
        f"{json.dumps(name)}: {json.dumps(tables[name])}" for name in SEARCHES if name in tables
    )
    TABLES.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    record(sys.argv[1:])
