"""The chart of parallel coordinates: an axis for each hyperparameter and the score, a line a trial, to be brushed."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from gputune.report.charts.slices import score_scale
from gputune.report.svg import Chart, Scale, cut, drawing, element, line_path, parameter_scale, spread_over
from gputune.study.study import Study
from gputune.views.parameters import Parameter, varied_parameters
from gputune.views.scores import is_wide, shown_scores

LINES, AXES, GROUPS = 400, 10, 5
"""Lines and axes at most; lines have so many colours, by the rank of their score."""

_HEIGHT, _TOP, _BOTTOM = 380.0, 52.0, 22.0
_SIDE = 70.0
_FEW, _APART = 12, 0.045
"""Values of an axis that are few, and how much of its length the lines through one of them take."""


@dataclass(frozen=True)
class Axis:
    """One axis: ``column`` is the key of its column in the table, ``heights`` (C,) are in [0, 1] in rank order."""

    column: str
    scale: Scale
    heights: np.ndarray

    def plain(self, rows: int, numbers: Collection[str]) -> dict[str, Any]:
        """What the page's script needs to place the first rows of the table.

        A column of ``numbers`` has a scale; another one has its heights, in thousandths.
        """
        if self.column in numbers:
            return {
                "column": self.column,
                "low": self.scale.low,
                "high": self.scale.high,
                "log": self.scale.log,
            }
        heights = self.heights[:rows].tolist()
        return {"heights": [None if h != h else round(1000 * h) for h in heights]}


@dataclass(frozen=True)
class Parallel:
    """The chart and its axes, from left to right."""

    chart: Chart
    axes: tuple[Axis, ...]


def parallel_chart(study: Study, important: Sequence[str] = ()) -> Parallel | None:
    """Return the chart; None where no trial has a score or no hyperparameter varied.

    Where there are too many axes, the ``important`` hyperparameters come first.
    """
    shown, found = shown_scores(study), varied_parameters(study)
    if not found or not np.isfinite(shown.values).any():
        return None
    columns, notes = _chosen(found, important)
    ranked = _ranked_rows(study)
    scales = [*(parameter_scale(column, most=7) for column in columns), _score_axis(study)]
    keys = [*(f"params_{column.name}" for column in columns), "score"]
    values = [*(column.values for column in columns), shown.values]
    axes = [
        Axis(key, scale, np.clip(scale(one[ranked]), 0, 1)) for key, scale, one in zip(keys, scales, values)
    ]
    width = max(960.0, 2 * _SIDE + 105.0 * (len(axes) - 1))
    x = np.linspace(_SIDE, width - _SIDE, len(axes))
    lines, more = _lines(shown.values[ranked], x, np.stack([_down(_apart(axis)) for axis in axes], axis=1))
    labels = [*(c.label for c in columns), shown.measure.name]
    ticks = [
        _axis(px, axis, label, place) for place, (px, axis, label) in enumerate(zip(x.tolist(), axes, labels))
    ]
    title = "Parallel coordinates: one line a trial"
    svg = drawing(
        width, _HEIGHT, title, element("g", *lines, class_="lines"), *ticks, class_="chart parallel"
    )
    return Parallel(Chart(svg, (*notes, *more)), tuple(axes))


def _chosen(found: Sequence[Parameter], important: Sequence[str]) -> tuple[list[Parameter], tuple[str, ...]]:
    if len(found) < AXES:
        return list(found), ()
    rank = {name: place for place, name in enumerate(important)}
    first = sorted(found, key=lambda one: rank.get(one.name, len(rank)))[: AXES - 1]
    kept = [one for one in found if one in first]
    which = "most important" if important else "first"
    return kept, (f"The {which} {len(kept)} of {len(found)} hyperparameters have an axis here.",)


def _score_axis(study: Study) -> Scale:
    """Return the axis of the score without the margin that dots need."""
    shown = shown_scores(study)
    low, high = shown.range
    scale = score_scale(shown)
    if not high > low:
        return scale
    inside = tuple(tick for tick in scale.ticks if low <= tick[0] <= high)
    return Scale(low, high, inside, is_wide(low, high, shown.measure))


def _ranked_rows(study: Study) -> list[int]:
    """Return the places of the trials in the study, in rank order."""
    place = {trial.number: row for row, trial in enumerate(study.trials)}
    return [place[trial.number] for trial in study.ranking()]


def _apart(axis: Axis) -> np.ndarray:
    """Return heights at which lines through one of few values lie beside each other, always alike."""
    if len(np.unique(axis.heights[np.isfinite(axis.heights)])) > _FEW:
        return axis.heights
    # the golden ratio spreads any number of neighbours evenly
    shift = (np.arange(len(axis.heights)) * 0.6180339887498949) % 1.0 - 0.5
    apart: np.ndarray = np.clip(axis.heights + _APART * shift, 0, 1)
    return apart


def _down(height: Any) -> Any:
    return _HEIGHT - _BOTTOM - height * (_HEIGHT - _TOP - _BOTTOM)


def _lines(scores: np.ndarray, x: np.ndarray, heights: np.ndarray) -> tuple[list[Markup], tuple[str, ...]]:
    """Return the lines, worst first, each with its rank, which is its row in the table."""
    scored = np.flatnonzero(np.isfinite(scores)).tolist()
    drawn = spread_over(scored, LINES)
    lines = []
    for rank in drawn[::-1]:
        group = min(GROUPS - 1, rank * GROUPS // len(scored))
        lines.append(element("path", class_=f"q{group}", data_rank=rank, d=line_path(x, heights[rank])))
    if len(drawn) == len(scored):
        return lines, ()
    return lines, (
        f"{len(drawn)} of {len(scored)} scored trials have a line: the best {LINES // 4}, and the others evenly by "
        "rank. A brush chooses among all of them.",
    )


def _axis(x: float, axis: Axis, label: str, place: int) -> Markup:
    top, bottom = _TOP, _HEIGHT - _BOTTOM
    parts: list[Any] = [
        element("text", element("title", label), cut(label, 17), class_="name mid", x=x, y=top - 24),
        element("path", class_="edge", d=f"M{x:.1f} {top:.1f}V{bottom:.1f}"),
    ]
    for value, text in axis.scale.ticks:
        y = _down(float(axis.scale(value)))
        parts += [
            element("path", class_="mark", d=f"M{x - 4:.1f} {y:.1f}h4"),
            element("text", cut(text, 9), class_="tick end halo", x=x - 7, y=y + 4),
        ]
    parts += [
        element("rect", class_="brush", x=x - 9, y=top, width=18.0, height=0.0),
        element("rect", class_="reach", x=x - 22, y=top, width=44.0, height=bottom - top),
    ]
    return element(
        "g",
        *parts,
        class_="axis",
        tabindex=0,
        role="slider",
        aria_label=f"Brush on {label}",
        aria_valuemin=0,
        aria_valuemax=100,
        aria_valuenow=0,
        aria_valuetext="all",
        data_axis=place,
    )
