"""What a notebook shows of a study or a model: a title and a small table, every text escaped."""

import math
from collections import Counter
from collections.abc import Iterable
from html import escape

from gputune.study.study import Study
from gputune.text import clean, count, short


def card(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """Return an HTML table with one row for each name and text."""
    lines = "".join(
        f'<tr><th style="text-align:left">{escape(clean(name))}</th>'
        f'<td style="text-align:left">{escape(clean(text))}</td></tr>'
        for name, text in rows
    )
    return f"<div><strong>{escape(clean(title))}</strong><table>{lines}</table></div>"


def study_card(study: Study) -> str:
    """Return the card of a study: what it searched, its best score and parameters, how many trials ended how."""
    states = Counter(trial.state for trial in study.trials)
    rows = [("trials", ", ".join(f"{number} {state}" for state, number in states.items()) or "none")]
    best = next(iter(study.ranking()), None)
    if best is not None and math.isfinite(best.score):
        measure = study.record.measure(best.score)
        error = f" ± {measure.size(best.std_error)}" if math.isfinite(best.std_error) else ""
        rows += [
            (measure.title, f"{measure.text(best.score)}{error} over {count(len(best.fold_scores), 'fold')}"),
            ("best trial", f"{best.number}, epoch {best.best_epoch}"),
            *((name, short(value)) for name, value in best.params.items()),
        ]
    model = study.record.model
    return card(f"Study of {model}" if model else "Study", rows)
