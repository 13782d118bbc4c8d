"""Modules of a user's own, tuned by gputune and by the same module in a plain PyTorch loop, one process a core.

Adam without decay, float32, batches of 32 unless the row says otherwise, learning rates of the shared list; all that a
user waits for is counted. The loop scores every epoch too, as gputune does. It trains the first trials alone, and its
time without the start of its processes is scaled to all. The two take turns; times are medians. Rows in which gputune
is the slower one are in the table too. The mean accuracy of the trials that both trained must be the same, to 0.02.
"""

import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import joblib
import numpy as np

import gputune
from benchmark.engines import modules
from benchmark.report import describe_machine, page, publish, table
from benchmark.work import Work, digits_work, over_cores, stop_workers

AGREEMENT = 0.02


@dataclass(frozen=True)
class Case:
    """A module, how much of it is trained, by the loop on the first ``looped`` trials, and what is asked of gputune."""

    name: str
    module_class: type
    trials: int
    epochs: int
    looped: int
    asked: float
    batch_size: int = 32
    images: bool = False


CASES = (
    Case("residual net, LayerNorm", modules.Residual, 64, 10, 16, 10.0),
    Case("residual net, LayerNorm, batches of 128", modules.Residual, 64, 10, 16, 10.0, batch_size=128),
    Case("residual net, dropout", modules.WithDropout, 64, 10, 16, 8.0),
    Case("residual net, BatchNorm", modules.WithBatchNorm, 64, 10, 16, 8.0),
    Case("transformer encoder", modules.Encoder, 16, 3, 4, 3.0),
    Case("convolutional net, BatchNorm", modules.Convolutional, 8, 3, 4, 1.5, images=True),
)


@dataclass(frozen=True)
class Row:
    """What was measured of a case: seconds of both in each repeat, mean accuracies of the trials that both trained."""

    name: str
    work: str
    asked: float
    gputune_seconds: Sequence[float]
    loop_seconds: Sequence[float]
    gputune_accuracy: float
    loop_accuracy: float

    @property
    def ratio(self) -> float:
        """How many times as fast gputune is."""
        return float(np.median(self.loop_seconds) / np.median(self.gputune_seconds))


def run(options: Namespace) -> int:
    """Measure, print and write; return 1 where the accuracies differ."""
    machine, rows = describe_machine(with_card=False), []
    for case in CASES:
        rows.append(compare(case, options.repeats or 3))
        print(f"{rows[-1].name}: {rows[-1].ratio:.2f}x", flush=True)
    apart = [row for row in rows if not abs(row.gputune_accuracy - row.loop_accuracy) <= AGREEMENT]
    if apart:
        print(f"NO SPEED: mean accuracies differ by more than {AGREEMENT}: {apart}")
        return 1
    numbers = [{**asdict(row), "ratio": row.ratio} for row in rows]
    return publish(options.out, "modules", machine, markdown(machine, rows), rows=numbers)


def compare(case: Case, repeats: int) -> Row:
    """Measure one case; both begin once."""
    work = case_work(case)
    own, loop = [], []
    for repeat in range(repeats):
        for engine in sorted((own, loop), key=lambda times: (times is own) == repeat % 2):
            stop_workers()
            if engine is own:
                own.append(_tuned(case, work))
            else:
                loop.append(_looped(case, work))
    size = f"{case.trials} x {len(work.folds)} x {case.epochs}"
    accuracies = [float(np.mean([scores[: case.looped] for _, scores in times])) for times in (own, loop)]
    return Row(case.name, size, case.asked, [s for s, _ in own], [s for s, _ in loop], *accuracies)


def case_work(case: Case) -> Work:
    """Return digits with the trials of a case, as images of 28 x 28 where it asks for them."""
    work = digits_work("narrow", n_trials=case.trials, epochs=case.epochs)
    trials = [{**trial, "batch_size": case.batch_size} for trial in work.trials]
    X = work.X
    if case.images:
        large = np.kron(X.reshape(-1, 8, 8), np.ones((1, 3, 3), np.float32))
        X = np.pad(large, ((0, 0), (2, 2), (2, 2))).reshape(len(X), -1)
    return replace(work, name=case.name, X=X, trials=trials)


def _tuned(case: Case, work: Work) -> tuple[float, np.ndarray]:
    begin = time.perf_counter()
    include = [{key: trial[key] for key in ("lr", "batch_size")} for trial in work.trials]
    study = gputune.tune(
        case.module_class, work.X, work.y, n_trials=0, include=include, include_default=False, cv=work.folds,
        optimizer="adam", max_epochs=work.epochs, epoch="last", device="cpu", verbose=0,
    )  # fmt: skip
    return time.perf_counter() - begin, study.curves[:, -1]


def _looped(case: Case, work: Work) -> tuple[float, np.ndarray]:
    begin = time.perf_counter()
    few = replace(work, trials=work.trials[: case.looped])
    outcome = over_cores(partial(modules.fit, case.module_class), few, joblib.cpu_count())
    spent = time.perf_counter() - begin - outcome.start
    return outcome.start + spent * case.trials / case.looped, outcome.scores


def markdown(machine: dict[str, object], rows: Sequence[Row]) -> str:
    """Return the report as a page."""
    head = [
        "module", "trials x folds x epochs", "gputune, s", "loop on all cores, s", "times as fast", "asked for",
        "accuracy: gputune, loop",
    ]  # fmt: skip
    lines = [
        (r.name, r.work, *(f"{np.median(times):.1f}" for times in (r.gputune_seconds, r.loop_seconds)),
         f"**{r.ratio:.2f}**" if r.ratio < r.asked else f"{r.ratio:.2f}", r.asked,
         f"{r.gputune_accuracy:.3f}, {r.loop_accuracy:.3f}")
        for r in rows
    ]  # fmt: skip
    return page("Modules of a user's own", machine, __doc__ or "", table(head, lines))
