"""The importance of the hyperparameters as bars."""

from typing import Any

from gputune.analysis.importance import importance
from gputune.plots.canvas import BEST, axes, plain
from gputune.study.study import Study


def plot_importance(study: Study, ax: Any = None, *, seed: int = 0) -> Any:
    """Draw it and return the Axes; see ``gputune.analysis.importance`` for what it is. InputError for a small study."""
    found = importance(study, seed=seed)
    ax = axes("plot_importance", ax, (6.0, 1.2 + 0.4 * len(found.names)))
    places = range(len(found.names))
    ax.barh(places, found.drops, xerr=found.errors, color=BEST, height=0.6)
    ax.set_yticks(places, list(map(plain, found.labels)))
    ax.invert_yaxis()
    ax.set_xlabel(f"fall of the forest's R² when shuffled (R² {found.fit:.2f} on trials it has not seen)")
    return ax
