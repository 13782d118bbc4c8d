"""A study that an earlier version wrote opens in every later one, and goes on: one file of each format is kept here."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from gputune.study.repair import repair
from gputune.study.store import Candidate, Chunk, Store
from study_rows import bits, candidates, result

META = {"model": "mlp", "seed": 0, "classes": ["a", "b"], "limit": float("inf")}
TRIALS = [*candidates(range(3)), Candidate(3, {"lr": [0.1, 0.2]}, (0, 1))]
PLAN = [Chunk(0, 0, (2, 0), 1), Chunk(1, 0, (1,), 2)]
RESULTS = [result(0), result(2, state="stopped", detail={"rung": 3})]


def write(path):
    """How the file of the present format was made; run it once when the format changes, and keep the old files."""
    with Store.create(path, META) as store:
        store.add_trials(TRIALS)
        store.add_chunks(PLAN)
        store.finish(RESULTS)


@pytest.mark.parametrize("name", ["format3.db"])
def test_the_file_of_a_format_opens_and_goes_on(tmp_path, name):
    path = tmp_path / name
    shutil.copy(Path(__file__).with_name(name), path)
    with Store.open(path) as store:
        assert store.meta == META and store.plan() == PLAN
        rows = store.trials()
        assert [candidate for candidate, _ in rows] == TRIALS
        found = {r.number: r for _, r in rows if r is not None}
        assert {n: bits(r) for n, r in found.items()} == {r.number: bits(r) for r in RESULTS}
        assert found[2].detail == {"rung": 3} and np.isfinite(found[0].curve).all()
        store.finish([result(1), result(2)])
    assert repair(path, tmp_path / "repaired.db").finished == 3
