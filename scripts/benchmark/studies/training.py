"""One shared list of trials through every engine.

The scores must agree; then the times are shown.
"""

import functools
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import joblib
import numpy as np

from benchmark.engines import ENGINES, Chosen, Engine, choose, split_by_lack, versions
from benchmark.engines.gputune import train as train_with_gputune
from benchmark.report import card, counted, describe_machine, publish, table
from benchmark.work import TRIALS, Outcome, Work, digits_work, stop_workers

EPOCHS = 20
REPEATS = 3
ON_CARD = "gputune on the GPU"
AGREEMENT = 0.01  # in mean accuracy; other starting weights and row orders change it by less

HOW = """\
Every engine trains the same trials (learning rate log-uniform, batch size and width from lists; two hidden relu
layers, Adam, no decay) on the same folds, standardised by each fold's training rows, for the same number of epochs,
in float32, the data in memory. Its accuracies on the validation rows after the last epoch must have the same mean, to
0.01, before a time is shown. The times hold all that a user waits for inside the call: start of the worker processes
and their imports, scaling, writing and reading of the data, compiling, training, scores. All workers are ended before
each call, and what is compiled (torch.compile, JAX, gputune's C code) is compiled in each call anew. Only the imports
of the calling process, and one call on a small piece of the work, are made before. The engines take turns, and in each
repeat another one begins.

Parts of the time, medians: "start" is until the last worker began its first trial (for gputune, until its search
began to train), "compile" is of the process that compiled longest. Each loop runs one process a core with one thread
each, longest trials first (one process where the work has fewer than 5,000 steps), and scores once, after the last
epoch; gputune plans its processes and threads itself and scores after each epoch. The loop is eager PyTorch with fused
Adam and no DataLoader. With torch.compile its whole step is one function, compiled once for all shapes. Optuna's
processes share one study in a journal file, in which the list is enqueued. Ray Tune runs the loop as trials on reused
actors. JAX compiles one program for each batch size and width: a vmap over trials and folds of a scan over steps.

The last columns say how many times as fast gputune is: the median of the engine over gputune's on the same trials, and
in brackets the smallest and the largest ratio within a repeat, and then the same ratio with the compiling of both left
out, which a later call finds done where it is kept on disk. Below 1, gputune is the slower one.
"""


@dataclass(frozen=True)
class Run:
    """An engine on the first ``trials`` of the list.

    ``rival`` is False for gputune itself, with which the others are compared.
    """

    engine: str
    train: Callable[[Work], Outcome]
    trials: int
    rival: bool = True


@dataclass(frozen=True)
class Measured:
    """One engine on the first C trials of one work.

    ``seconds``, ``start`` and ``compile`` have one number for each of the R repeats; the last two
    are parts of the first. ``scores`` (R, C, F) are last-epoch accuracies.
    """

    engine: str
    seconds: tuple[float, ...]
    scores: np.ndarray
    start: tuple[float, ...]
    compile: tuple[float, ...]
    rival: bool = True

    @property
    def trials(self) -> int:
        return self.scores.shape[1]

    def accuracy(self, trials: int | None = None) -> float:
        """Mean over repeats, folds and the first ``trials`` (None: all); NaN if one of them
        diverged.
        """
        return float(self.scores[:, :trials].mean())

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


def measure(runs: Sequence[Run], work: Work, repeats: int) -> list[Measured]:
    """Run each engine ``repeats`` times, in turns, after a warm-up on a small part of the work.

    Each repeat starts with a different engine.
    """
    for run in runs:
        stop_workers()
        run.train(replace(work, trials=work.trials[:4], epochs=1))
    found: list[list[tuple[float, Outcome]]] = [[] for _ in runs]
    for repeat, turn in product(range(repeats), range(len(runs))):
        run = runs[position := (repeat + turn) % len(runs)]
        stop_workers()
        begin = time.perf_counter()
        outcome = run.train(replace(work, trials=work.trials[: run.trials]))
        found[position].append((time.perf_counter() - begin, outcome))
    stop_workers()
    return [
        Measured(
            run.engine,
            tuple(seconds for seconds, _ in each),
            np.stack([outcome.scores for _, outcome in each]),
            tuple(outcome.start for _, outcome in each),
            tuple(outcome.compile for _, outcome in each),
            run.rival,
        )
        for run, each in zip(runs, found)
    ]


def run(options: Namespace) -> int:
    able, lacks = split_by_lack(options.engines or choose(",".join(ENGINES)))
    parts = []
    for name, trials in options.work:
        n_trials = trials or options.trials or TRIALS
        work = digits_work(name, n_trials=n_trials, epochs=options.epochs or EPOCHS)
        measured = measure(runs(able, work), work, options.repeats or REPEATS)
        for m in measured:
            print(f"{name}: {m.engine}: mean last-epoch accuracy {m.accuracy():.4f}", flush=True)
        if not agree(measured):
            print(
                f"NO SPEED: the mean accuracies differ by more than {AGREEMENT}, so the work was "
                "not the same."
            )
            return 1
        parts.append(summary(work, measured, lacks))
    machine = describe_machine(with_card=True)
    machine["versions"] |= versions(able)
    title = "One list of trials, trained by each engine"
    sections = [text for part in parts for text in section(part)]
    return publish(options.out, "training", title, HOW, *sections, machine=machine, works=parts)


def runs(chosen: Sequence[Chosen], work: Work) -> list[Run]:
    """Return each engine with its trials.

    gputune also runs on every part of the list that another engine gets.
    """
    whole = len(work.trials)

    def run_of(engine: Engine, trials: int) -> Run:
        rival = engine.word != "gputune"
        return Run(engine.name, lambda work: engine.load()(work, joblib.cpu_count()), trials, rival)

    *rivals, (own, _) = chosen
    found = [run_of(engine, min(trials or whole, whole)) for engine, trials in rivals]
    found += [run_of(own, trials) for trials in sorted({run.trials for run in found} | {whole})]
    if card():
        found.append(
            Run(ON_CARD, functools.partial(train_with_gputune, device="cuda"), whole, rival=False)
        )
    return found


def agree(measured: Sequence[Measured]) -> bool:
    """Return whether the mean accuracies of engines with the same trials differ by at most
    ``AGREEMENT``.

    A NaN never agrees.
    """
    for trials in {m.trials for m in measured}:
        means = [m.accuracy(trials) for m in measured if m.trials >= trials]
        if not np.isfinite(means).all() or max(means) - min(means) > AGREEMENT:
            return False
    return True


def summary(work: Work, measured: Sequence[Measured], lacks: Mapping[str, str]) -> dict[str, Any]:
    """Return one work's part of the report.

    ``measured`` has a result of gputune for each number of trials. ``lacks`` has the reasons why
    engines were left out.
    """
    own = {m.trials: m for m in measured if m.engine == "gputune"}
    engines = [_engine(m, own[m.trials]) for m in measured]
    rivals = [engine for engine in engines if engine["ratio"] is not None]
    fastest = min(rivals, key=lambda engine: engine["ratio"], default=None)
    speed = fastest and {
        "rival": fastest["engine"],
        "ratio": fastest["ratio"],
        "trials": fastest["trials"],
    }
    shape = {
        "work": work.name,
        "epochs": work.epochs,
        "folds": len(work.folds),
        "trials": list(work.trials),
    }
    return {**shape, "engines": engines, "left_out": dict(lacks), "speed": speed}


def _engine(measured: Measured, own: Measured) -> dict[str, Any]:
    each = np.array(measured.seconds) / np.array(own.seconds)
    compiled, own_compiled = (np.median(np.subtract(m.seconds, m.compile)) for m in (measured, own))
    ratios = {
        "ratio": measured.median / own.median,
        "ratio_min": float(each.min()),
        "ratio_max": float(each.max()),
        "ratio_compiled": float(compiled / own_compiled),
    }
    return {
        "engine": measured.engine,
        "trials": measured.trials,
        "accuracy": measured.accuracy(),
        "seconds": list(measured.seconds),
        "median": measured.median,
        "min": min(measured.seconds),
        "max": max(measured.seconds),
        "start": float(np.median(measured.start)),
        "compile": float(np.median(measured.compile)),
        "trials_per_second": measured.trials / measured.median,
        "trial_accuracies": measured.scores.mean((0, 2)).tolist(),
        **(ratios if measured.rival else dict.fromkeys(ratios)),
    }


def section(part: dict[str, Any]) -> list[str]:
    widths, sizes = (
        sorted({trial[key] for trial in part["trials"]}) for key in ("width", "batch_size")
    )
    whole = len(part["trials"])
    head = (
        "engine|mean accuracy|seconds, median|min|max|of it start|compile|trials/s|gputune "
        "is|without compiling"
    )
    rows = [_row(engine, whole) for engine in part["engines"]]
    rows += [f"{name}: {lack}" for name, lack in part["left_out"].items()]
    texts = [
        f"## {part['work']}: {counted(whole, 'trial')} x {part['folds']} folds x {part['epochs']} "
        "epochs",
        f"Widths {', '.join(map(str, widths))}; batch sizes {', '.join(map(str, sizes))}.",
        table(head, rows),
    ]
    if (speed := part["speed"]) is not None:
        on = (
            ""
            if speed["trials"] == whole
            else f", on the first {counted(speed['trials'], 'trial')}"
        )
        texts.append(
            f"gputune is {speed['ratio']:.2f}x as fast as the fastest other one, "
            f"{speed['rival']}{on}."
        )
    return texts


def _row(engine: dict[str, Any], whole: int) -> str:
    trials = engine["trials"]
    part = "" if trials == whole else f" (measured on the first {counted(trials, 'trial')})"
    keys = ("median", "min", "max", "start", "compile", "trials_per_second")
    numbers = "|".join(f"{engine[key]:.2f}" for key in keys)
    row = f"{engine['engine']}{part}|{engine['accuracy']:.4f}|{numbers}"
    if engine["ratio"] is None:
        return row
    ratios = "{ratio:.2f}x ({ratio_min:.2f} to {ratio_max:.2f})|{ratio_compiled:.2f}x"
    return f"{row}|{ratios.format(**engine)}"
