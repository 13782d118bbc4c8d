"""``gputune status``: how far a search is that another process runs, read from its file."""

import time
from collections import Counter
from pathlib import Path

from gputune.report.facts import best_trial, seconds_text, states_text
from gputune.report.places import study_file
from gputune.report.text import clean, count, measure_of, short
from gputune.study.study import Study


def status(place: str) -> str:
    """Return the state of a study in a few lines."""
    file = study_file(place)
    written = last_written(file) if file.is_file() else 0.0  # before it is opened, which may tidy up the file
    study = Study.open(file)
    states = Counter(trial.state for trial in study.trials)
    done = len(study.trials) - states["waiting"] - states["stopped"]
    lines = [
        ("Study", clean(file)),
        (
            "Trials",
            f"{done} of {count(len(study.trials), 'trial')} finished{f': {states_text(study)}' if states else ''}",
        ),
        ("Best", _best(study, trains_on=states["waiting"] > 0)),
        ("Written", f"{seconds_text(max(0.0, time.time() - written))} ago"),
    ]
    return "\n".join(f"{name:9}{text}" for name, text in lines)


def last_written(file: Path) -> float:
    """Return when the study was last written, by the clock of its file system, in seconds since 1970."""
    resolved = file.resolve()
    log = resolved.with_name(f"{resolved.name}-wal")
    # A log that is empty was made by a reader.
    files = [resolved, *([log] if log.exists() and log.stat().st_size else [])]
    return max(path.stat().st_mtime for path in files)


def _best(study: Study, *, trains_on: bool) -> str:
    best = best_trial(study)
    if best is None:
        return "none yet"
    measure = measure_of(str(study.meta.get("scoring") or "score"), best.score, study.meta.get("positive"))
    params = ", ".join(f"{clean(name)}={short(value)}" for name, value in best.params.items())
    # The trials that have passed a rung have no result before they end, and all that have one are worse.
    left = (
        " (sent away early; those that train on are not told yet)"
        if trains_on and best.state == "pruned"
        else ""
    )
    return f"{measure.title} {measure.text(best.score)} in trial {best.number}: {params}{left}"
