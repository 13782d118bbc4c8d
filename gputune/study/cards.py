"""What a notebook shows of a study or a model: a title and a small table, every text escaped."""

import math
from collections import Counter
from collections.abc import Iterable
from html import escape
from typing import Any

from gputune.text import clean, count, measure_of, short


def card(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """Return an HTML table with one row for each name and text."""
    lines = "".join(
        f'<tr><th style="text-align:left">{escape(clean(name))}</th>'
        f'<td style="text-align:left">{escape(clean(text))}</td></tr>'
        for name, text in rows
    )
    return f"<div><strong>{escape(clean(title))}</strong><table>{lines}</table></div>"


def study_card(study: Any) -> str:
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


def model_card(model: Any) -> str:
    """Return the card of a tuned model: what it predicts from what, and the scores it was chosen by."""
    info, layout = model.info, model.layout
    rows = [("predicts", model.target), ("from", layout.in_words())]
    if model.classes is not None:
        shown = ", ".join(map(str, model.classes[:8].tolist()))
        rows.append(("classes", f"{len(model.classes)}: {shown}{', ...' if len(model.classes) > 8 else ''}"))
    if "score" in info:
        measure = measure_of(str(info.get("scoring") or "score"), info["score"], info.get("positive"))
        rows.append((f"cross-validated {measure.title}", measure.text(info["score"])))
        if (score := info.get("held_out_score")) is not None:
            words = f"{measure.text(score)} on {count(info['held_out_rows'], 'row')}"
            rows.append((f"held-out {measure.name}", words))
    rows += [(name, short(value)) for name, value in info.get("params", {}).items()]
    return card(f"TunedModel: {type(model.module).__name__}", rows)
