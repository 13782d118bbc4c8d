"""What is printed when a search has ended: what was understood, the best trials, the honest score, what to do next."""

import math
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from gputune.data.source import Source
from gputune.data.table import Table
from gputune.report.held_out import HeldOut
from gputune.report.text import clean, paragraph
from gputune.report.trials import error_words, study_measure, trial_rows
from gputune.study.study import Study

BEST = 5
"""Trials in the table."""

_LABEL = 8
_STATES = {
    "complete": "complete",
    "stopped": "stopped by the timeout",
    "failed": "diverged",
    "waiting": "not started before the timeout",
}


@dataclass(frozen=True)
class Ending:
    """A finished search: its study, the rows it searched on, its held-out score (None: all rows were used).

    ``study_file`` and ``model_folder`` are where both lie, ``seconds`` is the time of the whole run.
    """

    study: Study
    rest: Source
    held_out: HeldOut | None
    study_file: Path
    model_folder: Path
    seconds: float


def closing_text(ending: Ending, *, width: int) -> str:
    """Return the lines that end ``gputune tune``."""
    parts = [_understood(ending, width), _best_trials(ending, width), _scores(ending, width)]
    return "\n\n".join([*parts, _whereabouts(ending, width)])


def _understood(ending: Ending, width: int) -> str:
    meta = ending.study.meta
    lines = [("Data", _data(ending)), ("Task", _task(ending.study)), ("Model", _model(ending.study))]
    return _labelled([*lines, *(("Note", note) for note in meta["notes"])], width)


def _data(ending: Ending) -> str:
    meta, X = ending.study.meta, ending.rest.X
    rows = ending.study.meta["fingerprint"]["rows"]
    apart = "" if ending.held_out is None else f" and {ending.held_out.rows} held out"
    kinds = Counter(X.kinds) if isinstance(X, Table) else {}
    named = ", ".join(_count(number, kind, _PLURALS) for kind, number in kinds.items())
    return f"{rows} rows to search on{apart}; {named}, made into {_count(meta['features'], 'feature')}"


_PLURALS = {"number": "numbers", "boolean": "booleans", "category": "categories", "date": "dates"}


def _task(study: Study) -> str:
    classes, target = study.meta["classes"], clean(study.meta["target"])
    if classes is None:
        return f"regression: predict the number {target!r}"
    shown = ", ".join(clean(name) for name in classes[:10])
    more = f" and {len(classes) - 10} more" if len(classes) > 10 else ""
    return f"{len(classes)} classes of {target!r}: {shown}{more}"


def _model(study: Study) -> str:
    meta = study.meta
    size = f"{_count(len(study.trials), 'trial')} x {_count(meta['folds'], 'fold')}"
    if meta["optimizer"] == "exact":
        return f"{meta['model']}, solved to convergence; {size}"
    rule = meta["optimizer"] if meta["schedule"] == "constant" else f"{meta['optimizer']}, {meta['schedule']}"
    return f"{clean(meta['model'])} trained with {rule}; {size} x {_count(meta['max_epochs'], 'epoch')}"


def _best_trials(ending: Ending, width: int) -> str:
    study = ending.study
    shown = [trial for trial in study.ranking() if math.isfinite(trial.score)][:BEST]
    best = f"The best {len(shown)} of {len(study.trials)} trials" if len(shown) > 1 else "The best trial"
    title = f"{best} by {study_measure(study).title}{error_words(study)}:"
    rows = trial_rows(shown, study_measure(study), width=width, indent="  ")
    return f"{paragraph(title, width)}\n\n{rows}"


def _scores(ending: Ending, width: int) -> str:
    measure, study, held = study_measure(ending.study), ending.study, ending.held_out
    ran = sum(math.isfinite(trial.score) for trial in study.trials)
    chosen = (
        f"the best of {ran} on the folds that chose it"
        if ran > 1
        else "its epoch was chosen on its own folds"
    )
    optimistic = f"cross-validated {measure.name} of {measure.text(study.best_score)}"
    optimistic += f" is optimistic: it is {chosen}." if ran > 1 else f" may be optimistic: {chosen}."
    if held is None:
        text = f"All rows were used, so no honest score is left. The {optimistic} Keep rows apart with --test-size."
    elif held.why:
        text = f"There is no held-out {measure.name}: {clean(held.why)}. The {optimistic}"
    else:
        text = (
            f"Held-out {measure.title}: {measure.text(held.score)} on {_count(held.rows, 'row')} that nothing was "
            f"fitted on. It is the saved model's own score. The {optimistic}"
        )
    if held is not None and held.unseen:
        text += f" {_count(held.unseen, 'held-out row')} with a class that no other row has count as wrong."
    return paragraph(text, width)


def _whereabouts(ending: Ending, width: int) -> str:
    states = Counter(trial.state for trial in ending.study.trials)
    counts = ", ".join(f"{states[state]} {words}" for state, words in _STATES.items() if states[state])
    go_on = " (repeat the command to run them)" if states["waiting"] else ""
    model = clean(ending.model_folder)
    lines = [
        ("Trials", f"{counts}{go_on}; {_seconds(ending.seconds)} in all"),
        ("Study", clean(ending.study_file)),
        ("Model", model),
        ("Next", f"gputune predict {shlex.quote(model)} FILE"),
    ]
    return _labelled(lines, width)


def _labelled(lines: list[tuple[str, str]], width: int) -> str:
    then = " " * _LABEL
    return "\n".join(
        paragraph(clean(text), width, first=f"{name:{_LABEL}}", then=then) for name, text in lines
    )


def _count(number: int, noun: str, plurals: dict[str, str] | None = None) -> str:
    return f"{number} {noun if number == 1 else (plurals or {}).get(noun, noun + 's')}"


def _seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
