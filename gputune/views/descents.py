"""The paths of a search by hypergradients: the points of each start, in the order of its steps."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gputune.study.study import Study
from gputune.views.parameters import Parameter, parameters
from gputune.views.scores import shown_scores


@dataclass(frozen=True, eq=False)
class Descent:
    """One start. ``rows`` are the places of its finished points in ``study.trials``.

    steps    (n,) outer steps, 0 for the start
    scores   (n,) in the sign of their name
    values   name of a hyperparameter -> (n,) its values
    usable   (n,) false where the guard took the slope for noise
    """

    start: int
    rows: tuple[int, ...]
    steps: NDArray[np.int64]
    scores: NDArray[np.float64]
    values: dict[str, NDArray[np.float64]]
    usable: NDArray[np.bool_]


def descended(study: Study) -> tuple[Parameter, ...]:
    """Return the hyperparameters that a search by hypergradients descended on; () for another search."""
    found = {parameter.name: parameter for parameter in parameters(study) if not parameter.levels}
    return tuple(found[name] for name in study.record.descended if name in found)


def descents(study: Study) -> tuple[Descent, ...]:
    """Return the paths with their best score first; () for another search."""
    moved = descended(study)
    if not moved:
        return ()
    shown = shown_scores(study)
    points: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for row, trial in enumerate(study.trials):
        if isinstance(trial.origin, tuple) and trial.state != "waiting":
            points[trial.origin[0]].append((trial.origin[1], row))
    paths = []
    for start, places in points.items():
        steps, rows = (list(part) for part in zip(*sorted(places)))
        paths.append(
            Descent(
                start=start,
                rows=tuple(rows),
                steps=np.array(steps),
                scores=shown.values[rows],
                values={parameter.name: parameter.values[rows] for parameter in moved},
                usable=np.array([bool(study.trials[row].detail.get("usable", True)) for row in rows]),
            )
        )
    best = {path.start: max(_goodness(study, path.rows)) for path in paths}
    return tuple(sorted(paths, key=lambda path: (-best[path.start], path.start)))


def _goodness(study: Study, rows: tuple[int, ...]) -> list[float]:
    scores = [study.trials[row].score for row in rows]
    return [score if np.isfinite(score) else -np.inf for score in scores]
