"""Remarks on the ends of a space: whether the best value of a hyperparameter lies at one of
them."""

import math
from collections.abc import Mapping
from typing import TypeGuard

import numpy as np

from gputune.methods.config import RANGES
from gputune.study.study import Study
from gputune.text import short

_TRIED = 3  # values of a hyperparameter from which on the best one says something
_NEAR = 0.05  # share of a range, on its own scale, that counts as its end


def edge_remarks(study: Study) -> tuple[str, ...]:
    """Return a sentence for each hyperparameter whose best value is the first or last one in the
    space.

    Nothing is said of words, of values that no law of one range was drawn from, of what a descent
    moves, and of the end that no value may lie beyond, as dropout=0; nor where an included trial
    went further, or another scored the same.
    """
    finite = np.flatnonzero(np.isfinite(study.scores)).tolist()
    if not finite:
        return ()
    sentences = []
    best = study.order[0]
    scored = [study.rows[row][0].params for row in finite]
    equal = [
        study.rows[row][0].params
        for row in np.flatnonzero(study.scores == study.scores[best]).tolist()
    ]
    for key, law in study.record.distributions.items():
        value = study.rows[best][0].params.get(key)
        ends = _ends(law)
        if ends is None or not _is_number(value) or key in study.record.descended:
            continue
        values = [params.get(key) for params in scored]
        # as those of 100,000 trials are, and have few values
        plain = {int, float}.issuperset(map(type, values))
        tried = set(filter(_is_number, set(values) if plain else values))
        if len(tried) < _TRIED:
            continue
        (low, high), rule = ends, RANGES.get(key)
        places = [
            _place(params[key], low, high, law) for params in equal if _is_number(params.get(key))
        ]
        # Beyond a bound of the key no value may lie.
        bounded = (low <= rule.low, high >= rule.high) if rule else (low == 0, False)
        lower = max(places) <= _NEAR and low <= min(tried) and not bounded[0]
        upper = min(places) >= 1 - _NEAR and max(tried) <= high and not bounded[1]
        for at_end, end, beyond in ((lower, "lower", "smaller"), (upper, "upper", "larger")):
            if at_end:
                where = f"at the {end} end of the space, {short(low)} to {short(high)}"
                sentences.append(
                    f"The best {key}, {short(value)}, lies {where}: no {beyond} one was tried."
                )
    return tuple(sentences)


def _ends(law: Mapping[str, object]) -> tuple[float, float] | None:
    """Return the smallest and the largest value; None of words, and of less than three numbers."""
    if law["kind"] != "choices":
        low = law.get("low")
        high = law.get("high")
        return (low, high) if _is_number(low) and _is_number(high) else None
    choices = law.get("choices")
    if (
        not isinstance(choices, list | tuple)
        or not all(map(_is_number, choices))
        or len({*choices}) < _TRIED
    ):
        return None
    return min(choices), max(choices)


def _place(value: float, low: float, high: float, law: Mapping[str, object]) -> float:
    """Return where a value lies from 0, the low end, to 1; of choices the ends alone are 0 and
    1."""
    if law["kind"] == "choices":
        return 0.0 if value == low else 1.0 if value == high else 0.5
    if law.get("log") and low > 0 and value > 0:
        value = math.log(value)
        low = math.log(low)
        high = math.log(high)
    return (value - low) / (high - low) if high > low else 0.5


def _is_number(value: object) -> TypeGuard[float]:
    # An integer may be too large for a float, but not to be compared with one.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
