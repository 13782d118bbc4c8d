"""The figures of ``gputune tune --profile``: share of the matrix-product peak, overhead per trial.

Digits, 5 folds, 20 epochs, Adam, batch sizes 16 to 256. Wide trials show how close the steps come
to the machine's matrix products. Many very narrow trials show the cost per trial of planning,
storing, reporting and everything else except training.
"""

import re
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from dataclasses import dataclass

from benchmark.report import publish, table

EPOCHS = 20
REPEATS = 3
WIDE = (256, 128)
WIDE_TRIALS = 32
NARROW = 16
NARROW_TRIALS = 10_000
TRAINING = ("steps", "scores")  # the other lines are overhead of a trial
HEAD = (
    "width|trials|seconds|steps, GFLOP/s|the product of 1024 x 1024 matrices|share|ms a trial "
    "beside training"
)


@dataclass(frozen=True)
class Run:
    """One command: its seconds in total and by line of its table, and GFLOP/s of steps and product.

    The last two are None if the command did not report them.
    """

    width: int
    trials: int
    seconds: float
    parts: dict[str, float]
    reached: float | None
    peak: float | None

    @property
    def share(self) -> float:
        """The share of the product's speed that the steps reached."""
        return self.reached / self.peak if self.reached and self.peak else float("nan")

    @property
    def beside(self) -> float:
        """Overhead in milliseconds per trial: everything except steps and scores."""
        without = sum(self.parts[name] for name in TRAINING)
        return (self.seconds - without) / self.trials * 1e3


def run(options: Namespace) -> int:
    epochs = options.epochs or EPOCHS
    found = [
        measure(width, WIDE_TRIALS, epochs)
        for _ in range(options.repeats or REPEATS)
        for width in WIDE
    ]
    found.append(measure(NARROW, NARROW_TRIALS, epochs))
    rows = (
        f"{r.width}|{r.trials:,}|{r.seconds:.1f}|{r.reached}|{r.peak}|{r.share:.0%}|{r.beside:.2f}"
        for r in found
    )
    shares = {
        width: statistics.median(r.share for r in found if r.width == width) for width in WIDE
    }
    seconds = (
        "|".join([str(r.width), *(f"{number:.2f}" for number in r.parts.values())]) for r in found
    )
    parts = (
        (__doc__ or "").split("\n", 2)[2],
        table(HEAD, rows),
        "\n".join(f"Width {width}: median share {share:.0%}." for width, share in shares.items()),
        f"Beside training is all but {' and '.join(TRAINING)}. The seconds of each run:",
        table("|".join(["width", *found[0].parts]), seconds),
    )
    return publish(options.out, "profile", "Where the time goes", *parts, epochs=epochs, runs=found)


def measure(width: int, trials: int, epochs: int) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        command = [  # -P: the installed package, whatever the current folder holds
            sys.executable,
            "-P",
            "-m",
            "gputune",
            "tune",
            "sklearn:digits",
            "--trials",
            str(trials),
            "--no-default",
            "--optimizer",
            "adam",
            "--epochs",
            str(epochs),
            "--profile",
            "--out",
            f"{folder}/out",
            "--space",
            "lr=1e-4..1e-2:log",
            "batch_size=16,32,64,128,256",
            f"width={width}",
        ]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return read(said, width, trials)


def read(said: str, width: int, trials: int) -> Run:
    """Return the numbers in the command's table.

    The command prints the parts of training as shares of it.
    """
    table = said[said.index("Where the time went:") :]
    parts = {
        name: float(number)
        for name, number in re.findall(r"^  (\S.*?) +([\d.]+) s +\d+%$", table, re.M)
    }
    seconds = sum(parts.values())
    training = parts.pop("training")
    for name, share in re.findall(r"^    (\S.*?) +(\d+)% of it$", table, re.M):
        parts[name] = training * int(share) / 100
    speeds = re.search(r"Steps reached ([\d.]+) GFLOP/s, \d+% of the ([\d.]+) that", table)
    reached, peak = (float(speeds[1]), float(speeds[2])) if speeds else (None, None)
    return Run(width, trials, seconds, parts, reached, peak)
