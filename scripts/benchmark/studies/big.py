"""Much work through gputune alone: a table of 100,000 rows, and how time and memory grow with the work.

What grows is measured in fresh processes: python -m benchmark.studies.big TRIALS FOLDS EPOCHS prints one as JSON.
"""

import json
import os
import re
import resource
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmark.engines.gputune import train
from benchmark.report import card, table
from benchmark.work import WIDTHS, Work, digits_work, draw_trials, stop_workers

ROWS, EPOCHS = 100_000, 5
FOLDS = 5  # of the least work that grows


def run(options: Namespace) -> int:
    """Train the large table and print: first gputune's plan, then the time and the memory; return 0."""
    work = big_work(n_trials=options.trials, epochs=options.epochs or EPOCHS, rows=ROWS)
    stop_workers()
    begin = time.perf_counter()
    scores = train(work, device="cuda" if card() else "cpu", verbose=2).scores
    seconds = time.perf_counter() - begin
    stop_workers()  # the system counts a child when it has ended
    trials, (rows, columns) = len(work.trials), work.X.shape
    print(
        f"{rows:,} rows x {columns} columns, {trials} trials, {len(work.folds)} folds, {work.epochs} epochs\n"
        f"{seconds:.1f} s, {trials / seconds:.2f} trials/s, mean accuracy {scores.mean():.4f}\n"
        f"peak memory: {peak_gib(resource.RUSAGE_SELF):.2f} GiB in this process, "
        f"{peak_gib(resource.RUSAGE_CHILDREN):.2f} GiB in its largest child (the mapped data counts in both); "
        f"the machine has {machine_gib():.1f} GiB"
    )
    return 0


def big_work(*, n_trials: int, epochs: int, rows: int) -> Work:
    """Return synthetic numbers, 50 columns and 5 classes that a noisy linear map decides, with 3 folds."""
    from sklearn.model_selection import KFold

    rng = np.random.default_rng(0)
    X = rng.standard_normal((rows, 50), dtype=np.float32)
    strength = X @ rng.standard_normal((50, 5), dtype=np.float32)
    y = (strength + 2 * rng.standard_normal(strength.shape, dtype=np.float32)).argmax(1)
    folds = list(KFold(3, shuffle=True, random_state=0).split(X))
    return Work("big", X, y, folds, draw_trials(n_trials, WIDTHS["wide"]), epochs)


def peak_gib(who: int) -> float:
    """Return the largest resident memory so far, of this process or of its largest ended child."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(who).ru_maxrss * unit / 2**30


def machine_gib() -> float:
    """Return the memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


@dataclass(frozen=True)
class Growth:
    """One search: seconds without compiling, and the peak memory of its process (MiB), before it and in all."""

    trials: int
    folds: int
    epochs: int
    seconds: float
    before: float
    peak: float

    @property
    def work(self) -> int:
        """Trials x folds x epochs."""
        return self.trials * self.folds * self.epochs


def measure_growth(*, trials: int, epochs: int, factor: int) -> list[Growth]:
    """Measure the least work, then twice of its trials, of its folds and of its epochs, and so on to ``factor``."""
    times = [1]
    while times[-1] < factor:
        times.append(2 * times[-1])
    cases = [
        *((trials * n, FOLDS, epochs) for n in times),
        *((trials, FOLDS * n, epochs) for n in times[1:]),
        *((trials, FOLDS, epochs * n) for n in times[1:]),
    ]
    return [in_fresh_process(*case) for case in cases]


def in_fresh_process(trials: int, folds: int, epochs: int) -> Growth:
    """Measure one search in a process that has done nothing else."""
    command = [sys.executable, "-m", "benchmark.studies.big", *map(str, (trials, folds, epochs))]
    scripts = Path(__file__).parents[2]
    said = subprocess.run(command, cwd=scripts, stdout=subprocess.PIPE, text=True, check=True).stdout
    return Growth(**json.loads(said))


def measure_here(trials: int, folds: int, epochs: int) -> Growth:
    """Measure one search in this process."""
    work = digits_work("narrow", n_trials=trials, epochs=epochs, folds=folds)
    before, begin = peak_mib(), time.perf_counter()
    outcome = train(work)
    seconds = time.perf_counter() - begin - outcome.compile
    return Growth(trials, folds, epochs, seconds, before, peak_mib())


def peak_mib() -> float:
    """Return the largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    # Linux lets a child begin with its parent's peak in getrusage, but not here.
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.M) if status.exists() else None
    return int(found[1]) / 1024 if found else peak_gib(resource.RUSAGE_SELF) * 1024


GROWN = """\
Digits, widths 16 to 64, each search in a fresh process, without compiling. Linear growth shows as a time for each
trial, fold and epoch that does not rise; memory is the peak of the process, and how far it is above what the imports
and the data took.
"""


def growth_table(grown: Sequence[Growth]) -> str:
    """Return the report's table."""
    head = "trials|folds|epochs|trials x folds x epochs|seconds|µs for each|peak MiB|above the start"
    rows = [
        (
            g.trials, g.folds, g.epochs, f"{g.work:,}", f"{g.seconds:.2f}", f"{g.seconds / g.work * 1e6:.0f}",
            f"{g.peak:.0f}", f"{g.peak - g.before:.0f}",
        )
        for g in grown
    ]  # fmt: skip
    return table(head.split("|"), rows)


if __name__ == "__main__":
    print(json.dumps(asdict(measure_here(*map(int, sys.argv[1:4])))))
