"""The charts of a search by hypergradients: score and hyperparameters from outer step to outer step."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from gputune.analysis.descents import Descent, descended, descents
from gputune.analysis.scores import shown_scores
from gputune.report.charts.slices import score_scale
from gputune.report.scale import Scale, linear_scale, parameter_scale
from gputune.report.svg import Chart, Frame, drawing, element, line_path
from gputune.study.study import Study

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
