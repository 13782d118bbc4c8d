"""What all plots share: matplotlib where it is installed, axes to draw on, names as plain text, scales."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gputune.analysis.parameters import Parameter
from gputune.extras import import_extra
from gputune.report.text import clean

BEST, OTHERS = "C0", "0.7"
"""Colours of what is looked at, and of all else."""


def pyplot(plot: str) -> Any:
    """Return matplotlib.pyplot; MissingExtraError, naming the plot and the extra, where it is not installed."""
    return import_extra("matplotlib.pyplot", extra="report", used_by=f"study.{plot}()")


def axes(plot: str, ax: Any, size: tuple[float, float] = (7.0, 4.0)) -> Any:
    """Return the Axes that were given, or new ones in a figure of so many inches."""
    module = pyplot(plot)
    return ax if ax is not None else module.subplots(figsize=size, layout="constrained")[1]


def plain(text: object) -> str:
    """Return text that matplotlib shows as it is: a dollar sign begins no formula."""
    return clean(text).replace("$", r"\$")


def set_scale(ax: Any, axis: str, parameter: Parameter) -> None:
    """Name an axis after a hyperparameter and give it its scale: numbers, a logarithm, or words."""
    getattr(ax, f"set_{axis}label")(plain(parameter.label))
    if parameter.levels:
        getattr(ax, f"set_{axis}ticks")(range(len(parameter.levels)), list(map(plain, parameter.levels)))
    elif parameter.log:
        getattr(ax, f"set_{axis}scale")("log")


def seen(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return where there is a number."""
    found: NDArray[np.bool_] = np.isfinite(values)
    return found
