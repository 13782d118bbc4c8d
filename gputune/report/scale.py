"""An axis of a chart: from values to places in [0, 1], with ticks at round numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gputune.analysis.parameters import Parameter

Ticks = tuple[tuple[float, str], ...]

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """``low`` and ``high`` are its ends; a value beyond them has a place beyond 0 or 1."""

    low: float
    high: float
    ticks: Ticks
    log: bool = False

    def __call__(self, values: ArrayLike) -> NDArray[np.float64]:
        """Return places, 0 at ``low`` and 1 at ``high``; NaN for NaN, and for what has no logarithm."""
        found = np.asarray(values, dtype=np.float64)
        low, high = self.low, self.high
        if self.log:
            with np.errstate(divide="ignore", invalid="ignore"):
                found = np.where(found > 0, np.log(found), np.nan)
            low, high = math.log(low), math.log(high)
        return (found - low) / (high - low)


def number_text(value: float) -> str:
    """Return a number in few characters: 0.001, 20000, 1e-5."""
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return f"{value:.6g}"
    mantissa, _, exponent = f"{value:.3g}".partition("e")
    if not exponent:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}"


def linear_scale(low: float, high: float, *, most: int = 6, pad: float = 0.0) -> Scale:
    """Return a scale with at most so many ticks; ``pad`` widens it on both sides by a share of its length."""
    if not high > low:
        half = abs(low) * 0.05 or 0.5
        low, high = low - half, high + half
    margin = pad * (high - low)
    low, high = low - margin, high + margin
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * part for part in _STEPS if power * part >= rough * (1 - 1e-9))
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
            return Scale(low, high, tuple((m, number_text(m)) for m in inside), True)
    inside = inside[:: max(1, math.ceil(len(inside) / most))] if len(inside) > 1 else []
    if not inside:  # less than a decade, between the marks
        return Scale(low, high, linear_scale(low, high, most=most).ticks, True)
    return Scale(low, high, tuple((m, number_text(m)) for m in inside), True)


def parameter_scale(parameter: Parameter, *, most: int = 6, pad: float = 0.0) -> Scale:
    """Return the scale of a hyperparameter that some trial has: its words, its few numbers, or its range."""
    if parameter.levels:
        edge = 0.5 if pad else 0.0
        last = max(len(parameter.levels) - 1, 0 if pad else 1)
        return Scale(-edge, last + edge, tuple(enumerate(parameter.levels)))
    values = np.unique(parameter.values[np.isfinite(parameter.values)])
    make = log_scale if parameter.log else linear_scale
    scale = make(float(values[0]), float(values[-1]), most=most, pad=pad)
    return _at_the_values(scale, values) if len(values) <= most else scale


def _at_the_values(scale: Scale, values: NDArray[np.float64]) -> Scale:
    """Return the scale with its ticks at the values themselves, where they do not crowd."""
    places = scale(values)
    if len(places) > 1 and np.diff(places).min() < 0.08:
        return scale
    return Scale(scale.low, scale.high, tuple((float(v), number_text(float(v))) for v in values), scale.log)


def cut(text: str, most: int) -> str:
    """Return text of at most so many characters, its middle left out where it is longer."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def spread_over(order: Sequence[int], most: int) -> list[int]:
    """Return at most so many of an order: the first quarter of them as they come, the others evenly from the rest."""
    if len(order) <= most:
        return list(order)
    first = most // 4
    rest = np.linspace(first, len(order) - 1, most - first).round().astype(int)
    return [*order[:first], *(order[place] for place in rest)]
