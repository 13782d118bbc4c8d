"""One shared list of trials through every engine: the scores must agree, then the times are shown."""

import functools
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import joblib
import numpy as np

from benchmark.engines import ENGINES, Chosen, choose, split_by_lack, versions
from benchmark.engines.gputune import train as train_with_gputune
from benchmark.report import card, counted, describe_machine, page, publish, table
from benchmark.work import Outcome, Work, digits_work, stop_workers

EPOCHS, REPEATS = 20, 3
ON_CARD = "gputune on the GPU"
AGREEMENT = 0.01  # in mean accuracy; a network's other start and row order move it less

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

    rival   False for gputune itself, which the others are compared to
    """

    engine: str
    train: Callable[[Work], Outcome]
    trials: int
    rival: bool = True


@dataclass(frozen=True)
class Measured:
    """One engine on the first C trials of one work.

    seconds, start, compile   of each of the R repeats; the last two are parts of the first
    scores                    (R, C, F) last-epoch accuracies
    """

    engine: str
    seconds: tuple[float, ...]
    scores: np.ndarray
    start: tuple[float, ...]
    compile: tuple[float, ...]
    rival: bool = True

    @property
    def trials(self) -> int:
        """How many trials of the list it trained."""
        return self.scores.shape[1]

    def accuracy(self, trials: int | None = None) -> float:
        """Mean over repeats, the first ``trials`` (None: all) and folds; NaN where one of them diverged."""
        return float(self.scores[:, :trials].mean())

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.seconds))


def measure(runs: Sequence[Run], work: Work, repeats: int) -> list[Measured]:
    """Run each engine ``repeats`` times, in turns, after each one's warm-up on a small piece of the work.

    In each repeat another engine begins.
    """
    for run in runs:
        _timed(run, replace(work, trials=work.trials[:4], epochs=1))
    found: list[list[tuple[float, Outcome]]] = [[] for _ in runs]
    for repeat in range(repeats):
        for turn in range(len(runs)):
            run = runs[position := (repeat + turn) % len(runs)]
            found[position].append(_timed(run, replace(work, trials=work.trials[: run.trials])))
    stop_workers()
    return [_measured(run, *zip(*each)) for run, each in zip(runs, found)]


def _timed(run: Run, work: Work) -> tuple[float, Outcome]:
    stop_workers()
    begin = time.perf_counter()
    outcome = run.train(work)
    return time.perf_counter() - begin, outcome


def _measured(run: Run, seconds: tuple[float, ...], outcomes: tuple[Outcome, ...]) -> Measured:
    start, compiling = zip(*((outcome.start, outcome.compile) for outcome in outcomes))
    scores = np.stack([outcome.scores for outcome in outcomes])
    return Measured(run.engine, seconds, scores, start, compiling, run.rival)


def ratio(measured: Measured, own: Measured) -> float:
    """Return how many times as fast gputune is as another engine, by medians."""
    return measured.median / own.median


def compiled_ratio(measured: Measured, own: Measured) -> float:
    """Return the same where both find everything compiled."""
    seconds, own_seconds = (np.median(np.subtract(m.seconds, m.compile)) for m in (measured, own))
    return float(seconds / own_seconds)


def run(options: Namespace) -> int:
    """Measure, print and write; return 1 where the engines' scores differ."""
    able, lacks = split_by_lack(options.engines or choose(",".join(ENGINES)))
    parts = []
    for name, trials in options.work:
        work = digits_work(name, n_trials=trials or options.trials, epochs=options.epochs or EPOCHS)
        measured = measure(runs(able, work), work, options.repeats or REPEATS)
        for m in measured:
            print(f"{name}: {m.engine}: mean last-epoch accuracy {m.accuracy():.4f}", flush=True)
        if not agree(measured):
            print(f"NO SPEED: the mean accuracies differ by more than {AGREEMENT}, so the work was not the same.")
            return 1
        parts.append(summary(work, measured, lacks))
    machine = describe_machine()
    machine["versions"] |= versions(able)
    return publish(options.out, "training", machine, markdown(machine, parts), works=parts)


def runs(chosen: Sequence[Chosen], work: Work) -> list[Run]:
    """Return each engine on its trials, gputune also on every part of the list that another one gets."""
    whole, found, parts = len(work.trials), [], set()
    for one in chosen:
        trials = min(one.trials or whole, whole)
        parts.add(trials)
        train = functools.partial(_train, one, joblib.cpu_count())
        found.append(Run(one.engine.name, train, trials, rival=one.engine.word != "gputune"))
    own = found.pop()
    found += [Run("gputune", own.train, trials, rival=False) for trials in sorted(parts - {whole})]
    found.append(own)
    if card():
        on_card = functools.partial(train_with_gputune, device="cuda")
        found.append(Run(ON_CARD, on_card, whole, rival=False))
    return found


def _train(one: Chosen, cores: int, work: Work) -> Outcome:
    return one.engine.load()(work, cores)


def agree(measured: Sequence[Measured]) -> bool:
    """Whether the mean accuracies of all that trained the same first trials lie within ``AGREEMENT``.

    A NaN agrees with nothing.
    """
    for trials in {m.trials for m in measured}:
        means = [m.accuracy(trials) for m in measured if m.trials >= trials]
        if not np.isfinite(means).all() or max(means) - min(means) > AGREEMENT:
            return False
    return True


def summary(work: Work, measured: Sequence[Measured], lacks: Mapping[str, str]) -> dict[str, Any]:
    """Return one work's part of the report.

    ``measured`` has a gputune of each number of trials; ``lacks`` says why engines were left out.
    """
    own = {m.trials: m for m in measured if m.engine == "gputune"}
    return {
        "work": work.name,
        "epochs": work.epochs,
        "folds": len(work.folds),
        "trials": list(work.trials),
        "engines": [_engine(m, own[m.trials]) for m in measured],
        "left_out": dict(lacks),
        "speed": _speed(measured, own),
    }


def _engine(measured: Measured, own: Measured) -> dict[str, Any]:
    each = np.array(measured.seconds) / np.array(own.seconds)
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
        "ratio": ratio(measured, own) if measured.rival else None,
        "ratio_min": float(each.min()) if measured.rival else None,
        "ratio_max": float(each.max()) if measured.rival else None,
        "ratio_compiled": compiled_ratio(measured, own) if measured.rival else None,
    }


def _speed(measured: Sequence[Measured], own: Mapping[int, Measured]) -> dict[str, Any] | None:
    """How many times gputune's speed is that of the fastest other one, by medians on the same trials."""
    rivals = [m for m in measured if m.rival]
    if not rivals:
        return None
    rival = min(rivals, key=lambda m: ratio(m, own[m.trials]))
    return {"rival": rival.engine, "ratio": ratio(rival, own[rival.trials]), "trials": rival.trials}


def markdown(machine: dict[str, Any], parts: Sequence[dict[str, Any]]) -> str:
    """Return the report as a page."""
    sections = [text for part in parts for text in _section(part)]
    return page("One list of trials, trained by each engine", machine, HOW, *sections)


def _section(part: dict[str, Any]) -> list[str]:
    widths, sizes = (sorted({trial[key] for trial in part["trials"]}) for key in ("width", "batch_size"))
    whole = len(part["trials"])
    head = "engine|mean accuracy|seconds, median|min|max|of it start|compile|trials/s|gputune is|without compiling"
    rows = [_row(engine, whole) for engine in part["engines"]]
    rows += [[f"{name}: {lack}"] for name, lack in part["left_out"].items()]
    texts = [
        f"## {part['work']}: {counted(whole, 'trial')} x {part['folds']} folds x {part['epochs']} epochs",
        f"Widths {', '.join(map(str, widths))}; batch sizes {', '.join(map(str, sizes))}.",
        table(head.split("|"), rows),
    ]
    if (speed := part["speed"]) is not None:
        on = "" if speed["trials"] == whole else f", on the first {counted(speed['trials'], 'trial')}"
        texts.append(f"gputune is {speed['ratio']:.2f}x as fast as the fastest other one, {speed['rival']}{on}.")
    return texts


def _row(engine: dict[str, Any], whole: int) -> list[str]:
    trials = engine["trials"]
    part = "" if trials == whole else f" (measured on the first {counted(trials, 'trial')})"
    keys = ("median", "min", "max", "start", "compile", "trials_per_second")
    row = [f"{engine['engine']}{part}", f"{engine['accuracy']:.4f}", *(f"{engine[key]:.2f}" for key in keys)]
    if engine["ratio"] is not None:
        row.append(f"{engine['ratio']:.2f}x ({engine['ratio_min']:.2f} to {engine['ratio_max']:.2f})")
        row.append(f"{engine['ratio_compiled']:.2f}x")
    return row
