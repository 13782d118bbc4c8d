"""The charts of scores: learning curves, in the order of the trials, against each hyperparameter, by outer step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from gputune.report.svg import (
    Chart,
    Frame,
    band_path,
    beside,
    dots_path,
    drawing,
    element,
    line_path,
    path,
    spread_over,
    text,
)
from gputune.study.study import Study
from gputune.text import count
from gputune.views.axes import Scale, curve_scale, linear_scale, parameter_scale, score_scale, value_scale
from gputune.views.parameters import DescentPath, Parameter, descended, descent_paths, varied_parameters
from gputune.views.scores import (
    BEST,
    LearningCurves,
    ParetoFront,
    Scores,
    curve_view,
    metric_scores,
    pareto_front,
    score_range,
    score_view,
)

THIN_CURVES, CURVE_POINTS, STARTS = 250, 80, 100
"""LearningCurves behind the best ones, epochs that one of them has, and starts of a descent, at most."""

POINTS, FEWEST, ALL, FAILURES = 1500, 100, 9000, 300
"""Points of a chart at most, how few of them many charts leave it, points of all charts, marks of diverged trials."""

FEW = 12
"""Values of a hyperparameter that are few: their points stand in a strip each."""

_SHIFT, _WIDEST = 0.3, 40.0
"""A strip's share of the step to the next one, and its width at most."""

_PAD = 0.06
"""Share of the axis of scores below and above them: room for the marks of diverged trials."""

_WIDE, _SMALL, _LETTERS = 960.0, (440.0, 300.0), 14


def curves_chart(study: Study) -> Chart | None:
    """Return the best trials with the spread over their folds, all others thin behind; None where there is no line."""
    curves = curve_view(study)
    if not curves.drawable:
        return None
    best, others = curves.order[:BEST], curves.order[BEST:]
    drawn = spread_over(others, THIN_CURVES)
    x = linear_scale(1, len(curves.epochs), most=10, whole=True)
    frame = Frame(_WIDE, 400.0, x, curve_scale(study, curves), right=118).with_room()
    size = {"width": frame.width - frame.left - frame.right, "height": frame.height - frame.top - frame.bottom}
    area = element("rect", x=frame.left, y=frame.top, **size)
    thin = [path(None, _curve_line(curves, row, frame, CURVE_POINTS)) for row in drawn]
    parts = [
        frame.axes("epoch", curves.measure.title),
        element("clipPath", area, id="plot"),
        element("g", *thin, class_="behind", clip_path="url(#plot)"),
        *(_best_curve(study, curves, row, rank, frame) for rank, row in reversed(list(enumerate(best)))),
        _legend(study, curves, best, frame),
    ]
    over = ", mean and standard deviation over the folds" * (study.curves.shape[2] > 1)
    title = f"Learning curves of the best {len(best)} trials{over}"
    note = (
        f"Behind the best {len(best)}, {len(drawn)} of the {len(others)} other curves are drawn: the next best, "
        "and the rest evenly by rank."
    )
    return Chart(drawing(frame.width, frame.height, title, *parts), (note,) if len(drawn) < len(others) else ())


def _curve_line(curves: LearningCurves, row: int, frame: Frame, most: int | None = None) -> str:
    known = np.flatnonzero(np.isfinite(curves.mean[row]))
    if most is not None and len(known) > most:
        known = known[np.linspace(0, len(known) - 1, most).round().astype(int)]
    return line_path(frame.across(curves.epochs[known]), frame.down(curves.mean[row][known]))


def _best_curve(study: Study, curves: LearningCurves, row: int, rank: int, frame: Frame) -> Markup:
    mean, spread, trial = curves.mean[row], curves.spread[row], study.trials[row]
    band = band_path(frame.across(curves.epochs), frame.down(mean - spread), frame.down(mean + spread))
    parts = [path("band", band)] if band else []
    parts.append(path("line", _curve_line(curves, row, frame)))
    at = min(trial.best_epoch, len(mean)) - 1
    if at >= 0 and np.isfinite(mean[at]):
        x, y = float(frame.across(at + 1)), float(frame.down(mean[at]))
        parts.append(element("circle", class_="dot", cx=x, cy=y, r=4))
    score = f"trial {trial.number}: {curves.measure.text(trial.score)} at epoch {trial.best_epoch}"
    return element("g", element("title", score), *parts, class_=f"c{rank}", clip_path="url(#plot)")


def _legend(study: Study, curves: LearningCurves, best: list[int], frame: Frame) -> Markup:
    """Name the best curves at their right, in the order of their scores."""
    x, parts = frame.width - frame.right + 14, []
    for rank, row in enumerate(best):
        trial, y = study.trials[row], frame.top + 12 + 36 * rank
        parts += [
            path(f"line c{rank}", f"M{x:.0f} {y - 4:.0f}h16"),
            text("tick", x + 22, y, f"trial {trial.number}"),
            text("tick strong", x + 22, y + 14, curves.measure.text(trial.score)),
        ]
    return element("g", *parts)


def folds_note(study: Study) -> str:
    """Return what line, band and dot are."""
    if study.record.face == "loop":
        return "A line is what a trial reported, step by step; the dot is where its score was taken."
    folds = study.curves.shape[2]
    band = ", the band one standard deviation over them on either side" if folds > 1 else ""
    return f"A line is the mean over {count(folds, 'fold')}{band}; the dot is the epoch that the trial is scored at."


def history_chart(study: Study) -> Chart | None:
    """Return the scores in the order of the trials with the best so far; None where nothing has a score."""
    shown = score_view(study)
    if not shown.order:
        return None
    numbers = np.array([trial.number for trial in study.trials], dtype=float)
    x = linear_scale(numbers.min(), numbers.max(), most=10, pad=0.01, whole=True)
    frame = Frame(_WIDE, 280.0, x, score_scale(shown, pad=_PAD)).with_room()
    drawn, notes = _rows_to_draw(shown, POINTS)
    best = shown.best_so_far
    steps = np.flatnonzero(np.isfinite(best) & (best != np.concatenate([[np.nan], best[:-1]])))
    corners = np.append(np.repeat(numbers[steps], 2)[1:], numbers[-1])
    line = line_path(frame.across(corners), frame.down_within(np.repeat(best[steps], 2)))
    title = f"Score of {count(len(study.trials), 'trial')} in the order of their numbers, and the best so far"
    parts = [
        frame.axes("trial", shown.measure.title),
        *_points(study, shown, frame.across(numbers), frame, drawn),
        path("line c0", line),
    ]
    return Chart(drawing(frame.width, frame.height, title, *parts), notes)


def pareto_charts(study: Study) -> tuple[tuple[str, Chart], ...]:
    """Return a chart of the metric that ranks with each of the others, by its name; () for one metric."""
    if not study.metrics or not np.isfinite(metric_scores(study)).all(1).any():
        return ()
    return tuple((name, _pareto(study, name)) for name in study.metrics[1:])


def _pareto(study: Study, name: str) -> Chart:
    """Return a dot a trial by two metrics, with a line through those that no other one beats in both."""
    front = pareto_front(study, study.metrics[0], name)
    across, down = front.measures
    scales = [
        value_scale(*score_range(front.values[:, axis], measure), measure, pad=_PAD)
        for axis, measure in enumerate(front.measures)
    ]
    frame = Frame(*_SMALL, scales[0], scales[1]).with_room()
    drawn = spread_over(np.flatnonzero(np.isfinite(front.values[:, 0])).tolist(), POINTS)
    x = np.clip(frame.across(front.values[:, 0]), frame.left + 6, frame.width - frame.right - 6)
    y = frame.down_within(front.values[:, 1])
    parts = [
        frame.axes(across.title, down.title),
        path("dots complete", dots_path(x[drawn], y[drawn])),
        path("line c0", line_path(x[front.order], y[front.order])),
        *(_unbeaten(study, front, row, float(x[row]), float(y[row])) for row in front.order[:POINTS]),
    ]
    far = np.hypot(x - frame.across(front.values[:, 0]), y - frame.down(front.values[:, 1])) > 12  # more than a margin
    notes = [
        f"{len(drawn)} of {len(study.trials)} trials are drawn." if len(drawn) == POINTS else "",
        f"{count(int(far.sum()), 'trial')} beyond the axes, drawn at the edge." if far.any() else "",
    ]
    svg = drawing(frame.width, frame.height, f"{across.name} and {down.name} of the trials", *parts)
    return Chart(svg, tuple(filter(None, notes)))


def _unbeaten(study: Study, front: ParetoFront, row: int, x: float, y: float) -> Markup:
    """Return the mark of a trial that no other one beats."""
    scores = [
        f"{measure.name} {measure.size(value)}" for measure, value in zip(front.measures, front.values[row].tolist())
    ]
    title = element("title", f"trial {study.trials[row].number}: {', '.join(scores)}")
    return element("circle", title, class_="ring", cx=x, cy=y, r=5)


@dataclass(frozen=True)
class Slices:
    """The charts by the label of their hyperparameter, and what is to be said of all of them."""

    charts: tuple[tuple[str, Chart], ...]
    notes: tuple[str, ...]


def slice_charts(study: Study) -> Slices | None:
    """Return a chart for each hyperparameter that varied; None where there is none, or nothing has a score."""
    shown, varied = score_view(study), varied_parameters(study)
    if not shown.order or not varied:
        return None
    drawn, notes = _rows_to_draw(shown, max(FEWEST, min(POINTS, ALL // len(varied))))
    return Slices(tuple((one.label, _slice(study, shown, one, drawn)) for one in varied), notes)


def _slice(study: Study, shown: Scores, parameter: Parameter, drawn: Sequence[int]) -> Chart:
    few = len(np.unique(parameter.values[np.isfinite(parameter.values)])) <= FEW
    scale = parameter_scale(parameter, pad=0.12 if few else 0.04)  # few values need room for their points
    frame = Frame(*_SMALL, scale, score_scale(shown, pad=_PAD)).with_room(_LETTERS)
    across = frame.across(parameter.values)
    strips = np.unique(across[np.isfinite(across)])
    if 2 <= len(strips) <= FEW:
        across = beside(across, min(float(np.diff(strips).min()) * _SHIFT, _WIDEST))
    failed = [row for row, trial in enumerate(study.trials) if trial.state == "failed"]
    bottom = frame.height - frame.bottom
    places = across[spread_over(failed, FAILURES)]
    marks = "".join(f"M{x:.1f} {bottom:.1f}v-8" for x in places.tolist() if np.isfinite(x))
    parts = [
        frame.axes(parameter.label, shown.measure.title, letters=_LETTERS),
        path("failed", marks) if marks else "",
        *_points(study, shown, across, frame, drawn),
    ]
    have = "has" if parameter.hidden == 1 else "have"
    note = f"{count(parameter.hidden, 'trial')} with an infinite {parameter.label} {have} no place here."
    svg = drawing(frame.width, frame.height, f"Score against {parameter.label}", *parts)
    return Chart(svg, (note,) if parameter.hidden else ())


def _rows_to_draw(shown: Scores, most: int) -> tuple[list[int], tuple[str, ...]]:
    """Return the rows whose points are drawn, worst first, and what must be said of those that are not."""
    drawn, scored = spread_over(shown.order, most), len(shown.order)
    note = f"{len(drawn)} of {scored} scored trials are drawn: the best {most // 4}, and the others evenly by rank."
    return drawn[::-1], ((note,) if len(drawn) < scored else ()) + shown.notes


def _points(
    study: Study, shown: Scores, across: NDArray[np.float64], frame: Frame, drawn: Sequence[int]
) -> list[Markup]:
    """Return the dots of each state, and a ring around the best trial."""
    y, parts = frame.down_within(shown.values), []
    for state in ("pruned", "stopped", "complete"):
        rows = [row for row in drawn if study.trials[row].state == state]
        if rows:
            parts.append(path(f"dots {state}", dots_path(across[rows], y[rows])))
    best = drawn[-1]
    if np.isfinite(across[best]):
        trial = study.trials[best]
        title = element("title", f"best: trial {trial.number}, {shown.measure.text(trial.score)}")
        parts.append(element("circle", title, class_="ring", cx=across[best], cy=y[best], r=7))
    return parts


def path_charts(study: Study) -> tuple[tuple[str, Chart], ...]:
    """Return name and chart of the score and of each hyperparameter that was descended on; () for another search."""
    drawn, shown = descent_paths(study), score_view(study)
    if not drawn or not shown.order:
        return ()
    lines = [(shown.measure.title, score_scale(shown, pad=_PAD), [one.scores for one in drawn])]
    for column in descended(study):
        if np.isfinite(column.values).any():
            values = [one.values[column.name] for one in drawn]
            lines.append((column.label, parameter_scale(column, pad=0.05), values))
    return tuple((name, _path_chart(drawn, values, y, name)) for name, y, values in lines)


def _path_chart(starts: Sequence[DescentPath], values: Sequence[NDArray[np.float64]], y: Scale, name: str) -> Chart:
    drawn = starts[:STARTS]
    last = max(1, *(int(one.steps[-1]) for one in drawn))
    frame = Frame(*_SMALL, linear_scale(0, last, most=min(last, 10), whole=True), y).with_room()
    lines = [_path_line(*line, frame, rank) for rank, line in enumerate(zip(drawn, values))]
    title = f"{name} of {len(drawn)} starts by outer step"
    svg = drawing(frame.width, frame.height, title, frame.axes("outer step", name), *lines[::-1])
    note = f"The best {len(drawn)} of {len(starts)} starts are drawn."
    return Chart(svg, (note,) if len(drawn) < len(starts) else ())


def _path_line(start: DescentPath, values: NDArray[np.float64], frame: Frame, rank: int) -> Markup:
    x, y = frame.across(start.steps), frame.down_within(values)
    dots = [
        element("circle", class_="dot" if usable else "dot hollow", cx=px, cy=py, r=2.5)
        for px, py, usable in zip(x.tolist(), y.tolist(), start.usable.tolist())
        if py == py
    ]
    title, line = element("title", f"start {start.start}"), path("line", line_path(x, y))
    return element("g", title, line, *dots, class_=f"c{rank}" if rank < BEST else "other")
