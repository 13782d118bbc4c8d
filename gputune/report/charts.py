"""The HTML report's charts of scores: learning curves, history, slices and hypergradient paths."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from gputune.ground.annotations import FloatArray
from gputune.ground.text import count
from gputune.report.digits import page_curves, page_front, page_scores
from gputune.report.svg import (
    Chart,
    Frame,
    band_path,
    dots_path,
    element,
    line_path,
    path,
    shifted,
    spread_over,
    text,
)
from gputune.study.study import Study
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
    linear_scale,
    score_range,
    value_scale,
)

THIN_CURVES = 250
CURVE_POINTS = 80
STARTS = 100
"""The largest numbers of thin curves, of points per curve, and of starting points in a chart.

Thin curves are the curves behind the best curves. Starting points belong to a hypergradient search.
"""

POINTS = 1500
FEWEST = 100
ALL = 9000
FAILURES = 300
"""The limits on the number of points in the charts of scores.

``POINTS`` limits one chart, and ``ALL`` limits all charts together. If there are many charts, each
may still have ``FEWEST`` points. ``FAILURES`` limits the marks of diverged trials.
"""

FEW = 12  # few values of a hyperparameter: each value has a strip of points
# Share of the distance between two values that a strip of points takes, and its largest width.
_SHIFT = 0.3
_WIDEST = 40.0

_WIDE = 960.0
_SMALL = (440.0, 300.0)
_LETTERS = 14


def curves_chart(study: Study) -> Chart | None:
    """Return the chart of learning curves, or None if no trial has scores for two epochs.

    The best trials have a colored line, with a band that shows the spread over the folds. All other
    trials are thin lines behind the best trials.
    """
    curves = page_curves(study)
    if not (np.isfinite(curves.mean).sum(1) > 1).any():
        return None
    best = curves.order[:BEST]
    others = curves.order[BEST:]
    drawn = spread_over(others, THIN_CURVES)
    x = linear_scale(1, len(curves.epochs), most=10, whole=True)
    frame = Frame(_WIDE, 400.0, x, curves.scale(), right=118).with_room()
    rectangle = element(
        "rect",
        x=frame.left,
        y=frame.top,
        width=frame.width - frame.left - frame.right,
        height=frame.height - frame.top - frame.bottom,
    )
    thin = [_thin_curve(curves, row, frame) for row in drawn]
    parts = [
        frame.axes("epoch", curves.measure.title),
        element("clipPath", rectangle, id="plot"),
        element("g", *thin, class_="behind", clip_path="url(#plot)"),
    ]
    for rank in reversed(range(len(best))):  # the best one on top
        parts.append(_best_curve(curves, best[rank], rank, frame))
    parts.append(_legend(curves, best, frame))
    title = f"Learning curves of the best {len(best)} trials"
    if study.curves.shape[2] > 1:
        title = f"{title}, mean and standard deviation over the folds"
    notes = []
    if len(drawn) < len(others):
        notes.append(
            f"Behind the best {len(best)}, {len(drawn)} of the {len(others)} other curves are "
            "drawn: the next best, and others at even steps in rank."
        )
    return frame.chart(title, *parts, notes=notes)


def _thin_curve(curves: LearningCurves, row: int, frame: Frame) -> Markup:
    """Return the thin learning curve of one trial as SVG, with at most ``CURVE_POINTS`` points."""
    known = np.flatnonzero(np.isfinite(curves.mean[row]))
    if len(known) > CURVE_POINTS:
        # A long curve is thinned evenly.
        known = known[np.linspace(0, len(known) - 1, CURVE_POINTS).round().astype(int)]
    x = frame.across(curves.epochs[known])
    return path(None, line_path(x, frame.down(curves.mean[row][known])))


def _best_curve(curves: LearningCurves, row: int, rank: int, frame: Frame) -> Markup:
    """Return the learning curve of one of the best trials as SVG, with its band over the folds.

    A dot marks the epoch of the trial's score.
    """
    mean = curves.mean[row]
    spread = curves.spread[row]
    trial = curves.study.trials[row]
    x = frame.across(curves.epochs)
    band = band_path(x, frame.down(mean - spread), frame.down(mean + spread))
    known = np.isfinite(mean)
    parts = [path("band", band)] if band else []
    parts.append(path("line", line_path(x[known], frame.down(mean[known]))))
    epoch = min(trial.best_epoch, len(mean)) - 1
    if epoch >= 0 and known[epoch]:
        y = float(frame.down(mean[epoch]))
        parts.append(element("circle", class_="dot", cx=float(x[epoch]), cy=y, r=4))
    score = f"trial {trial.number}: {curves.measure.text(trial.score)} at epoch {trial.best_epoch}"
    return element("g", element("title", score), *parts, class_=f"c{rank}", clip_path="url(#plot)")


def _legend(curves: LearningCurves, best: list[int], frame: Frame) -> Markup:
    """Return the legend of the learning curves as SVG: the number and score of each best trial."""
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
    """Return the chart of scores by trial number, with a line for the best score so far.

    The result is None if no trial has a score.
    """
    view = page_scores(study)
    if not view.order:
        return None
    numbers = np.array([trial.number for trial in study.trials], dtype=float)
    x = linear_scale(numbers.min(), numbers.max(), most=10, pad=0.01, whole=True)
    frame = Frame(_WIDE, 280.0, x, view.scale()).with_room()
    drawn, notes = _rows_to_draw(view, POINTS)
    best = view.best_so_far
    previous = np.concatenate([[np.nan], best[:-1]])
    # trials at which the best score changes
    steps = np.flatnonzero(np.isfinite(best) & (best != previous))
    # A staircase: each best score lasts until the next one.
    corners = np.append(np.repeat(numbers[steps], 2)[1:], numbers[-1])
    line = line_path(frame.across(corners), frame.down_within(np.repeat(best[steps], 2)))
    trials = count(len(study.trials), "trial")
    return frame.chart(
        f"Score of {trials} in the order of their numbers, and the best so far",
        frame.axes("trial", view.measure.title),
        *_points(view, frame.across(numbers), frame, drawn),
        path("line c0", line),
        notes=notes,
    )


def pareto_charts(study: Study) -> list[Chart]:
    """Return one chart for each further metric, which plots the metric against the ranking metric.

    The list is empty for a study with one metric, or without scores.
    """
    fronts = [page_front(study, study.metrics[0], name) for name in study.metrics[1:]]
    return [_pareto(study, front) for front in fronts if front.order]


def _pareto(study: Study, front: ParetoFront) -> Chart:
    """Return a chart of two metrics, with a dot per trial and a line through the Pareto-optimal
    trials."""
    x_values, y_values = front.values.T
    x_measure, y_measure = front.measures
    x_scale = value_scale(*score_range(x_values, x_measure), x_measure)
    y_scale = value_scale(*score_range(y_values, y_measure), y_measure)
    frame = Frame(*_SMALL, x_scale, y_scale).with_room()
    drawn = spread_over(np.flatnonzero(np.isfinite(x_values)).tolist(), POINTS)
    x = np.clip(frame.across(x_values), frame.left + 6, frame.width - frame.right - 6)
    y = frame.down_within(y_values)
    parts = [
        frame.axes(x_measure.title, y_measure.title),
        path("dots complete", dots_path(x[drawn], y[drawn])),
        path("line c0", line_path(x[front.order], y[front.order])),
    ]
    for row in front.order[:POINTS]:
        title = (
            f"trial {study.trials[row].number}: {x_measure.name} "
            f"{x_measure.size(float(x_values[row]))}, {y_measure.name} "
            f"{y_measure.size(float(y_values[row]))}"
        )
        parts.append(_ring(title, x[row], y[row], 5))
    notes = []
    if len(drawn) == POINTS:
        notes.append(f"{len(drawn)} of {len(study.trials)} trials are drawn.")
    # Points that were moved by more than a margin lie beyond the axes.
    far = np.hypot(x - frame.across(x_values), y - frame.down(y_values)) > 12
    if far.any():
        trials = count(int(far.sum()), "trial")
        notes.append(f"The points at the edge include {trials} beyond the axes.")
    title = f"{x_measure.name} and {y_measure.name} of the trials"
    return frame.chart(title, *parts, notes=notes)


def _ring(title: str, x: float, y: float, r: int) -> Markup:
    """Return an SVG ring that highlights a point of a chart, with a tooltip."""
    return element("circle", element("title", title), class_="ring", cx=float(x), cy=float(y), r=r)


def slice_charts(study: Study) -> tuple[list[Chart], tuple[str, ...]] | None:
    """Return a chart of the scores against each hyperparameter that varied, and notes for all
    charts.

    The result is None if no hyperparameter varied, or if no trial has a score. Each chart also has
    notes on the trials that it leaves out.
    """
    view = page_scores(study)
    varied = varied_parameters(study)
    if not view.order or not varied:
        return None
    drawn, notes = _rows_to_draw(view, max(FEWEST, min(POINTS, ALL // len(varied))))
    return [_slice(view, parameter, drawn) for parameter in varied], notes


def _slice(view: Scores, parameter: Parameter, drawn: Sequence[int]) -> Chart:
    """Return the chart of the trials' scores against one hyperparameter."""
    few = len(parameter.distinct) <= FEW
    # Strips of points need more space at the edges.
    scale = parameter_scale(parameter, pad=0.12 if few else 0.04)
    frame = Frame(*_SMALL, scale, view.scale(), letters=_LETTERS).with_room()
    across = frame.across(parameter.values)
    strips = np.unique(across[np.isfinite(across)])
    if 2 <= len(strips) <= FEW:
        across = shifted(across, min(float(np.diff(strips).min()) * _SHIFT, _WIDEST))
    failed = [row for row, trial in enumerate(view.study.trials) if trial.state == "failed"]
    places = across[spread_over(failed, FAILURES)]
    bottom = frame.height - frame.bottom
    marks = "".join(f"M{x:.1f} {bottom:.1f}v-8" for x in places.tolist() if np.isfinite(x))
    notes = []
    if parameter.hidden:
        verb = "is" if parameter.hidden == 1 else "are"
        trials = count(parameter.hidden, "trial")
        notes.append(f"{trials} with an infinite {parameter.label} {verb} not drawn.")
    return frame.chart(
        f"Score against {parameter.label}",
        frame.axes(parameter.label, view.measure.title),
        path("failed", marks) if marks else "",
        *_points(view, across, frame, drawn),
        notes=notes,
    )


def _rows_to_draw(view: Scores, most: int) -> tuple[list[int], tuple[str, ...]]:
    """Choose at most ``most`` trials to draw, worst first, and return notes on the other trials."""
    drawn = spread_over(view.order, most)
    n_scored = len(view.order)
    notes = view.notes
    if len(drawn) < n_scored:
        note = (
            f"{len(drawn)} of {n_scored} scored trials are drawn: the best {most // 4}, and "
            "others at even steps in rank."
        )
        notes = (note, *notes)
    return drawn[::-1], notes


def _points(view: Scores, across: FloatArray, frame: Frame, drawn: Sequence[int]) -> list[Markup]:
    """Return SVG dots for the trials, one path for each state, and a ring around the best trial."""
    y = frame.down_within(view.values)
    parts = []
    trials = view.study.trials
    for state in ("pruned", "stopped", "complete"):
        rows = [row for row in drawn if trials[row].state == state]
        if rows:
            parts.append(path(f"dots {state}", dots_path(across[rows], y[rows])))
    best = drawn[-1]
    if np.isfinite(across[best]):
        title = f"best: trial {trials[best].number}, {view.measure.text(trials[best].score)}"
        parts.append(_ring(title, across[best], y[best], 7))
    return parts


def path_charts(study: Study) -> list[Chart]:
    """Return charts that show how a hypergradient search changed the score and each hyperparameter.

    The list is empty for any other kind of search.
    """
    starts = descent_paths(study)
    view = page_scores(study)
    if not starts or not view.order:
        return []
    scores = [start.scores for start in starts]
    charts = [_path_chart(starts, scores, view.scale(), view.measure.title)]
    for column in descended(study):
        if np.isfinite(column.values).any():
            values = [start.values[column.name] for start in starts]
            scale = parameter_scale(column, pad=0.05)
            charts.append(_path_chart(starts, values, scale, column.label))
    return charts


def _path_chart(
    starts: Sequence[DescentPath], values: Sequence[FloatArray], y: Scale, name: str
) -> Chart:
    """Return the chart of a score or hyperparameter by outer step, with a line per starting
    point."""
    drawn = starts[:STARTS]
    last = max(1, *(int(start.steps[-1]) for start in drawn))
    frame = Frame(*_SMALL, linear_scale(0, last, most=min(last, 10), whole=True), y).with_room()
    lines = []
    for rank, (start, heights) in enumerate(zip(drawn, values)):
        across = frame.across(start.steps)
        down = frame.down_within(heights)
        parts = [element("title", f"start {start.start}"), path("line", line_path(across, down))]
        for cx, cy, usable in zip(across.tolist(), down.tolist(), start.usable.tolist()):
            if not np.isnan(cy):
                class_ = "dot" if usable else "dot hollow"
                parts.append(element("circle", class_=class_, cx=cx, cy=cy, r=2.5))
        lines.append(element("g", *parts, class_=f"c{rank}" if rank < BEST else "other"))
    notes = []
    if len(drawn) < len(starts):
        notes.append(f"The best {len(drawn)} of {len(starts)} starts are drawn.")
    title = f"{name} of {len(drawn)} starts by outer step"
    return frame.chart(title, frame.axes("outer step", name), *lines[::-1], notes=notes)
