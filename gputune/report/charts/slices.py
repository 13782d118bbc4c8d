"""The charts of the score against one hyperparameter, and of the scores in the order of the trials."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from gputune.report.svg import (
    Chart,
    Frame,
    Scale,
    dots_path,
    drawing,
    element,
    line_path,
    linear_scale,
    log_scale,
    parameter_scale,
    spread_over,
)
from gputune.study.study import Study
from gputune.text import count
from gputune.views.parameters import Parameter, varied_parameters
from gputune.views.scores import Scores, is_wide, shown_scores

POINTS, FEWEST, ALL, FAILURES = 1500, 100, 9000, 300
"""Points of a chart at most, how few of them many charts leave it, points of all charts, marks of diverged trials."""

_WIDTH, _HEIGHT = 440.0, 300.0
_PAD = 0.06
"""Share of the axis of scores below and above them: room for the marks of diverged trials."""

_WIDE = 960.0
_FEW = 12
"""Values of a hyperparameter that are few: their points stand in a strip each."""

_SHIFT = 0.3
"""Points of one word or of few numbers stand beside each other within so much of their step."""


@dataclass(frozen=True)
class Slices:
    """The charts by the label of their hyperparameter, and what is to be said of all of them."""

    charts: tuple[tuple[str, Chart], ...]
    notes: tuple[str, ...]


def slice_charts(study: Study) -> Slices | None:
    """Return a chart for each hyperparameter that varied; None where there is none, or nothing has a score."""
    shown, varied = shown_scores(study), varied_parameters(study)
    if not np.isfinite(shown.values).any() or not varied:
        return None
    drawn, notes = _drawn(study, shown, max(FEWEST, min(POINTS, ALL // len(varied))))
    return Slices(tuple((one.label, _slice(study, shown, one, drawn)) for one in varied), notes)


def history_chart(study: Study) -> Chart | None:
    """Return the scores in the order of the trials with the best so far; None where nothing has a score."""
    shown = shown_scores(study)
    if not np.isfinite(shown.values).any():
        return None
    numbers = np.array([trial.number for trial in study.trials], dtype=float)
    frame = Frame(
        _WIDE, 280.0, linear_scale(numbers.min(), numbers.max(), most=10, pad=0.01), score_scale(shown)
    )
    drawn, notes = _drawn(study, shown, POINTS)
    best = shown.best_so_far
    steps = np.flatnonzero(np.isfinite(best) & (best != np.concatenate([[np.nan], best[:-1]])))
    x = np.append(np.repeat(numbers[steps], 2)[1:], numbers[-1])
    parts = [
        frame.axes("trial", shown.measure.title),
        *_points(study, shown, frame.across(numbers), frame, drawn),
        element(
            "path", class_="line c0", d=line_path(frame.across(x), frame.held_down(np.repeat(best[steps], 2)))
        ),
    ]
    title = f"Score of {count(len(study.trials), 'trial')} in the order of their numbers, and the best so far"
    return Chart(drawing(_WIDE, 280.0, title, *parts), notes)


def score_scale(shown: Scores) -> Scale:
    """Return the axis of the scores: the best one, and all that are not far off."""
    low, high = shown.range
    make = log_scale if is_wide(low, high, shown.measure) else linear_scale
    return make(low, high, pad=_PAD)


def _slice(study: Study, shown: Scores, parameter: Parameter, drawn: Sequence[int]) -> Chart:
    few = len(np.unique(parameter.values[np.isfinite(parameter.values)])) <= _FEW
    scale = parameter_scale(
        parameter, most=6, pad=0.12 if few else 0.04
    )  # few values need room for their points
    frame = Frame(_WIDTH, _HEIGHT, scale, score_scale(shown))
    across = _beside(frame.across(parameter.values), parameter)
    failed = [c for c, trial in enumerate(study.trials) if trial.state == "failed"]
    failed = spread_over(failed, FAILURES)
    marks = "".join(
        f"M{x:.1f} {frame.height - frame.bottom:.1f}v-8" for x in across[failed].tolist() if np.isfinite(x)
    )
    parts = [
        frame.axes(parameter.label, shown.measure.title, letters=14),
        element("path", class_="failed", d=marks) if marks else "",
        *_points(study, shown, across, frame, drawn),
    ]
    notes: tuple[str, ...] = ()
    if parameter.hidden:
        have = "has" if parameter.hidden == 1 else "have"
        notes = (
            f"{count(parameter.hidden, 'trial')} with an infinite {parameter.label} {have} no place here.",
        )
    return Chart(drawing(_WIDTH, _HEIGHT, f"Score against {parameter.label}", *parts), notes)


def _drawn(study: Study, shown: Scores, most: int) -> tuple[list[int], tuple[str, ...]]:
    """Return the rows whose points are drawn, worst first, and what must be said of those that are not."""
    place = {trial.number: row for row, trial in enumerate(study.trials)}
    scored = [place[t.number] for t in study.ranking() if np.isfinite(shown.values[place[t.number]])]
    drawn = spread_over(scored, most)
    notes = []
    if len(drawn) < len(scored):
        notes.append(
            f"{len(drawn)} of {len(scored)} scored trials are drawn: the best {most // 4}, and the others evenly by "
            "rank."
        )
    low, high = shown.range
    worse = shown.values > high if shown.measure.lower_is_better else shown.values < low
    if worse.any():
        lie, stand = ("lies", "stands") if worse.sum() == 1 else ("lie", "stand")
        notes.append(f"{count(int(worse.sum()), 'score')} {lie} beyond the axis and {stand} at its edge.")
    return drawn[::-1], tuple(notes)


def _points(
    study: Study, shown: Scores, across: np.ndarray, frame: Frame, drawn: Sequence[int]
) -> list[Markup]:
    """Return the dots of each state, and a ring around the best trial."""
    y = frame.held_down(shown.values)
    parts = []
    for state in ("pruned", "stopped", "complete"):
        rows = [row for row in drawn if study.trials[row].state == state]
        if rows:
            parts.append(element("path", class_=f"dots {state}", d=dots_path(across[rows], y[rows])))
    best = drawn[-1]
    if np.isfinite(across[best]):
        title = f"best: trial {study.trials[best].number}, {shown.measure.text(study.trials[best].score)}"
        parts.append(
            element("circle", element("title", title), class_="ring", cx=across[best], cy=y[best], r=7)
        )
    return parts


def _beside(across: np.ndarray, parameter: Parameter) -> np.ndarray:
    """Return places from the left; those of one word or of few numbers are spread a little, always alike."""
    known = np.unique(across[np.isfinite(across)])
    if len(known) > _FEW or len(known) < 2:
        return across
    width = float(np.diff(known).min()) * _SHIFT
    # the golden ratio spreads any number of neighbours evenly
    shift = (np.arange(len(across)) * 0.6180339887498949) % 1.0 - 0.5
    apart: np.ndarray = across + min(width, 40.0) * shift
    return apart
