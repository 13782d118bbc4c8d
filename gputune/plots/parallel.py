"""Parallel coordinates: one line a trial through an axis for each hyperparameter, the colour its score."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gputune.analysis.parameters import Parameter, varied_parameters
from gputune.analysis.scores import shown_scores
from gputune.plots.canvas import axes, plain, seen
from gputune.study.study import Study


def plot_parallel(study: Study, ax: Any = None) -> Any:
    """Draw the trials that have a score and return the Axes; the last axis is the score.

    Each axis runs from 0 to 1 over the range of its hyperparameter (its logarithm where that is its scale) or through
    its words; a line breaks where a trial lacks one. The better lines lie on top.
    """
    ax = axes("plot_parallel", ax, (9.0, 4.5))
    shown, columns = shown_scores(study), varied_parameters(study)
    heights = [*map(axis_heights, columns), _unit(shown.values)]
    table = np.stack(heights, axis=1)
    rows = np.flatnonzero(seen(shown.values))
    sign = -1.0 if shown.measure.lower_is_better else 1.0
    low, high = shown.range
    colours = _colours(low, high, reverse=sign < 0)
    for row in sorted(rows, key=lambda row: sign * shown.values[row]):
        ax.plot(range(table.shape[1]), table[row], color=colours.to_rgba(shown.values[row]), linewidth=0.8)
    names = [*(column.label for column in columns), shown.measure.name]
    ax.set_xticks(range(table.shape[1]), list(map(plain, names)))
    ax.set_ylabel("low to high")
    ax.figure.colorbar(colours, ax=ax, label=plain(shown.measure.title))
    return ax


def axis_heights(parameter: Parameter) -> NDArray[np.float64]:
    """Return (C,) heights in [0, 1]; NaN for a trial without the hyperparameter."""
    if parameter.levels:
        return parameter.values / max(1, len(parameter.levels) - 1)
    return _unit(np.log(parameter.values) if parameter.log else parameter.values)


def _unit(values: NDArray[np.float64]) -> NDArray[np.float64]:
    there = seen(values)
    if not there.any():
        return values
    low, high = values[there].min(), values[there].max()
    return (values - low) / (high - low) if high > low else np.where(there, 0.5, np.nan)


def _colours(low: float, high: float, *, reverse: bool) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(low, high), "viridis_r" if reverse else "viridis")
