"""User's modules, tuned by gputune, by a plain PyTorch loop, and by Optuna with that loop.

The loops use one process per core. All use Adam without decay, float32, batches of 32 unless the
row says otherwise, and the learning rates of the shared list. Times include everything that a user
waits for. The loops score every epoch too, as gputune does. The loops train only the first trials.
Their time without the start of their processes is scaled to all trials. The engines take turns, and
times are medians. Rows in which gputune is slower than required are in bold. The mean accuracy of
the trials that both trained must be the same, to 0.02. "Load" is the other work of the machine
before a row, in processes that wait for a core (0 on a quiet machine).
"""

import os
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial

import joblib
import numpy as np

import gputune
from benchmark.engines import modules
from benchmark.engines import optuna as with_optuna
from benchmark.report import describe_machine, publish, published, table
from benchmark.work import Work, digits_work, over_cores, stop_workers

AGREEMENT = 0.02
ENGINES = ("gputune", "loop", "optuna")
HEAD = (
    "module|trials x folds x epochs|gputune, s|loop on all cores, s|Optuna with the loop, "
    "s|times as fast as the loop|asked for|as Optuna|accuracy: gputune, loop, Optuna|date, load"
)


@dataclass(frozen=True)
class Case:
    """A module, the size of its search, and the speed required of gputune.

    A loop trains the first ``looped`` trials. ``asked`` is the required speed relative to the loop.
    """

    name: str
    module_class: type
    trials: int
    epochs: int
    looped: int
    asked: float
    batch_size: int = 32
    features: str = "digits"


CASES = (
    Case("residual net, LayerNorm, batches of 32", modules.Residual, 64, 10, 16, 10.0),
    Case(
        "residual net, LayerNorm, batches of 128",
        modules.Residual,
        64,
        10,
        16,
        10.0,
        batch_size=128,
    ),
    Case("residual net, dropout", modules.WithDropout, 64, 10, 16, 8.0),
    Case("residual net, BatchNorm", modules.WithBatchNorm, 64, 10, 16, 8.0),
    Case("transformer encoder", modules.Encoder, 16, 3, 8, 3.0),
    Case("GRU", modules.Recurrent, 16, 3, 8, 3.0, features="sequences"),
    Case("LSTM", modules.WithLSTM, 16, 3, 8, 3.0, features="sequences"),
    Case("convolutional net, BatchNorm", modules.Convolutional, 16, 3, 8, 1.5, features="images"),
    Case("residual net with control flow on data", modules.Branching, 16, 5, 16, 0.95),
)


@dataclass(frozen=True)
class Row:
    """Measurements of a case: seconds of each engine in each repeat, and mean accuracies.

    The accuracies are of the trials that all engines trained.
    """

    name: str
    work: str
    asked: float
    date: str
    load: float
    seconds: dict[str, Sequence[float]]
    accuracies: dict[str, float]

    def ratio(self, engine: str) -> float:
        """The speed of gputune divided by the speed of an engine."""
        return float(np.median(self.seconds[engine]) / np.median(self.seconds["gputune"]))

    def row(self) -> str:
        seconds = "|".join(f"{np.median(self.seconds[engine]):.1f}" for engine in ENGINES)
        ratio = (
            f"{self.ratio('loop'):.2f}"
            if self.ratio("loop") >= self.asked
            else f"**{self.ratio('loop'):.2f}**"
        )
        accuracies = ", ".join(f"{self.accuracies[engine]:.3f}" for engine in ENGINES)
        ratios = f"{ratio}|{self.asked}|{self.ratio('optuna'):.2f}"
        return f"{self.name}|{self.work}|{seconds}|{ratios}|{accuracies}|{self.date}, {self.load}"


def run(options: Namespace) -> int:
    """Measure the chosen rows, print them, and write them next to the earlier ones.

    Returns 1 if the accuracies differ.
    """
    machine = describe_machine()
    rows = {row.name: row for row in published(options.out, "modules", machine, "rows", Row)}
    for case in CASES:
        if options.rows and not any(word in case.name for word in options.rows):
            continue
        row = rows[case.name] = compare(case, options.repeats or 3)
        print(f"{row.name}: {row.ratio('loop'):.2f}x, {row.ratio('optuna'):.2f}x", flush=True)
        if max(row.accuracies.values()) - min(row.accuracies.values()) > AGREEMENT:
            print(f"NO SPEED: mean accuracies differ by more than {AGREEMENT}: {row.accuracies}")
            return 1
    found = [rows[case.name] for case in CASES if case.name in rows]
    ratios = {engine: {row.name: row.ratio(engine) for row in found} for engine in ENGINES[1:]}
    parts = (__doc__ or "", table(HEAD, (row.row() for row in found)))
    numbers = {"rows": found, "ratios": ratios}
    return publish(
        options.out, "modules", "Modules of a user's own", *parts, machine=machine, **numbers
    )


def compare(case: Case, repeats: int) -> Row:
    """Measure one case; the engines take turns in starting."""
    work = case_work(case)
    load = os.getloadavg()[0]
    found: dict[str, list[tuple[float, np.ndarray]]] = {engine: [] for engine in ENGINES}
    for repeat in range(repeats):
        first = repeat % len(ENGINES)
        for engine in ENGINES[first:] + ENGINES[:first]:
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
        {engine: [round(seconds, 2) for seconds, _ in times] for engine, times in found.items()},
        {
            e: float(np.mean([scores[: case.looped] for _, scores in times]))
            for e, times in found.items()
        },
    )


def case_work(case: Case) -> Work:
    """Return digits with the trials of a case.

    The rows are images of 28 x 28 or sequences of 20 if the case asks for them.
    """
    work = digits_work("narrow", n_trials=case.trials, epochs=case.epochs)
    X = work.X
    trials = [{**trial, "batch_size": case.batch_size} for trial in work.trials]
    if case.features == "images":
        large = np.kron(X.reshape(-1, 8, 8), np.ones((1, 3, 3), np.float32))
        X = np.pad(large, ((0, 0), (2, 2), (2, 2))).reshape(len(X), -1)
    if case.features == "sequences":
        X = np.tile(X, 3)[:, :160]
    return replace(work, name=case.name, X=X, trials=trials)


def _tuned(case: Case, work: Work) -> tuple[float, np.ndarray]:
    begin = time.perf_counter()
    include = [
        {"lr": t["lr"], "batch_size": t["batch_size"], "weight_decay": 0.0} for t in work.trials
    ]
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
    )
    return time.perf_counter() - begin, study.curves[:, -1]


def _looped(engine: str, case: Case, work: Work) -> tuple[float, np.ndarray]:
    begin = time.perf_counter()
    few = replace(work, trials=work.trials[: case.looped])
    fit = partial(modules.fit, case.module_class)
    cores = joblib.cpu_count()
    outcome = (
        over_cores(fit, few, cores) if engine == "loop" else with_optuna.train(few, cores, fit)
    )
    spent = time.perf_counter() - begin - outcome.start
    return outcome.start + spent * case.trials / case.looped, outcome.scores
