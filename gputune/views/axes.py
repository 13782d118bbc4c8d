"""Axes: from values to places in [0, 1], with ticks at round numbers; those of parallel coordinates."""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gputune.study.study import Study
from gputune.text import Measure
from gputune.views.parameters import Parameter, varied_parameters
from gputune.views.scores import BEST, LearningCurves, Scores, is_wide, score_range

Ticks = tuple[tuple[float, str], ...]

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_APART = 0.08
"""Share of an axis by which ticks must be apart."""


@dataclass(frozen=True)
class Scale:
    """``low`` and ``high`` are its ends; a value beyond them has a place beyond 0 or 1."""

    low: float
    high: float
    ticks: Ticks
    log: bool = False

    def __call__(self, values: ArrayLike) -> NDArray[np.float64]:
        """Return places, 0 at ``low`` and 1 at ``high``; NaN for NaN, and for what has no logarithm."""
        places = np.asarray(values, dtype=np.float64)
        low, high = self.low, self.high
        if self.log:
            with np.errstate(divide="ignore", invalid="ignore"):
                places = np.where(places > 0, np.log(places), np.nan)
            low, high = math.log(low), math.log(high)
        return (places - low) / (high - low)


def number_text(value: float) -> str:
    """Return a number in few characters: 0.001, 20000, 1e-5."""
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return f"{value:.6g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def linear_scale(low: float, high: float, *, most: int = 6, pad: float = 0.0, whole: bool = False) -> Scale:
    """Return a scale with at most so many ticks, ``whole`` or not; ``pad`` is a share of its length on both sides."""
    if not high > low:
        half = abs(low) * 0.05 or 0.5
        low, high = low - half, high + half
    margin = pad * (high - low)
    low, high = low - margin, high + margin
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * part for part in _STEPS if power * part >= rough * (1 - 1e-9))
    step = math.ceil(step) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9) + (step / power == 2.5))
    plain = max(abs(low), abs(high)) < 1e6 and decimals <= 6
    marks = [k * step for k in range(first, last + 1)]
    return Scale(low, high, tuple((m, f"{m + 0.0:.{decimals}f}" if plain else number_text(m)) for m in marks))


def log_scale(low: float, high: float, *, most: int = 6, pad: float = 0.0) -> Scale:
    """Return a scale of positive numbers, its ticks at powers of ten, or at 1, 2 and 5 of them where they are few."""
    if not high > low:
        low, high = low / 2, high * 2
    margin = pad * (math.log(high) - math.log(low))
    low, high = math.exp(math.log(low) - margin), math.exp(math.log(high) + margin)
    begin, end = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for digits in ((1, 2, 5), (1, 3), (1,)):
        marks = [float(f"{d}e{e}") for e in range(begin, end + 1) for d in digits]
        inside = [m for m in marks if low * (1 - 1e-9) <= m <= high * (1 + 1e-9)]
        if 2 <= len(inside) <= most:
            break
    else:
        inside = inside[:: max(1, math.ceil(len(inside) / most))] if len(inside) > 1 else []
    # Less than a decade may lie between the marks.
    ticks = tuple((m, number_text(m)) for m in inside) or linear_scale(low, high, most=most).ticks
    return Scale(low, high, ticks, log=True)


def parameter_scale(parameter: Parameter, *, most: int = 6, pad: float = 0.0) -> Scale:
    """Return the scale of a hyperparameter that some trial has: its words, its few numbers, or its range."""
    if parameter.levels:
        edge = 0.5 if pad else 0.0
        last = max(len(parameter.levels) - 1, 0 if pad else 1)
        return Scale(-edge, last + edge, tuple(enumerate(parameter.levels)))
    values = parameter.distinct
    make = log_scale if parameter.log else linear_scale
    scale = make(float(values[0]), float(values[-1]), most=most, pad=pad)
    crowded = len(values) > 1 and np.diff(scale(values)).min() < _APART
    if len(values) > most or crowded:
        return scale
    return replace(scale, ticks=tuple((value, number_text(value)) for value in values.tolist()))


def value_scale(low: float, high: float, measure: Measure, *, pad: float = 0.0) -> Scale:
    """Return the scale of scores between two ends."""
    return (log_scale if is_wide(low, high, measure) else linear_scale)(low, high, pad=pad)


def score_scale(shown: Scores, *, pad: float = 0.0) -> Scale:
    """Return the scale of all scores: the best one, and all that are not far off."""
    return value_scale(*shown.range, shown.measure, pad=pad)


def curve_scale(study: Study, curves: LearningCurves) -> Scale:
    """Return an axis that holds the best curves whole, and of the others what is not far off where they ended."""
    late = [row for row in curves.order if study.trials[row].state != "pruned"] or curves.order
    ends = [curves.mean[row][np.isfinite(curves.mean[row])][-1] for row in late]
    low, high = score_range(np.array(ends), curves.measure)
    best = curves.order[:BEST]
    whole, spread = curves.mean[best], np.nan_to_num(curves.spread[best])
    low, high = min(low, float(np.nanmin(whole))), max(high, float(np.nanmax(whole)))
    # The bands too, on the good side; a logarithm has no room for all of one.
    if curves.measure.lower_is_better:
        low = max(min(low, float(np.nanmin(whole - spread))), low / 2 if low > 0 else -np.inf)
    else:
        high = max(high, float(np.nanmax(whole + spread)))
    return value_scale(low, high, curves.measure, pad=0.03)


@dataclass(frozen=True, eq=False)
class Axis:
    """An axis of parallel coordinates: ``column`` is its key in the table of trials, ``heights`` (C,) are in [0, 1]."""

    column: str
    label: str
    scale: Scale
    heights: NDArray[np.float64]


def parallel_axes(study: Study, shown: Scores) -> list[Axis]:
    """Return an axis for each hyperparameter that varied, and the last one for the score."""
    columns = [
        (f"params_{one.name}", one.label, parameter_scale(one, most=7), one.values) for one in varied_parameters(study)
    ]
    columns.append(("score", shown.measure.name, score_scale(shown), shown.values))
    return [Axis(key, label, scale, np.clip(scale(values), 0, 1)) for key, label, scale, values in columns]
