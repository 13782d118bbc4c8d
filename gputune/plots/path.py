"""The paths of a search by hypergradients: a hyperparameter from outer step to outer step, a line a start."""

from typing import Any

from gputune.analysis.descents import descended, descents
from gputune.errors import InputError
from gputune.plots.canvas import OTHERS, axes, set_scale
from gputune.study.study import Study

_NAMED = 5


def plot_path(study: Study, parameter: str | None = None, ax: Any = None) -> Any:
    """Draw it and return the Axes; ``parameter`` is the first of those descended on where it is left out.

    The best five starts have colours; a hollow point is one whose slope the guard took for noise. Raises InputError for
    a study of another method and for a hyperparameter that was not descended on.
    """
    moved = {one.name: one for one in descended(study)}
    if not moved:
        raise InputError("plot_path needs a study by hypergradients: tune(..., method='hypergradient').")
    name = next(iter(moved)) if parameter is None else parameter
    if name not in moved:
        raise InputError(f"plot_path(parameter=...) must be one of {', '.join(moved)}, got {name!r}.")
    ax = axes("plot_path", ax)
    paths = descents(study)
    for place, path in reversed(list(enumerate(paths))):
        named = place < _NAMED
        colour = f"C{place}" if named else OTHERS
        label = f"start {path.start}" if named else None
        values, noisy = path.values[name], ~path.usable
        ax.plot(path.steps, values, color=colour, marker="o", markersize=4, label=label, zorder=2 + named)
        ax.plot(
            path.steps[noisy],
            values[noisy],
            "o",
            color=colour,
            markerfacecolor="white",
            markersize=4,
            zorder=4,
        )
    ax.set_xlabel("outer step")
    set_scale(ax, "y", moved[name])
    if paths:
        ax.legend()
    return ax
