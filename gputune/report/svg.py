"""An axis of a chart: from values to places in [0, 1], with ticks at round numbers.

SVG as escaped markup: elements, lines, dots, and the frame of a chart with its axes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import ArrayLike, NDArray

from gputune.views.parameters import Parameter

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


def element(name: str, *children: Any, **attributes: Any) -> Markup:
    """Return one element. Text and attributes are escaped; ``class_`` is class, ``_`` stands for a hyphen."""
    given = Markup("").join(
        Markup(' {}="{}"').format(Markup(key.rstrip("_").replace("_", "-")), _attribute(value))
        for key, value in attributes.items()
        if value is not None
    )
    inside = Markup("").join(map(escape, children))
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), given, inside)


def line_path(x: ArrayLike, y: ArrayLike) -> str:
    """Return the path of a line through points; it breaks at NaN."""
    parts, pen = [], "M"
    for px, py in zip(np.asarray(x, dtype=float).tolist(), np.asarray(y, dtype=float).tolist()):
        if px != px or py != py:
            pen = "M"
            continue
        parts.append(f"{pen}{px:.1f} {py:.1f}")
        pen = "L"
    return "".join(parts)


def dots_path(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    """Return a path of dots, one at each point that is no NaN; a round cap makes them."""
    there = np.isfinite(x) & np.isfinite(y)
    return "".join(f"M{px:.1f} {py:.1f}h0" for px, py in zip(x[there].tolist(), y[there].tolist()))


def band_path(x: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]) -> str:
    """Return the path of the area between two lines, where both are numbers."""
    there = np.isfinite(low) & np.isfinite(high)
    if there.sum() < 2:
        return ""
    edge = line_path(
        np.concatenate([x[there], x[there][::-1]]), np.concatenate([high[there], low[there][::-1]])
    )
    return f"{edge}Z"


@dataclass(frozen=True)
class Chart:
    """A drawing, and sentences on what it leaves out."""

    svg: Markup
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Frame:
    """The rectangle of a chart in a drawing of ``width`` x ``height`` units, and the scales of its axes."""

    width: float
    height: float
    x: Scale
    y: Scale
    left: float = 62
    right: float = 16
    top: float = 14
    bottom: float = 46

    def across(self, values: ArrayLike) -> NDArray[np.float64]:
        """Return where values lie from the left."""
        return self.left + self.x(values) * (self.width - self.left - self.right)

    def down(self, values: ArrayLike) -> NDArray[np.float64]:
        """Return where values lie from the top."""
        return self.height - self.bottom - self.y(values) * (self.height - self.top - self.bottom)

    def held_down(self, values: ArrayLike) -> NDArray[np.float64]:
        """As ``down``; what lies beyond an end of the axis is drawn near it."""
        return np.clip(self.down(values), self.top + 6, self.height - self.bottom - 12)

    def axes(self, across: str, up: str, *, letters: int = 12) -> Markup:
        """Return the grid, the ticks and the names of both axes; ticks of the x axis have so many letters at most."""
        right, bottom = self.width - self.right, self.height - self.bottom
        parts = []
        for value, text in self.y.ticks:
            y = float(self.down(value))
            parts += [
                element("path", class_="grid", d=f"M{self.left:.1f} {y:.1f}H{right:.1f}"),
                element("text", text, class_="tick end", x=self.left - 8, y=y + 4),
            ]
        slant = sum(len(cut(text, letters)) for _, text in self.x.ticks) * 7 > right - self.left
        for value, text in self.x.ticks:
            x = float(self.across(value))
            parts += [
                element("path", class_="mark", d=f"M{x:.1f} {bottom:.1f}v5"),
                self._tick(x, bottom + (14 if slant else 19), cut(text, letters), slant=slant),
            ]
        middle = (self.top + bottom) / 2
        parts += [
            element("path", class_="edge", d=f"M{self.left:.1f} {bottom:.1f}H{right:.1f}"),
            element("text", across, class_="name mid", x=(self.left + right) / 2, y=self.height - 6),
            element("text", up, class_="name mid", x=14, y=middle, transform=f"rotate(-90 14 {middle:.1f})"),
        ]
        return element("g", *parts)

    @staticmethod
    def _tick(x: float, y: float, text: str, *, slant: bool) -> Markup:
        if slant:
            return element(
                "text", text, class_="tick end", x=x + 4, y=y, transform=f"rotate(-28 {x:.1f} {y:.1f})"
            )
        return element("text", text, class_="tick mid", x=x, y=y)


def drawing(width: float, height: float, title: str, *children: Any, class_: str = "chart") -> Markup:
    """Return an SVG that takes the width it is given; ``title`` is what a screen reader says."""
    return element(
        "svg", *children, class_=class_, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=title
    )


def _attribute(value: Any) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
