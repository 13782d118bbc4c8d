"""Do to a study what a night can do to it, and count what is lost: kills, damage, a crowd, a full disk.

Every search runs in processes of its own, which are killed by real signals; the table at the end is compared, bit for
bit, with that of a search that nothing disturbed. Prints one line of counts for each part; ends with 1 where one of
them is not what it must be. Takes some minutes with its defaults.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scipy.stats import loguniform
from sklearn.datasets import load_iris
from torture_chunks import kills_in_chunks
from torture_damage import cuts, flips
from torture_disk import full_disk, storing
from torture_processes import begin, end, kill

import gputune
from gputune.study.claims import Claims
from gputune.study.store import Store

STORE_CALLS = (
    (Store, "add_trials"),
    (Store, "add_chunks"),
    (Store, "finish"),
    (Claims, "_take"),
    (Claims, "_delete"),
)


def search(path: Path, n_trials: int) -> gputune.Study:
    """Search with tiny trials, each a chunk of its own."""
    X, y = load_iris(return_X_y=True)
    space = {"lr": loguniform(1e-4, 0.1), "width": [4, 8]}
    return gputune.tune(
        "mlp", X[::5], y[::5], space=space, n_trials=n_trials, include_default=False, max_epochs=1, cv=2,
        memory=1024, workers=1, study=path, checkpoint_seconds=1, verbose=0,
    )  # fmt: skip


def table(path: Path) -> list[tuple]:
    """Return every trial of a study but its times, in a form that compares bits."""
    study = gputune.Study.open(path)
    return [
        (t.number, repr(t.params), t.state, np.array([t.score, *t.fold_scores]).tobytes(), curve.tobytes())
        for t, curve in zip(study.trials, study.curves)
    ]


@cache
def undisturbed(n_trials: int) -> list[tuple]:
    """Return the table of a search that nothing disturbed."""
    with tempfile.TemporaryDirectory() as folder:
        assert end(begin(search, Path(folder) / "study.db", n_trials)) == 0
        return table(Path(folder) / "study.db")


def kills(folder: Path, count: int, n_trials: int, seed: int = 0) -> dict[str, int]:
    """Kill a search so often at random moments, each time one that goes on with the same study."""
    path, draw = folder / "kills.db", random.Random(seed)
    expected, before = undisturbed(n_trials), {}
    found = {"kills": 0, "lost": 0, "changed": 0, "unopened": 0}
    most = (n_trials - 1) // count  # results of one run: none ends before its kill
    while found["kills"] < count:
        least, pause = draw.randint(1, most), draw.uniform(0, 0.01)
        kill(search, path, n_trials, method=(Store, "finish"), least=least, most=most, pause=pause)
        found["kills"] += 1
        try:
            now = {row[0]: row for row in table(path) if row[2] != "waiting"} if path.exists() else {}
        except gputune.InputError:
            found["unopened"] += 1
            continue
        found["lost"] += len(before.keys() - now.keys())
        found["changed"] += sum(row != now.get(number, row) for number, row in before.items())
        before = now
    assert end(begin(search, path, n_trials)) == 0
    rows = table(path)
    return {
        **found,
        "trials": len(rows),
        "unfinished": sum(row[2] != "complete" for row in rows),
        "files left": len(list(folder.glob("kills.db-*"))),
        "different": sum(a != b for a, b in zip(rows, expected, strict=True)),
    }


def fault_points(folder: Path, n_trials: int) -> dict[str, int]:
    """Kill a search before its first call of the store, before its second, and so on; each goes on to its end."""
    expected, found = undisturbed(n_trials), {"fault points": 0, "different": 0}
    for point in range(1, 10_000):
        path = folder / f"fault{point}.db"
        code = end(begin(_search_until, point, path, n_trials))
        if code == 0:
            return found
        assert code == -signal.SIGKILL, code
        found["fault points"] += 1
        assert end(begin(search, path, n_trials)) == 0
        found["different"] += table(path) != expected
        left = [place.name for place in folder.iterdir() if place.name.startswith(path.name)]
        assert left == [path.name], left
        path.unlink()
    raise AssertionError("the search never ends")


def _search_until(point: int, path: Path, n_trials: int) -> None:
    """Search, and be killed before a call of the store."""
    calls = 0

    def counted(original: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return call

    for owner, name in STORE_CALLS:
        setattr(owner, name, counted(getattr(owner, name)))
    search(path, n_trials)


def crowd(folder: Path, processes: int, n_trials: int) -> dict[str, int]:
    """Let several processes begin the same search at once."""
    path = folder / "crowd.db"
    children = [begin(search, path, n_trials) for _ in range(processes)]
    failed = sum(end(child) != 0 for child in children)
    rows, expected = table(path), undisturbed(n_trials)
    return {
        "processes": processes,
        "failed": failed,
        "trials": len(rows),
        "unfinished": sum(row[2] != "complete" for row in rows),
        "different": sum(a != b for a, b in zip(rows, expected, strict=True)),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run every part and print its counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=60, help="times that a search is killed (60)")
    parser.add_argument("--trials", type=int, default=600, help="trials of the search that is killed (600)")
    parser.add_argument("--chunk-kills", type=int, default=20, help="times that long training is killed (20)")
    parser.add_argument("--processes", type=int, default=8, help="of the crowd (8)")
    parser.add_argument("--crowd-trials", type=int, default=4000, help="trials that the crowd shares (4000)")
    parser.add_argument("--flips", type=int, default=1000, help="bits that are flipped, one at a time (1000)")
    parser.add_argument("--stored", type=int, default=10_000, help="trials whose storing is timed (10000)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the searches run in forks of this process
    folder = Path(tempfile.mkdtemp(prefix="gputune-torture-"))
    parts: dict[str, Callable[[], dict[str, int]]] = {
        "kill -9 at random": lambda: kills(folder, options.kills, options.trials, options.seed),
        "kill -9 between store calls": lambda: fault_points(folder, 4),
        "kill -9 within chunks": lambda: _within_chunks(folder, options, "random"),
        "kill -9 within chunks, halving": lambda: _within_chunks(
            folder, options, gputune.Halving(min_epochs=50)
        ),
        "one study, many processes": lambda: crowd(folder, options.processes, options.crowd_trials),
        "cut at every sector": lambda: cuts(folder),
        "flipped bits": lambda: flips(folder, options.flips, options.seed),
        "full disk": lambda: full_disk(folder, search, table, undisturbed(60)),
        "storing": lambda: storing(folder, options.stored),
    }
    wrong = 0
    for name, part in parts.items():
        start = time.monotonic()
        counts = part()
        wrong += sum(bool(counts.get(word)) for word in BAD)
        words = ", ".join(f"{value} {word}" for word, value in counts.items())
        print(f"{name}: {words} ({time.monotonic() - start:.0f} s)", flush=True)
    shutil.rmtree(folder)
    return int(wrong > 0)


def _within_chunks(
    folder: Path, options: argparse.Namespace, method: str | gputune.Halving
) -> dict[str, int]:
    return kills_in_chunks(folder, options.chunk_kills, method, table, options.seed)


BAD = (
    "lost",
    "changed",
    "unopened",
    "unfinished",
    "different",
    "failed",
    "files left",
    "wrong values",
    "other errors",
)

if __name__ == "__main__":
    sys.exit(main())
