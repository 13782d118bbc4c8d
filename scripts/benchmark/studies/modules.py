"""User's modules, tuned by gputune, by a plain PyTorch loop, and by Optuna with that loop.

The loops use one process per core. All use Adam without decay, float32, batches of 32 unless the
row says otherwise, and the learning rates of the shared list. Times include everything that a user
waits for: gputune's searches begin without built code. The loops score every epoch too, as gputune
does. The loops begin with the same weights as gputune, and use the same minibatches. The loops
train only the first trials. Their time without the start of their processes is scaled to all
trials. The engines take turns, and times are medians. Rows in which gputune is slower than required
are in bold. "CPU" is the ratio of the CPU seconds of the loop, without the start of its processes,
to all CPU seconds of gputune. Other programs on the machine hardly change it. The mean accuracy of
the trials that both trained must be the same, to 0.02. "Load" is the other work of the machine
before a row, in processes that wait for a core (0 on a quiet machine).
"""

import io
import json
import math
import os
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from unittest.mock import patch

import joblib
import numpy as np
from torch import nn

import gputune
from benchmark.engines import modules
from benchmark.engines import optuna as with_optuna
from benchmark.report import describe_machine, publish, published, table
from benchmark.work import Work, digits_work, over_cores, stop_workers
from gputune.cli.main import main as gputune_command
from gputune.native import library

AGREEMENT = 0.02
STEP_TIMES = ("plain loop", "compiled", "recorded")
ENGINES = ("gputune", "loop", "optuna")
HEAD = (
    "module|trials x folds x epochs|gputune, s|loop on all cores, s|Optuna with the loop, "
    "s|times as fast as the loop|asked for|CPU|as Optuna|accuracy: gputune, loop, Optuna|date, load"
)


@dataclass(frozen=True)
class Case:
    """A module, the size of its search, and the speed required of gputune.

    A loop trains the first ``looped`` trials. ``asked`` is the required speed relative to the loop.
    ``loss`` is passed to gputune; the loop always uses cross-entropy.
    """

    name: str
    module_class: type
    trials: int
    epochs: int
    looped: int
    asked: float
    batch_size: int = 32
    features: str = "digits"
    loss: nn.Module | None = None


CASES = (
    Case("residual net, LayerNorm, batches of 32", modules.Residual, 64, 10, 16, 12.0),
    Case(
        "residual net, LayerNorm, batches of 128",
        modules.Residual,
        64,
        10,
        16,
        6.0,
        batch_size=128,
    ),
    Case("residual net, dropout", modules.WithDropout, 64, 10, 16, 10.0),
    Case("residual net, BatchNorm", modules.WithBatchNorm, 64, 10, 16, 10.0),
    Case("residual net, SiLU", modules.WithSiLU, 64, 10, 16, 12.0),
    Case("residual net, GELU", modules.WithGELU, 64, 10, 16, 10.0),
    Case("residual net, Hardswish", modules.WithHardswish, 64, 10, 16, 10.0),
    Case("residual net, SwiGLU", modules.WithSwiGLU, 64, 10, 16, 10.0),
    Case(
        "residual net, loss=nn.CrossEntropyLoss()",
        modules.Residual,
        64,
        10,
        16,
        10.0,
        loss=nn.CrossEntropyLoss(),
    ),
    Case("residual net, spectral norm", modules.WithSpectralNorm, 16, 3, 8, 1.0),
    Case("residual net with control flow on data", modules.Branching, 16, 5, 16, 0.95),
    Case("transformer encoder", modules.Encoder, 16, 3, 8, 6.0),
    Case("MLP-Mixer", modules.Mixer, 16, 3, 8, 1.0),
    Case("GRU", modules.Recurrent, 16, 3, 8, 8.0, features="sequences"),
    Case("LSTM", modules.WithLSTM, 16, 3, 8, 7.0, features="sequences"),
    Case("TCN", modules.TCN, 16, 3, 8, 6.0, features="sequences"),
    Case("convolutional net, BatchNorm", modules.Convolutional, 16, 3, 8, 4.0, features="images"),
    Case("convolutional net, 8 x 8", modules.SmallConvolutional, 32, 5, 8, 8.0),
    Case("U-Net", modules.UNet, 16, 3, 8, 6.0, features="small images"),
    Case("graph network", modules.Graph, 16, 5, 8, 6.0, features="graphs"),
    Case("mixture of experts", modules.MixtureOfExperts, 32, 5, 8, 6.0),
    Case("short: residual net, GELU", modules.WithGELU, 8, 3, 8, 7.0),
    Case("short: graph network", modules.Graph, 7, 3, 7, 6.0, features="graphs"),
    Case("short: TCN", modules.TCN, 5, 3, 5, 6.0, features="sequences"),
    Case("short: attention with padding", modules.PaddedAttention, 7, 3, 7, 4.0, features="graphs"),
)


@dataclass(frozen=True)
class Row:
    """Measurements of a case: seconds of each engine in each repeat, and mean accuracies.

    The accuracies are of the trials that all engines trained. ``cpu`` are the CPU seconds of
    gputune and of the loop.
    """

    name: str
    work: str
    asked: float
    date: str
    load: float
    seconds: dict[str, Sequence[float]]
    accuracies: dict[str, float]
    cpu: dict[str, Sequence[float]] = field(default_factory=dict)

    def ratio(self, engine: str) -> float:
        """The speed of gputune divided by the speed of an engine; NaN if it was not measured."""
        if not self.seconds.get(engine):
            return math.nan
        return float(np.median(self.seconds[engine]) / np.median(self.seconds["gputune"]))

    def cpu_ratio(self) -> float:
        """The CPU seconds of the loop divided by those of gputune; NaN if not measured."""
        if not self.cpu:
            return math.nan
        return float(np.median(self.cpu["loop"]) / np.median(self.cpu["gputune"]))

    def row(self) -> str:
        seconds = "|".join(
            f"{np.median(self.seconds[engine]):.1f}" if self.seconds.get(engine) else "-"
            for engine in ENGINES
        )
        ratio = (
            f"{self.ratio('loop'):.2f}"
            if self.ratio("loop") >= self.asked
            else f"**{self.ratio('loop'):.2f}**"
        )
        accuracies = ", ".join(f"{value:.3f}" for value in self.accuracies.values())
        others = "|".join(
            "-" if math.isnan(value) else f"{value:.2f}"
            for value in (self.cpu_ratio(), self.ratio("optuna"))
        )
        ratios = f"{ratio}|{self.asked}|{others}"
        return f"{self.name}|{self.work}|{seconds}|{ratios}|{accuracies}|{self.date}, {self.load}"


@dataclass(frozen=True)
class Measured:
    """One search: its seconds, its CPU seconds and its scores, trials by folds."""

    seconds: float
    cpu: float
    scores: np.ndarray


def run(options: Namespace) -> int:
    """Measure the chosen rows, print them, and write them next to the earlier ones.

    A row in which the accuracies differ is left out. Returns 1 if there is such a row.
    """
    if options.steps:
        return print_steps(options.rows)
    machine = describe_machine()
    what = "modules-small" if options.small else "modules"
    rows = {row.name: row for row in published(options.out, what, machine, "rows", Row)}
    unequal: list[str] = []
    for case in CASES:
        if options.rows and not any(word in case.name for word in options.rows):
            continue
        if options.small:
            case = replace(case, looped=max(1, case.looped // 4))
        row = rows[case.name] = compare(case, options.repeats or 3, is_small=options.small)
        print(
            f"{row.name}: {row.ratio('loop'):.2f}x, CPU {row.cpu_ratio():.2f}x, Optuna "
            f"{row.ratio('optuna'):.2f}x",
            flush=True,
        )
        if max(row.accuracies.values()) - min(row.accuracies.values()) > AGREEMENT:
            del rows[case.name]
            accuracies = ", ".join(f"{name} {value:.3f}" for name, value in row.accuracies.items())
            unequal.append(
                f"{case.name} is left out: its mean accuracies differ by more than {AGREEMENT} "
                f"({accuracies})."
            )
            print(unequal[-1], flush=True)
    found = [rows[case.name] for case in CASES if case.name in rows]
    if found:
        parts, ratios = _report(found, unequal)
        numbers = {"rows": found, "ratios": ratios}
        publish(options.out, what, "Searches over modules", *parts, machine=machine, **numbers)
    return int(bool(unequal))


def _report(
    found: Sequence[Row], unequal: Sequence[str]
) -> tuple[list[str], dict[str, dict[str, float]]]:
    """Return the parts of the page, and the speed of gputune compared with each engine in each row.

    ``unequal`` has a sentence about each row that was left out.
    """
    ratios: dict[str, dict[str, float]] = {}
    for engine in ENGINES[1:]:
        measured = [row for row in found if row.seconds.get(engine)]
        ratios[engine] = {row.name: row.ratio(engine) for row in measured}
    ratios["CPU"] = {row.name: row.cpu_ratio() for row in found if row.cpu}
    parts = [__doc__ or "", table(HEAD, (row.row() for row in found)), *unequal]
    return parts, ratios


def print_steps(names: Sequence[str] | None) -> int:
    """Print the CPU time of one training step of a plain loop and of each backend, for the chosen
    rows. ``gputune check --module`` measures it on one thread."""
    print(table("module|plain loop, ms|compiled, ms|recorded, ms|loop / compiled", ()))
    for case in CASES:
        if names and not any(word in case.name for word in names):
            continue
        work = case_work(case)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.csv"
            columns = [*(f"x{i}" for i in range(work.X.shape[1])), "y"]
            rows = np.column_stack([work.X, work.y])
            # letters, so that the targets are classes
            formats = [*["%g"] * work.X.shape[1], "class %d"]
            np.savetxt(path, rows, formats, ",", header=",".join(columns), comments="")
            module = f"{modules.__file__}:{case.module_class.__name__}"
            arguments = ["check", "--module", module, str(path), "--target", "y", "--json"]
            arguments += ["--set", f"batch_size={case.batch_size}", "weight_decay=0"]
            output = io.StringIO()
            with redirect_stdout(output):
                gputune_command(arguments)
        times = json.loads(output.getvalue())["milliseconds"]
        cells = [f"{times[name]:.3f}" if name in times else "-" for name in STEP_TIMES]
        gain = times["plain loop"] / times["compiled"] if "compiled" in times else math.nan
        print(f"| {case.name} | {' | '.join(cells)} | {gain:.1f} |", flush=True)
    return 0


def compare(case: Case, repeats: int, *, is_small: bool = False) -> Row:
    """Measure one case; the engines take turns in starting. A small measurement leaves out
    Optuna."""
    work = case_work(case)
    load = os.getloadavg()[0]
    engines = ENGINES[:-1] if is_small else ENGINES
    found: dict[str, list[Measured]] = {engine: [] for engine in engines}
    for repeat in range(repeats):
        first = repeat % len(engines)
        for engine in engines[first:] + engines[:first]:
            stop_workers()
            found[engine].append(
                _tuned(case, work) if engine == "gputune" else _looped(engine, case, work)
            )
    return Row(
        case.name,
        f"{case.trials} x {len(work.folds)} x {case.epochs}",
        case.asked,
        datetime.now(UTC).date().isoformat(),
        round(load, 1),
        {engine: [round(each.seconds, 2) for each in times] for engine, times in found.items()},
        {
            engine: float(np.mean([each.scores[: case.looped] for each in times]))
            for engine, times in found.items()
        },
        {engine: [round(each.cpu, 2) for each in found[engine]] for engine in ("gputune", "loop")},
    )


def case_work(case: Case) -> Work:
    """Return digits with the trials of a case.

    The rows are images of 28 x 28 or 16 x 16, sequences of 20, or graphs if the case asks for them.
    """
    work = digits_work("narrow", n_trials=case.trials, epochs=case.epochs)
    X = work.X
    trials = [{**trial, "batch_size": case.batch_size} for trial in work.trials]
    if case.features == "images":
        large = np.kron(X.reshape(-1, 8, 8), np.ones((1, 3, 3), np.float32))
        X = np.pad(large, ((0, 0), (2, 2), (2, 2))).reshape(len(X), -1)
    if case.features == "small images":
        X = np.kron(X.reshape(-1, 8, 8), np.ones((1, 2, 2), np.float32)).reshape(len(X), -1)
    if case.features == "sequences":
        X = np.tile(X, 3)[:, :160]
    if case.features == "graphs":
        # 16 patches of 2 x 2 pixels; empty patches are padding
        patches = X.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(len(X), 16, 4)
        is_node = patches.any(2).astype(np.float32)
        X = np.concatenate([patches.reshape(len(X), 64), is_node], 1)
    return replace(work, name=case.name, X=X, trials=trials)


def _tuned(case: Case, work: Work) -> Measured:
    """Tune with gputune, which has no built code yet."""
    include = [
        {"lr": t["lr"], "batch_size": t["batch_size"], "weight_decay": 0.0} for t in work.trials
    ]
    options = {} if case.loss is None else {"loss": case.loss}
    library.build.cache_clear()
    library._kernels.clear()
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict(os.environ, XDG_CACHE_HOME=folder),
    ):
        begin = time.perf_counter()
        cpu = _all_cpu_seconds()
        study = gputune.tune(
            case.module_class,
            work.X,
            work.y,
            n_trials=0,
            include=include,
            include_default=False,
            cv=work.folds,
            optimizer="adam",
            max_epochs=work.epochs,
            epoch="last",
            device="cpu",
            verbose=0,
            **options,
        )
        seconds = time.perf_counter() - begin
        stop_workers()  # the CPU seconds of a process are known when it has ended
    return Measured(seconds, _all_cpu_seconds() - cpu, study.curves[:, -1])


def _all_cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its ended child processes."""
    return sum(os.times()[:4])


def _looped(engine: str, case: Case, work: Work) -> Measured:
    begin = time.perf_counter()
    few = replace(work, trials=work.trials[: case.looped])
    fit = partial(modules.fit, case.module_class)
    cores = joblib.cpu_count()
    outcome = (
        over_cores(fit, few, cores) if engine == "loop" else with_optuna.train(few, cores, fit)
    )
    spent = time.perf_counter() - begin - outcome.start
    factor = case.trials / case.looped
    return Measured(outcome.start + spent * factor, outcome.cpu * factor, outcome.scores)
