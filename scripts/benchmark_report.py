"""What was measured, as values: do the engines agree, how much faster is gputune; a JSON and a Markdown file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_machine import write_both
from benchmark_work import Work

AGREEMENT = 0.01  # in mean accuracy; a network's other start and row order move it less

HOW = """\
Every engine trains the same trials (learning rate log-uniform, batch size and width from lists; two hidden relu
layers, Adam, no decay) on the same folds, standardised by each fold's training rows, for the same number of epochs,
in float32. Its accuracies on the validation rows after the last epoch must have the same mean, to 0.01, before a
time is shown. The times hold all that a user waits for inside the call: start of the worker processes and their
imports, scaling, writing and reading of the data, training, scores. All workers are ended before each call. Only
the imports of the calling process, and one call on a small piece of the work, are made before. scikit-learn and
the PyTorch loop (eager, fused Adam, no DataLoader) run one process a core with one thread each, longest trials
first, and score once, after the last epoch; gputune plans its processes itself and scores after each epoch. The
engines take turns, and in each repeat another one begins.
"""


@dataclass(frozen=True)
class Measured:
    """One engine on one work.

    seconds   of each of the R repeats
    scores    (R, C, F) last-epoch accuracies
    """

    engine: str
    seconds: tuple[float, ...]
    scores: np.ndarray

    @property
    def accuracy(self) -> float:
        """Mean over repeats, trials and folds; NaN where one of them diverged."""
        return float(self.scores.mean())


def agree(measured: Sequence[Measured]) -> bool:
    """Whether the mean accuracies lie within ``AGREEMENT`` of each other; a NaN agrees with nothing."""
    means = [m.accuracy for m in measured]
    return bool(np.isfinite(means).all()) and max(means) - min(means) <= AGREEMENT


def summary(work: Work, measured: Sequence[Measured], card: dict[str, float] | None) -> dict[str, Any]:
    """Return one work's part of the report. ``measured`` has an engine named "gputune"; ``card`` is the GPU's part."""
    return {
        "work": work.name,
        "epochs": work.epochs,
        "folds": len(work.folds),
        "trials": list(work.trials),
        "engines": [_engine(work, m) for m in measured],
        "speed": _speed(measured),
        "card": card,
    }


def _engine(work: Work, measured: Measured) -> dict[str, Any]:
    seconds = np.array(measured.seconds)
    return {
        "engine": measured.engine,
        "accuracy": measured.accuracy,
        "seconds": list(measured.seconds),
        "median": float(np.median(seconds)),
        "min": float(seconds.min()),
        "max": float(seconds.max()),
        "trials_per_second": len(work.trials) / float(np.median(seconds)),
        "trial_accuracies": measured.scores.mean((0, 2)).tolist(),
    }


def _speed(measured: Sequence[Measured]) -> dict[str, Any]:
    """How many times gputune's speed is that of the faster other one: of medians, and within each repeat."""
    own = next(m for m in measured if m.engine == "gputune")
    others = [m for m in measured if m is not own]
    rival = min(others, key=lambda m: float(np.median(m.seconds)))
    each = np.min([m.seconds for m in others], axis=0) / np.array(own.seconds)
    ratio = float(np.median(rival.seconds) / np.median(own.seconds))
    return {"rival": rival.engine, "ratio": ratio, "min": float(each.min()), "max": float(each.max())}


def markdown(machine: dict[str, Any], parts: Sequence[dict[str, Any]]) -> str:
    """Return the report as a page."""
    lines = [
        "# One list of trials, trained by each engine",
        "",
        f"{machine['cpu']}, {machine['cores']} cores; {machine['card'] or 'no GPU'}; {machine['system']}; "
        f"Python {machine['python']}, {', '.join(f'{k} {v}' for k, v in machine['versions'].items())}; "
        f"commit {machine['commit']}; {machine['date']}.",
        "",
        HOW,
    ]
    for part in parts:
        lines += _section(part)
    return "\n".join(lines) + "\n"


def _section(part: dict[str, Any]) -> list[str]:
    widths = sorted({trial["width"] for trial in part["trials"]})
    sizes = sorted({trial["batch_size"] for trial in part["trials"]})
    speed = part["speed"]
    return [
        f"## {part['work']}: {len(part['trials'])} trials x {part['folds']} folds x {part['epochs']} epochs",
        "",
        f"Widths {', '.join(map(str, widths))}; batch sizes {', '.join(map(str, sizes))}.",
        "",
        "| engine | mean accuracy | seconds, median | min | max | trials/s |",
        "|---|---|---|---|---|---|",
        *(
            f"| {e['engine']} | {e['accuracy']:.4f} | {e['median']:.2f} | {e['min']:.2f} | {e['max']:.2f} "
            f"| {e['trials_per_second']:.2f} |"
            for e in part["engines"]
        ),
        *_card_rows(part["card"], len(part["trials"])),
        "",
        f"gputune is {speed['ratio']:.2f}x as fast as {speed['rival']}, the faster of the others on the CPU "
        f"({speed['min']:.2f} to {speed['max']:.2f} within a repeat).",
        "",
    ]


def _card_rows(card: dict[str, float] | None, trials: int) -> list[str]:
    if card is None:
        nothing = "| not measured |  |  |  |  |"
        return [f"| gputune on a GPU {nothing}", f"| PyTorch loop on a GPU, one at a time {nothing}"]
    own = card["gputune_median"]
    return [
        f"| gputune on the GPU | {card['gputune_accuracy']:.4f} | {own:.2f} | {card['gputune_min']:.2f} "
        f"| {card['gputune_max']:.2f} | {trials / own:.2f} |",
        f"| PyTorch loop on the GPU, one at a time | from {card['eager_trials']:.0f} trials "
        f"| {card['eager_seconds']:.2f} |  |  | {trials / card['eager_seconds']:.2f} |",
    ]


def write(out: Path, machine: dict[str, Any], parts: Sequence[dict[str, Any]]) -> tuple[Path, Path]:
    """Write the JSON and the Markdown file into a folder, made if need be; return their paths."""
    whole = {"machine": machine, "works": list(parts)}
    return write_both(out, machine, "training", markdown(machine, parts), whole)
