"""Tables with many rows: the memory of a search."""

import sys

import pytest

from forked import Fork

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# 17 columns as in heart_2020: four numbers, the others texts of few levels.
SCRIPT = """
import os, sys
from pathlib import Path
import numpy as np
import pandas as pd
import gputune

rng = np.random.default_rng(0)
n = int(sys.argv[1])
columns = {f"number{j}": rng.normal(size=n) for j in range(4)}
for j, levels in enumerate((2, 2, 2, 2, 2, 13, 6, 4, 2, 5, 2, 2, 2)):
    columns[f"text{j}"] = np.array([f"level {i}" for i in range(levels)])[rng.integers(levels, size=n)]
y = np.where(columns["number0"] + rng.normal(size=n) > 1, "Yes", "No")
gputune.tune(
    "realmlp", pd.DataFrame(columns), y, n_trials=8, cv=3, max_epochs=1, scoring="roc_auc",
    random_state=0, workers=2, verbose=0,
)
processes = [os.getpid()]
for thread in Path("/proc/self/task").iterdir():
    processes += (thread / "children").read_text().split()
for process in processes:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):  # in KiB
            print(int(line.split()[1]) >> 10)
"""


@pytest.mark.long
def test_eight_realmlps_of_320_000_rows_in_three_folds_take_less_than_4_gib():
    """Peaks of resident memory of both processes; pages that they share count twice."""
    out, err = Fork(SCRIPT, 320_000).communicate()
    assert err == ""
    peaks = [int(line) for line in out.split()]
    assert len(peaks) >= 2
    assert sum(peaks) < 4 << 10, peaks
