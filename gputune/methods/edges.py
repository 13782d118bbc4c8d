"""Best values that lie at the edge of what was searched: what lies beyond was not tried."""

import math
from collections.abc import Mapping
from typing import TypeGuard

from gputune.methods.config import RANGES
from gputune.study.study import Study
from gputune.text import short

_TRIED = 3
"""Values of a hyperparameter from which on the best one says something."""

_NEAR = 0.05
"""Share of a range, on its own scale, that counts as its end."""


def edge_remarks(study: Study) -> tuple[str, ...]:
    """Return a sentence for each hyperparameter whose best value is the first or last one in the space.

    Nothing is said of words, of values that no law of one range was drawn from, of what a descent moves, and of the end
    that no value may lie beyond, as dropout=0; nor where an included trial went further, or another scored the same.
    """
    scored = [trial for trial in study.trials if math.isfinite(trial.score)]
    best, sentences = next(iter(study.ranking()), None), []
    if best is None or not math.isfinite(best.score):
        return ()
    for key, law in study.record.distributions.items():
        value, ends = best.params.get(key), _ends(law)
        if ends is None or not _is_number(value) or key in study.record.descended:
            continue
        tried = {one for trial in scored if _is_number(one := trial.params.get(key))}
        if len(tried) < _TRIED:
            continue
        low, high = ends
        equal = [trial.params.get(key) for trial in scored if trial.score == best.score]
        places = [_place(one, low, high, law) for one in equal if _is_number(one)]
        if max(places) <= _NEAR and low <= min(tried) and not _is_last(key, low, "low"):
            sentences.append(_sentence(key, value, "lower", "smaller", ends))
        if min(places) >= 1 - _NEAR and max(tried) <= high and not _is_last(key, high, "high"):
            sentences.append(_sentence(key, value, "upper", "larger", ends))
    return tuple(sentences)


def _sentence(key: str, value: object, end: str, beyond: str, ends: tuple[float, float]) -> str:
    low, high = map(short, ends)
    where = f"at the {end} end of the space, {low} to {high}"
    return f"The best {key}, {short(value)}, lies {where}: no {beyond} one was tried."


def _ends(law: Mapping[str, object]) -> tuple[float, float] | None:
    """Return the smallest and the largest value; None of words, and of less than three numbers."""
    if law["kind"] != "choices":
        low, high = law.get("low"), law.get("high")
        return (low, high) if _is_number(low) and _is_number(high) else None
    choices = law.get("choices")
    if not isinstance(choices, list | tuple) or not all(map(_is_number, choices)) or len({*choices}) < _TRIED:
        return None
    return min(choices), max(choices)


def _place(value: float, low: float, high: float, law: Mapping[str, object]) -> float:
    """Return where a value lies from 0, the low end, to 1; of choices the ends alone are 0 and 1."""
    if law["kind"] == "choices":
        return 0.0 if value == low else 1.0 if value == high else 0.5
    if law.get("log") and low > 0 and value > 0:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low) if high > low else 0.5


def _is_last(key: str, end: float, side: str) -> bool:
    """Whether no value of the key may lie beyond an end."""
    rule = RANGES.get(key)
    if rule is None:
        return side == "low" and end == 0
    return end <= rule.low if side == "low" else end >= rule.high


def _is_number(value: object) -> TypeGuard[float]:
    # An integer may be too large for a float, but not to be compared with one.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
