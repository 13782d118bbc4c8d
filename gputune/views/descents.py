"""The paths of a search by hypergradients: the points of each start, in the order of its steps."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gputune.study.study import Study
from gputune.views.parameters import Parameter, parameters
from gputune.views.scores import ranked_rows, shown_scores


@dataclass(frozen=True, eq=False)
class DescentPath:
    """The finished points of one start.

    steps    (n,) outer steps, 0 for the start
    scores   (n,) in the sign of their name
    values   name of a hyperparameter -> (n,) its values
    usable   (n,) false where the guard took the slope for noise
    """

    start: int
    steps: NDArray[np.int64]
    scores: NDArray[np.float64]
    values: dict[str, NDArray[np.float64]]
    usable: NDArray[np.bool_]


def descended(study: Study) -> tuple[Parameter, ...]:
    """Return the hyperparameters that a search by hypergradients descended on; () for another search."""
    numbers = {parameter.name: parameter for parameter in parameters(study) if not parameter.levels}
    return tuple(numbers[name] for name in study.record.descended if name in numbers)


def descent_paths(study: Study) -> tuple[DescentPath, ...]:
    """Return the paths with their best score first; () for another search."""
    columns, shown = descended(study), shown_scores(study)
    points: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for row in ranked_rows(study) if columns else ():
        trial = study.trials[row]
        if isinstance(trial.origin, tuple) and trial.state != "waiting":
            points[trial.origin[0]].append((trial.origin[1], row))
    return tuple(
        DescentPath(
            start,
            steps=np.array([step for step, _ in sorted(of_start)]),
            scores=shown.values[rows := [row for _, row in sorted(of_start)]],
            values={column.name: column.values[rows] for column in columns},
            usable=np.array([bool(study.trials[row].detail.get("usable", True)) for row in rows]),
        )
        for start, of_start in points.items()
    )
