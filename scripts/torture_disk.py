"""The part of torture.py about the disk: one that fills, and how long storing takes."""

import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torture_processes import begin, end

from gputune.study.claims import Claims
from gputune.study.store import Candidate, Chunk, Result, Store

LIMIT = 200_000  # bytes that a file may have


def full_disk(folder: Path, search: Callable, table: Callable, expected: list[tuple]) -> dict[str, int]:
    """Search where files cannot grow beyond a limit, until the error; then without it, to the end."""
    path = folder / "full.db"
    code = end(begin(_search_limited, search, path, len(expected)))
    with Store.open(path) as store:
        kept = store.finished()
    failed = end(begin(search, path, len(expected))) != 0
    return {
        "clear errors": int(code == 0),
        "results kept then": kept,
        "failed": int(failed or code != 0),
        "different": sum(a != b for a, b in zip(table(path), expected, strict=True)),
    }


def _search_limited(search: Callable, path: Path, n_trials: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))
    try:
        search(path, n_trials)
    except OSError as error:
        assert path.name in str(error) and ("make room" in str(error) or "check the disk" in str(error)), (
            error
        )
    else:
        raise AssertionError("the disk was never full")


def storing(folder: Path, count: int, together: int = 64) -> dict[str, float]:
    """Store so many trials with curves of 50 epochs x 5 folds, chunk by chunk; milliseconds a trial."""
    curve = np.random.default_rng(0).random((50, 5))
    path = folder / "stored.db"
    numbers = [range(n, min(n + together, count)) for n in range(0, count, together)]
    chunks = [Chunk(i, 0, tuple(part), 1) for i, part in enumerate(numbers)]
    params = {"lr": 0.123456789, "batch_size": 32, "width": 64, "weight_decay": 1e-3}
    start = time.perf_counter()
    with Store.create(path, {}) as store, Claims(path) as claims:
        store.add_trials(Candidate(n, params, "random") for n in range(count))
        store.add_chunks(chunks)
        for chunk in chunks:
            claims.take(chunk)
            store.finish(Result(n, "complete", 0.5, (0.5,) * 5, 50, 0.1, curve) for n in chunk.trials)
    stored = time.perf_counter() - start
    start = time.perf_counter()
    with Store.open(path) as store:
        store.trials()
    read = time.perf_counter() - start
    return {
        "trials": count,
        "ms a trial to store": round(1e3 * stored / count, 4),
        "ms a trial to open and read": round(1e3 * read / count, 4),
    }
