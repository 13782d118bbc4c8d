"""The table of trials as columns of JSON, best first, short enough for ten thousand trials on one page."""

import json
import math
from collections.abc import Sequence
from typing import Any

from gputune.analysis.scores import shown_scores
from gputune.report.text import clean, short
from gputune.study.study import Study

BUDGET = 1_100_000
"""Characters of the table; what is worse by rank is left out beyond them."""

_DIGITS = 5


def table_columns(study: Study) -> tuple[list[dict[str, Any]], int]:
    """Return the columns and the number of trials in them.

    A column has a "key", a "label", its "values" in rank order (null where there is none), and for words "levels",
    whose places are its values. Scores have "decimals", and "first" of -1 where a first click sorts the largest up.
    """
    rows = len(study.trials)
    while True:
        columns = _columns(study, rows)
        size = len(as_json(columns))
        if size <= BUDGET or rows == 0:
            return columns, rows
        rows = min(rows - 1, int(rows * BUDGET / size))


def as_json(value: Any) -> str:
    """Return JSON that can stand within a script element: it has no character that HTML reads."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _columns(study: Study, rows: int) -> list[dict[str, Any]]:
    trials = study.ranking()[:rows]
    measure = shown_scores(study).measure
    sign, decimals = (-1.0 if measure.lower_is_better else 1.0), measure.decimals
    scores = _numbers([sign * trial.score for trial in trials], decimals)
    errors = _numbers([trial.std_error for trial in trials], decimals)
    epochs = [trial.best_epoch if math.isfinite(trial.score) else None for trial in trials]
    seconds = _numbers([trial.seconds for trial in trials], 2)
    columns = [
        {"key": "number", "label": "trial", "values": [trial.number for trial in trials]},
        _words("state", "state", [trial.state for trial in trials]),
        {"key": "score", "label": measure.name, "decimals": decimals, "first": int(-sign), "values": scores},
        {"key": "error", "label": "± error", "decimals": decimals, "values": errors},
        {"key": "epoch", "label": "epoch", "values": epochs},
        {"key": "seconds", "label": "seconds", "decimals": 2, "values": seconds},
    ]
    if any(trial.origin_text != "random" for trial in trials):
        columns.append(_words("origin", "origin", [trial.origin_text for trial in trials]))
    names = dict.fromkeys(name for trial in study.trials for name in trial.params)
    return columns + [_parameter(name, [trial.params for trial in trials]) for name in names]


def _parameter(name: str, params: Sequence[dict[str, Any]]) -> dict[str, Any]:
    key, label = f"params_{name}", clean(name)
    given = [config.get(name) for config in params]
    if all(value is None or _is_number(value) for value in given):
        return {"key": key, "label": label, "values": [_short_number(value, _DIGITS) for value in given]}
    return _words(key, label, [short(config[name]) if name in config else None for config in params])


def _words(key: str, label: str, texts: Sequence[str | None]) -> dict[str, Any]:
    levels = sorted({clean(text) for text in texts if text is not None})
    place = {text: position for position, text in enumerate(levels)}
    values = [None if text is None else place[clean(text)] for text in texts]
    return {"key": key, "label": label, "levels": levels, "values": values}


def _numbers(values: Sequence[float], decimals: int) -> list[float | None]:
    return [round(value, decimals) + 0.0 if math.isfinite(value) else None for value in values]


def _short_number(value: Any, digits: int) -> int | float | None:
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _is_number(value: Any) -> bool:
    """A number that JSON has: infinity is shown as a word."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
