"""Learning curves: the best trials with the spread over the folds, in front of all others."""

from typing import Any

import numpy as np

from gputune.analysis.curves import shown_curves
from gputune.errors import InputError
from gputune.plots.canvas import OTHERS, axes, plain
from gputune.study.study import Study


def plot_curves(study: Study, ax: Any = None, *, best: int = 5) -> Any:
    """Draw the mean over the folds after each epoch and return the Axes.

    The ``best`` trials have a band of one standard deviation over the folds on either side. Raises InputError for a
    negative or fractional ``best``.
    """
    if isinstance(best, bool) or not isinstance(best, int) or best < 0:
        raise InputError(f"plot_curves(best=...) must be an integer of at least 0, got {best!r}.")
    ax = axes("plot_curves", ax)
    curves = shown_curves(study)
    order = {trial.number: place for place, trial in enumerate(study.ranking())}
    leading = [row for row, trial in enumerate(study.trials) if order[trial.number] < best]
    leading.sort(key=lambda row: order[study.trials[row].number])
    for row in sorted(set(range(len(study.trials))) - set(leading)):
        ax.plot(curves.epochs, curves.mean[row], color=OTHERS, linewidth=0.5, alpha=0.5, zorder=1)
    for place, row in enumerate(leading):
        mean, spread, colour = curves.mean[row], curves.spread[row], f"C{place % 10}"
        ax.plot(curves.epochs, mean, color=colour, label=f"trial {study.trials[row].number}", zorder=3)
        if np.isfinite(spread).any():
            ax.fill_between(
                curves.epochs, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0
            )
    ax.set_xlabel("epoch")
    ax.set_ylabel(plain(curves.measure.title))
    if leading:
        ax.legend()
    return ax
