"""The report's importance bars, parallel coordinates and confusion matrix, as SVG charts."""

from collections.abc import Collection, Sequence

import numpy as np
from markupsafe import Markup

from gputune.ground.annotations import FloatArray
from gputune.ground.text import clean
from gputune.report.charts import FEW
from gputune.report.digits import page_scores
from gputune.report.svg import (
    Chart,
    cut,
    drawing,
    element,
    line_path,
    path,
    shifted,
    spread_over,
    text,
)
from gputune.study.rows import FoldReport
from gputune.study.study import Study
from gputune.views.parameters import Axis, Importance, parallel_axes
from gputune.views.scores import limited, linear_scale, order_by_score

WEAK = 0.2  # R2 below which the forest does not explain the trials
# Limits of lines and axes, and number of colors of lines by the rank of their score.
LINES = 400
AXES = 10
GROUPS = 5
# Sizes of the bar charts.
_WIDTH = 700.0
_ROW = 30.0
_LEFT = 190.0
_RIGHT = 110.0
# Sizes of the parallel coordinates.
_HEIGHT = 380.0
_TOP = 52.0
_BOTTOM = 22.0
_SIDE = 70.0
_LETTER = 6.2  # width of a letter in an axis name
_STRIP = 0.045  # share of an axis over which lines through the same value spread


def importance_chart(forest: Importance) -> Chart:
    """Return a bar chart of the importance of each hyperparameter.

    The length of a bar is the fall of a random forest's R2 after the values of the hyperparameter
    are shuffled.
    """
    rows = list(zip(forest.labels, forest.drops.tolist(), forest.errors.tolist()))
    return _bars("Importance of the hyperparameters", "fall of the forest's R²", rows, decimals=2)


def columns_chart(study: Study, report: FoldReport) -> Chart | None:
    """Return a bar chart of the importance of each column of the data, or None without columns.

    The length of a bar is the loss of score after the values of the column are shuffled.
    """
    if not report.columns:
        return None
    measure = page_scores(study).measure
    labels = map(clean, report.columns[:COLUMNS])
    rows = list(zip(labels, report.drops.tolist(), report.errors.tolist()))
    name = f"{'rise' if measure.lower_is_better else 'fall'} of {measure.title}"
    decimals = max(2, measure.decimals - 1)
    notes = _left_out("columns", "important", len(rows), len(report.columns))
    return _bars("Importance of the columns", name, rows, decimals=decimals, notes=notes)


def _left_out(nouns: str, quality: str, n_drawn: int, n_all: int) -> list[str]:
    """Return a list with a note on the columns or classes that a chart leaves out, or []."""
    if n_drawn == n_all:
        return []
    return [f"The {n_drawn} most {quality} {nouns}; {n_all - n_drawn} others are left out."]


def _bars(
    title: str,
    name: str,
    rows: Sequence[tuple[str, float, float]],
    *,
    decimals: int,
    notes: Sequence[str] = (),
) -> Chart:
    """Return a bar chart from rows (label, mean, standard deviation).

    ``name`` is the name of the value axis.
    """
    longest = max(10.0**-decimals, *(drop + error for _, drop, error in rows))
    scale = linear_scale(0.0, longest, most=5)
    height = _ROW * len(rows) + 40
    span = _WIDTH - _LEFT - _RIGHT
    parts = []
    for value, label in scale.ticks:
        x = _LEFT + float(scale(value)) * span
        parts.append(path("grid", f"M{x:.1f} 4V{height - 34:.1f}"))
        parts.append(text("tick mid", x, height - 19, label))
    for row, (label, drop, error) in enumerate(rows):
        y = 4 + _ROW * row
        places = scale([drop - error, drop, drop + error]) * span
        low, middle, high = np.maximum(places, 0.0).tolist()
        value_text = f"{limited(drop, decimals)} ± {limited(error, decimals)}"
        parts += [
            text("tick end label", _LEFT - 10, y + 19, element("title", label), cut(label, 26)),
            element("rect", class_="bar", x=_LEFT, y=y + 5, width=middle, height=_ROW - 12, rx=2),
            path("whisker", f"M{_LEFT + low:.1f} {y + 14:.1f}H{_LEFT + high:.1f}"),
            text("tick end", _WIDTH - 4, y + 19, value_text),
        ]
    parts.append(text("name mid", _LEFT + span / 2, height - 3, name))
    return drawing(_WIDTH, height, title, *parts, notes=notes, class_="chart bars")


def brush_data(
    axes: Sequence[Axis], rows: list[int], numbers: Collection[str]
) -> list[dict[str, object]]:
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


def parallel_chart(study: Study, important: Sequence[str] = ()) -> tuple[Chart, list[Axis]] | None:
    """Return the chart of parallel coordinates and the list of its axes, from left to right.

    The result is None if no trial has a score or no hyperparameter varied. If there are too many
    axes, the ``important`` hyperparameters come first.
    """
    view = page_scores(study)
    notes = []
    axes = parallel_axes(view)
    if len(axes) == 1 or not view.order:
        return None
    if len(axes) > AXES:
        # Only AXES - 1 hyperparameters have an axis, because the score has the last one.
        places = {f"params_{name}": place for place, name in enumerate(important)}
        by_place = sorted(axes[:-1], key=lambda axis: places.get(axis.column, len(places)))
        best = by_place[: AXES - 1]
        quality = "most important" if important else "first"
        n_all = len(axes) - 1
        notes = [f"The {quality} {len(best)} of {n_all} hyperparameters have an axis here."]
        axes = [axis for axis in axes if axis in (*best, axes[-1])]
    ranked = order_by_score(study)
    width = max(960.0, 2 * _SIDE + 105.0 * (len(axes) - 1))
    x = np.linspace(_SIDE, width - _SIDE, len(axes))
    heights = np.stack([_line_heights(axis.heights[ranked]) for axis in axes], axis=1)
    scored = np.flatnonzero(np.isfinite(view.values[ranked])).tolist()
    drawn = spread_over(scored, LINES)
    lines = []
    for rank in drawn[::-1]:  # the worst first; a rank is a row of the table
        group = min(GROUPS - 1, rank * GROUPS // len(scored))
        lines.append(path(f"q{group}", line_path(x, heights[rank]), data_rank=rank))
    if len(drawn) < len(scored):
        notes.append(
            f"{len(drawn)} of {len(scored)} scored trials have a line: the best {LINES // 4}, and "
            "others at even steps in rank. A brush selects from all trials."
        )
    half = float(x[1] - x[0]) / 2
    parts = [element("g", *lines, class_="lines")]
    for place, (px, axis) in enumerate(zip(x.tolist(), axes)):
        parts.append(_axis(px, axis, place, int(2 * min(half, px, width - px) / _LETTER)))
    title = "Parallel coordinates: one line a trial"
    return drawing(width, _HEIGHT, title, *parts, notes=notes, class_="chart parallel"), axes


def _line_heights(heights: FloatArray) -> FloatArray:
    """Return the y coordinate at which the line of each trial crosses a parallel axis.

    On an axis with few values, lines through the same value lie next to each other.
    """
    few = len(np.unique(heights[np.isfinite(heights)])) <= FEW
    return _down(np.clip(shifted(heights, _STRIP), 0, 1) if few else heights)


def _down(height: FloatArray) -> FloatArray:
    """Convert heights on an axis to y coordinates, which SVG measures from the top."""
    return _HEIGHT - _BOTTOM - height * (_HEIGHT - _TOP - _BOTTOM)


def _axis(x: float, axis: Axis, place: int, letters: int) -> Markup:
    """Return one parallel axis as SVG: its name, its ticks, and a brush for selecting trials."""
    top = _TOP
    bottom = _HEIGHT - _BOTTOM
    parts = [
        text("name mid", x, top - 24, element("title", axis.label), cut(axis.label, letters)),
        path("edge", f"M{x:.1f} {top:.1f}V{bottom:.1f}"),
    ]
    for value, label in axis.scale.ticks:
        y = float(_down(axis.scale(value)))
        parts.append(path("mark", f"M{x - 4:.1f} {y:.1f}h4"))
        parts.append(text("tick end halo", x - 7, y + 4, cut(label, 9)))
    parts.append(element("rect", class_="brush", x=x - 9, y=top, width=18.0, height=0.0))
    parts.append(element("rect", class_="reach", x=x - 22, y=top, width=44.0, height=bottom - top))
    slider = {"role": "slider", "aria_label": f"Brush on {axis.label}", "aria_valuetext": "all"}
    values = {"aria_valuemin": 0, "aria_valuemax": 100, "aria_valuenow": 0, "data_axis": place}
    return element("g", *parts, class_="axis", tabindex=0, **slider, **values)


# Limits of the drawn classes and columns.
CLASSES = 25
COLUMNS = 30

_WIDTH_OF_MATRIX = 640.0
_LEFT_OF_MATRIX = 150.0
_TOP_OF_MATRIX = 92.0
_LARGEST = 56.0
_SMALLEST = 26.0
_COUNTED = 0.65  # opacity of a cell with all rows of its class; keeps its text legible


def confusion_chart(study: Study, report: FoldReport) -> Chart | None:
    """Return the chart of the confusion matrix, or None if the report has no confusion matrix.

    The color of a cell is stronger for a larger share of the rows of the true class.
    """
    if not report.confusion.size:
        return None
    # the most frequent classes, in their usual order
    drawn = np.sort(np.argsort(-report.confusion.sum(1), kind="stable")[:CLASSES])
    matrix = report.confusion[np.ix_(drawn, drawn)]
    classes = study.record.classes or ()
    labels = [clean(classes[place]) for place in drawn.tolist()]
    left = _LEFT_OF_MATRIX
    top = _TOP_OF_MATRIX
    parts = []
    side = max(_SMALLEST, min(_LARGEST, (_WIDTH_OF_MATRIX - left - 60) / len(labels)))
    # (K, K) / (K, 1): shares of all rows of the true class
    shares = matrix / np.maximum(report.confusion[drawn].sum(1), 1)[:, None]
    # A letter is about 7 units wide.
    slant = max(len(cut(label, 14)) for label in labels) * 7 > side
    for i, label in enumerate(labels):
        middle = left + (i + 0.5) * side
        titled = (element("title", label), cut(label, 14))
        turn = f"rotate(-40 {middle:.1f} {top - 10:.1f})" if slant else None
        parts += [
            text("tick end", left - 8, top + (i + 0.5) * side + 4, *titled),
            text("tick" if slant else "tick mid", middle, top - 10, *titled, transform=turn),
        ]
        for j, count in enumerate(matrix[i].tolist()):
            x = left + j * side
            y = top + i * side
            opacity = f"{_COUNTED * shares[i, j]:.3f}"
            box = {"x": x + 1, "y": y + 1, "width": side - 2, "height": side - 2, "rx": 2}
            title = element("title", f"{label} predicted as {labels[j]}: {count}")
            parts.append(element("rect", title, class_="cell", fill_opacity=opacity, **box))
            if count:
                parts.append(text("label mid", x + side / 2, y + side / 2 + 4, str(count)))
    span = side * len(labels)
    up = top + span / 2
    parts.append(text("name mid", left + span / 2, 14 if slant else top - 32, "predicted"))
    parts.append(text("name mid", 20, up, "true", transform=f"rotate(-90 20 {up:.1f})"))
    notes = _left_out("classes", "frequent", len(labels), len(classes))
    width = max(_WIDTH_OF_MATRIX, left + span + 60)
    height = top + span + 12
    return drawing(width, height, "Confusion matrix", *parts, notes=notes, class_="chart matrix")
