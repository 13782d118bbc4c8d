"""The curves of a comparison as one SVG: validation loss by epoch, and below it the learning rate by step."""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT, LEFT, TOP, GAP = 400, 220, 70, 76, 60  # pixels: of a panel, and of what lies around it
STYLES = [  # colour and dashes, method by method: the dashed one of a colour is the plain one
    ("#1f77b4", "5 4"), ("#1f77b4", ""), ("#d95f02", "5 4"), ("#d95f02", ""), ("#1b9e77", "5 4"), ("#1b9e77", ""),
    ("#555555", "1 3"),
]  # fmt: skip

Curves = dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]
"""Model -> method -> (validation loss of each epoch, learning rate of each step)."""


class Axis(NamedTuple):
    """A vertical axis: the map of a value to a height, and the values that get a line."""

    scale: Callable[[float], float]
    ticks: Sequence[float]


def figure(curves: Curves, unit: float) -> str:
    """Return the SVG. Losses are on a log scale; rates are linear within ±unit and logarithmic beyond.

    The rates' scale is asinh, since hypergradient descent can make a rate negative.
    """
    loss = Axis(math.log10, [m * 10.0**e for e in range(-6, 7) for m in (1, 2, 5)])
    powers = [unit * 10**k for k in range(7)]
    rate = Axis(lambda lr: math.asinh(lr / unit), [-p for p in powers[::-1]] + [0, *powers])
    width, height = LEFT + len(curves) * (WIDTH + GAP), TOP + 2 * (HEIGHT + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *_legend(list(next(iter(curves.values())))),
    ]
    for column, (model, methods) in enumerate(curves.items()):
        x = LEFT + column * (WIDTH + GAP)
        losses, rates = zip(*methods.values())
        parts += _panel(x, TOP, loss, f"{model}: validation loss", "epoch", losses)
        parts += _panel(x, TOP + HEIGHT + GAP, rate, f"{model}: learning rate", "step", rates)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(x: int, y: int, axis: Axis, title: str, below: str, series: Sequence[np.ndarray]) -> list[str]:
    finite = [axis.scale(v) for values in series for v in values if math.isfinite(v)] or [0.0]
    margin = 0.04 * (max(finite) - min(finite)) or 1.0
    low, high = min(finite) - margin, max(finite) + margin
    count = max(map(len, series))

    def across(index: int) -> float:
        return x + WIDTH * index / max(count - 1, 1)

    def up(value: float) -> float:
        return y + HEIGHT * (high - axis.scale(value)) / (high - low)

    parts = [f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>']
    for tick in (t for t in axis.ticks if low <= axis.scale(t) <= high):
        parts.append(f'<path d="M{x} {up(tick):.1f}h{WIDTH}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{x - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for index in sorted({0, count // 2, count - 1}):
        parts.append(
            f'<text x="{across(index):.1f}" y="{y + HEIGHT + 16}" text-anchor="middle">{index + 1}</text>'
        )
    parts.append(f'<text x="{x + WIDTH / 2}" y="{y + HEIGHT + 32}" text-anchor="middle">{below}</text>')
    parts.append(f'<text x="{x}" y="{y - 9}" font-weight="bold">{escape(title)}</text>')
    for values, (colour, dashes) in zip(series, STYLES, strict=True):
        every = max(1, len(values) // WIDTH)  # about as many points as pixels
        points = [(across(i), up(v)) for i, v in enumerate(values) if i % every == 0 and math.isfinite(v)]
        parts += _curve(points, colour, dashes)
    return parts


def _curve(points: Sequence[tuple[float, float]], colour: str, dashes: str) -> list[str]:
    if len(points) == 1:  # of a single epoch
        ((x, y),) = points
        return [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>']
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return [
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.8" stroke-dasharray="{dashes}"/>'
    ]


def _legend(names: Sequence[str]) -> list[str]:
    parts = []
    for k, (name, (colour, dashes)) in enumerate(zip(names, STYLES, strict=True)):
        x, y = LEFT + 110 * (k // 2), 18 + 20 * (k % 2)
        parts.append(
            f'<path d="M{x} {y}h28" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"/>'
        )
        parts.append(f'<text x="{x + 34}" y="{y + 4}">{escape(name)}</text>')
    return parts
