"""Build SVG charts for the report: escaped elements, lines, dots, and frames with axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import ArrayLike

from gputune.ground.annotations import FloatArray
from gputune.views.scores import Scale

GOLDEN = 0.6180339887498949  # steps of the golden ratio, modulo 1, spread points evenly
# Width of a letter of a tick, and angle of slanted ticks in degrees.
_LETTER = 6.6
_SLANT = 40

_SIN = math.sin(math.radians(_SLANT))
_COS = math.cos(math.radians(_SLANT))


def cut(text: str, most: int) -> str:
    """Shorten a text to at most ``most`` characters, by replacing the middle with "…"."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def spread_over(order: Sequence[int], most: int) -> list[int]:
    """Choose at most ``most`` entries of a sequence for a chart, in their original order.

    A quarter of the chosen entries are the first entries. The others are spread evenly over the
    rest of the sequence.
    """
    if len(order) <= most:
        return list(order)
    first = most // 4
    rest = np.linspace(first, len(order) - 1, most - first).round().astype(int)
    return [*order[:first], *(order[place] for place in rest)]


def shifted(places: FloatArray, width: float) -> FloatArray:
    """Shift the coordinates of points by up to half of ``width``, so that equal points do not
    overlap.

    Each call returns the same shifts.
    """
    return places + width * ((np.arange(len(places)) * GOLDEN) % 1.0 - 0.5)


def element(name: str, *children: str, **attributes: str | float | None) -> Markup:
    """Return an SVG element with its children. Text and attributes are escaped.

    In attribute names, ``class_`` means class, and ``_`` means a hyphen.
    """
    pairs = Markup("")
    for key, value in attributes.items():
        if value is not None:
            text = f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
            pairs += Markup(' {}="{}"').format(Markup(key.rstrip("_").replace("_", "-")), text)
    inside = Markup("").join(map(escape, children))
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), pairs, inside)


def path(class_: str | None, d: str, **attributes: str | float | None) -> Markup:
    """Return an SVG path element with the path data ``d`` and a CSS class."""
    return element("path", class_=class_, d=d, **attributes)


def text(
    class_: str, x: float, y: float, *children: str, **attributes: str | float | None
) -> Markup:
    """Return an SVG text element at the position (x, y)."""
    return element("text", *children, class_=class_, x=x, y=y, **attributes)


def line_path(x: ArrayLike, y: ArrayLike) -> str:
    """Return SVG path data for a line through points. The line breaks at NaN."""
    points = np.column_stack([x, y]).astype(float)
    parts = []
    pen = "M"
    for px, py in points.tolist():
        if math.isnan(px) or math.isnan(py):
            pen = "M"
        else:
            parts.append(f"{pen}{px:.1f} {py:.1f}")
            pen = "L"
    return "".join(parts)


def dots_path(x: FloatArray, y: FloatArray) -> str:
    """Return SVG path data with a dot at each finite point, as a line of length 0 with round
    ends."""
    points = np.column_stack([x, y])
    finite = points[np.isfinite(points).all(1)]
    return "".join(f"M{px:.1f} {py:.1f}h0" for px, py in finite.tolist())


def band_path(x: FloatArray, low: FloatArray, high: FloatArray) -> str:
    """Return SVG path data for the area between two lines, such as an error band."""
    known = np.isfinite(low) & np.isfinite(high)
    if known.sum() < 2:
        return ""
    x = x[known]
    low = low[known]
    high = high[known]
    return f"{line_path(np.append(x, x[::-1]), np.append(high, low[::-1]))}Z"


@dataclass(frozen=True)
class Chart:
    """An SVG chart, with notes for the reader on the data that the chart leaves out."""

    svg: Markup
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Frame:
    """The size, margins and axis scales of a chart. The methods convert values to SVG
    coordinates."""

    width: float
    height: float
    x: Scale
    y: Scale
    left: float = 62
    right: float = 16
    top: float = 14
    bottom: float = 46
    letters: int = 12  # letters of a tick of the x axis at most

    def chart(self, title: str, *children: str, notes: Sequence[str] = ()) -> Chart:
        """Return a chart of this frame's size from SVG elements."""
        return drawing(self.width, self.height, title, *children, notes=notes)

    def with_room(self) -> "Frame":
        """Return a copy of the frame with margins that are wide enough for the tick labels.

        Long labels of the y axis widen the left margin. Slanted labels of the x axis make the chart
        higher.
        """
        longest = max((len(label) for _, label in self.y.ticks), default=0)
        frame = replace(self, left=max(self.left, 40 + _LETTER * longest))
        if not frame.slants:
            return frame
        reach = 0.0  # how far slanted ticks extend beyond the left edge
        depth = 0.0  # how far they extend below the axis
        for value, label in self.x.ticks:
            length = _LETTER * len(cut(label, self.letters))
            reach = max(reach, _COS * length - float(frame.across(value)))
            depth = max(depth, 40 + _SIN * length)
        added = max(0.0, depth - self.bottom)
        return replace(
            frame,
            left=frame.left + reach,
            bottom=self.bottom + added,
            height=self.height + added,
        )

    @property
    def slants(self) -> bool:
        """True if the tick labels of the x axis must be slanted, because they are too long side by
        side."""
        letters = sum(len(cut(label, self.letters)) for _, label in self.x.ticks)
        return letters * 7 > self.width - self.right - self.left

    def across(self, values: ArrayLike) -> FloatArray:
        """Convert values on the x axis to SVG x coordinates."""
        return self.left + self.x(values) * (self.width - self.left - self.right)

    def down(self, values: ArrayLike) -> FloatArray:
        """Convert values on the y axis to SVG y coordinates, measured from the top."""
        return self.height - self.bottom - self.y(values) * (self.height - self.top - self.bottom)

    def down_within(self, values: ArrayLike) -> FloatArray:
        """Convert values to SVG y coordinates, and move values beyond the y axis to its edge."""
        return np.clip(self.down(values), self.top + 6, self.height - self.bottom - 12)

    def axes(self, across: str, up: str) -> Markup:
        """Return the grid, the ticks and the names of both axes as SVG."""
        right = self.width - self.right
        bottom = self.height - self.bottom
        parts = []
        for value, label in self.y.ticks:
            y = float(self.down(value))
            parts.append(path("grid", f"M{self.left:.1f} {y:.1f}H{right:.1f}"))
            parts.append(text("tick end", self.left - 8, y + 4, label))
        for value, label in self.x.ticks:
            x = float(self.across(value))
            label = cut(label, self.letters)
            parts.append(path("mark", f"M{x:.1f} {bottom:.1f}v5"))
            if self.slants:
                y = bottom + 14
                turn = f"rotate(-{_SLANT} {x:.1f} {y:.1f})"
                parts.append(text("tick end", x + 4, y, label, transform=turn))
            else:
                parts.append(text("tick mid", x, bottom + 19, label))
        middle = (self.top + bottom) / 2
        turn = f"rotate(-90 14 {middle:.1f})"
        parts.append(path("edge", f"M{self.left:.1f} {bottom:.1f}H{right:.1f}"))
        parts.append(text("name mid", (self.left + right) / 2, self.height - 6, across))
        parts.append(text("name mid", 14, middle, up, transform=turn))
        return element("g", *parts)


def drawing(
    width: float,
    height: float,
    title: str,
    *children: str,
    notes: Sequence[str] = (),
    class_: str = "chart",
) -> Chart:
    """Return a chart from SVG elements that scales to the width of the page.

    ``title`` is the text for screen readers.
    """
    box = {"viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria_label": title}
    return Chart(element("svg", *children, class_=class_, **box), tuple(notes))
