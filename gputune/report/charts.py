"""The charts of the HTML report: matplotlib draws them, and the page holds them as SVG."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup

from gputune.ground.entry_points import import_extra
from gputune.ground.text import clean, count
from gputune.study.rows import FoldReport
from gputune.study.study import Study
from gputune.views.parameters import (
    Axis,
    Importance,
    descended,
    descent_paths,
    parallel_axes,
    varied_parameters,
)
from gputune.views.plots import (
    draw_bars,
    draw_confusion,
    draw_importance,
    draw_lineages,
    draw_parallel,
    draw_score_paths,
    draw_slice,
    plot_curves,
    plot_history,
    plot_pareto,
    plot_path,
)
from gputune.views.scores import BEST, curve_view, order_by_score, pareto_front, score_view

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Limits of the drawn lines and axes of parallel coordinates, and of classes and columns.
LINES = 400
AXES = 10
CLASSES = 25
COLUMNS = 30

# Sizes in inches.
_WIDE = (10.5, 4.2)
_SMALL = (4.8, 3.3)

_STYLE = {
    "svg.fonttype": "none",  # texts stay texts
    "svg.hashsalt": "gputune",  # two reports of a study are equal
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_DOTS_PER_INCH = 100  # of pictures of many points or lines


@dataclass(frozen=True)
class Chart:
    """A chart as the children of an SVG element, its size, and its title for screen readers."""

    title: str
    svg: Markup
    view_box: str
    notes: tuple[str, ...] = ()
    # The parallel axes: the x coordinate, and the label for screen readers. Then the y coordinate
    # of their top, and their length.
    axes: tuple[tuple[float, str], ...] = ()
    top: float = 0.0
    length: float = 0.0


def chart(title: str, draw: Callable[..., object], size: tuple[float, float] = _SMALL) -> Chart:
    """Return a chart that ``draw(ax=...)`` draws on matplotlib axes."""
    matplotlib = import_extra("matplotlib", extra="report", used_by="the HTML report")
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
        figure = Figure(figsize=size, layout="constrained")
        draw(ax=figure.subplots())
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=none, dpi=_DOTS_PER_INCH)
    root = ElementTree.fromstring(buffer.getvalue())
    children = [child for child in root if child.tag.endswith("}g")]
    definitions = [child for child in root if child.find("{*}clipPath") is not None]
    for element in root.iter():
        _make_plain(element)
    texts = [ElementTree.tostring(child, encoding="unicode") for child in definitions + children]
    return Chart(title, Markup("".join(texts)), root.attrib["viewBox"])


def _make_plain(element: ElementTree.Element) -> None:
    """Remove namespaces from an SVG element, and turn its style into attributes.

    The policy of the page forbids styles in elements.
    """
    element.tag = element.tag.rpartition("}")[2]
    attributes = dict(element.attrib)
    element.attrib.clear()
    for declaration in attributes.pop("style", "").split(";"):
        name, _, value = declaration.partition(":")
        # The style sheet of the page has the font.
        if value and name.strip() != "font-family":
            element.set(name.strip(), value.strip())
    if element.tag == "g":
        # Charts have the same names for their parts, so only the names of lines stay.
        rank = attributes.pop("id", "").removeprefix("rank-")
        if rank.isdecimal():
            element.set("data-rank", rank)
    for name, value in attributes.items():
        element.set(name.rpartition("}")[2], " ".join(value.split()))


def curves_chart(study: Study) -> Chart | None:
    """Return the chart of learning curves, or None if no trial has scores for two epochs."""
    curves = curve_view(study)
    if not (np.isfinite(curves.mean).sum(1) > 1).any():
        return None
    title = f"Learning curves of the best {len(curves.order[:BEST])} trials"
    if study.curves.shape[2] > 1:
        title = f"{title}, mean and standard deviation over the folds"
    return chart(title, partial(plot_curves, study), _WIDE)


def folds_note(study: Study) -> str:
    """Return a sentence that explains the lines, bands and dots of the learning curves."""
    if study.record.face == "loop":
        return (
            "A line shows the scores that a trial reported, step by step. The dot marks its final "
            "score."
        )
    folds = study.curves.shape[2]
    band = ", and the band one standard deviation on either side" if folds > 1 else ""
    return (
        f"A line shows the mean over {count(folds, 'fold')}{band}. The dot marks the epoch of the "
        "trial's score."
    )


def history_chart(study: Study) -> Chart | None:
    """Return the chart of scores by trial number, or None if no trial has a score."""
    if not score_view(study).order:
        return None
    trials = count(len(study.trials), "trial")
    title = f"Score of {trials} in the order of their numbers, and the best so far"
    return chart(title, partial(plot_history, study), (10.5, 3.0))


def pareto_charts(study: Study) -> list[Chart]:
    """Return one chart for each further metric, which plots the metric against the ranking metric.

    The list is empty for a study with one metric, or without scores.
    """
    charts = []
    for name in study.metrics[1:]:
        front = pareto_front(study, study.metrics[0], name)
        title = " and ".join(measure.name for measure in front.measures) + " of the trials"
        if front.order:
            charts.append(chart(title, partial(plot_pareto, study, y=name)))
    return charts


def slice_charts(study: Study) -> list[Chart]:
    """Return a chart of the scores against each hyperparameter that varied, or [] without
    scores."""
    view = score_view(study)
    charts = []
    for parameter in varied_parameters(study) if view.order else ():
        title = f"Score against {parameter.label}"
        charts.append(chart(title, partial(draw_slice, parameter=parameter, view=view)))
    return charts


def path_charts(study: Study) -> list[Chart]:
    """Return charts that show how a hypergradient search changed the score and each hyperparameter.

    The list is empty for any other kind of search.
    """
    paths = descent_paths(study)
    view = score_view(study)
    if not paths or not view.order:
        return []
    title = f"{view.measure.title} of {len(paths)} starts by outer step"
    charts = [chart(title, partial(draw_score_paths, paths=paths, view=view))]
    for column in descended(study):
        if len(column.distinct):
            title = f"{column.label} of {len(paths)} starts by outer step"
            charts.append(chart(title, partial(plot_path, study, column.name)))
    return charts


def tree_chart(study: Study) -> Chart | None:
    """Return the family tree of the trials, or None if no trial has copied another."""
    trials = [study.trials[row] for row in score_view(study).order]
    if not any(len(trial.lineage) > 1 for trial in trials):
        return None
    title = f"the lineages of {len(trials)} trials by epoch"
    return chart(
        title, partial(draw_lineages, trials=trials, max_epochs=study.record.max_epochs), _WIDE
    )


def importance_chart(forest: Importance) -> Chart:
    """Return a bar chart of the importance of each hyperparameter."""
    size = (7.0, 1.0 + 0.3 * len(forest.names))
    title = "Importance of the hyperparameters"
    return chart(title, partial(draw_importance, forest=forest), size)


def columns_chart(study: Study, report: FoldReport) -> Chart | None:
    """Return a bar chart of the importance of each column of the data, or None without columns.

    The length of a bar is the loss of score after the values of the column are shuffled.
    """
    if not report.columns:
        return None
    measure = score_view(study).measure
    name = f"{'rise' if measure.lower_is_better else 'fall'} of {measure.title}"
    labels = report.columns[:COLUMNS]
    drops = report.drops[:COLUMNS]
    errors = report.errors[:COLUMNS]
    size = (7.0, 1.0 + 0.3 * len(labels))
    drawn = chart(
        "Importance of the columns",
        partial(draw_bars, labels=labels, values=drops, errors=errors, name=name),
        size,
    )
    return replace(drawn, notes=_left_out("important columns", len(labels), len(report.columns)))


def confusion_chart(study: Study, report: FoldReport) -> Chart | None:
    """Return the chart of the confusion matrix, or None if the report has no confusion matrix."""
    if not report.confusion.size:
        return None
    # the most frequent classes, in their usual order
    drawn = np.sort(np.argsort(-report.confusion.sum(1), kind="stable")[:CLASSES])
    matrix = report.confusion[np.ix_(drawn, drawn)]
    classes = study.record.classes or ()
    labels = [clean(classes[place]) for place in drawn.tolist()]
    # (K, K) / (K, 1): shares of all rows of the true class
    shares = matrix / np.maximum(report.confusion[drawn].sum(1), 1)[:, None]
    side = 2.0 + 0.35 * len(labels)
    matrix_chart = chart(
        "Confusion matrix",
        partial(draw_confusion, matrix=matrix, shares=shares, labels=labels),
        (side, side),
    )
    return replace(matrix_chart, notes=_left_out("frequent classes", len(labels), len(classes)))


def _left_out(nouns: str, n_drawn: int, n_all: int) -> tuple[str, ...]:
    """Return a note on the columns, classes or axes that a chart leaves out, or ()."""
    if n_drawn == n_all:
        return ()
    return (f"The {n_drawn} most {nouns} of {n_all} are drawn.",)


def parallel_chart(study: Study, important: Sequence[str] = ()) -> tuple[Chart, list[Axis]] | None:
    """Return the chart of parallel coordinates and the list of its axes, from left to right.

    The result is None if no trial has a score or no hyperparameter varied. If there are too many
    axes, the ``important`` hyperparameters come first.
    """
    view = score_view(study)
    axes = parallel_axes(view)
    if len(axes) == 1 or not view.order:
        return None
    n_all = len(axes) - 1
    # Only AXES - 1 hyperparameters have an axis, because the score has the last one.
    places = {f"params_{name}": place for place, name in enumerate(important)}
    by_place = sorted(axes[:-1], key=lambda axis: places.get(axis.column, n_all))
    best = by_place[: AXES - 1]
    axes = [axis for axis in axes if axis in (*best, axes[-1])]
    ranked = [row for row in order_by_score(study) if np.isfinite(view.values[row])]
    notes = list(_left_out("important hyperparameters", len(best), n_all))
    if len(ranked) > LINES:
        notes.append(f"The best {LINES} of {len(ranked)} scored trials have a line.")
    lines: dict[int, str | None] = {row: f"rank-{rank}" for rank, row in enumerate(ranked[:LINES])}
    drawn_on: list[Axes] = []

    def draw(*, ax: "Axes") -> None:
        draw_parallel(ax, view, axes, lines)
        ax.set_ylim(0, 1)
        drawn_on.append(ax)

    drawn = chart("Parallel coordinates: one line a trial", draw, _WIDE)
    (ax,) = drawn_on
    corners = [(place, height) for place in range(len(axes)) for height in (0, 1)]
    ends = ax.transData.transform(corners) * 72 / ax.figure.dpi
    x = ends[::2, 0].round(1).tolist()
    low, high = ends[:2, 1].round(1).tolist()
    labels = [axis.label for axis in axes]
    return replace(
        drawn,
        notes=tuple(notes),
        axes=tuple(zip(x, labels)),
        top=72 * _WIDE[1] - high,
        length=high - low,
    ), axes


def brush_data(axes: Sequence[Axis], rows: list[int], numbers: set[str]) -> list[dict[str, object]]:
    """Return the positions of all trials on the parallel axes, as data for the report's script.

    The script selects trials by these positions when a reader drags a brush on an axis.

    For a column in ``numbers`` (numeric hyperparameters), the data is the axis scale. For any other
    column, the data is the height of each row, in thousandths.
    """
    data: list[dict[str, object]] = []
    for axis in axes:
        if axis.column in numbers:
            scale = axis.scale
            ends = {"low": scale.low, "high": scale.high, "log": scale.log}
            data.append({"column": axis.column, **ends})
        else:
            heights = axis.heights[rows].tolist()
            data.append({"heights": [None if h != h else round(1000 * h) for h in heights]})
    return data
