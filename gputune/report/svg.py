"""SVG as escaped markup: elements, lines, dots, and the frame of a chart with its axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import ArrayLike, NDArray

from gputune.views.scores import Scale

GOLDEN = 0.6180339887498949  # steps of it, modulo 1, spread any number of neighbours evenly
# width of a letter of a tick, and degrees by which ticks are turned
_LETTER = 6.6
_SLANT = 40

_SIN = math.sin(math.radians(_SLANT))
_COS = math.cos(math.radians(_SLANT))


def cut(text: str, most: int) -> str:
    """Return text of at most so many characters, its middle left out where it is longer."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def spread_over(order: Sequence[int], most: int) -> list[int]:
    """Return at most so many of an order: the first quarter of them as they come, the others evenly
    from the rest."""
    if len(order) <= most:
        return list(order)
    first = most // 4
    rest = np.linspace(first, len(order) - 1, most - first).round().astype(int)
    return [*order[:first], *(order[place] for place in rest)]


def beside(places: NDArray[np.float64], width: float) -> NDArray[np.float64]:
    """Return places of which equal ones stand beside each other within so much, always alike."""
    return places + width * ((np.arange(len(places)) * GOLDEN) % 1.0 - 0.5)


def element(name: str, *children: str, **attributes: str | float | None) -> Markup:
    """Return one element. Text and attributes are escaped; ``class_`` is class, ``_`` stands for a
    hyphen."""
    written = Markup("")
    for key, value in attributes.items():
        if value is not None:
            text = f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
            written += Markup(' {}="{}"').format(Markup(key.rstrip("_").replace("_", "-")), text)
    inside = Markup("").join(map(escape, children))
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, inside)


def path(class_: str | None, d: str, **attributes: str | float | None) -> Markup:
    return element("path", class_=class_, d=d, **attributes)


def text(class_: str, x: float, y: float, *words: str, **attributes: str | float | None) -> Markup:
    return element("text", *words, class_=class_, x=x, y=y, **attributes)


def line_path(x: ArrayLike, y: ArrayLike) -> str:
    """Return the path of a line through points; it breaks at NaN."""
    parts = []
    pen = "M"
    for px, py in zip(np.asarray(x, dtype=float).tolist(), np.asarray(y, dtype=float).tolist()):
        known = px == px and py == py
        parts.append(f"{pen}{px:.1f} {py:.1f}" if known else "")
        pen = "L" if known else "M"
    return "".join(parts)


def dots_path(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    """Return a path of dots, one at each point that is no NaN; a round cap makes them."""
    known = np.isfinite(x) & np.isfinite(y)
    return "".join(f"M{px:.1f} {py:.1f}h0" for px, py in zip(x[known].tolist(), y[known].tolist()))


def band_path(x: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]) -> str:
    """Return the path of the area between two lines, where both are numbers."""
    known = np.isfinite(low) & np.isfinite(high)
    if known.sum() < 2:
        return ""
    x = x[known]
    low = low[known]
    high = high[known]
    return f"{line_path(np.append(x, x[::-1]), np.append(high, low[::-1]))}Z"


@dataclass(frozen=True)
class Chart:
    """A drawing, and sentences on what it leaves out."""

    svg: Markup
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Frame:
    """The rectangle of a chart in a drawing of ``width`` x ``height`` units, and the scales of its
    axes."""

    width: float
    height: float
    x: Scale
    y: Scale
    left: float = 62
    right: float = 16
    top: float = 14
    bottom: float = 46
    letters: int = 12  # of a tick of the x axis, at most

    def chart(self, title: str, *children: str, notes: Sequence[str] = ()) -> Chart:
        return drawing(self.width, self.height, title, *children, notes=notes)

    def with_room(self) -> "Frame":
        """Return a frame with room for its ticks: a wider left for long ones, and a higher drawing
        for slanted ones."""
        left = max(
            self.left, 40 + _LETTER * max((len(words) for _, words in self.y.ticks), default=0)
        )
        frame = replace(self, left=left)
        if not frame.slants:
            return frame
        ticks = [
            (float(frame.across(value)), _LETTER * len(cut(words, self.letters)))
            for value, words in self.x.ticks
        ]
        reach = max(_COS * length - x for x, length in ticks)
        more = max(0.0, 40 + _SIN * max(length for _, length in ticks) - self.bottom)
        return replace(
            frame, left=left + max(0.0, reach), bottom=self.bottom + more, height=self.height + more
        )

    @property
    def slants(self) -> bool:
        """Whether the ticks of the x axis have no room side by side."""
        return (
            sum(len(cut(words, self.letters)) for _, words in self.x.ticks) * 7
            > self.width - self.right - self.left
        )

    def across(self, values: ArrayLike) -> NDArray[np.float64]:
        return self.left + self.x(values) * (self.width - self.left - self.right)

    def down(self, values: ArrayLike) -> NDArray[np.float64]:
        return self.height - self.bottom - self.y(values) * (self.height - self.top - self.bottom)

    def down_within(self, values: ArrayLike) -> NDArray[np.float64]:
        """As ``down``; what lies beyond an end of the axis is drawn near it."""
        return np.clip(self.down(values), self.top + 6, self.height - self.bottom - 12)

    def axes(self, across: str, up: str) -> Markup:
        """Return the grid, the ticks and the names of both axes."""
        right = self.width - self.right
        bottom = self.height - self.bottom
        parts = []
        for value, words in self.y.ticks:
            y = float(self.down(value))
            parts.append(path("grid", f"M{self.left:.1f} {y:.1f}H{right:.1f}"))
            parts.append(text("tick end", self.left - 8, y + 4, words))
        slant = self.slants
        y = bottom + (14 if slant else 19)
        for value, words in self.x.ticks:
            x = float(self.across(value))
            turn = f"rotate(-{_SLANT} {x:.1f} {y:.1f})" if slant else None
            where = ("tick end", x + 4) if slant else ("tick mid", x)
            parts += [
                path("mark", f"M{x:.1f} {bottom:.1f}v5"),
                text(*where, y, cut(words, self.letters), transform=turn),
            ]
        middle = (self.top + bottom) / 2
        parts += [
            path("edge", f"M{self.left:.1f} {bottom:.1f}H{right:.1f}"),
            text("name mid", (self.left + right) / 2, self.height - 6, across),
            text("name mid", 14, middle, up, transform=f"rotate(-90 14 {middle:.1f})"),
        ]
        return element("g", *parts)


def drawing(
    width: float,
    height: float,
    title: str,
    *children: str,
    notes: Sequence[str] = (),
    class_: str = "chart",
) -> Chart:
    """Return a chart that takes the width it is given; ``title`` is what a screen reader says."""
    box = {"viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria_label": title}
    return Chart(element("svg", *children, class_=class_, **box), tuple(notes))
