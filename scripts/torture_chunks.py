"""The part of torture.py that kills a search within its chunks: it goes on from the states that they keep."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from sklearn.datasets import load_iris

import gputune

EPOCHS = 500


def search_long(path: Path, method: str | gputune.Halving, epochs: int) -> gputune.Study:
    """Search with a few trials that train for long, and keep their states every tenth of a second."""
    X, y = load_iris(return_X_y=True)
    space = {"lr": [1e-4, 1e-3, 1e-2], "width": [8, 40], "optimizer": ["adamw", "adamhd"]}
    return gputune.tune(
        "mlp", X, y, space=space, n_trials=6, include_default=False, max_epochs=epochs, cv=3, method=method,
        memory="1KB", workers=1, study=path, checkpoint_seconds=0.1, verbose=0,
    )  # fmt: skip


def kills_in_chunks(
    folder: Path,
    count: int,
    method: str | gputune.Halving,
    table: Callable,
    begin: Callable,
    end: Callable,
    seed: int,
    epochs: int = EPOCHS,
) -> dict[str, int]:
    """Kill a search so often at random moments of its training; the last begin goes on to the end."""
    whole, path, draw = folder / "whole.db", folder / "chunks.db", random.Random(seed)
    assert end(begin(search_long, whole, method, epochs)) == 0
    found = {"kills": 0, "with a state": 0}
    for _ in range(count):
        child = begin(search_long, path, method, epochs)
        time.sleep(draw.uniform(0.2, 0.8))
        os.kill(child, signal.SIGKILL)
        if end(child) == 0:
            break
        found["kills"] += 1
        found["with a state"] += any(folder.glob("chunks.db.state/*.safetensors"))
    failed = end(begin(search_long, path, method, epochs)) != 0
    rows, expected = table(path), table(whole)
    found |= {
        "trials": len(rows),
        "failed": int(failed),
        "files left": len(list(folder.glob("chunks.db[.-]*"))),
        "different": sum(a != b for a, b in zip(rows, expected, strict=True)),
    }
    for file in (whole, path):
        file.unlink()
    return found
