"""Draw a study with matplotlib, for ``study.plot_...()`` and for the charts of the HTML report.

gputune imports matplotlib only when you call a plot or write a report.
"""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from gputune.ground.annotations import FloatArray, IntArray
from gputune.ground.entry_points import import_extra
from gputune.ground.errors import InputError, Verbatim, check_count
from gputune.ground.text import clean, count, short
from gputune.study.study import Study, Trial, check_metric
from gputune.views.parameters import (
    Axis,
    DescentPath,
    Importance,
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
    number_text,
    pareto_front,
    score_range,
    score_view,
    value_scale,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE = "C0"
_GREY = "0.7"
# The report's style sheet has the same colors.
_RED = "#b83a3a"
_OCHRE = "#b3872b"
_STATES = {"complete": "#3f7cb8", "pruned": _OCHRE, "stopped": _OCHRE}
_COLUMNS = 3  # columns of the grid of slices
_LEVELS = 12  # levels of a contour
_LETTERS = 24  # letters of words that fit side by side on an axis
_LONGEST = 40  # letters of a name or of the text of a tick
_MANY = 300  # an SVG file stores more points or lines than this as one picture


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
    """Shorten a text, and escape it for matplotlib, so that a dollar sign begins no formula."""
    # matplotlib cannot draw half of a surrogate pair
    text = clean(text).encode(errors="replace").decode()
    if len(text) > _LONGEST:
        half = _LONGEST // 2
        text = f"{text[:half]}…{text[-half:]}"
    return text.replace("$", r"\$")


def _set_axis(ax: "Axes", side: str, label: str, scale: Scale | None = None) -> None:
    """Set the label of the x axis or the y axis, and its scale and ticks.

    Without a scale, the axis counts trials, epochs or steps.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator

    axis = ax.xaxis if side == "x" else ax.yaxis
    axis.set_label_text(_plain(label))
    if scale is None:
        axis.set_major_locator(MaxNLocator(integer=True))
        return
    ax.set(**{f"{side}scale": "log" if scale.log else "linear"})
    ax.set(**{f"{side}lim": (scale.low, scale.high)})
    axis.minorticks_off()
    axis.set_major_formatter(lambda value, _: number_text(value))
    if scale.ticks:
        labels = [_plain(text) for _, text in scale.ticks]
        axis.set_ticks([place for place, _ in scale.ticks], labels=labels)
        if side == "x" and sum(map(len, labels)) > _LETTERS:
            ax.tick_params("x", labelrotation=30)
            for tick in axis.get_ticklabels():
                tick.set(ha="right", rotation_mode="anchor")
    elif scale.log:
        is_wide = scale.high > 100 * scale.low
        axis.set_major_locator(LogLocator(subs=(1,) if is_wide else (1, 2, 5)))


def _draw_scores(ax: "Axes", places: FloatArray, view: Scores, notes: Sequence[str] = ()) -> None:
    """Draw a point for each trial that has a position on the x axis and a score.

    The color is the state of the trial, and the best trial has a ring. The title says how many
    points were moved to the edge of the axis.
    """
    drawn = np.isfinite(places) & np.isfinite(view.values)
    heights = np.clip(view.values, *view.range)
    colors = [_STATES.get(view.study.trials[row].state, _GREY) for row in np.flatnonzero(drawn)]
    is_picture = len(colors) > _MANY
    x = places[drawn]
    ax.scatter(x, heights[drawn], s=14, color=colors, alpha=0.7, rasterized=is_picture)
    best = view.order[:1]
    ax.scatter(places[best], heights[best], s=60, facecolors="none", edgecolors="black")
    _set_axis(ax, "y", view.measure.title, view.scale())
    ax.set_title("\n".join([*view.notes, *notes]), fontsize="small")


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
    numbers = np.array([trial.number for trial in study.trials], dtype=float)
    _draw_scores(ax, numbers, view)
    _set_axis(ax, "x", "trial")
    best = np.clip(view.best_so_far, *view.range)
    ax.step(numbers, best, where="post", color=_BLUE, label="best so far")
    ax.legend()
    return ax


def plot_curves(study: Study, *, best: int = BEST, ax: "Axes | None" = None) -> "Axes":
    """Plot the learning curves: the mean score over the folds after each epoch.

    The best trials have a band of one standard deviation over the folds on either side, and a dot
    at the epoch of their score. The other trials are gray lines behind the best trials.

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
    epochs = curves.epochs
    others = [(epochs, curves.mean[row]) for row in curves.order[best:]]
    _draw_lines(ax, others)
    for place, row in enumerate(curves.order[:best]):
        mean = curves.mean[row]
        spread = curves.spread[row]
        trial = study.trials[row]
        color = f"C{place % 10}"
        label = f"trial {trial.number}"
        scored = [max(0, min(trial.best_epoch, len(mean)) - 1)]
        ax.plot(epochs, mean, "o-", color=color, label=label, markevery=scored, zorder=3)
        if np.isfinite(spread).any():
            low = mean - spread
            high = mean + spread
            ax.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
    _set_axis(ax, "x", "epoch")
    scale = curves.scale() if curves.order else None
    _set_axis(ax, "y", curves.measure.title, scale)
    if curves.order[:best]:
        ax.legend()
    return ax


def _draw_lines(ax: "Axes", lines: Sequence[tuple[FloatArray | IntArray, FloatArray]]) -> None:
    """Draw thin gray lines, each given as its x and y values, behind everything else."""
    from matplotlib.collections import LineCollection

    if lines:
        segments = [np.column_stack(line) for line in lines]
        is_picture = len(segments) > _MANY
        style = {"linewidths": 0.5, "alpha": 0.5, "zorder": 1, "rasterized": is_picture}
        ax.add_collection(LineCollection(segments, colors=_GREY, **style))
        ax.autoscale_view()


def plot_slice(
    study: Study, parameter: str | None = None, *, ax: "Axes | None" = None
) -> "Axes | np.ndarray":
    """Plot the score against one hyperparameter, or against each hyperparameter that varied.

    Red marks on the axis are trials that diverged.

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
        draw_slice(ax, column, view)
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
        draw_slice(cell, column, view)
    for cell in cells[len(varied) :]:
        cell.remove()
    return cells[: len(varied)]


def draw_slice(ax: "Axes", parameter: Parameter, view: Scores) -> None:
    """Draw the score of each trial against one hyperparameter, and marks for diverged trials."""
    notes = []
    if parameter.hidden:
        verb = "is" if parameter.hidden == 1 else "are"
        trials = count(parameter.hidden, "trial")
        notes.append(f"{trials} with an infinite {_plain(parameter.name)} {verb} not drawn")
    _draw_scores(ax, parameter.values, view, notes)
    scale = parameter_scale(parameter, pad=0.05) if len(parameter.distinct) else None
    _set_axis(ax, "x", parameter.label, scale)
    failed = [row for row, trial in enumerate(view.study.trials) if trial.state == "failed"]
    if failed:
        bottom = ax.get_xaxis_transform()
        is_picture = len(failed) > _MANY
        x = parameter.values[failed]
        y = np.full(len(failed), 0.02)
        ax.plot(x, y, "|", color=_RED, transform=bottom, rasterized=is_picture)


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
    draw_parallel(ax, view, parallel_axes(view), dict.fromkeys(view.order))
    return ax


def draw_parallel(
    ax: "Axes", view: Scores, columns: Sequence[Axis], lines: dict[int, str | None]
) -> None:
    """Draw parallel coordinates of some trials.

    ``lines`` maps the row of a trial, best first, to the name of its line in an SVG file.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colors = ScalarMappable(Normalize(*view.range), _color_map(view))
    places = range(len(columns))
    for row, name in reversed(lines.items()):
        heights = [column.heights[row] for column in columns]
        color = colors.to_rgba(view.values[row])
        ax.plot(places, heights, color=color, linewidth=0.8, gid=name)
    for place, column in enumerate(columns):
        for value, label in _parallel_ticks(column.scale):
            height = float(column.scale(value))
            ax.text(place, height, f" {_plain(label)}", fontsize="x-small", va="center")
    ax.set_xticks(places, [_plain(column.label) for column in columns])
    ax.set_ylabel("low to high")
    bar = ax.figure.colorbar(colors, ax=ax, label=_plain(view.measure.title))
    bar.ax.yaxis.set_major_formatter(lambda value, _: number_text(value))


def _parallel_ticks(scale: Scale) -> list[tuple[float, str]]:
    """Return the values and texts of the ticks of one parallel axis."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    if scale.ticks:
        return list(scale.ticks)
    locator = LogLocator(subs=(1, 3), numticks=7) if scale.log else MaxNLocator(6)
    values = np.asarray(locator.tick_values(scale.low, scale.high)).tolist()
    return [(value, number_text(value)) for value in values if scale.low <= value <= scale.high]


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
    scales = []
    for values, measure in zip(front.values.T, front.measures):
        scales.append(value_scale(*score_range(values, measure), measure))
    places = np.clip(front.values, [s.low for s in scales], [s.high for s in scales])
    is_picture = len(places) > _MANY
    x_places, y_places = places.T
    ax.scatter(x_places, y_places, s=14, color=_GREY, label="trial", rasterized=is_picture)
    ax.plot(*places[front.order].T, "o-", color=_BLUE, markersize=5, label="Pareto-optimal")
    for side, scale, measure in zip("xy", scales, front.measures):
        _set_axis(ax, side, measure.title, scale)
    far = int((np.abs(places - front.values) > 0).any(1).sum())
    if far:
        trials = count(far, "trial")
        ax.set_title(f"The points at the edge include {trials} beyond the axes.", fontsize="small")
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
    draw_importance(ax, forest)
    return ax


def draw_importance(ax: "Axes", forest: Importance) -> None:
    """Draw the importance of each hyperparameter as a bar."""
    name = f"fall of the forest's R² when shuffled (R² {forest.fit:.2f} on unseen trials)"
    draw_bars(ax, forest.labels, forest.drops, forest.errors, name)


def draw_bars(
    ax: "Axes", labels: Sequence[str], values: FloatArray, errors: FloatArray, name: str
) -> None:
    """Draw a horizontal bar for each value, with its standard deviation, from top to bottom."""
    places = range(len(labels))
    ax.barh(places, values, xerr=errors, color=_BLUE, height=0.6)
    ax.set_yticks(places, list(map(_plain, labels)))
    ax.invert_yaxis()
    ax.set_xlabel(name)
    ax.xaxis.set_major_formatter(lambda value, _: number_text(value))


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
    for side, column in zip("xy", columns):
        _set_axis(ax, side, column.label, parameter_scale(column, pad=0.02))
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
    draw_paths(ax, paths, [path.values[name] for path in paths])
    column = columns[name]
    scale = parameter_scale(column, pad=0.05) if len(column.distinct) else None
    _set_axis(ax, "y", column.label, scale)
    return ax


def draw_score_paths(ax: "Axes", paths: Sequence[DescentPath], view: Scores) -> None:
    """Draw the score by outer step of a hypergradient search, one line per starting point."""
    draw_paths(ax, paths, [np.clip(path.scores, *view.range) for path in paths])
    _set_axis(ax, "y", view.measure.title, view.scale())


def draw_paths(ax: "Axes", paths: Sequence[DescentPath], values: Sequence[FloatArray]) -> None:
    """Draw a line per starting point of a hypergradient search, with hollow points for noise.

    ``values`` are the heights of each line.
    """
    for place, (path, heights) in reversed(list(enumerate(zip(paths, values)))):
        named = place < BEST
        noisy = ~path.usable
        color = f"C{place}" if named else _GREY
        (line,) = ax.plot(path.steps, heights, "o-", color=color, markersize=4)
        line.set(label=f"start {path.start}" if named else None, zorder=2 + named)
        (points,) = ax.plot(path.steps[noisy], heights[noisy], "o", color=color, markersize=4)
        points.set(markerfacecolor="white", zorder=4)
    _set_axis(ax, "x", "outer step")
    if paths:
        ax.legend()


def draw_lineages(ax: "Axes", trials: Sequence[Trial], max_epochs: int) -> None:
    """Draw the family tree of population based training: one line for the lineage of each trial.

    A line runs along the row of a trial. At a copy, it moves to the row of the copying trial.
    """
    lines = []
    for trial in trials:
        epochs, rows = zip(*trial.lineage)
        # Each trial number lasts until the next copy.
        corners = np.append(np.repeat(epochs, 2)[1:], max_epochs)
        lines.append((corners, np.repeat(rows, 2).astype(float)))
    _draw_lines(ax, lines[BEST:])
    for trial, line in zip(trials, lines[:BEST]):
        ax.plot(*line, label=f"trial {trial.number}")
    _set_axis(ax, "x", "epoch")
    _set_axis(ax, "y", "trial")
    ax.legend()


def draw_confusion(ax: "Axes", matrix: IntArray, shares: FloatArray, labels: Sequence[str]) -> None:
    """Draw a confusion matrix (K, K). A cell is darker for a larger share of its true class."""
    places = range(len(labels))
    names = list(map(_plain, labels))
    ax.pcolormesh(shares, cmap="Blues", vmin=0.0, vmax=1.0, edgecolors="white")
    for row, column in np.argwhere(matrix).tolist():
        color = "white" if shares[row, column] > 0.5 else "black"
        number = str(matrix[row, column])
        ax.text(column + 0.5, row + 0.5, number, color=color, ha="center", va="center")
    ax.invert_yaxis()
    centers = [place + 0.5 for place in places]
    ax.set_xticks(centers, names, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(centers, names)
    ax.set(xlabel="predicted", ylabel="true")
