"""The part of torture.py that kills a search within its chunks: it goes on from the states that they keep."""

import random
from collections.abc import Callable
from pathlib import Path

from sklearn.datasets import load_iris
from torture_processes import begin, end, kill

import gputune
from gputune.engine import checkpoint
from gputune.engine.checkpoint import CheckpointFolder

TRIALS = 6


def search_long(path: Path, method: str | gputune.Halving, epochs: int, **options: object) -> gputune.Study:
    """Search with a few trials, each a chunk of its own."""
    X, y = load_iris(return_X_y=True)
    space = {"lr": [1e-4, 1e-3, 1e-2], "width": [8, 40], "optimizer": ["adamw", "adamhd"]}
    return gputune.tune(
        "mlp", X, y, space=space, n_trials=TRIALS, include_default=False, max_epochs=epochs, cv=3, method=method,
        memory="1KB", workers=1, study=path, verbose=0, **options,
    )  # fmt: skip


def _keeping(path: Path, method: str | gputune.Halving, epochs: int) -> None:
    """Search, and keep a state after every epoch but a chunk's last."""
    checkpoint._WRITING_SHARE = 0
    search_long(path, method, epochs, checkpoint_seconds=1e-9)


def kills_in_chunks(
    folder: Path, count: int, method: str | gputune.Halving, table: Callable, seed: int, epochs: int = 500
) -> dict[str, int]:
    """Kill a search so often at random moments of its training; the last begin goes on to the end."""
    whole, path, draw = folder / "whole.db", folder / "chunks.db", random.Random(seed)
    assert end(begin(search_long, whole, method, epochs)) == 0
    found = {"kills": 0, "with a state": 0}
    shortest = method.min_epochs if isinstance(method, gputune.Halving) else epochs
    # States that one run may keep: none ends before its kill, and the first one is killed within its first chunk.
    most = min((TRIALS * (shortest - 1) - 1) // count, shortest - 2)
    for _ in range(count):
        least, pause = draw.randint(1, most), draw.uniform(0, 0.02)
        call = (CheckpointFolder, "write")
        kill(_keeping, path, method, epochs, method=call, least=least, most=most, pause=pause)
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
