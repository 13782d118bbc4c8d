"""The score against one hyperparameter, or against each in axes of its own."""

import math
from typing import Any

from gputune.analysis.parameters import Parameter, parameters, varied_parameters
from gputune.analysis.scores import Scores, shown_scores
from gputune.errors import InputError
from gputune.plots.canvas import BEST, axes, plain, pyplot, seen, set_scale
from gputune.report.text import short
from gputune.study.study import Study

_COLUMNS = 3


def plot_slice(study: Study, parameter: str | None = None, ax: Any = None) -> Any:
    """Draw it and return the Axes; without ``parameter``, an array of Axes, one for each hyperparameter that varied.

    Raises InputError for an unknown hyperparameter, for ``ax`` without ``parameter``, and where none varied.
    """
    shown = shown_scores(study)
    if parameter is not None:
        found = chosen(study, parameter, "plot_slice")
        ax = axes("plot_slice", ax, (4.5, 3.5))
        _draw(ax, found, shown)
        return ax
    if ax is not None:
        raise InputError("plot_slice(ax=...) is one Axes and needs parameter=..., got none; name one.")
    varied = varied_parameters(study)
    if not varied:
        raise InputError("plot_slice() needs a hyperparameter in which two trials differ, and there is none.")
    columns = min(_COLUMNS, len(varied))
    rows = math.ceil(len(varied) / columns)
    _, grid = pyplot("plot_slice").subplots(
        rows, columns, figsize=(3.6 * columns, 3 * rows), layout="constrained", squeeze=False
    )
    cells = grid.ravel()
    for cell, one in zip(cells, varied):
        _draw(cell, one, shown)
    for cell in cells[len(varied) :]:
        cell.remove()
    return cells[: len(varied)]


def chosen(study: Study, name: str, plot: str) -> Parameter:
    """Return a hyperparameter by its name; InputError, with those that there are, for another one."""
    found = {parameter.name: parameter for parameter in parameters(study)}
    if name not in found:
        raise InputError(
            f"{plot}: the trials have no hyperparameter {name!r}; choose one of "
            f"{', '.join(map(short, found)) or 'none'}."
        )
    return found[name]


def _draw(ax: Any, parameter: Parameter, shown: Scores) -> None:
    there = seen(parameter.values) & seen(shown.values)
    ax.scatter(parameter.values[there], shown.values[there], s=14, color=BEST, alpha=0.7)
    set_scale(ax, "x", parameter)
    ax.set_ylabel(plain(shown.measure.title))
