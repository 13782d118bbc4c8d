"""The plots of a study with matplotlib, which is imported only when you call a plot."""

import math
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gputune.errors import InputError, check_count, import_extra
from gputune.study.study import Study, check_metric
from gputune.text import clean, short
from gputune.views.parameters import (
    Parameter,
    descended,
    descent_paths,
    importance,
    parallel_axes,
    parameter_scale,
    parameters,
    varied_parameters,
)
from gputune.views.scores import (
    BEST,
    Scale,
    Scores,
    curve_view,
    pareto_front,
    score_range,
    score_view,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE = "C0"
_GREY = "0.7"
_COLUMNS = 3  # columns of the grid of slices
_LEVELS = 12  # levels of a contour
_LETTERS = 24  # letters of words that fit side by side on an axis


def _pyplot(plot: str) -> ModuleType:
    """Return matplotlib.pyplot.

    Raises MissingExtraError, which names the plot and the extra, if matplotlib is not installed.
    """
    return import_extra("matplotlib.pyplot", extra="report", used_by=f"study.{plot}()")


def _axes(plot: str, ax: "Axes | None", size: tuple[float, float] = (7.0, 4.0)) -> "Axes":
    """Return the given Axes, or new Axes in a figure of ``size`` inches."""
    pyplot = _pyplot(plot)
    return pyplot.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def _plain(text: object) -> str:
    """Return text that matplotlib shows literally, so that a dollar sign begins no formula."""
    return clean(text).replace("$", r"\$")


def _name_axes(ax: "Axes", x: Parameter | str, y: Parameter | str) -> None:
    """Name both axes.

    The axis of a hyperparameter also gets its scale: numbers, a logarithm or words.
    """
    for axis, what in (("x", x), ("y", y)):
        ax.set(**{f"{axis}label": _plain(what.label if isinstance(what, Parameter) else what)})
        if isinstance(what, str):
            continue
        ticks = parameter_scale(what).ticks if len(what.distinct) else ()
        if what.log:
            ax.set(**{f"{axis}scale": "log"})
        if what.levels or (what.log and len(ticks) == len(what.distinct)):
            places = [place for place, _ in ticks]
            words = [_plain(words) for _, words in ticks]
            slanted = axis == "x" and sum(map(len, words)) > _LETTERS
            style: dict[str, Any] = (
                {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
            )
            ax.minorticks_off()
            (ax.set_xticks if axis == "x" else ax.set_yticks)(places, words, **style)


def _scale_axis(ax: "Axes", scale: Scale) -> None:
    """Give the axis of scores the same scale as in the HTML report."""
    ax.set(ylim=(scale.low, scale.high), yscale="log" if scale.log else "linear")


def _draw_scores(
    ax: "Axes", x: Parameter | str, places: NDArray[Any], shown: Scores, **style: Any
) -> None:
    """Draw a point per trial with a place and a score.

    The title says how many points were moved to the edge of the axis.
    """
    drawn = np.isfinite(places) & np.isfinite(shown.values)
    ax.scatter(places[drawn], np.clip(shown.values[drawn], *shown.range), s=14, **style)
    _name_axes(ax, x, shown.measure.title)
    _scale_axis(ax, shown.scale())
    ax.set_title("\n".join(shown.notes), fontsize="small")


def plot_history(study: Study, *, ax: "Axes | None" = None) -> "Axes":
    """Plot the score of each trial in the order of their numbers, and the best score so far.

    Args:
        ax: the Axes to draw on. None: a new figure.

    Returns:
        The Axes.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    ax = _axes("plot_history", ax)
    shown = score_view(study)
    numbers = np.array([trial.number for trial in study.trials], dtype=int)
    _draw_scores(ax, "trial", numbers, shown, color=_GREY, label="trial")
    ax.step(
        numbers,
        np.clip(shown.best_so_far, *shown.range),
        where="post",
        color=_BLUE,
        label="best so far",
    )
    ax.legend()
    return ax


def plot_curves(study: Study, *, best: int = BEST, ax: "Axes | None" = None) -> "Axes":
    """Plot the learning curves: the mean score over the folds after each epoch.

    The best trials have a band of one standard deviation over the folds on either side. The other
    trials are drawn behind them.

    Args:
        best: number of trials in color, an integer of at least 0.
        ax: the Axes to draw on. None: a new figure.

    Returns:
        The Axes.

    Raises:
        InputError: ``best`` is not an integer of at least 0.
        MissingExtraError: matplotlib is not installed.
    """
    check_count(best, "plot_curves(best=...)", least=0)
    ax = _axes("plot_curves", ax)
    curves = curve_view(study)
    for row in sorted(curves.order[best:]):
        ax.plot(curves.epochs, curves.mean[row], color=_GREY, linewidth=0.5, alpha=0.5, zorder=1)
    for place, row in enumerate(curves.order[:best]):
        mean = curves.mean[row]
        spread = curves.spread[row]
        colour = f"C{place % 10}"
        ax.plot(
            curves.epochs, mean, color=colour, label=f"trial {study.trials[row].number}", zorder=3
        )
        if np.isfinite(spread).any():
            ax.fill_between(
                curves.epochs, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0
            )
    _name_axes(ax, "epoch", curves.measure.title)
    if curves.order:
        _scale_axis(ax, curves.scale())
    if curves.order[:best]:
        ax.legend()
    return ax


def plot_slice(
    study: Study, parameter: str | None = None, *, ax: "Axes | None" = None
) -> "Axes | np.ndarray":
    """Plot the score against one hyperparameter, or against each that varied.

    Args:
        parameter: name of a hyperparameter. None: all that varied.
        ax: the Axes to draw on, only with ``parameter``. None: a new figure.

    Returns:
        The Axes, or without ``parameter`` an array of Axes, one per hyperparameter.

    Raises:
        InputError: the hyperparameter is unknown, ``ax`` is given without ``parameter``, or no
            hyperparameter varied.
        MissingExtraError: matplotlib is not installed.
    """
    shown = score_view(study)
    style = dict[str, Any](color=_BLUE, alpha=0.7)
    if parameter is not None:
        column = _parameter(study, parameter, "plot_slice")
        ax = _axes("plot_slice", ax, (4.5, 3.5))
        _draw_scores(ax, column, column.values, shown, **style)
        return ax
    if ax is not None:
        raise InputError(
            "plot_slice(ax=...) is one Axes and needs parameter=..., got none; name one."
        )
    if not (varied := varied_parameters(study)):
        raise InputError(
            "plot_slice() needs a hyperparameter in which two trials differ, and there is none."
        )
    columns = min(_COLUMNS, len(varied))
    rows = math.ceil(len(varied) / columns)
    size = (3.6 * columns, 3 * rows)
    _, grid = _pyplot("plot_slice").subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False
    )
    cells: np.ndarray = grid.ravel()
    for cell, column in zip(cells, varied):
        _draw_scores(cell, column, column.values, shown, **style)
    for cell in cells[len(varied) :]:
        cell.remove()
    return cells[: len(varied)]


def _parameter(study: Study, name: str, plot: str) -> Parameter:
    """Return a hyperparameter by its name. Raises InputError with the known names."""
    columns = {parameter.name: parameter for parameter in parameters(study)}
    if name not in columns:
        known = ", ".join(map(short, columns)) or "none"
        raise InputError(
            f"{plot}: the trials have no hyperparameter {name!r}; choose one of {known}."
        )
    return columns[name]


def plot_parallel(study: Study, *, ax: "Axes | None" = None) -> "Axes":
    """Plot parallel coordinates: a line per trial with a score, through one axis per
    hyperparameter.

    Only hyperparameters that varied have an axis. Each axis runs from 0 to 1 over its range, its
    logarithm if the scale is logarithmic, or its words. A line breaks if a trial lacks a
    hyperparameter. The color is the score, and better lines lie on top.

    Args:
        ax: the Axes to draw on. None: a new figure.

    Returns:
        The Axes.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    ax = _axes("plot_parallel", ax, (9.0, 4.5))
    shown = score_view(study)
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    columns = parallel_axes(shown)
    colours = ScalarMappable(Normalize(*shown.range), _colour_map(shown))
    places = range(len(columns))
    for row in shown.order[::-1]:
        heights = [column.heights[row] for column in columns]
        ax.plot(places, heights, color=colours.to_rgba(shown.values[row]), linewidth=0.8)
    for place, column in enumerate(columns):
        for value, label in column.scale.ticks:
            height = float(column.scale(value))
            ax.text(
                place, height, f" {_plain(label)}", fontsize="x-small", va="center", clip_on=True
            )
    ax.set_xticks(places, [_plain(column.label) for column in columns])
    ax.set_ylabel("low to high")
    ax.figure.colorbar(colours, ax=ax, label=_plain(shown.measure.title))
    return ax


def plot_pareto(
    study: Study, x: str | None = None, y: str | None = None, *, ax: "Axes | None" = None
) -> "Axes":
    """Plot the trials by two metrics, with a line through the Pareto-optimal trials.

    Args:
        x: name of a metric. None: the first one.
        y: name of another metric. None: the first one except ``x``.
        ax: the Axes to draw on. None: a new figure.

    Returns:
        The Axes.

    Raises:
        InputError: the study has only one metric, or a name is not one of its metrics.
        MissingExtraError: matplotlib is not installed.
    """
    known = study.metrics
    x = known[0] if x is None and known else x
    y = next((name for name in known if name != x), None) if y is None else y
    front = pareto_front(
        study, check_metric(study, x, "plot_pareto"), check_metric(study, y, "plot_pareto")
    )
    ax, (across, down) = _axes("plot_pareto", ax, (5.0, 4.0)), front.measures
    ax.scatter(front.values[:, 0], front.values[:, 1], s=14, color=_GREY, label="trial")
    ax.plot(*front.values[front.order].T, "o-", color=_BLUE, markersize=5, label="Pareto-optimal")
    _name_axes(ax, across.title, down.title)
    ax.legend()
    return ax


def _colour_map(shown: Scores) -> str:
    """Return the name of a color map in which better scores are brighter."""
    return "viridis_r" if shown.measure.lower_is_better else "viridis"


def plot_importance(study: Study, *, seed: int = 0, ax: "Axes | None" = None) -> "Axes":
    """Plot the permutation importance of the hyperparameters, from a random forest on the trials.

    Args:
        seed: seed of the forest.
        ax: the Axes to draw on. None: a new figure.

    Returns:
        The Axes.

    Raises:
        InputError: fewer than ten trials are finished, or no hyperparameter varied.
        MissingExtraError: matplotlib is not installed.
    """
    shown = importance(study, seed=seed)
    ax = _axes("plot_importance", ax, (6.0, 1.2 + 0.4 * len(shown.names)))
    places = range(len(shown.names))
    ax.barh(places, shown.drops, xerr=shown.errors, color=_BLUE, height=0.6)
    ax.set_yticks(places, list(map(_plain, shown.labels)))
    ax.invert_yaxis()
    ax.set_xlabel(
        f"fall of the forest's R² when shuffled (R² {shown.fit:.2f} on trials it has not seen)"
    )
    return ax


def plot_contour(
    study: Study, x: str | None = None, y: str | None = None, *, ax: "Axes | None" = None
) -> "Axes":
    """Plot the score over two hyperparameters as filled contours.

    Between trials the score is interpolated linearly, on the logarithm if the scale is logarithmic.
    Trials at the same place are averaged.

    Args:
        x: name of a hyperparameter. None, together with ``y``: the two most important ones.
        y: name of another hyperparameter.
        ax: the Axes to draw on. None: a new figure.

    Returns:
        The Axes.

    Raises:
        InputError: a hyperparameter is unknown, only one name is given, or the trials lie on a
            line.
        MissingExtraError: matplotlib is not installed.
    """
    if (x is None) != (y is None) or (x is not None and x == y):
        raise InputError(
            f"plot_contour needs two different hyperparameters or none, got x={x!r}, y={y!r}."
        )
    try:
        names = importance(study).names if x is None else (x, str(y))
    except InputError as error:
        raise InputError(f"{error} Or name two: plot_contour(x, y).") from None
    if len(names) < 2:
        raise InputError(f"plot_contour needs two hyperparameters that vary, got {len(names)}.")
    columns = [_parameter(study, name, "plot_contour") for name in names[:2]]
    shown = score_view(study)
    at = np.stack([column.values for column in columns], axis=1)
    scored = np.isfinite(at).all(1) & np.isfinite(shown.values)
    places, trials = np.unique(at[scored], axis=0, return_inverse=True)
    means = np.bincount(trials.ravel(), shown.values[scored]) / np.bincount(trials.ravel())
    flat = np.stack([np.log(at) if one.log else at for one, at in zip(columns, places.T)], axis=1)
    if len(places) < 3 or np.linalg.matrix_rank(flat - flat[0], tol=1e-9) < 2:
        raise InputError(
            "plot_contour needs scored trials at three places that are not on one line, got "
            f"{len(places)} places in {columns[0].name!r} and {columns[1].name!r}; choose others, "
            "or search further."
        )
    ax = _axes("plot_contour", ax, (6.0, 4.5))
    from matplotlib.tri import Triangulation

    # The triangles are computed on the scales of the axes, and drawn at the values.
    (x_places, y_places), triangles = places.T, Triangulation(*flat.T).triangles
    low, high = score_range(means, shown.measure)
    levels = np.linspace(low, high if high > low else low + 1e-12, _LEVELS)
    drawn = Triangulation(x_places, y_places, triangles)
    filled = ax.tricontourf(drawn, means, levels=levels, cmap=_colour_map(shown), extend="both")
    ax.scatter(x_places, y_places, s=10, color="white", edgecolor="black", linewidth=0.5)
    ax.figure.colorbar(filled, ax=ax, label=_plain(shown.measure.title))
    _name_axes(ax, *columns)
    return ax


def plot_path(study: Study, parameter: str | None = None, *, ax: "Axes | None" = None) -> "Axes":
    """Plot the paths of a hypergradient search: one line per start, a hyperparameter by outer step.

    The best five starts have colors. A hollow point has a slope that the guard rejected as noise.

    Args:
        parameter: name of a hyperparameter that the search moved. None: the first one.
        ax: the Axes to draw on. None: a new figure.

    Returns:
        The Axes.

    Raises:
        InputError: the study used another method, or the search did not move this hyperparameter.
        MissingExtraError: matplotlib is not installed.
    """
    columns = {column.name: column for column in descended(study)}
    if not columns:
        raise InputError(
            "plot_path needs a study by hypergradients: tune(..., method='hypergradient')."
        )
    name = next(iter(columns)) if parameter is None else parameter
    if name not in columns:
        raise InputError(
            f"plot_path(parameter=...) must be one of {', '.join(columns)}, got {name!r}."
        )
    ax = _axes("plot_path", ax)
    shown = descent_paths(study)
    for place, path in reversed(list(enumerate(shown))):
        named = place < BEST
        values = path.values[name]
        noisy = ~path.usable
        (line,) = ax.plot(
            path.steps, values, "o-", color=f"C{place}" if named else _GREY, markersize=4
        )
        line.set(label=f"start {path.start}" if named else None, zorder=2 + named)
        (points,) = ax.plot(
            path.steps[noisy], values[noisy], "o", color=line.get_color(), markersize=4
        )
        points.set(markerfacecolor="white", zorder=4)
    _name_axes(ax, "outer step", columns[name])
    if shown:
        ax.legend()
    return ax
