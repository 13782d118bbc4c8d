"""The chart of the hyperparameters' importance: bars with their error."""

from gputune.analysis.importance import Importance
from gputune.report.scale import cut, linear_scale
from gputune.report.svg import Chart, drawing, element

_WIDTH, _ROW, _LEFT, _RIGHT = 700.0, 30.0, 190.0, 110.0

WEAK = 0.2
"""R2 below which a forest has not understood the trials."""


def importance_chart(found: Importance) -> Chart:
    """Return one bar a hyperparameter, as long as the forest's R2 falls without it."""
    top = float(max((found.drops + found.errors).max(), 0.01))
    scale = linear_scale(0.0, top, most=5)
    height = _ROW * len(found.names) + 40
    span, bottom = _WIDTH - _LEFT - _RIGHT, height - 34
    parts = []
    for value, text in scale.ticks:
        x = _LEFT + float(scale(value)) * span
        parts += [
            element("path", class_="grid", d=f"M{x:.1f} 4V{bottom:.1f}"),
            element("text", text, class_="tick mid", x=x, y=bottom + 15),
        ]
    for row, (label, drop, error) in enumerate(
        zip(found.labels, found.drops.tolist(), found.errors.tolist())
    ):
        y = 4 + _ROW * row
        length = max(0.0, float(scale(drop)) * span)
        low, high = (_LEFT + float(scale(max(0.0, end))) * span for end in (drop - error, drop + error))
        parts += [
            element(
                "text",
                element("title", label),
                cut(label, 26),
                class_="tick end label",
                x=_LEFT - 10,
                y=y + 19,
            ),
            element("rect", class_="bar", x=_LEFT, y=y + 5, width=length, height=_ROW - 12, rx=2),
            element("path", class_="whisker", d=f"M{low:.1f} {y + 14:.1f}H{high:.1f}"),
            element(
                "text", f"{round(drop, 2) + 0.0:.2f} ± {error:.2f}", class_="tick end", x=_WIDTH - 4, y=y + 19
            ),
        ]
    parts.append(
        element("text", "fall of the forest's R²", class_="name mid", x=_LEFT + span / 2, y=height - 3)
    )
    return Chart(drawing(_WIDTH, height, "Importance of the hyperparameters", *parts, class_="chart bars"))
