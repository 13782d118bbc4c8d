"""The command line's KEY=SPEC: one key of a space written as text."""

import math
import re
from collections.abc import Iterable
from typing import Any

from scipy import stats

from gputune.errors import InputError
from gputune.search.config import RANGES, WORDS
from gputune.search.distributions import log_int

_EXAMPLES = (
    "Examples: width=32,64,128 (a list), width=16..256 (all integers between), width=16..256:log, "
    "lr=1e-4..1e-1:log, dropout=0..0.5, activation=relu,tanh."
)


def parse_specs(texts: Iterable[str]) -> dict[str, Any]:
    """Return the space of several ``KEY=SPEC``, for ``check_space``; a key given twice is an InputError."""
    space: dict[str, Any] = {}
    for text in texts:
        key, value = parse_spec(text)
        if key in space:
            raise InputError(f"--space must name a key once, got {key!r} twice. Join them: {key}=A,B.")
        space[key] = value
    return space


def parse_spec(text: str) -> tuple[str, Any]:
    """Return the key and the value of one ``KEY=SPEC``, as ``check_space`` takes it.

    ``a,b,c`` is a list, ``a..b`` uniform between (all integers, both ends included, for an integer key),
    ``a..b:log`` log-uniform, anything else one fixed value. A ``module__*`` value is read as a number, as
    true or false, else as a word; its range is of integers when both ends are written so. Raises InputError.
    """
    key, equals, spec = (part.strip() for part in text.partition("="))
    if not equals or not key or not spec:
        raise InputError(f"A space is written KEY=SPEC, got {text!r}. {_EXAMPLES}")
    ends = re.fullmatch(r"([^,]*?)\.\.([^:,]*)(:.*)?", spec)
    if ends and (key in RANGES or None not in (_number(ends[1]), _number(ends[2]))):
        return key, _parse_range(key, ends[1], ends[2], (ends[3] or "").strip(), text)
    values = [_parse_value(key, part.strip(), text) for part in spec.split(",")]
    return key, values if len(values) > 1 else values[0]


def _parse_range(key: str, low_text: str, high_text: str, scale: str, text: str) -> Any:
    low, high = _number(low_text), _number(high_text)
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(f"A range is LOW..HIGH with two finite numbers, got {text!r}. {_EXAMPLES}")
    if scale not in ("", ":log"):
        raise InputError(f"A range may end in ':log', not in {scale!r}, got {text!r}. {_EXAMPLES}")
    if low >= high:
        raise InputError(
            f"A range needs LOW < HIGH, got {text!r}. "
            f"Swap the ends, or write {key}={low_text.strip()} for one value."
        )
    if scale and low <= 0:
        example = f"{high / 1000:g}..{high:g}" if high > 0 else "1e-4..1e-1"
        raise InputError(f"A log range needs LOW > 0, got {text!r}. For example {key}={example}:log.")
    written_as_integers = isinstance(low, int) and isinstance(high, int)
    if RANGES[key].integer if key in RANGES else written_as_integers:
        if low != int(low) or high != int(high):
            raise InputError(f"A range of {key} needs integer ends, got {text!r}. {_EXAMPLES}")
        low, high = int(low), int(high)
        return log_int(low, high) if scale else stats.randint(low, high + 1)
    return stats.loguniform(low, high) if scale else stats.uniform(low, high - low)


def _parse_value(key: str, text: str, spec: str) -> Any:
    if not text:
        raise InputError(f"A list needs a value at each place, got {spec!r}. {_EXAMPLES}")
    if key in WORDS:
        return text
    number = _number(text)
    if number is not None:
        return number
    if key in RANGES:
        raise InputError(f"{key} must be {RANGES[key].rule}, got the text {text!r} in {spec!r}. {_EXAMPLES}")
    return {"true": True, "false": False}.get(text.lower(), text)


def _number(text: str) -> int | float | None:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            pass
    return None
