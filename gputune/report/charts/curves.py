"""The chart of learning curves: the best trials with the spread over their folds, all others thin behind them."""

import numpy as np
from markupsafe import Markup

from gputune.report.svg import (
    Chart,
    Frame,
    Scale,
    band_path,
    drawing,
    element,
    line_path,
    linear_scale,
    log_scale,
    spread_over,
)
from gputune.study.study import Study
from gputune.text import count
from gputune.views.scores import Curves, is_wide, score_range, shown_curves

BEST, BEHIND, POINTS = 5, 250, 80
"""Curves in colour, thin curves behind them, and epochs that a thin curve has at most."""

_WIDTH, _HEIGHT = 960.0, 400.0


def curves_chart(study: Study) -> Chart | None:
    """Return the chart; None where no trial was scored at two epochs."""
    curves = shown_curves(study)
    if not curves.drawable:
        return None
    place = {trial.number: row for row, trial in enumerate(study.trials)}
    order = [
        place[trial.number]
        for trial in study.ranking()
        if np.isfinite(curves.mean[place[trial.number]]).any()
    ]
    best, others = order[:BEST], order[BEST:]
    drawn = spread_over(others, BEHIND)
    epochs = curves.epochs
    frame = Frame(
        _WIDTH,
        _HEIGHT,
        linear_scale(1, len(epochs), most=10),
        _score_scale(study, curves, best, order),
        right=118,
    )
    parts = [
        frame.axes("epoch", curves.measure.title),
        _clip(frame),
        element("g", *(_thin(curves, row, frame) for row in drawn), class_="behind", clip_path="url(#plot)"),
        *(_leading(study, curves, row, rank, frame) for rank, row in reversed(list(enumerate(best)))),
        _legend(study, curves, best, frame),
    ]
    title = f"Learning curves of the best {len(best)} trials, mean and standard deviation over the folds"
    notes: tuple[str, ...] = ()
    if len(drawn) < len(others):
        notes = (
            f"Behind the best {len(best)}, {len(drawn)} of the {len(others)} other curves are drawn: the next best, "
            "and the rest evenly by rank.",
        )
    return Chart(drawing(_WIDTH, _HEIGHT, title, *parts), notes)


def _score_scale(study: Study, curves: Curves, best: list[int], order: list[int]) -> Scale:
    """Return an axis that holds the best curves whole, and of the others what is not far off where they ended."""
    late = [row for row in order if study.trials[row].state != "pruned"] or order
    ends = [curves.mean[row][np.isfinite(curves.mean[row])][-1] for row in late]
    low, high = score_range(np.array(ends), curves.measure)
    whole, spread = curves.mean[best], np.nan_to_num(curves.spread[best])
    low, high = min(low, float(np.nanmin(whole))), max(high, float(np.nanmax(whole)))
    if (
        curves.measure.lower_is_better
    ):  # the bands too, on the good side; a logarithm has no room for all of one
        low = max(min(low, float(np.nanmin(whole - spread))), low / 2 if low > 0 else -np.inf)
    else:
        high = max(high, float(np.nanmax(whole + spread)))
    if is_wide(low, high, curves.measure):
        return log_scale(low, high, pad=0.03)
    return linear_scale(low, high, pad=0.03)


def _clip(frame: Frame) -> Markup:
    area = element(
        "rect",
        x=frame.left,
        y=frame.top,
        width=frame.width - frame.left - frame.right,
        height=frame.height - frame.top - frame.bottom,
    )
    return element("clipPath", area, id="plot")


def _thin(curves: Curves, row: int, frame: Frame) -> Markup:
    there = np.flatnonzero(np.isfinite(curves.mean[row]))
    if len(there) > POINTS:
        there = there[np.linspace(0, len(there) - 1, POINTS).round().astype(int)]
    return element("path", d=_line(curves, row, there, frame))


def _line(curves: Curves, row: int, there: np.ndarray, frame: Frame) -> str:
    return line_path(frame.across(curves.epochs[there]), frame.down(curves.mean[row][there]))


def _leading(study: Study, curves: Curves, row: int, rank: int, frame: Frame) -> Markup:
    mean, spread = curves.mean[row], curves.spread[row]
    trial = study.trials[row]
    there = np.flatnonzero(np.isfinite(mean))
    band = band_path(frame.across(curves.epochs), frame.down(mean - spread), frame.down(mean + spread))
    at = min(trial.best_epoch, len(mean)) - 1
    parts = [element("path", class_="band", d=band)] if band else []
    parts.append(element("path", class_="line", d=_line(curves, row, there, frame)))
    if at >= 0 and np.isfinite(mean[at]):
        x, y = float(frame.across(at + 1)), float(frame.down(mean[at]))
        parts.append(element("circle", class_="dot", cx=x, cy=y, r=4))
    title = element(
        "title", f"trial {trial.number}: {curves.measure.text(trial.score)} at epoch {trial.best_epoch}"
    )
    return element("g", title, *parts, class_=f"c{rank}", clip_path="url(#plot)")


def _legend(study: Study, curves: Curves, best: list[int], frame: Frame) -> Markup:
    """Name the best curves at their right, in the order of their scores."""
    x = frame.width - frame.right + 14
    rows = []
    for rank, row in enumerate(best):
        trial, y = study.trials[row], frame.top + 12 + 36 * rank
        rows += [
            element("path", class_=f"line c{rank}", d=f"M{x:.0f} {y - 4:.0f}h16"),
            element("text", f"trial {trial.number}", class_="tick", x=x + 22, y=y),
            element("text", curves.measure.text(trial.score), class_="tick strong", x=x + 22, y=y + 14),
        ]
    return element("g", *rows)


def folds_note(study: Study) -> str:
    """Return what line, band and dot are."""
    folds = study.curves.shape[2]
    band = ", the band one standard deviation over them on either side" if folds > 1 else ""
    return f"A line is the mean over {count(folds, 'fold')}{band}; the dot is the epoch that the trial is scored at."
