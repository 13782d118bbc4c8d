"""What was measured, as values: do the engines agree, how much faster is gputune; a JSON and a Markdown file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_machine import write_both
from benchmark_measure import Measured
from benchmark_work import Work

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


def agree(measured: Sequence[Measured]) -> bool:
    """Whether the mean accuracies of all that trained the same first trials lie within ``AGREEMENT``.

    A NaN agrees with nothing.
    """
    for trials in {m.trials for m in measured}:
        means = [m.accuracy(trials) for m in measured if m.trials >= trials]
        if not np.isfinite(means).all() or max(means) - min(means) > AGREEMENT:
            return False
    return True


def summary(
    work: Work, measured: Sequence[Measured], card: dict[str, float] | None, lacks: Mapping[str, str]
) -> dict[str, Any]:
    """Return one work's part of the report.

    ``measured`` has a gputune of each number of trials; ``card`` is the GPU's part; ``lacks`` says why engines were
    left out.
    """
    own = {m.trials: m for m in measured if not m.rival}
    return {
        "work": work.name,
        "epochs": work.epochs,
        "folds": len(work.folds),
        "trials": list(work.trials),
        "engines": [_engine(m, own[m.trials]) for m in measured],
        "left_out": dict(lacks),
        "speed": _speed(measured, own),
        "card": card,
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


def ratio(measured: Measured, own: Measured) -> float:
    """Return how many times as fast gputune is as another engine."""
    return measured.median / own.median


def compiled_ratio(measured: Measured, own: Measured) -> float:
    """Return the same where both find everything compiled."""
    seconds, own_seconds = (np.median(np.subtract(m.seconds, m.compile)) for m in (measured, own))
    return float(seconds / own_seconds)


def _speed(measured: Sequence[Measured], own: Mapping[int, Measured]) -> dict[str, Any] | None:
    """How many times gputune's speed is that of the fastest other one, by medians on the same trials."""
    rivals = [m for m in measured if m.rival]
    if not rivals:
        return None
    rival = min(rivals, key=lambda m: ratio(m, own[m.trials]))
    return {"rival": rival.engine, "ratio": ratio(rival, own[rival.trials]), "trials": rival.trials}


def markdown(machine: dict[str, Any], parts: Sequence[dict[str, Any]]) -> str:
    """Return the report as a page."""
    lines = ["# One list of trials, trained by each engine", "", machine_line(machine), "", HOW]
    for part in parts:
        lines += _section(part)
    return "\n".join(lines) + "\n"


def machine_line(machine: dict[str, Any]) -> str:
    """Return processor, versions, commit and date as a sentence."""
    return (
        f"{machine['cpu']}, {machine['cores']} cores; {machine['card'] or 'no GPU'}; {machine['system']}; "
        f"Python {machine['python']}, {', '.join(f'{k} {v}' for k, v in machine['versions'].items())}; "
        f"commit {machine['commit']}; {machine['date']}."
    )


def _section(part: dict[str, Any]) -> list[str]:
    widths = sorted({trial["width"] for trial in part["trials"]})
    sizes = sorted({trial["batch_size"] for trial in part["trials"]})
    whole = len(part["trials"])
    lines = [
        f"## {part['work']}: {counted(whole, 'trial')} x {part['folds']} folds x {part['epochs']} epochs",
        "",
        f"Widths {', '.join(map(str, widths))}; batch sizes {', '.join(map(str, sizes))}.",
        "",
        "| engine | mean accuracy | seconds, median | min | max | of it start | compile | trials/s | gputune is "
        "| without compiling |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_row(engine, whole) for engine in part["engines"]),
        *(f"| {name}: {lack} |  |  |  |  |  |  |  |  |  |" for name, lack in part["left_out"].items()),
        *_card_rows(part["card"], whole),
        "",
    ]
    if (speed := part["speed"]) is not None:
        on = "" if speed["trials"] == whole else f", on the first {counted(speed['trials'], 'trial')}"
        lines += [
            f"gputune is {speed['ratio']:.2f}x as fast as the fastest other one, {speed['rival']}{on}.",
            "",
        ]
    return lines


def _row(engine: dict[str, Any], whole: int) -> str:
    part = (
        "" if engine["trials"] == whole else f" (measured on the first {counted(engine['trials'], 'trial')})"
    )
    ratios = " | "
    if engine["ratio"] is not None:
        ratios = (
            f"{engine['ratio']:.2f}x ({engine['ratio_min']:.2f} to {engine['ratio_max']:.2f}) "
            f"| {engine['ratio_compiled']:.2f}x"
        )
    return (
        f"| {engine['engine']}{part} | {engine['accuracy']:.4f} | {engine['median']:.2f} | {engine['min']:.2f} "
        f"| {engine['max']:.2f} | {engine['start']:.2f} | {engine['compile']:.2f} "
        f"| {engine['trials_per_second']:.2f} | {ratios} |"
    )


def counted(number: int, noun: str) -> str:
    """Return "1 trial", "2,000 trials"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _card_rows(card: dict[str, float] | None, trials: int) -> list[str]:
    if card is None:
        nothing = "| not measured |  |  |  |  |  |  |  |  |"
        return [f"| gputune on a GPU {nothing}", f"| PyTorch loop on a GPU, one at a time {nothing}"]
    own = card["gputune_median"]
    return [
        f"| gputune on the GPU | {card['gputune_accuracy']:.4f} | {own:.2f} | {card['gputune_min']:.2f} "
        f"| {card['gputune_max']:.2f} |  |  | {trials / own:.2f} |  |  |",
        f"| PyTorch loop on the GPU, one at a time | from {card['eager_trials']:.0f} trials "
        f"| {card['eager_seconds']:.2f} |  |  |  |  | {trials / card['eager_seconds']:.2f} |  |  |",
    ]


def write(out: Path, machine: dict[str, Any], parts: Sequence[dict[str, Any]]) -> tuple[Path, Path]:
    """Write the JSON and the Markdown file into a folder, made if need be; return their paths."""
    whole = {"machine": machine, "works": list(parts)}
    return write_both(out, machine, "training", markdown(machine, parts), whole)
