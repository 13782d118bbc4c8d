"""SVG as escaped markup: elements, lines, dots, and the frame of a chart with its axes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import ArrayLike, NDArray

from gputune.report.scale import Scale, cut


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
