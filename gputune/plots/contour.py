"""The score over two hyperparameters as filled contours through the trials."""

from typing import Any

import numpy as np

from gputune.analysis.importance import importance
from gputune.analysis.scores import score_range, shown_scores
from gputune.errors import InputError
from gputune.plots.canvas import axes, plain, seen, set_scale
from gputune.plots.slices import chosen
from gputune.study.study import Study

_LEVELS = 12


def plot_contour(study: Study, x: str | None = None, y: str | None = None, ax: Any = None) -> Any:
    """Draw it and return the Axes; without ``x`` and ``y`` the two most important hyperparameters are taken.

    Between trials the score is interpolated linearly, on the logarithm where that is the scale; trials at one place are
    averaged. Raises InputError for an unknown hyperparameter, one name without the other, and where the trials
    lie on a line.
    """
    if (x is None) != (y is None) or (x is not None and x == y):
        raise InputError(f"plot_contour needs two different hyperparameters or none, got x={x!r}, y={y!r}.")
    if x is None or y is None:
        found = importance(study).names
        if len(found) < 2:
            raise InputError(f"plot_contour needs two hyperparameters that vary, got {len(found)}.")
        x, y = found[:2]
    across, up = chosen(study, x, "plot_contour"), chosen(study, y, "plot_contour")
    shown = shown_scores(study)
    there = seen(across.values) & seen(up.values) & seen(shown.values)
    at = np.stack([across.values[there], up.values[there]], axis=1)
    places, which = np.unique(at, axis=0, return_inverse=True)
    which = which.ravel()
    means = np.bincount(which, shown.values[there]) / np.bincount(which) if len(places) else np.empty(0)
    flat = np.stack(
        [np.log(part) if one.log else part for one, part in ((across, places[:, 0]), (up, places[:, 1]))], 1
    )
    if len(places) < 3 or np.linalg.matrix_rank(flat - flat[0], tol=1e-9) < 2:
        raise InputError(
            f"plot_contour needs scored trials at three places that are not on one line, got {len(places)} places in "
            f"{x!r} and {y!r}; choose others, or search further."
        )
    ax = axes("plot_contour", ax, (6.0, 4.5))
    _fill(ax, places, flat, means, shown)
    set_scale(ax, "x", across)
    set_scale(ax, "y", up)
    return ax


def _fill(ax: Any, places: Any, flat: Any, means: Any, shown: Any) -> None:
    """Fill the triangles of the transformed places, drawn where the places are."""
    from matplotlib.tri import Triangulation

    triangles = Triangulation(flat[:, 0], flat[:, 1]).triangles
    low, high = score_range(means, shown.measure)
    levels = np.linspace(low, high if high > low else low + 1e-12, _LEVELS)
    colours = "viridis_r" if shown.measure.lower_is_better else "viridis"
    filled = ax.tricontourf(
        places[:, 0], places[:, 1], triangles, means, levels=levels, cmap=colours, extend="both"
    )
    ax.scatter(places[:, 0], places[:, 1], s=10, color="white", edgecolor="black", linewidth=0.5)
    ax.figure.colorbar(filled, ax=ax, label=plain(shown.measure.title))
