"""The hyperparameters of a study as columns of numbers: which of them varied, numbers or words, on which scale."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gputune.study.study import Study
from gputune.text import clean, short
from gputune.views.scores import ranked_rows, shown_scores

_DECADES = 100.0
"""Positive values whose largest is so many times the smallest are read on a logarithm."""

_FARTHEST = 1e300
"""An axis reaches no farther, so that its ends and their distance are numbers."""

_LEVELS = 12
"""The words of a hyperparameter that are told apart; rarer ones share one level."""


@dataclass(frozen=True, eq=False)
class Parameter:
    """One hyperparameter of all trials.

    label    its name, and what was made of lists of values
    values   (C,) numbers, or positions in ``levels``; NaN for a trial without it
    levels   the words, () for numbers
    log      whether its numbers are read on a logarithm
    hidden   trials whose value is a number that no axis has (infinity)
    """

    name: str
    label: str
    values: NDArray[np.float64]
    levels: tuple[str, ...] = ()
    log: bool = False
    hidden: int = 0

    @property
    def varied(self) -> bool:
        """Whether two trials differ in it."""
        return len(np.unique(self.values[np.isfinite(self.values)])) > 1


def parameters(study: Study) -> tuple[Parameter, ...]:
    """Return the hyperparameters in the order in which the trials name them."""
    names = dict.fromkeys(name for trial in study.trials for name in trial.params)
    return tuple(_parameter(name, study) for name in names)


def varied_parameters(study: Study) -> tuple[Parameter, ...]:
    """Return those in which the trials differ."""
    return tuple(parameter for parameter in parameters(study) if parameter.varied)


def _parameter(name: str, study: Study) -> Parameter:
    values = [trial.params.get(name) for trial in study.trials]
    present = [value for value in values if value is not None]
    if not present or not all(map(_is_numbers, present)):
        return _words(name, [short(t.params[name]) if name in t.params else None for t in study.trials])
    lists = any(isinstance(value, list) for value in present)
    label = f"{clean(name)} (median of its values)" if lists else clean(name)
    numbers = np.array([np.nan if value is None else median(_flat(value)) for value in values])
    infinite = np.abs(numbers) > _FARTHEST
    numbers[infinite] = np.nan
    log = is_log(name, numbers, study.record.space)
    return Parameter(name, label, numbers, log=log, hidden=int(infinite.sum()))


def is_log(name: str, values: NDArray[np.float64], space: str) -> bool:
    """Whether numbers are read on a logarithm: the space draws them so, or they span decades, or are powers."""
    levels = np.unique(values[np.isfinite(values)])
    if levels.size < 2 or levels[0] <= 0:
        return False
    law = re.search(rf"(?:^|[, |]){re.escape(name)}=(\w+)\(", space)
    if law is not None:
        return law[1] in ("loguniform", "reciprocal", "log_int")
    ratios = levels[1:] / levels[:-1]
    powers = 3 <= levels.size <= _LEVELS and np.allclose(ratios, ratios[0], rtol=1e-6)
    return bool(levels[-1] >= _DECADES * levels[0] or powers)


def _words(name: str, texts: Sequence[str | None]) -> Parameter:
    counts = Counter(text for text in texts if text is not None)
    levels = sorted(counts, key=lambda text: (-counts[text], text))
    if len(levels) > _LEVELS:
        levels = [*levels[: _LEVELS - 1], f"{len(levels) - _LEVELS + 1} others"]
    place = {text: position for position, text in enumerate(levels)}
    values = [np.nan if text is None else place.get(text, len(levels) - 1) for text in texts]
    return Parameter(name, clean(name), np.array(values, dtype=float), levels=tuple(levels))


def _is_number(value: object) -> bool:
    """A number that has a place among others; of whole numbers some have more digits than a float."""
    return isinstance(value, float) or (
        isinstance(value, int) and not isinstance(value, bool) and abs(value) < _FARTHEST
    )


def _is_numbers(value: object) -> bool:
    """A number, or a list over segments (and layers) of a training."""
    return all(map(_is_numbers, value)) and bool(value) if isinstance(value, list) else _is_number(value)


def _flat(value: Any) -> list[float]:
    return [number for part in value for number in _flat(part)] if isinstance(value, list) else [float(value)]


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
