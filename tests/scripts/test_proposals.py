"""The comparison of proposals by look-up, on a small table that the test makes."""

import json

import numpy as np
import pytest


@pytest.fixture
def folder(tmp_path):
    """A folder with a table of 6 x 6 x 2 configurations and two seeds; the best one is (4, 4, 0)."""
    space = {"x": list(range(6)), "y": [0.1 * i for i in range(6)], "kind": ["a", "b"]}
    index = np.stack(np.meshgrid(range(6), range(6), range(2), indexing="ij"), -1).reshape(-1, 3)
    errors = 1 + (index[:, 0] - 4) ** 2 + (index[:, 1] - 4) ** 2 + index[:, 2]
    about = json.dumps({"space": space, "minimize": True}).encode()
    metric = errors[:, None] * np.array([1.0, 1.01])
    np.savez(
        tmp_path / "grid.npz", index=index, metric=metric, space=np.frombuffer(about, np.uint8)
    )
    return tmp_path


def test_a_small_table(script, folder, monkeypatch, capsys):
    module = script("proposals")
    monkeypatch.setattr(module, "SIZES", (40,))
    monkeypatch.setattr(module, "SLOTS", 8)
    path = folder / "figures.json"
    module.main([str(folder), "--runs", "2", "--json", str(path)])
    shown = capsys.readouterr().out
    assert "grid: rank correlation with the final score: epoch 3: 0.9" in shown
    figures = json.loads(path.read_text())
    rows = {row["method"]: row for row in figures["rows"]}
    assert rows.keys() == module.METHODS.keys()
    assert rows["random"]["epochs"] == 1 and rows['method="tpe", halving, slots']["epochs"] < 0.6
    for row in rows.values():
        assert len(row["shares"]) == 2 and max(row["shares"]) <= 1
    assert rows['method="tpe", halving, slots']["share"] > 0.8


def test_the_share_of_a_configuration(script, folder):
    table = script("proposals").Table(folder / "grid.npz")
    assert table.share({"x": 4, "y": 4, "kind": 0}) == 1
    assert table.share({"x": 0, "y": 0, "kind": 1}) < 0
    assert set(table.correlations()) == {3, 9}
