"""The charts of scores: learning curves, history, scores against each hyperparameter, and paths."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from gputune.report.svg import (
    Chart,
    Frame,
    band_path,
    beside,
    dots_path,
    element,
    line_path,
    path,
    spread_over,
    text,
)
from gputune.study.study import Study
from gputune.text import count
from gputune.views.parameters import (
    DescentPath,
    Parameter,
    descended,
    descent_paths,
    parameter_scale,
    varied_parameters,
)
from gputune.views.scores import (
    BEST,
    LearningCurves,
    ParetoFront,
    Scale,
    Scores,
    curve_view,
    linear_scale,
    pareto_front,
    score_range,
    score_view,
    value_scale,
)

THIN_CURVES = 250
CURVE_POINTS = 80
STARTS = 100
"""Limits of a chart: curves behind the best ones, epochs per curve, and starts of a hypergradient
search."""

POINTS = 1500
FEWEST = 100
ALL = 9000
FAILURES = 300
"""Limits of points: points of a chart, the fewest points that many charts leave to one, points of
all charts, and marks of diverged trials."""

FEW = 12  # few values of a hyperparameter: each value has a strip of points
# Share of the distance between two values that a strip of points takes, and its largest width.
_SHIFT = 0.3
_WIDEST = 40.0

_WIDE = 960.0
_SMALL = (440.0, 300.0)
_LETTERS = 14


def curves_chart(study: Study) -> Chart | None:
    """Return the learning curves, or None if no trial has a line.

    The best trials have the spread over their folds. All other trials are thin lines behind them.
    """
    curves = curve_view(study)
    if not (np.isfinite(curves.mean).sum(1) > 1).any():
        return None
    best = curves.order[:BEST]
    others = curves.order[BEST:]
    drawn = spread_over(others, THIN_CURVES)
    x = linear_scale(1, len(curves.epochs), most=10, whole=True)
    frame = Frame(_WIDE, 400.0, x, curves.scale(), right=118).with_room()
    size = {
        "width": frame.width - frame.left - frame.right,
        "height": frame.height - frame.top - frame.bottom,
    }
    parts = [
        element("clipPath", element("rect", x=frame.left, y=frame.top, **size), id="plot"),
        element(
            "g",
            *(_thin_curve(curves, row, frame) for row in drawn),
            class_="behind",
            clip_path="url(#plot)",
        ),
        *(_best_curve(curves, row, rank, frame) for rank, row in reversed(list(enumerate(best)))),
        _legend(curves, best, frame),
    ]
    over = ", mean and standard deviation over the folds" * (study.curves.shape[2] > 1)
    behind = (
        f"Behind the best {len(best)}, {len(drawn)} of the {len(others)} other curves are drawn: "
        "the next best, "
    )
    notes = [f"{behind}and the rest evenly by rank."] * (len(drawn) < len(others))
    title = f"Learning curves of the best {len(best)} trials{over}"
    return frame.chart(title, frame.axes("epoch", curves.measure.title), *parts, notes=notes)


def _thin_curve(curves: LearningCurves, row: int, frame: Frame) -> Markup:
    """Return the thin line of one trial, with at most ``CURVE_POINTS`` points."""
    known = np.flatnonzero(np.isfinite(curves.mean[row]))
    if len(known) > CURVE_POINTS:
        # A long curve is thinned evenly.
        known = known[np.linspace(0, len(known) - 1, CURVE_POINTS).round().astype(int)]
    return path(
        None, line_path(frame.across(curves.epochs[known]), frame.down(curves.mean[row][known]))
    )


def _best_curve(curves: LearningCurves, row: int, rank: int, frame: Frame) -> Markup:
    """Return the line, the band and the scored epoch of one of the best trials."""
    mean = curves.mean[row]
    spread = curves.spread[row]
    trial = curves.study.trials[row]
    x = frame.across(curves.epochs)
    band = band_path(x, frame.down(mean - spread), frame.down(mean + spread))
    known = np.isfinite(mean)
    parts = [path("band", band)] if band else []
    parts.append(path("line", line_path(x[known], frame.down(mean[known]))))
    at = min(trial.best_epoch, len(mean)) - 1
    if at >= 0 and known[at]:
        parts.append(
            element("circle", class_="dot", cx=float(x[at]), cy=float(frame.down(mean[at])), r=4)
        )
    score = f"trial {trial.number}: {curves.measure.text(trial.score)} at epoch {trial.best_epoch}"
    return element("g", element("title", score), *parts, class_=f"c{rank}", clip_path="url(#plot)")


def _legend(curves: LearningCurves, best: list[int], frame: Frame) -> Markup:
    """Return the legend of the best trials."""
    x = frame.width - frame.right + 14
    parts = []
    for rank, row in enumerate(best):
        trial = curves.study.trials[row]
        y = frame.top + 12 + 36 * rank
        parts += [
            path(f"line c{rank}", f"M{x:.0f} {y - 4:.0f}h16"),
            text("tick", x + 22, y, f"trial {trial.number}"),
            text("tick strong", x + 22, y + 14, curves.measure.text(trial.score)),
        ]
    return element("g", *parts)


def folds_note(study: Study) -> str:
    """Return a sentence that explains the lines, bands and dots of the learning curves."""
    if study.record.face == "loop":
        return (
            "A line is what a trial reported, step by step; the dot is where its score was taken."
        )
    folds = study.curves.shape[2]
    band = ", the band one standard deviation over them on either side" if folds > 1 else ""
    return (
        f"A line is the mean over {count(folds, 'fold')}{band}; the dot is the epoch that the "
        "trial is scored at."
    )


def history_chart(study: Study) -> Chart | None:
    """Return the scores in the order of the trials and the best so far, or None without a score."""
    shown = score_view(study)
    if not shown.order:
        return None
    numbers = np.array([trial.number for trial in study.trials], dtype=float)
    x = linear_scale(numbers.min(), numbers.max(), most=10, pad=0.01, whole=True)
    frame = Frame(_WIDE, 280.0, x, shown.scale()).with_room()
    drawn, notes = _rows_to_draw(shown, POINTS)
    best = shown.best_so_far
    # trials at which the best score changes
    steps = np.flatnonzero(np.isfinite(best) & (best != np.concatenate([[np.nan], best[:-1]])))
    # A staircase: each best score lasts until the next one.
    corners = np.append(np.repeat(numbers[steps], 2)[1:], numbers[-1])
    line = line_path(frame.across(corners), frame.down_within(np.repeat(best[steps], 2)))
    title = (
        f"Score of {count(len(study.trials), 'trial')} in the order of their numbers, and the "
        "best so far"
    )
    points = _points(shown, frame.across(numbers), frame, drawn)
    return frame.chart(
        title, frame.axes("trial", shown.measure.title), *points, path("line c0", line), notes=notes
    )


def pareto_charts(study: Study) -> list[Chart]:
    """Return a chart of the ranking metric with each other metric.

    The list is empty for one metric, and if no trial has a score.
    """
    fronts = [pareto_front(study, study.metrics[0], name) for name in study.metrics[1:]]
    return [_pareto(study, front) for front in fronts if front.order]


def _pareto(study: Study, front: ParetoFront) -> Chart:
    """Return a dot per trial by two metrics, with a line through the Pareto-optimal trials."""
    values = front.values.T
    measures = front.measures
    x_scale, y_scale = (value_scale(*score_range(*one), one[1]) for one in zip(values, measures))
    frame = Frame(*_SMALL, x_scale, y_scale).with_room()
    drawn = spread_over(np.flatnonzero(np.isfinite(values[0])).tolist(), POINTS)
    x = np.clip(frame.across(values[0]), frame.left + 6, frame.width - frame.right - 6)
    y = frame.down_within(values[1])
    rings = []
    for row in front.order[:POINTS]:
        pair = (
            f"{measure.name} {measure.size(value)}"
            for measure, value in zip(measures, values[:, row].tolist())
        )
        rings.append(
            _ring(f"trial {study.trials[row].number}: {', '.join(pair)}", x[row], y[row], 5)
        )
    # Points that were moved by more than a margin lie beyond the axes.
    far = np.hypot(x - frame.across(values[0]), y - frame.down(values[1])) > 12
    return frame.chart(
        " and ".join(measure.name for measure in measures) + " of the trials",
        frame.axes(*(measure.title for measure in measures)),
        path("dots complete", dots_path(x[drawn], y[drawn])),
        path("line c0", line_path(x[front.order], y[front.order])),
        *rings,
        notes=[
            *[f"{len(drawn)} of {len(study.trials)} trials are drawn."] * (len(drawn) == POINTS),
            *[f"{count(int(far.sum()), 'trial')} beyond the axes, drawn at the edge."]
            * bool(far.any()),
        ],
    )


def _ring(title: str, x: float, y: float, r: int) -> Markup:
    """Return a ring with a title."""
    return element("circle", element("title", title), class_="ring", cx=float(x), cy=float(y), r=r)


def slice_charts(study: Study) -> tuple[list[Chart], tuple[str, ...]] | None:
    """Return a chart for each hyperparameter that varied, and notes on all of them.

    None if no hyperparameter varied, or if no trial has a score. Each chart has notes on its own
    omissions.
    """
    shown = score_view(study)
    varied = varied_parameters(study)
    if not shown.order or not varied:
        return None
    drawn, notes = _rows_to_draw(shown, max(FEWEST, min(POINTS, ALL // len(varied))))
    return [_slice(shown, one, drawn) for one in varied], notes


def _slice(shown: Scores, parameter: Parameter, drawn: Sequence[int]) -> Chart:
    """Return the chart of the scores against one hyperparameter."""
    few = len(parameter.distinct) <= FEW
    # Strips of points need more space at the edges.
    scale = parameter_scale(parameter, pad=0.12 if few else 0.04)
    frame = Frame(*_SMALL, scale, shown.scale(), letters=_LETTERS).with_room()
    across = frame.across(parameter.values)
    strips = np.unique(across[np.isfinite(across)])
    if 2 <= len(strips) <= FEW:
        across = beside(across, min(float(np.diff(strips).min()) * _SHIFT, _WIDEST))
    failed = [row for row, trial in enumerate(shown.study.trials) if trial.state == "failed"]
    places = across[spread_over(failed, FAILURES)]
    bottom = frame.height - frame.bottom
    marks = "".join(f"M{x:.1f} {bottom:.1f}v-8" for x in places.tolist() if np.isfinite(x))
    have = "has" if parameter.hidden == 1 else "have"
    note = (
        f"{count(parameter.hidden, 'trial')} with an infinite {parameter.label} {have} no place "
        "here."
    )
    return frame.chart(
        f"Score against {parameter.label}",
        frame.axes(parameter.label, shown.measure.title),
        path("failed", marks) if marks else "",
        *_points(shown, across, frame, drawn),
        notes=[note] * bool(parameter.hidden),
    )


def _rows_to_draw(shown: Scores, most: int) -> tuple[list[int], tuple[str, ...]]:
    """Return the rows to draw, worst first, and notes on the other rows."""
    drawn = spread_over(shown.order, most)
    scored = len(shown.order)
    note = (
        f"{len(drawn)} of {scored} scored trials are drawn: the best {most // 4}, and the others "
        "evenly by rank."
    )
    return drawn[::-1], ((note,) if len(drawn) < scored else ()) + shown.notes


def _points(
    shown: Scores, across: NDArray[np.float64], frame: Frame, drawn: Sequence[int]
) -> list[Markup]:
    """Return the dots of each state, and a ring around the best trial."""
    y = frame.down_within(shown.values)
    parts = []
    trials = shown.study.trials
    for state in ("pruned", "stopped", "complete"):
        if rows := [row for row in drawn if trials[row].state == state]:
            parts.append(path(f"dots {state}", dots_path(across[rows], y[rows])))
    if np.isfinite(across[best := drawn[-1]]):
        title = f"best: trial {trials[best].number}, {shown.measure.text(trials[best].score)}"
        parts.append(_ring(title, across[best], y[best], 7))
    return parts


def path_charts(study: Study) -> list[Chart]:
    """Return charts of the score and of each hyperparameter that a hypergradient search moved.

    The list is empty for another search.
    """
    starts = descent_paths(study)
    shown = score_view(study)
    if not starts or not shown.order:
        return []
    lines = [(shown.measure.title, shown.scale(), [one.scores for one in starts])]
    for column in descended(study):
        if np.isfinite(column.values).any():
            values = [one.values[column.name] for one in starts]
            lines.append((column.label, parameter_scale(column, pad=0.05), values))
    return [_path_chart(starts, values, scale, name) for name, scale, values in lines]


def _path_chart(
    starts: Sequence[DescentPath], values: Sequence[NDArray[np.float64]], y: Scale, name: str
) -> Chart:
    """Return the chart of one value of all starts by outer step."""
    drawn = starts[:STARTS]
    last = max(1, *(int(one.steps[-1]) for one in drawn))
    frame = Frame(*_SMALL, linear_scale(0, last, most=min(last, 10), whole=True), y).with_room()
    lines = []
    for rank, (start, scores) in enumerate(zip(drawn, values)):
        across = frame.across(start.steps)
        down = frame.down_within(scores)
        dots = [
            element("circle", class_="dot" if usable else "dot hollow", cx=px, cy=py, r=2.5)
            for px, py, usable in zip(across.tolist(), down.tolist(), start.usable.tolist())
            if py == py
        ]
        line = element("title", f"start {start.start}"), path("line", line_path(across, down))
        lines.append(element("g", *line, *dots, class_=f"c{rank}" if rank < BEST else "other"))
    notes = [f"The best {len(drawn)} of {len(starts)} starts are drawn."] * (
        len(drawn) < len(starts)
    )
    title = f"{name} of {len(drawn)} starts by outer step"
    return frame.chart(title, frame.axes("outer step", name), *lines[::-1], notes=notes)
