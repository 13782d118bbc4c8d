"""How gputune's time and memory grow with trials, folds and epochs: each in a fresh process of its own.

python scripts/benchmark_growth.py TRIALS FOLDS EPOCHS     one measurement, as JSON
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmark_big import peak_gib
from benchmark_gputune import train_with_gputune
from benchmark_work import Work, digits_work

FOLDS = 5


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
    times = []
    while not times or times[-1] < factor:
        times.append(2 * times[-1] if times else 1)
    cases = [
        *((trials * n, FOLDS, epochs) for n in times),
        *((trials, FOLDS * n, epochs) for n in times[1:]),
        *((trials, FOLDS, epochs * n) for n in times[1:]),
    ]
    return [in_fresh_process(*case) for case in cases]


def in_fresh_process(trials: int, folds: int, epochs: int) -> Growth:
    """Measure one search in a process that has done nothing else."""
    command = [sys.executable, __file__, *map(str, (trials, folds, epochs))]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return Growth(**json.loads(said))


def measure_here(trials: int, folds: int, epochs: int) -> Growth:
    """Measure one search in this process."""
    from time import perf_counter

    from sklearn.model_selection import StratifiedKFold

    digits = digits_work("narrow", n_trials=trials, epochs=epochs)
    cut = list(StratifiedKFold(folds, shuffle=True, random_state=0).split(digits.X, digits.y))
    work = Work("growth", digits.X, digits.y, cut, digits.trials, epochs)
    before, begin = peak_mib(), perf_counter()
    outcome = train_with_gputune(work)
    seconds = perf_counter() - begin - outcome.compile
    return Growth(trials, folds, epochs, seconds, before, peak_mib())


def peak_mib() -> float:
    """Return the largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    # Linux lets a child begin with its parent's peak in getrusage, but not here.
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.M) if status.exists() else None
    return int(found[1]) / 1024 if found else peak_gib(0) * 1024


def table(grown: Sequence[Growth]) -> list[str]:
    """Return the lines of the report."""
    return [
        "## What grows with trials x folds x epochs",
        "",
        "Digits, widths 16 to 64, each search in a fresh process, without compiling. Linear growth shows as a time for "
        "each trial, fold and epoch that does not rise; memory is the peak of the process, and how far it is above "
        "what the imports and the data took.",
        "",
        "| trials | folds | epochs | trials x folds x epochs | seconds | µs for each | peak MiB | above the start |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {g.trials} | {g.folds} | {g.epochs} | {g.work:,} | {g.seconds:.2f} | {g.seconds / g.work * 1e6:.0f} "
            f"| {g.peak:.0f} | {g.peak - g.before:.0f} |"
            for g in grown
        ),
    ]


if __name__ == "__main__":
    print(json.dumps(asdict(measure_here(*map(int, sys.argv[1:4])))))
