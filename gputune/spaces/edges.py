"""Hyperparameters with the best value at an end of their searched range."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import compress
from typing import Literal, TypeGuard

import numpy as np

from gputune.ground.text import short
from gputune.spaces.config import RANGES
from gputune.spaces.distributions import is_real
from gputune.study.study import Study

_TRIED = 3  # with fewer values of a hyperparameter, the best value means little
_NEAR = 0.05  # this share of a range, on its own scale, counts as its end


@dataclass(frozen=True)
class Edge:
    """A hyperparameter with its best value at an end of its searched range.

    ``end`` is "lower" or "upper". The range goes from ``low`` to ``high``.
    """

    name: str
    value: float
    end: Literal["lower", "upper"]
    low: float
    high: float

    def __str__(self) -> str:
        missing = "smaller" if self.end == "lower" else "larger"
        return (
            f"The best {self.name}, {short(self.value)}, lies at the {self.end} end of the space, "
            f"{short(self.low)} to {short(self.high)}: no {missing} one was tried."
        )


def edge_remarks(study: Study) -> tuple[str, ...]:
    """Return one sentence for each hyperparameter with the best value at an end of its searched
    range."""
    return tuple(map(str, edges(study)))


def edges(study: Study) -> tuple[Edge, ...]:
    """Return the hyperparameters with the best value at an end of their searched range.

    Some hyperparameters are left out: categorical values, values without a distribution of one
    range, and hyperparameters that a hypergradient search moves. A hyperparameter is also left out
    in three cases: the end is a value that no trial may exceed, such as dropout=0; an included
    trial went further; or another trial elsewhere has the same score.
    """
    finite = np.flatnonzero(np.isfinite(study.scores)).tolist()
    if not finite:
        return ()
    best = study.order[0]
    scored = [study.rows[row][0].params for row in finite]
    equal = list(compress(scored, study.scores[finite] == study.scores[best]))
    touched = list[Edge]()
    for key, distribution in study.record.distributions.items():
        value = study.rows[best][0].params.get(key)
        ends = _ends(distribution)
        if ends is None or not _is_number(value) or key in study.record.changed_hyperparameters:
            continue
        values = [params.get(key) for params in scored]
        # For 100,000 plain numbers, set() first is faster: they have few different values.
        if {int, float}.issuperset(map(type, values)):
            values = list(set(values))
        tried = set(filter(_is_number, values))
        if len(tried) < _TRIED:
            continue
        low, high = ends
        best_values = filter(_is_number, [params.get(key) for params in equal])
        positions = [_position(value, low, high, distribution) for value in best_values]
        # No remark at a bound of the key itself: larger or smaller values are not allowed.
        is_lowest = low == 0
        is_highest = False
        if key in RANGES:
            is_lowest = low <= RANGES[key].low
            is_highest = high >= RANGES[key].high
        if max(positions) <= _NEAR and low <= min(tried) and not is_lowest:
            touched.append(Edge(key, value, "lower", low, high))
        if min(positions) >= 1 - _NEAR and max(tried) <= high and not is_highest:
            touched.append(Edge(key, value, "upper", low, high))
    return tuple(touched)


def _ends(distribution: Mapping[str, object]) -> tuple[float, float] | None:
    """Return the smallest and the largest value of a hyperparameter's distribution.

    Returns None for categorical values, and for a list of fewer than three distinct numbers.
    """
    if distribution["kind"] != "choices":
        low = distribution.get("low")
        high = distribution.get("high")
        return (low, high) if _is_number(low) and _is_number(high) else None
    choices = distribution.get("choices")
    if not isinstance(choices, list | tuple) or not all(map(_is_number, choices)):
        return None
    return (min(choices), max(choices)) if len({*choices}) >= _TRIED else None


def _position(value: float, low: float, high: float, distribution: Mapping[str, object]) -> float:
    """Return the relative position of a value in its range, from 0 (low end) to 1 (high end).

    In a list of choices, the smallest value has the position 0, the largest has 1, and all others
    have 0.5.
    """
    if distribution["kind"] == "choices":
        return {low: 0.0, high: 1.0}.get(value, 0.5)
    if distribution.get("log") and low > 0 and value > 0:
        value = math.log(value)
        low = math.log(low)
        high = math.log(high)
    return (value - low) / (high - low) if high > low else 0.5


def _is_number(value: object) -> TypeGuard[float]:
    # An integer may be too large to become a float, but it can be compared with a float.
    return is_real(value) and abs(value) < 1e300
