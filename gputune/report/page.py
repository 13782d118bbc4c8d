"""Write the HTML report of a study.

The report is one HTML file. The report needs no network and no other file, and its browser policy
allows only its own script. The file stores the table of trials as columns of JSON, best trial
first. This form is short enough for ten thousand trials.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from functools import cache
from importlib import resources
from operator import attrgetter
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from gputune.ground.errors import PYTHON, InputError, Verbatim
from gputune.ground.text import Measure, clean, short, with_short_numbers
from gputune.ground.types import Config, Json
from gputune.report.charts import (
    brush_data,
    columns_chart,
    confusion_chart,
    curves_chart,
    folds_note,
    history_chart,
    importance_chart,
    parallel_chart,
    pareto_charts,
    path_charts,
    slice_charts,
    tree_chart,
)
from gputune.report.facts import (
    eligible_text,
    endings,
    is_its_model,
    page_scores,
    score_facts,
    search_facts,
    setting,
)
from gputune.report.snippet import snippet
from gputune.spaces.distributions import is_real
from gputune.spaces.edges import edge_remarks
from gputune.study.rows import FoldReport
from gputune.study.study import Study, Trial, best_trial
from gputune.version import __version__
from gputune.views.parameters import importance
from gputune.views.scores import (
    Scores,
    epochs_by,
    limited,
    order_by_score,
    other_measures,
    pareto_trials,
)

WEAK = 0.2  # R2 below which the forest does not explain the trials

MOST_ROWS = 10_000
BUDGET = 1_100_000
"""Limits of the table: the number of trials (``MOST_ROWS``) and of characters (``BUDGET``). A
larger table leaves out the worst trials."""

TableColumn = dict[str, Any]
"""A column of the table, with a "key", a "label" and "values" in order of score (null for no
value).

A categorical column has "levels", and its values are positions in these levels. A column of scores
has "decimals". Its "first" is -1 if a first click sorts the largest score to the top.
"""


def table_columns(study: Study) -> tuple[list[TableColumn], int]:
    """Return the columns of the report's table of trials, and the number of rows that fit."""
    rows = min(len(study.trials), MOST_ROWS)
    while True:
        columns = _columns(study, rows)
        size = len(as_json(columns))
        if size <= BUDGET or rows == 0:
            return columns, rows
        # Shrink in proportion to the size, and by at least one row.
        rows = min(rows - 1, int(rows * BUDGET / size))


def as_json(value: object) -> str:
    """Return a value as JSON for an HTML script element, without characters that HTML
    interprets."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _columns(study: Study, rows: int) -> list[TableColumn]:
    """Return the columns of the report's table, with the best ``rows`` trials as rows."""
    view = page_scores(study)
    order = order_by_score(study)[:rows]
    decimals = view.measure.decimals
    trials = [study.trials[row] for row in order]

    def column_of(field: str) -> list[Any]:
        return list(map(attrgetter(field), trials))

    columns = [
        {"key": "number", "label": "trial", "values": column_of("number")},
        _word_column("state", "state", column_of("state")),
        _score_column("score", view.measure, column_of("score")),
        _number_column("error", "± error", column_of("std_error"), decimals),
    ]
    if not view.late.all():
        columns.append(_word_column("eligible", "eligible", _eligible(study, view, order)))
    for name, measure in other_measures(study).items():
        scores = [trial.scores.get(name, math.nan) for trial in trials]
        columns.append(_score_column(f"score_{name}", measure, scores))
    if study.metrics:
        front = {trial.number for trial in pareto_trials(study)}
        is_optimal = ["yes" if trial.number in front else None for trial in trials]
        columns.append(_word_column("pareto", "Pareto-optimal", is_optimal))
    columns.append({"key": "epoch", "label": "epoch", "values": list(map(_epoch, trials))})
    columns.append(_seconds_column(column_of("seconds")))
    origins = list(map(_origin, trials))
    if set(origins) - {"random"}:
        columns.append(_word_column("origin", "origin", origins))
    names = dict.fromkeys(name for trial in study.trials for name in trial.params)
    params = column_of("params")
    return columns + [_parameter_column(name, params) for name in names]


def _epoch(trial: Trial) -> int | None:
    """Return the epoch of a trial's score for the report's table, or None without a score or
    epochs."""
    return trial.best_epoch or None if math.isfinite(trial.score) else None


def _eligible(study: Study, view: Scores, order: Sequence[int]) -> list[str | None]:
    """Return "best", "yes" or "no" for each row: whether the trial can be the best trial.

    The value is None for a trial without a score.
    """
    best = study.order[0]
    eligible = view.eligible
    texts: list[str | None] = []
    for row in order:
        if not math.isfinite(study.scores[row]):
            texts.append(None)
        elif row == best:
            texts.append("best")
        else:
            texts.append("yes" if eligible[row] else "no")
    return texts


def _origin(trial: Trial) -> str:
    """Return the origin of a trial as a short text, such as "default" or "Optuna, batch 2"."""
    if trial.origin_text.startswith("batch "):
        return f"Optuna, {trial.origin_text}"
    return trial.origin_text


def _seconds_column(seconds: Sequence[float]) -> TableColumn:
    """Return the table column of training times, with about four digits for the longest time."""
    longest = max((value for value in seconds if math.isfinite(value)), default=0.0)
    decimals = 2 if longest < 100 else 1 if longest < 1000 else 0
    return _number_column("seconds", "seconds", seconds, decimals)


def _score_column(key: str, measure: Measure, scores: Sequence[float]) -> TableColumn:
    """Return a table column of scores, with losses in their usual sign, as in log_loss 0.3."""
    sign = -1 if measure.lower_is_better else 1
    values = [sign * score for score in scores]
    column = _number_column(key, measure.name, values, measure.decimals)
    return {**column, "first": -sign}


def _number_column(key: str, label: str, values: Sequence[float], decimals: int) -> TableColumn:
    """Return a table column of numbers, rounded to at most four significant digits."""
    rounded = [
        float(limited(value, decimals)) if math.isfinite(value) else None for value in values
    ]
    return {"key": key, "label": label, "decimals": decimals, "values": rounded}


def _parameter_column(name: str, params: Sequence[Config]) -> TableColumn:
    """Return the table column of a hyperparameter, with its value in each trial.

    Numeric values have four digits. If one value is not a number in JSON, such as infinity, the
    column is categorical.
    """
    key = f"params_{name}"
    label = clean(name)
    values = [config.get(name) for config in params]
    if all(value is None or (is_real(value) and abs(value) < math.inf) for value in values):
        rounded = [float(f"{v:.4g}") if isinstance(v, float) else v for v in values]
        return {"key": key, "label": label, "values": rounded}
    texts = [short(config[name]) if name in config else None for config in params]
    return _word_column(key, label, texts)


def _word_column(key: str, label: str, texts: Sequence[str | None]) -> TableColumn:
    """Return a table column of texts, which is stored as categories."""
    levels = sorted({clean(text) for text in texts if text is not None}, key=_natural)
    place = {text: position for position, text in enumerate(levels)}
    values = [None if text is None else place[clean(text)] for text in texts]
    return {"key": key, "label": label, "levels": levels, "values": values}


def _natural(text: str) -> tuple[str, str]:
    """Return a sort key that orders numbers in texts by value: "batch 2" before "batch 10"."""
    return re.sub(r"[0-9]+", lambda digits: digits[0].zfill(12), text), text


_LARGEST_DOUBLE = 2**1024
"""The smallest integer that is too large for a float."""


def plain_number(value: float) -> str:
    """Return a number of the report's table as text, in the same form as ``number`` in report.js.

    Examples: 0.001, 64, 1.5e-5.
    """
    if isinstance(value, int) and abs(value) >= _LARGEST_DOUBLE:
        return "Infinity" if value > 0 else "-Infinity"  # like JavaScript reads the number
    if value == 0 or 1e-4 <= abs(value) < 1e6 or value == int(value):
        return f"{value:.15g}"
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


_ON_ALL_ROWS = "This code trains the best trial on all rows of the search."
_AGAIN = (
    "On the same rows, machine and versions, this code returns the same scores, except for rounding. "
    "Then it trains the model on all rows."
)

# Rows of the table before the script runs, and rows per page of the table.
FIRST_ROWS = 25


def page(
    study: Study,
    *,
    model: Json | None = None,
    folds: FoldReport | None = None,
    reload_seconds: int = 0,
) -> str:
    """Return the HTML report of a study.

    Args:
        study: the study.
        model: the ``info`` of its tuned model. None: no model.
        folds: predictions of the best trial on its folds, for the confusion matrix and importances.
        reload_seconds: seconds after which the report reloads itself. 0: never.

    Raises:
        InputError: the model belongs to another study.
    """
    if model is not None and not is_its_model(study, model):
        raise InputError(
            "report(model=...)",
            "must be the tuned model of this study",
            got=Verbatim("a model with other parameters, another score or other rows"),
            remedy="Create the model with study.best_model(), or leave out this argument.",
        )
    forest = None
    why_not = ""
    try:
        forest = importance(study)
    except InputError as error:  # a small study has no importances
        why_not = str(error)
    parallel = parallel_chart(study, forest.names if forest else ())
    columns, rows = table_columns(study)
    axes = []
    if parallel is not None:
        numbers = {column["key"] for column in columns if "levels" not in column}
        axes = brush_data(parallel[1], order_by_score(study)[:rows], numbers)
    style = _read_template("report.css")
    script = _read_template("report.js")
    html: str = _template().render(
        # The hashes allow only this script and this style. Charts hold pictures as data.
        policy=f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "img-src data:; "
        "base-uri 'none'; form-action 'none'",
        reload_seconds=reload_seconds,
        style=Markup(style),
        script=Markup(script),
        facts=[score_facts(study, model), search_facts(study)],
        curves=curves_chart(study),
        folds_note=folds_note(study),
        history=history_chart(study),
        pareto=pareto_charts(study),
        slices=slice_charts(study),
        confusion=None if folds is None else confusion_chart(study, folds),
        needed=None if folds is None else columns_chart(study, folds),
        parallel=None if parallel is None else parallel[0],
        importance=importance_chart(forest) if forest else None,
        forest=forest,
        fit=limited(forest.fit, 2) if forest else "",
        weak=WEAK,
        why_not=why_not,
        paths=path_charts(study),
        family=tree_chart(study),
        columns=[(column["label"], "levels" in column) for column in columns],
        first=list(zip(*map(_cells, columns))),
        rows=rows,
        data=Markup(as_json({"columns": columns, "axes": axes, "page": FIRST_ROWS})),
        **_texts(study),
    )
    return html


def _texts(study: Study) -> Json:
    """Return the texts and values that the report's HTML template shows."""
    best = best_trial(study)
    record = study.record
    params = {} if best is None else best.params
    source = ""
    if record.source:
        path = str(record.source.get("path", ""))
        data = path if path.startswith("sklearn:") else Path(path).name
        source = f"{clean(data)}, predicting {clean(record.target)!r}"
    code = snippet(study)
    code_note = ""
    if "gputune.tune(" in code:
        code_note = _AGAIN
    elif "best_model(" in code:
        code_note = _ON_ALL_ROWS
    return {
        "title": f"Study of {clean(record.model)}" if record.model else "Study",
        "source": source,
        "best": best,
        "epochs_by": clean(epochs_by(study)),
        "parameters": [(clean(key), short(value)) for key, value in params.items()],
        "eligible": eligible_text(study),
        "origins": _origin_note(study),
        "why_none": study.failure_message() if best is None else "",
        "waiting": sum(trial.state == "waiting" for trial in study.trials),
        "trials": len(study.trials),
        "guarded": study.guarded,
        "endings": endings(study),
        "code": code,
        "again": code_note,
        "setting": setting(study),
        "notes": [_note_text(note) for note in (*record.notes, *edge_remarks(study))],
        "version": __version__,
    }


def _note_text(note: str) -> str:
    """Return a note on the search in the form for the report, with short numbers."""
    return clean(with_short_numbers(PYTHON.render(note)))


def _origin_note(study: Study) -> str:
    """Return a note that explains the batches of an Optuna sampler, or "" for other studies."""
    if not any(trial.origin_text.startswith("batch ") for trial in study.trials):
        return ""
    return (
        "Optuna's sampler proposes trials in batches, and uses the scores of a batch to propose the "
        "next batch."
    )


def _cells(column: TableColumn) -> list[str]:
    """Return the texts of a table column's first rows, which the report shows before its script
    runs."""

    cells = []
    for value in column["values"][:FIRST_ROWS]:
        if value is None:
            cells.append("–")
        elif "levels" in column:
            cells.append(str(column["levels"][value]))
        elif "decimals" in column:
            cells.append(limited(value, column["decimals"]))
        else:
            cells.append(plain_number(value))
    return cells


@cache
def _read_template(name: str) -> str:
    """Return the text of a template file of the report, such as "report.css"."""
    return (resources.files("gputune.report") / "templates" / name).read_text(encoding="utf-8")


@cache
def _template() -> jinja2.Template:
    """Return the HTML template of the report, compiled by Jinja."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_read_template("report.html"))


def _hash(text: str) -> str:
    """Return the hash of a script or style, so that the report's content security policy allows
    it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
