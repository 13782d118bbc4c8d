"""The chart of the hyperparameters' importance: bars with their error.

The charts of a search by hypergradients: score and hyperparameters from outer step to outer step.
"""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from gputune.report.charts.slices import score_scale
from gputune.report.svg import (
    Chart,
    Frame,
    Scale,
    cut,
    drawing,
    element,
    line_path,
    linear_scale,
    parameter_scale,
)
from gputune.study.study import Study
from gputune.views.descents import Descent, descended, descents
from gputune.views.importance import Importance
from gputune.views.scores import shown_scores

_WIDTH, _ROW, _LEFT, _RIGHT = 700.0, 30.0, 190.0, 110.0

WEAK = 0.2
"""R2 below which a forest has not understood the trials."""


def importance_chart(found: Importance) -> Chart:
    """Return one bar a hyperparameter, as long as the forest's R2 falls without it."""
    top = float(max((found.drops + found.errors).max(), 0.01))
    scale = linear_scale(0.0, top, most=5)
    height = _ROW * len(found.names) + 40
    span, bottom = _WIDTH - _LEFT - _RIGHT, height - 34
    parts = []
    for value, text in scale.ticks:
        x = _LEFT + float(scale(value)) * span
        parts += [
            element("path", class_="grid", d=f"M{x:.1f} 4V{bottom:.1f}"),
            element("text", text, class_="tick mid", x=x, y=bottom + 15),
        ]
    for row, (label, drop, error) in enumerate(
        zip(found.labels, found.drops.tolist(), found.errors.tolist())
    ):
        y = 4 + _ROW * row
        length = max(0.0, float(scale(drop)) * span)
        low, high = (_LEFT + float(scale(max(0.0, end))) * span for end in (drop - error, drop + error))
        parts += [
            element(
                "text",
                element("title", label),
                cut(label, 26),
                class_="tick end label",
                x=_LEFT - 10,
                y=y + 19,
            ),
            element("rect", class_="bar", x=_LEFT, y=y + 5, width=length, height=_ROW - 12, rx=2),
            element("path", class_="whisker", d=f"M{low:.1f} {y + 14:.1f}H{high:.1f}"),
            element(
                "text", f"{round(drop, 2) + 0.0:.2f} ± {error:.2f}", class_="tick end", x=_WIDTH - 4, y=y + 19
            ),
        ]
    parts.append(
        element("text", "fall of the forest's R²", class_="name mid", x=_LEFT + span / 2, y=height - 3)
    )
    return Chart(drawing(_WIDTH, height, "Importance of the hyperparameters", *parts, class_="chart bars"))


BEST, DRAWN = 5, 100
"""Starts in colour, and starts that are drawn."""

_WIDTH, _HEIGHT = 440.0, 300.0


def path_charts(study: Study) -> tuple[tuple[str, Chart], ...]:
    """Return name and chart of the score and of each hyperparameter that was descended on; () for another search."""
    paths = descents(study)
    shown = shown_scores(study)
    if not paths or not np.isfinite(shown.values).any():
        return ()
    drawn = paths[:DRAWN]
    notes = () if len(drawn) == len(paths) else (f"The best {len(drawn)} of {len(paths)} starts are drawn.",)
    title = shown.measure.title
    charts = [(title, _chart(drawn, [path.scores for path in drawn], score_scale(shown), title, notes))]
    for parameter in descended(study):
        if np.isfinite(parameter.values).any():
            values = [path.values[parameter.name] for path in drawn]
            scale = parameter_scale(parameter, pad=0.05)
            charts.append((parameter.label, _chart(drawn, values, scale, parameter.label, notes)))
    return tuple(charts)


def _chart(
    paths: Sequence[Descent], values: Sequence[np.ndarray], y: Scale, name: str, notes: tuple[str, ...]
) -> Chart:
    last = max(int(path.steps[-1]) for path in paths)
    frame = Frame(_WIDTH, _HEIGHT, linear_scale(0, max(last, 1), most=min(max(last, 1), 10)), y)
    lines = [_line(path, heights, frame, rank) for rank, (path, heights) in enumerate(zip(paths, values))][
        ::-1
    ]
    title = f"{name} of {len(paths)} starts by outer step"
    return Chart(drawing(_WIDTH, _HEIGHT, title, frame.axes("outer step", name), *lines), notes)


def _line(path: Descent, values: np.ndarray, frame: Frame, rank: int) -> Markup:
    x, y = frame.across(path.steps), frame.held_down(values)
    dots = [
        element("circle", class_="dot" if usable else "dot hollow", cx=px, cy=py, r=2.5)
        for px, py, usable in zip(x.tolist(), y.tolist(), path.usable.tolist())
        if py == py
    ]
    line = element("path", class_="line", d=line_path(x, y))
    return element(
        "g",
        element("title", f"start {path.start}"),
        line,
        *dots,
        class_=f"c{rank}" if rank < BEST else "other",
    )
