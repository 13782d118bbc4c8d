"""How the trials of a study ended: how many in each state, at which rung they left, which ones diverged and when."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from gputune.report.facts import STATES
from gputune.report.text import clean, short
from gputune.study.study import Study

DIVERGED = 20
"""Diverged trials that are listed."""


@dataclass(frozen=True)
class Endings:
    """What the page says of the ends.

    states     (state, words, trials, share in percent) of those that there are
    rungs      (epoch, trials that were sent away, trials that trained on) of successive halving
    diverged   (number, first epoch with a loss that is no number, parameters) of the first of them
    failed     how many diverged
    spent      trial-epochs that were trained, and those of training all to the end
    """

    states: tuple[tuple[str, str, int, float], ...]
    rungs: tuple[tuple[int, int, int], ...]
    diverged: tuple[tuple[int, int, str], ...]
    failed: int
    spent: tuple[int, int]


def endings(study: Study) -> Endings:
    """Return how the trials ended."""
    counts = Counter(trial.state for trial in study.trials)
    total = max(1, len(study.trials))
    failed = [trial for trial in study.trials if trial.state == "failed"]
    return Endings(
        states=tuple(
            (s, words, counts[s], 100 * counts[s] / total) for s, words in STATES.items() if counts[s]
        ),
        rungs=_rungs(study),
        diverged=tuple(
            (
                trial.number,
                trial.best_epoch + 1,
                ", ".join(f"{clean(key)} = {short(value)}" for key, value in trial.params.items()),
            )
            for trial in failed[:DIVERGED]
        ),
        failed=len(failed),
        spent=study.spent,
    )


def _rungs(study: Study) -> tuple[tuple[int, int, int], ...]:
    left = Counter(
        trial.detail["rung"] for trial in study.trials if trial.state == "pruned" and "rung" in trial.detail
    )
    trained = (~np.isnan(study.curves)).any(2).sum(1) if study.curves.size else np.zeros(0, dtype=int)
    return tuple((epoch, number, int((trained > epoch).sum())) for epoch, number in sorted(left.items()))
