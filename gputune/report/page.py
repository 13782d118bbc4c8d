"""The table of trials as columns of JSON, best first, short enough for ten thousand trials on one page.

The report of a study: one page of HTML that needs no network, no other file and no right to run anything else.
"""

import base64
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from gputune.errors import InputError
from gputune.report.charts.curves import curves_chart, folds_note
from gputune.report.charts.parallel import Parallel, parallel_chart
from gputune.report.charts.paths import WEAK, importance_chart, path_charts
from gputune.report.charts.slices import history_chart, slice_charts
from gputune.report.facts import best_trial, check_model, endings, facts, setting
from gputune.report.snippet import again_code
from gputune.scratch import write_text
from gputune.study.study import Study
from gputune.text import clean, short
from gputune.version import __version__
from gputune.views.importance import Importance, importance
from gputune.views.scores import shown_scores

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
        _cell_words("state", "state", [trial.state for trial in trials]),
        {"key": "score", "label": measure.name, "decimals": decimals, "first": int(-sign), "values": scores},
        {"key": "error", "label": "± error", "decimals": decimals, "values": errors},
        {"key": "epoch", "label": "epoch", "values": epochs},
        {"key": "seconds", "label": "seconds", "decimals": 2, "values": seconds},
    ]
    if any(trial.origin_text != "random" for trial in trials):
        columns.append(_cell_words("origin", "origin", [trial.origin_text for trial in trials]))
    names = dict.fromkeys(name for trial in study.trials for name in trial.params)
    return columns + [_parameter(name, [trial.params for trial in trials]) for name in names]


def _parameter(name: str, params: Sequence[dict[str, Any]]) -> dict[str, Any]:
    key, label = f"params_{name}", clean(name)
    given = [config.get(name) for config in params]
    if all(value is None or _is_number(value) for value in given):
        return {"key": key, "label": label, "values": [_short_number(value, _DIGITS) for value in given]}
    return _cell_words(key, label, [short(config[name]) if name in config else None for config in params])


def _cell_words(key: str, label: str, texts: Sequence[str | None]) -> dict[str, Any]:
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


FIRST_ROWS = 25
"""Rows of the table that the page shows before its script runs, and on a page of the table."""


def write_page(study: Study, path: str | os.PathLike[str], *, model: Mapping[str, Any] | None = None) -> None:
    """Write the page of a study to a file; see ``Study.report``."""
    check_place(f"report({str(path)!r})", Path(path), study.file)
    text = page(study, model=model)
    write_text(Path(path), text)


def check_place(given: str, path: Path, study_file: Path | None) -> None:
    """Raise InputError, which names what was ``given``, for a place where no page can or should be written."""
    if path.is_dir():
        raise InputError(f"{given} is a folder; give the name of a file, such as report.html.")
    if study_file is not None and path.exists() and study_file.exists() and path.samefile(study_file):
        raise InputError(f"{given} is the file of the study itself; give another name.")
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{given} must end in .html, since a page of HTML is written; give such a name.")
    if not path.resolve().parent.is_dir():
        raise InputError(f"{given}: the folder {str(path.parent)!r} does not exist; make it first.")


def page(study: Study, *, model: Mapping[str, Any] | None = None) -> str:
    """Return the page of a study as HTML; ``model`` is the ``info`` of its tuned model.

    Raises InputError for a model of another study.
    """
    if model is not None:
        check_model(study, model)
    found, why_not = _importance(study)
    parallel = parallel_chart(study, found.names if found else ())
    columns, rows = table_columns(study)
    style, script = _packaged("report.css"), _packaged("report.js")
    html: str = _template().render(
        policy=f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; base-uri 'none'; "
        "form-action 'none'",
        style=Markup(style),
        script=Markup(script),
        facts=facts(study, model),
        parallel=None if parallel is None else parallel.chart,
        importance=importance_chart(found) if found else None,
        forest=found,
        weak=WEAK,
        why_not=why_not,
        columns=[(column["label"], "levels" in column) for column in columns],
        first=_first_rows(columns),
        rows=rows,
        data=Markup(as_json(_data(columns, parallel, rows))),
        **_words(study),
        **_charts(study),
    )
    return html


def _words(study: Study) -> dict[str, Any]:
    """Return what the page says of a study beside its charts and its table."""
    best = best_trial(study)
    return {
        "title": f"Study of {clean(study.record.model)}" if study.record.model else "Study",
        "source": _source(study),
        "best": best,
        "parameters": [] if best is None else [(clean(k), _exact(v)) for k, v in best.params.items()],
        "why_none": study.why_none_is_best() if best is None else "",
        "waiting": sum(trial.state == "waiting" for trial in study.trials),
        "trials": len(study.trials),
        "guarded": study.guarded,
        "endings": endings(study),
        "code": again_code(study),
        "setting": setting(study),
        "notes": [clean(note) for note in study.record.notes],
        "version": __version__,
    }


def _charts(study: Study) -> dict[str, Any]:
    return {
        "curves": curves_chart(study),
        "folds_note": folds_note(study),
        "history": history_chart(study),
        "slices": slice_charts(study),
        "paths": path_charts(study),
    }


def _importance(study: Study) -> tuple[Importance | None, str]:
    try:
        return importance(study), ""
    except InputError as error:  # a small study has none
        return None, str(error)


def _data(columns: list[dict[str, Any]], parallel: Parallel | None, rows: int) -> dict[str, Any]:
    numbers = {column["key"] for column in columns if "levels" not in column}
    axes = [] if parallel is None else [axis.plain(rows, numbers) for axis in parallel.axes]
    return {"columns": columns, "axes": axes, "page": FIRST_ROWS}


def _first_rows(columns: list[dict[str, Any]]) -> list[list[str]]:
    """Return the cells of the first rows, as the script shows them too."""
    return [list(row) for row in zip(*(_cells(column) for column in columns))]


def _cells(column: dict[str, Any]) -> list[str]:
    cells = []
    for value in column["values"][:FIRST_ROWS]:
        if value is None:
            cells.append("–")
        elif "levels" in column:
            cells.append(column["levels"][value])
        elif "decimals" in column:
            cells.append(f"{value:.{column['decimals']}f}")
        else:
            cells.append(f"{value:.6g}" if isinstance(value, float) else str(value))
    return cells


def _exact(value: Any) -> str:
    return clean(getattr(value, "__name__", value))


def _source(study: Study) -> str:
    """Return what the study was searched on, in few words."""
    origin = study.record.source
    if not origin:
        return ""
    path = str(origin.get("path", ""))
    name = path if path.startswith("sklearn:") else Path(path).name
    return f"{clean(name)}, predicting {clean(study.record.target)!r}"


@cache
def _packaged(name: str) -> str:
    return (resources.files("gputune.report") / "templates" / name).read_text(encoding="utf-8")


@cache
def _template() -> jinja2.Template:
    surroundings = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return surroundings.from_string(_packaged("report.html"))


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
