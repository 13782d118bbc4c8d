"""The charts of the best trial on its validation rows: the classes that it confuses, the columns that it needs."""

import numpy as np

from gputune.report.parallel import bars
from gputune.report.svg import Chart, cut, drawing, element, text
from gputune.study.curves import FoldReport
from gputune.study.study import Study
from gputune.text import clean
from gputune.views.scores import shown_scores

CLASSES, COLUMNS = 25, 30
"""Classes and columns that are drawn."""

_WIDTH, _LEFT, _TOP, _LARGEST, _SMALLEST = 640.0, 150.0, 92.0, 56.0, 26.0
_COUNTED = 0.65
"""Opacity of a cell that holds all rows of its class: text on it stays legible."""


def confusion_chart(study: Study, report: FoldReport) -> Chart | None:
    """Return a cell for each pair of classes, as strong as the share of the true class in it; None without a matrix."""
    if not report.confusion.size:
        return None
    drawn = np.sort(np.argsort(-report.confusion.sum(1), kind="stable")[:CLASSES])
    matrix, classes = report.confusion[np.ix_(drawn, drawn)], study.record.classes or ()
    labels = [clean(classes[place]) for place in drawn.tolist()]
    side = max(_SMALLEST, min(_LARGEST, (_WIDTH - _LEFT - 60) / len(labels)))
    shares = matrix / np.maximum(report.confusion[drawn].sum(1), 1)[:, None]
    slant = max(len(cut(label, 14)) for label in labels) * 7 > side
    parts = []
    for i, label in enumerate(labels):
        middle, titled = _LEFT + (i + 0.5) * side, (element("title", label), cut(label, 14))
        turn = f"rotate(-40 {middle:.1f} {_TOP - 10:.1f})" if slant else None
        parts += [
            text("tick end", _LEFT - 8, _TOP + (i + 0.5) * side + 4, *titled),
            text("tick" if slant else "tick mid", middle, _TOP - 10, *titled, transform=turn),
        ]
        for j, count in enumerate(matrix[i].tolist()):
            x, y = _LEFT + j * side, _TOP + i * side
            opacity = f"{_COUNTED * shares[i, j]:.3f}"
            box = {"x": x + 1, "y": y + 1, "width": side - 2, "height": side - 2, "rx": 2}
            said = element("title", f"{label} predicted as {labels[j]}: {count}")
            parts.append(element("rect", said, class_="cell", fill_opacity=opacity, **box))
            if count:
                parts.append(text("label mid", x + side / 2, y + side / 2 + 4, str(count)))
    span = side * len(labels)
    up = _TOP + span / 2
    parts += [
        text("name mid", _LEFT + span / 2, 14 if slant else _TOP - 32, "predicted"),
        text("name mid", 20, up, "true", transform=f"rotate(-90 20 {up:.1f})"),
    ]
    left_out = len(classes) - len(labels)
    notes = (f"The {len(labels)} most frequent classes; {left_out} others are left out.",) if left_out else ()
    size = max(_WIDTH, _LEFT + span + 60), _TOP + span + 12
    return Chart(drawing(*size, "Confusion matrix", *parts, class_="chart matrix"), notes)


def columns_chart(study: Study, report: FoldReport) -> Chart | None:
    """Return a bar for each column, as long as the score is worse without it; None without columns."""
    if not report.columns:
        return None
    labels = [clean(name) for name in report.columns[:COLUMNS]]
    measure = shown_scores(study).measure
    name = f"{'rise' if measure.lower_is_better else 'fall'} of {measure.title}"
    drops, errors = report.drops[:COLUMNS], report.errors[:COLUMNS]
    chart = bars(
        labels, drops, errors, "Importance of the columns", name, decimals=max(2, measure.decimals - 1)
    )
    left_out = len(report.columns) - len(labels)
    notes = (
        (f"The {len(labels)} most important columns; {left_out} others are left out.",) if left_out else ()
    )
    return Chart(chart.svg, notes)
