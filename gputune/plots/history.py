"""The score of each trial in the order of their numbers, and the best so far."""

from typing import Any

import numpy as np

from gputune.analysis.scores import shown_scores
from gputune.plots.canvas import BEST, OTHERS, axes, plain, seen
from gputune.study.study import Study


def plot_history(study: Study, ax: Any = None) -> Any:
    """Draw it and return the Axes; a trial without a score has no point."""
    ax = axes("plot_history", ax)
    shown = shown_scores(study)
    numbers, there = np.array([trial.number for trial in study.trials], dtype=int), seen(shown.values)
    ax.scatter(numbers[there], shown.values[there], s=14, color=OTHERS, label="trial")
    ax.step(numbers, shown.best_so_far, where="post", color=BEST, label="best so far")
    ax.set_xlabel("trial")
    ax.set_ylabel(plain(shown.measure.title))
    ax.legend()
    return ax
