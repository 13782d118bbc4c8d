"""What all plots share: matplotlib where it is installed, axes to draw on, names as plain text, scales.

The score of each trial in the order of their numbers, and the best so far.

Learning curves: the best trials with the spread over the folds, in front of all others.

The score against one hyperparameter, or against each in axes of its own.

Parallel coordinates: one line a trial through an axis for each hyperparameter, the colour its score.

The importance of the hyperparameters as bars.

The score over two hyperparameters as filled contours through the trials.

The paths of a search by hypergradients: a hyperparameter from outer step to outer step, a line a start.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gputune.errors import InputError
from gputune.extras import import_extra
from gputune.study.study import Study
from gputune.text import clean, short
from gputune.views.descents import descended, descents
from gputune.views.importance import importance
from gputune.views.parameters import Parameter, parameters, varied_parameters
from gputune.views.scores import Scores, score_range, shown_curves, shown_scores

BEST, OTHERS = "C0", "0.7"
"""Colours of what is looked at, and of all else."""


def pyplot(plot: str) -> Any:
    """Return matplotlib.pyplot; MissingExtraError, naming the plot and the extra, where it is not installed."""
    return import_extra("matplotlib.pyplot", extra="report", used_by=f"study.{plot}()")


def axes(plot: str, ax: Any, size: tuple[float, float] = (7.0, 4.0)) -> Any:
    """Return the Axes that were given, or new ones in a figure of so many inches."""
    module = pyplot(plot)
    return ax if ax is not None else module.subplots(figsize=size, layout="constrained")[1]


def plain(text: object) -> str:
    """Return text that matplotlib shows as it is: a dollar sign begins no formula."""
    return clean(text).replace("$", r"\$")


def set_scale(ax: Any, axis: str, parameter: Parameter) -> None:
    """Name an axis after a hyperparameter and give it its scale: numbers, a logarithm, or words."""
    getattr(ax, f"set_{axis}label")(plain(parameter.label))
    if parameter.levels:
        getattr(ax, f"set_{axis}ticks")(range(len(parameter.levels)), list(map(plain, parameter.levels)))
    elif parameter.log:
        getattr(ax, f"set_{axis}scale")("log")


def seen(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return where there is a number."""
    found: NDArray[np.bool_] = np.isfinite(values)
    return found


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


def plot_parallel(study: Study, ax: Any = None) -> Any:
    """Draw the trials that have a score and return the Axes; the last axis is the score.

    Each axis runs from 0 to 1 over the range of its hyperparameter (its logarithm where that is its scale) or through
    its words; a line breaks where a trial lacks one. The better lines lie on top.
    """
    ax = axes("plot_parallel", ax, (9.0, 4.5))
    shown, columns = shown_scores(study), varied_parameters(study)
    heights = [*map(axis_heights, columns), _unit(shown.values)]
    table = np.stack(heights, axis=1)
    rows = np.flatnonzero(seen(shown.values))
    sign = -1.0 if shown.measure.lower_is_better else 1.0
    low, high = shown.range
    colours = _colours(low, high, reverse=sign < 0)
    for row in sorted(rows, key=lambda row: sign * shown.values[row]):
        ax.plot(range(table.shape[1]), table[row], color=colours.to_rgba(shown.values[row]), linewidth=0.8)
    names = [*(column.label for column in columns), shown.measure.name]
    ax.set_xticks(range(table.shape[1]), list(map(plain, names)))
    ax.set_ylabel("low to high")
    ax.figure.colorbar(colours, ax=ax, label=plain(shown.measure.title))
    return ax


def axis_heights(parameter: Parameter) -> NDArray[np.float64]:
    """Return (C,) heights in [0, 1]; NaN for a trial without the hyperparameter."""
    if parameter.levels:
        return parameter.values / max(1, len(parameter.levels) - 1)
    return _unit(np.log(parameter.values) if parameter.log else parameter.values)


def _unit(values: NDArray[np.float64]) -> NDArray[np.float64]:
    there = seen(values)
    if not there.any():
        return values
    low, high = values[there].min(), values[there].max()
    return (values - low) / (high - low) if high > low else np.where(there, 0.5, np.nan)


def _colours(low: float, high: float, *, reverse: bool) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(low, high), "viridis_r" if reverse else "viridis")


def plot_importance(study: Study, ax: Any = None, *, seed: int = 0) -> Any:
    """Draw it and return the Axes; see ``gputune.views.importance`` for what it is. InputError for a small study."""
    found = importance(study, seed=seed)
    ax = axes("plot_importance", ax, (6.0, 1.2 + 0.4 * len(found.names)))
    places = range(len(found.names))
    ax.barh(places, found.drops, xerr=found.errors, color=BEST, height=0.6)
    ax.set_yticks(places, list(map(plain, found.labels)))
    ax.invert_yaxis()
    ax.set_xlabel(f"fall of the forest's R² when shuffled (R² {found.fit:.2f} on trials it has not seen)")
    return ax


_LEVELS = 12


def plot_contour(study: Study, x: str | None = None, y: str | None = None, ax: Any = None) -> Any:
    """Draw it and return the Axes; without ``x`` and ``y`` the two most important hyperparameters are taken.

    Between trials the score is interpolated linearly, on the logarithm where that is the scale; trials at one place are
    averaged. Raises InputError for an unknown hyperparameter, one name without the other, and where the trials
    lie on a line.
    """
    if (x is None) != (y is None) or (x is not None and x == y):
        raise InputError(f"plot_contour needs two different hyperparameters or none, got x={x!r}, y={y!r}.")
    if x is None or y is None:
        found = importance(study).names
        if len(found) < 2:
            raise InputError(f"plot_contour needs two hyperparameters that vary, got {len(found)}.")
        x, y = found[:2]
    across, up = chosen(study, x, "plot_contour"), chosen(study, y, "plot_contour")
    shown = shown_scores(study)
    there = seen(across.values) & seen(up.values) & seen(shown.values)
    at = np.stack([across.values[there], up.values[there]], axis=1)
    places, which = np.unique(at, axis=0, return_inverse=True)
    which = which.ravel()
    means = np.bincount(which, shown.values[there]) / np.bincount(which) if len(places) else np.empty(0)
    flat = np.stack(
        [np.log(part) if one.log else part for one, part in ((across, places[:, 0]), (up, places[:, 1]))], 1
    )
    if len(places) < 3 or np.linalg.matrix_rank(flat - flat[0], tol=1e-9) < 2:
        raise InputError(
            f"plot_contour needs scored trials at three places that are not on one line, got {len(places)} places in "
            f"{x!r} and {y!r}; choose others, or search further."
        )
    ax = axes("plot_contour", ax, (6.0, 4.5))
    _fill(ax, places, flat, means, shown)
    set_scale(ax, "x", across)
    set_scale(ax, "y", up)
    return ax


def _fill(ax: Any, places: Any, flat: Any, means: Any, shown: Any) -> None:
    """Fill the triangles of the transformed places, drawn where the places are."""
    from matplotlib.tri import Triangulation

    triangles = Triangulation(flat[:, 0], flat[:, 1]).triangles
    low, high = score_range(means, shown.measure)
    levels = np.linspace(low, high if high > low else low + 1e-12, _LEVELS)
    colours = "viridis_r" if shown.measure.lower_is_better else "viridis"
    filled = ax.tricontourf(
        places[:, 0], places[:, 1], triangles, means, levels=levels, cmap=colours, extend="both"
    )
    ax.scatter(places[:, 0], places[:, 1], s=10, color="white", edgecolor="black", linewidth=0.5)
    ax.figure.colorbar(filled, ax=ax, label=plain(shown.measure.title))


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
