"""Plot a study with matplotlib. gputune imports matplotlib only when you call a plot."""

import math
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gputune.ground.entry_points import import_extra
from gputune.ground.errors import InputError, Verbatim, check_count
from gputune.ground.text import clean, short
from gputune.study.study import Study, check_metric
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
    """Import and return matplotlib.pyplot.

    Raises MissingExtraError, which names the plot and the extra, if matplotlib is not installed.
    """
    return import_extra("matplotlib.pyplot", extra="report", used_by=f"study.{plot}()")


def _axes(plot: str, ax: "Axes | None", size: tuple[float, float] = (7.0, 4.0)) -> "Axes":
    """Return ``ax``, or new Axes in a figure of ``size`` inches if ``ax`` is None."""
    pyplot = _pyplot(plot)
    return pyplot.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def _plain(text: object) -> str:
    """Escape a text for matplotlib, so that a dollar sign does not begin a formula."""
    return clean(text).replace("$", r"\$")


def _name_axes(ax: "Axes", x: Parameter | str, y: Parameter | str) -> None:
    """Set the labels of the x axis and the y axis of a plot.

    The axis of a hyperparameter also gets a linear, logarithmic or categorical scale.
    """
    for axis, quantity in (("x", x), ("y", y)):
        if isinstance(quantity, str):
            ax.set(**{f"{axis}label": _plain(quantity)})
            continue
        ax.set(**{f"{axis}label": _plain(quantity.label)})
        ticks = parameter_scale(quantity).ticks if len(quantity.distinct) else ()
        if quantity.log:
            ax.set(**{f"{axis}scale": "log"})
        if quantity.levels or (quantity.log and len(ticks) == len(quantity.distinct)):
            places = [place for place, _ in ticks]
            labels = [_plain(label) for _, label in ticks]
            style: dict[str, Any] = {}
            if axis == "x" and sum(map(len, labels)) > _LETTERS:
                style = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
            ax.minorticks_off()
            (ax.set_xticks if axis == "x" else ax.set_yticks)(places, labels, **style)


def _scale_axis(ax: "Axes", scale: Scale) -> None:
    """Set the limits and the scale of the y axis for scores as in the HTML report."""
    ax.set(ylim=(scale.low, scale.high), yscale="log" if scale.log else "linear")


def _draw_scores(
    ax: "Axes", x: Parameter | str, places: NDArray[Any], view: Scores, **style: Any
) -> None:
    """Draw a point for each trial that has a position on the x axis and a score.

    The title says how many points were moved to the edge of the axis.
    """
    drawn = np.isfinite(places) & np.isfinite(view.values)
    ax.scatter(places[drawn], np.clip(view.values[drawn], *view.range), s=14, **style)
    _name_axes(ax, x, view.measure.title)
    _scale_axis(ax, view.scale())
    ax.set_title("\n".join(view.notes), fontsize="small")


def plot_history(study: Study, *, ax: "Axes | None" = None) -> "Axes":
    """Plot the score of each trial in the order of the trial numbers, and the best score so far.

    Args:
        ax: the Axes to draw on. None: a new figure.

    Returns:
        The Axes.

    Raises:
        MissingExtraError: matplotlib is not installed.

    Example:
        >>> ax = study.plot_history()
        >>> ax.figure.savefig("history.png")
    """
    ax = _axes("plot_history", ax)
    view = score_view(study)
    numbers = np.array([trial.number for trial in study.trials], dtype=int)
    _draw_scores(ax, "trial", numbers, view, color=_GREY, label="trial")
    best = np.clip(view.best_so_far, *view.range)
    ax.step(numbers, best, where="post", color=_BLUE, label="best so far")
    ax.legend()
    return ax


def plot_curves(study: Study, *, best: int = BEST, ax: "Axes | None" = None) -> "Axes":
    """Plot the learning curves: the mean score over the folds after each epoch.

    The best trials have a band of one standard deviation over the folds on either side. The other
    trials are gray lines behind the best trials.

    Args:
        best: number of trials in color, an integer of at least 0.
        ax: the Axes to draw on. None: a new figure.

    Returns:
        The Axes.

    Raises:
        InputError: ``best`` is not an integer of at least 0.
        MissingExtraError: matplotlib is not installed.

    Example:
        >>> ax = study.plot_curves(best=3)
    """
    check_count(best, "plot_curves(best=...)", least=0)
    ax = _axes("plot_curves", ax)
    curves = curve_view(study)
    for row in sorted(curves.order[best:]):
        ax.plot(curves.epochs, curves.mean[row], color=_GREY, linewidth=0.5, alpha=0.5, zorder=1)
    for place, row in enumerate(curves.order[:best]):
        mean = curves.mean[row]
        spread = curves.spread[row]
        color = f"C{place % 10}"
        label = f"trial {study.trials[row].number}"
        ax.plot(curves.epochs, mean, color=color, label=label, zorder=3)
        if np.isfinite(spread).any():
            ax.fill_between(
                curves.epochs, mean - spread, mean + spread, color=color, alpha=0.15, linewidth=0
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
    """Plot the score against one hyperparameter, or against each hyperparameter that varied.

    Args:
        parameter: name of a hyperparameter. None: all hyperparameters that varied.
        ax: the Axes to draw on, only with ``parameter``. None: a new figure.

    Returns:
        The Axes, or without ``parameter`` an array of Axes, one per hyperparameter.

    Raises:
        InputError: the hyperparameter is unknown, ``ax`` is given without ``parameter``, or no
            hyperparameter varied.
        MissingExtraError: matplotlib is not installed.

    Example:
        >>> ax = study.plot_slice("lr")
    """
    view = score_view(study)
    if parameter is not None:
        column = _parameter(study, parameter, "plot_slice")
        ax = _axes("plot_slice", ax, (4.5, 3.5))
        _draw_scores(ax, column, column.values, view, color=_BLUE, alpha=0.7)
        return ax
    if ax is not None:
        raise InputError(
            "plot_slice(ax=...)",
            "draws only one hyperparameter",
            remedy="Name it: plot_slice(parameter=..., ax=...).",
        )
    varied = varied_parameters(study)
    if not varied:
        raise InputError("plot_slice()", "needs a hyperparameter that differs between trials")
    columns = min(_COLUMNS, len(varied))
    rows = math.ceil(len(varied) / columns)
    size = (3.6 * columns, 3 * rows)
    _, grid = _pyplot("plot_slice").subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False
    )
    cells: np.ndarray = grid.ravel()
    for cell, column in zip(cells, varied):
        _draw_scores(cell, column, column.values, view, color=_BLUE, alpha=0.7)
    for cell in cells[len(varied) :]:
        cell.remove()
    return cells[: len(varied)]


def _parameter(study: Study, name: str, plot: str) -> Parameter:
    """Return the hyperparameter ``name`` of a study.

    Raises InputError with the known names if the name is unknown.
    """
    columns = {parameter.name: parameter for parameter in parameters(study)}
    if name not in columns:
        names = ", ".join(map(short, columns)) or "none"
        raise InputError(
            f"{plot}()", f"must name a hyperparameter of the trials: {names}", got=name
        )
    return columns[name]


def plot_parallel(study: Study, *, ax: "Axes | None" = None) -> "Axes":
    """Plot parallel coordinates: each trial with a score is a line across the hyperparameters'
    axes.

    Only hyperparameters that varied have an axis. Each axis runs from 0 to 1 over the range of the
    hyperparameter, over its logarithm if the scale is logarithmic, or over its categories. A line
    breaks if a trial lacks a hyperparameter. The color is the score, and better lines lie on top.

    Args:
        ax: the Axes to draw on. None: a new figure.

    Returns:
        The Axes.

    Raises:
        MissingExtraError: matplotlib is not installed.

    Example:
        >>> ax = study.plot_parallel()
    """
    ax = _axes("plot_parallel", ax, (9.0, 4.5))
    view = score_view(study)
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    columns = parallel_axes(view)
    colors = ScalarMappable(Normalize(*view.range), _color_map(view))
    places = range(len(columns))
    for row in view.order[::-1]:
        heights = [column.heights[row] for column in columns]
        ax.plot(places, heights, color=colors.to_rgba(view.values[row]), linewidth=0.8)
    for place, column in enumerate(columns):
        for value, label in column.scale.ticks:
            height = float(column.scale(value))
            text = f" {_plain(label)}"
            ax.text(place, height, text, fontsize="x-small", va="center", clip_on=True)
    ax.set_xticks(places, [_plain(column.label) for column in columns])
    ax.set_ylabel("low to high")
    ax.figure.colorbar(colors, ax=ax, label=_plain(view.measure.title))
    return ax


def plot_pareto(
    study: Study, x: str | None = None, y: str | None = None, *, ax: "Axes | None" = None
) -> "Axes":
    """Plot the trials by two metrics, with a line through the Pareto-optimal trials.

    Args:
        x: name of a metric. None: the first metric.
        y: name of another metric. None: the first metric other than ``x``.
        ax: the Axes to draw on. None: a new figure.

    Returns:
        The Axes.

    Raises:
        InputError: the study has only one metric, or a name is not one of its metrics.
        MissingExtraError: matplotlib is not installed.

    Example:
        >>> ax = study.plot_pareto()
    """
    metrics = study.metrics
    if x is None and metrics:
        x = metrics[0]
    if y is None:
        y = next((name for name in metrics if name != x), None)
    x = check_metric(study, x, "plot_pareto(x={})")
    y = check_metric(study, y, "plot_pareto(y={})")
    front = pareto_front(study, x, y)
    ax = _axes("plot_pareto", ax, (5.0, 4.0))
    ax.scatter(front.values[:, 0], front.values[:, 1], s=14, color=_GREY, label="trial")
    ax.plot(*front.values[front.order].T, "o-", color=_BLUE, markersize=5, label="Pareto-optimal")
    x_measure, y_measure = front.measures
    _name_axes(ax, x_measure.title, y_measure.title)
    ax.legend()
    return ax


def _color_map(view: Scores) -> str:
    """Return the name of the matplotlib color map in which better scores are brighter."""
    return "viridis_r" if view.measure.lower_is_better else "viridis"


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

    Example:
        >>> ax = study.plot_importance()
    """
    forest = importance(study, seed=seed)
    ax = _axes("plot_importance", ax, (6.0, 1.2 + 0.4 * len(forest.names)))
    places = range(len(forest.names))
    ax.barh(places, forest.drops, xerr=forest.errors, color=_BLUE, height=0.6)
    ax.set_yticks(places, list(map(_plain, forest.labels)))
    ax.invert_yaxis()
    ax.set_xlabel(f"fall of the forest's R² when shuffled (R² {forest.fit:.2f} on unseen trials)")
    return ax


def plot_contour(
    study: Study, x: str | None = None, y: str | None = None, *, ax: "Axes | None" = None
) -> "Axes":
    """Plot the score over two hyperparameters as filled contours.

    Between trials the score is interpolated linearly, on the logarithm if the scale is logarithmic.
    The scores of trials with the same two values are averaged.

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

    Example:
        >>> ax = study.plot_contour("lr", "weight_decay")
    """
    plot = "plot_contour()"
    if (x is None) != (y is None) or (x is not None and x == y):
        got = Verbatim(f"x={x!r}, y={y!r}")
        raise InputError(plot, "needs two different hyperparameters or none", got=got)
    try:
        names = importance(study).names if x is None else (x, str(y))
    except InputError as error:
        raise InputError(None, error.message, remedy="Or name two: plot_contour(x, y).") from None
    if len(names) < 2:
        raise InputError(plot, "needs two hyperparameters that vary", got=len(names))
    columns = [_parameter(study, name, "plot_contour") for name in names[:2]]
    view = score_view(study)
    values = np.stack([column.values for column in columns], axis=1)
    scored = np.isfinite(values).all(1) & np.isfinite(view.values)
    # (n, 2): the places of the trials, without repetitions
    places, trials = np.unique(values[scored], axis=0, return_inverse=True)
    means = np.bincount(trials.ravel(), view.values[scored]) / np.bincount(trials.ravel())
    scaled = places.copy()
    for axis, column in enumerate(columns):
        if column.log:
            scaled[:, axis] = np.log(places[:, axis])
    if len(places) < 3 or np.linalg.matrix_rank(scaled - scaled[0], tol=1e-9) < 2:
        raise InputError(
            plot,
            "needs scored trials at three points that do not lie on one line",
            got=Verbatim(f"{len(places)} points in {columns[0].name!r} and {columns[1].name!r}"),
            remedy="Choose other hyperparameters, or search further.",
        )
    ax = _axes("plot_contour", ax, (6.0, 4.5))
    from matplotlib.tri import Triangulation

    # The triangles are computed on the scales of the axes, and drawn at the values.
    x_places, y_places = places.T
    drawn = Triangulation(x_places, y_places, Triangulation(*scaled.T).triangles)
    low, high = score_range(means, view.measure)
    levels = np.linspace(low, high if high > low else low + 1e-12, _LEVELS)
    filled = ax.tricontourf(drawn, means, levels=levels, cmap=_color_map(view), extend="both")
    ax.scatter(x_places, y_places, s=10, color="white", edgecolor="black", linewidth=0.5)
    ax.figure.colorbar(filled, ax=ax, label=_plain(view.measure.title))
    _name_axes(ax, *columns)
    return ax


def plot_path(study: Study, parameter: str | None = None, *, ax: "Axes | None" = None) -> "Axes":
    """Plot a hyperparameter by outer step of a hypergradient search, one line per starting point.

    The paths from the best five starting points have colors. A hollow point means that the chaos
    guard rejected the slope at this point as noise.

    Args:
        parameter: name of a hyperparameter that the search moved. None: the first one.
        ax: the Axes to draw on. None: a new figure.

    Returns:
        The Axes.

    Raises:
        InputError: the study used another method, or the search did not move this hyperparameter.
        MissingExtraError: matplotlib is not installed.

    Example:
        >>> method = gputune.Hypergradient(outer_steps=2)
        >>> moved = gputune.tune(
        ...     "mlp", X, y, method=method, n_trials=1, max_epochs=2, cv=2, verbose=0
        ... )
        >>> ax = moved.plot_path("lr")
    """
    columns = {column.name: column for column in descended(study)}
    if not columns:
        rule = "needs a study of a hypergradient search, tune(..., method='hypergradient')"
        raise InputError("plot_path()", rule)
    name = next(iter(columns)) if parameter is None else parameter
    if name not in columns:
        raise InputError(
            "plot_path(parameter=...)", f"must be one of {', '.join(columns)}", got=name
        )
    ax = _axes("plot_path", ax)
    paths = descent_paths(study)
    for place, path in reversed(list(enumerate(paths))):
        named = place < BEST
        values = path.values[name]
        noisy = ~path.usable
        color = f"C{place}" if named else _GREY
        (line,) = ax.plot(path.steps, values, "o-", color=color, markersize=4)
        line.set(label=f"start {path.start}" if named else None, zorder=2 + named)
        (points,) = ax.plot(path.steps[noisy], values[noisy], "o", color=color, markersize=4)
        points.set(markerfacecolor="white", zorder=4)
    _name_axes(ax, "outer step", columns[name])
    if paths:
        ax.legend()
    return ax
