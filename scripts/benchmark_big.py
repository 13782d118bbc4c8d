"""The large table of the benchmark: 100,000 rows x 50 columns through gputune alone, its time and peak memory."""

import os
import resource
import sys
import time

import numpy as np
from benchmark_cores import stop_workers
from benchmark_gputune import train_with_gputune
from benchmark_work import WIDTHS, Work, draw_trials


def big_work(*, n_trials: int, epochs: int, rows: int = 100_000) -> Work:
    """Return synthetic numbers, 50 columns and 5 classes that a noisy linear map decides, with 3 folds."""
    from sklearn.model_selection import KFold

    rng = np.random.default_rng(0)
    X = rng.standard_normal((rows, 50), dtype=np.float32)
    strength = X @ rng.standard_normal((50, 5), dtype=np.float32)
    y = (strength + 2 * rng.standard_normal(strength.shape, dtype=np.float32)).argmax(1)
    folds = list(KFold(3, shuffle=True, random_state=0).split(X))
    return Work("big", X, y, folds, draw_trials(n_trials, WIDTHS["wide"]), epochs)


def run_big(work: Work, device: str) -> None:
    """Train and print: first gputune's plan, then the time and the memory."""
    stop_workers()
    begin = time.perf_counter()
    scores = train_with_gputune(work, device=device, verbose=2).scores
    seconds = time.perf_counter() - begin
    stop_workers()  # the system counts a child when it has ended
    trials, (rows, columns) = len(work.trials), work.X.shape
    print(
        f"{rows:,} rows x {columns} columns, {trials} trials, {len(work.folds)} folds, {work.epochs} epochs"
    )
    print(f"{seconds:.1f} s, {trials / seconds:.2f} trials/s, mean accuracy {scores.mean():.4f}")
    print(
        f"peak memory: {peak_gib(resource.RUSAGE_SELF):.2f} GiB in this process, "
        f"{peak_gib(resource.RUSAGE_CHILDREN):.2f} GiB in its largest child (the mapped data counts in both); "
        f"the machine has {machine_gib():.1f} GiB"
    )


def peak_gib(who: int) -> float:
    """Return the largest resident memory so far, of this process or of its largest ended child."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(who).ru_maxrss * unit / 2**30


def machine_gib() -> float:
    """Return the memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
