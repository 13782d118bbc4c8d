"""The commands ``gputune trials``, ``best``, ``status``, ``report`` and ``repair`` on a study.

A command imports the modules for training and plotting only if it needs them, because a list of
trials must not wait for torch.
"""

import csv
import io
import json
import math
import shlex
import shutil
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from gputune.cli.arguments import model_folder, report_page, study_file
from gputune.ground.files import write_text
from gputune.ground.memory import without_collector
from gputune.ground.text import (
    GAP,
    Measure,
    blocks,
    clean,
    count,
    is_formula,
    paragraph,
    short,
    table,
)
from gputune.report.facts import (
    FAILED,
    check_place,
    failure_reason,
    params_text,
    read_model_info,
    seconds_text,
    states_text,
)
from gputune.study.claims import Claims
from gputune.study.rows import FoldReport
from gputune.study.store import has_checkpoints
from gputune.study.study import RESUME, Study, Trial, best_trial, how_to_continue
from gputune.views.default_trial import improvement_json, improvement_text
from gputune.views.scores import measures, other_measures, pareto_trials, ranked_by, score_view

FIELDS = ("number", "params", "score", "fold_scores", "best_epoch", "state", "seconds", "origin")

SCORE = "score"
SCORE_AND_ERROR = "score ± error"
"""Table columns with the name of the measure as their header, unless this name is long.

Titles show it in full.
"""

_LONGEST = 17

_WATCH_SECONDS = 2.0
_LIVE_SECONDS = 5
_CURVES = 5
"""Settings of live views: seconds between two views of a running search, seconds between two live
reports, and the number of curves in a view."""

_LISTINGS = (
    ("trial", SCORE_AND_ERROR, "epoch", "state", "seconds"),
    ("trial", SCORE_AND_ERROR, "epoch", "state"),
    ("trial", SCORE, "epoch", "state"),
)


def trials(arguments: Namespace) -> str:
    """Return the trials of a study as a table, as JSON or as CSV, for ``gputune trials``."""
    study = open_study(arguments)
    if arguments.format == "table":
        return trials_table(study, width=shutil.get_terminal_size().columns)
    return trials_json(study) if arguments.format == "json" else trials_csv(study)


def best(arguments: Namespace) -> str:
    """Return the best trial of a study as text or JSON."""
    study = open_study(arguments)
    return best_json(study) if arguments.format == "json" else best_text(study)


def open_study(arguments: Namespace) -> Study:
    """Return the study that a command names, ranked by the metric of ``--by``."""
    study = Study.open(study_file(arguments.study))
    return study if arguments.by is None else ranked_by(study, arguments.by)


def trials_table(study: Study, *, width: int) -> str:
    """Return a title and a table with one line per trial, in order of trial number.

    In a narrow terminal the table has fewer columns.
    """
    rows = trial_rows(study, study.trials, _LISTINGS, width=width)
    title = f"{count(len(study.trials), 'trial')} by {score_view(study).measure.title}"
    if study.record.face != "loop":
        title = f"{title}, {mean_words(study, errors='±' in rows)}"
    lines = [paragraph(title, width), "", rows]
    failed = [trial for trial in study.trials if trial.state == "failed"]
    if failed:
        lines += ["", "Failed:"]
    for trial in failed[:FAILED]:
        text = f"trial {trial.number}: {failure_reason(study, trial)}"
        lines.append(paragraph(text, width, first="  ", then=" " * 4))
    if len(failed) > FAILED:
        lines.append(f"  and {len(failed) - FAILED} more (--format json lists all)")
    return "\n".join(lines)


def trials_json(study: Study) -> str:
    """Return the trials as JSON objects with the keys ``FIELDS``, and a "reason" for failed trials.

    Scores have scikit-learn's sign. NaN is null.
    """
    rows = list(map(trial_json, study.trials))
    for row, trial in zip(rows, study.trials):
        if trial.state == "failed":
            row["reason"] = failure_reason(study, trial)
    return json.dumps(rows, indent=1, default=_name, allow_nan=False)


def trials_csv(study: Study) -> str:
    """Return the columns of ``Study.to_pandas`` as CSV, with a column for each fold and parameter.

    NaN is empty. Text that a spreadsheet takes for a formula has a ' before it.
    """

    def cell(value: object) -> object:
        """Return one CSV cell. Text that looks like a formula gets a ' before it."""
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        text = value if isinstance(value, bool | int | float) else clean(_name(value))
        return f"'{text}" if is_formula(text) else text

    file = io.StringIO()
    columns = study.columns()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(clean, columns))
    writer.writerows(map(cell, row) for row in zip(*columns.values()))
    return file.getvalue().rstrip("\n")


def best_text(study: Study) -> str:
    """Return the best score and the parameters of its trial as text.

    The parameters are written in full, so that you can copy them.
    """
    best = study.best_trial
    measure = score_view(study).measure
    facts = [f"{measure.title} {measure.with_error(best.score, best.std_error)}"]
    for name, other in other_measures(study).items():
        facts.append(f"{other.name} {other.text(best.scores[name])}")
    if best.best_epoch > 0:
        facts.append(f"epoch {best.best_epoch}")
    if best.state != "complete":
        facts.append(best.state)
    rows = [[clean(key), clean(_name(value))] for key, value in best.params.items()]
    width = shutil.get_terminal_size().columns
    parts = [
        f"trial {best.number}: {', '.join(facts)}",
        table(["parameter", "value"], rows, left=["parameter", "value"]),
        paragraph(improvement_text(study), width),
        pareto_text(study, width=width, most=len(study.trials)),
    ]
    return "\n\n".join(filter(None, parts))


def best_json(study: Study) -> str:
    """Return the best trial as one JSON object.

    It has the keys ``FIELDS``, the ``scoring``, its ``positive`` class and the comparison with the
    ``default``.
    """
    record = study.record
    best = {
        "scoring": record.scoring,
        "positive": record.ranked_class,
        **trial_json(study.best_trial),
    }
    best["default"] = improvement_json(study)
    if study.metrics:
        best["best_trials"] = [trial.number for trial in pareto_trials(study)]
    return json.dumps(best, indent=1, default=_name, allow_nan=False)


def mean_words(study: Study, *, errors: bool) -> str:
    """Return the text that marks a score as a mean over the folds, with its standard error if
    shown."""
    folds = study.record.folds or study.curves.shape[2]
    return f"mean{' ± standard error' * errors} over {count(folds, 'fold')}"


def trial_rows(
    study: Study,
    trials: Sequence[Trial],
    layouts: Sequence[Sequence[str]],
    *,
    width: int,
    indent: str = "",
) -> str:
    """Return a table of trials, with a column for each parameter.

    The metrics that do not rank the trials follow the score.

    Args:
        study: the study.
        trials: the trials to show.
        layouts: sets of columns. The first set that fits into ``width`` is used. If all sets are
            too wide, the parameters share the last column of the last set, on several lines.
        width: width of the terminal.
        indent: text before each line.
    """
    measure = score_view(study).measure
    others = other_measures(study)
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    score = measure.name if len(measure.name) <= _LONGEST else SCORE
    for layout in layouts:
        header = [score if column in (SCORE, SCORE_AND_ERROR) else column for column in layout]
        # The other metrics follow the trial and its score.
        header[2:2] = [other.name for other in others.values()]
        rows = [_cells(trial, measure, layout, others) for trial in trials]
        full_rows = []
        for row, trial in zip(rows, trials):
            params = {name: short(value) for name, value in trial.params.items()}
            full_rows.append([*row, *(params.get(name, "-") for name in names)])
        lines = table([*header, *map(clean, names)], full_rows, left=["state"], indent=indent)
        if max(map(len, lines.split("\n"))) <= width:
            return lines
    titles, *narrow = table(header, rows, left=["state"], indent=indent).split("\n")
    start = max(map(len, (titles, *narrow)))
    wrapped = [f"{titles:{start}}{GAP}parameters"]
    for line, trial in zip(narrow, trials):
        first = f"{line:{start}}{GAP}"
        text = paragraph(params_text(trial, " "), width, first=first, then=" " * len(first))
        wrapped.append(text.rstrip())
    return "\n".join(wrapped)


def _cells(
    trial: Trial, measure: Measure, layout: Sequence[str], others: Mapping[str, Measure]
) -> list[str]:
    """Return the texts of one trial for the columns of a table."""
    scores = trial.scores
    cells = {
        "trial": str(trial.number),
        SCORE: measure.text(trial.score),
        SCORE_AND_ERROR: measure.with_error(trial.score, trial.std_error),
        "epoch": str(trial.best_epoch) if trial.best_epoch and math.isfinite(trial.score) else "-",
        "state": trial.state,
        "seconds": f"{trial.seconds:.2f}" if math.isfinite(trial.seconds) else "-",
    }
    row = [cells[column] for column in layout]
    row[2:2] = [other.text(scores.get(name, math.nan)) for name, other in others.items()]
    return row


def pareto_text(study: Study, *, width: int, most: int) -> str:
    """Return a table of the Pareto-optimal trials, or "" if the study has only one metric."""
    if not study.metrics:
        return ""
    front = pareto_trials(study)
    by_metric = measures(study)
    names = [measure.name for measure in by_metric.values()]
    verb = "is" if len(front) == 1 else "are"
    title = (
        f"By {', '.join(names[:-1])} and {names[-1]} {count(len(front), 'trial')} {verb} "
        "Pareto-optimal"
    )
    title += f" ({most} shown):" if len(front) > most else ":"
    rows = []
    for trial in front[:most]:
        scores = [measure.text(trial.scores[name]) for name, measure in by_metric.items()]
        rows.append([str(trial.number), *scores])
    return f"{paragraph(title, width)}\n\n{table(['trial', *names], rows, indent='  ')}"


def trial_json(trial: Trial) -> dict[str, object]:
    """Return a trial as values that JSON supports.

    NaN is null. Infinity, a possible value of C, is text.
    """
    row = {field: getattr(trial, field) for field in FIELDS}
    row["origin"] = trial.origin_text
    params = dict(trial.params)
    for name, value in params.items():
        if isinstance(value, float) and not math.isfinite(value):
            params[name] = str(value)
    row["params"] = params
    row["score"], row["seconds"] = _numbers((trial.score, trial.seconds))
    row["fold_scores"] = _numbers(trial.fold_scores)
    if trial.metrics:
        row["metrics"] = {name: _numbers(folds) for name, folds in trial.metrics.items()}
    return row


def _numbers(values: Iterable[float]) -> list[float | None]:
    """Return floats for JSON: None replaces NaN and infinity."""
    return [value if math.isfinite(value) else None for value in values]


def _name(value: object) -> str:
    """Return the name of a function or class. Any other value becomes its text."""
    return str(getattr(value, "__name__", value))


def status(arguments: Namespace) -> str:
    """Return the progress of a search, which may run in another process.

    With ``--watch``, print the progress again and again until the search ends.
    """
    file = study_file(arguments.study)
    while True:
        text, is_over = _look(file, most=_CURVES if arguments.watch else 0)
        if is_over or not arguments.watch:
            return text
        # Move the cursor to the top left and clear the screen.
        print(f"\x1b[H\x1b[J{text}" if sys.stdout.isatty() else f"{text}\n", flush=True)
        time.sleep(_WATCH_SECONDS)


def _look(file: Path, *, most: int) -> tuple[str, bool]:
    """Return the progress of the search in a file as text, and whether all trials have ended.

    Up to ``most`` curves of the best trials are shown below.
    """
    # Read before the file is opened, because opening may change the file.
    written = last_written(file) if file.is_file() else 0.0
    study = Study.open(file)
    trials = Counter(trial.state for trial in study.trials)
    left = trials["waiting"] + trials["stopped"]
    progress = f"{trials.total() - left} of {count(trials.total(), 'trial')} finished"
    if study.trials:
        progress = f"{progress}: {states_text(study)}"
    running = [f"Running  {line}" for line in _running_lines(file, study)]
    best_text = _best(study, trains_on=trials["waiting"] > 0)
    if not running and trials["waiting"] == trials.total() and has_checkpoints(file):
        best_text += (
            f"; all training waits in checkpoints, and {how_to_continue(study.record)} continues it"
        )
    lines = [
        f"Study    {clean(file)}",
        f"Trials   {progress}",
        f"Best     {best_text}",
        *running,
        f"Written  {seconds_text(max(0.0, time.time() - written))} ago",
    ]
    measure = score_view(study).measure
    best = [row for row in study.order[:most] if math.isfinite(study.scores[row])]
    if best and study.curves.shape[1] > 1:  # all curves share one scale
        lines.append("")
        for row in best:
            curve = blocks(study.curves[row].mean(1), width=40)
            trial = study.trials[row]
            lines.append(f"{f'trial {trial.number}':12}{curve} {measure.text(trial.score)}")
    return "\n".join(lines), not left


def _running_lines(file: Path, study: Study) -> Iterator[str]:
    """Yield a line for each process that trains, with its progress and best mean score at any
    epoch."""
    with Claims(file) as claims:
        for owner, progress in claims.shown():
            name = f"process {owner.pid}" if owner.is_near else clean(owner)
            line = f"{name}: {progress['done']} of {progress['of']} {clean(progress['unit'])}"
            best = progress["best"]
            if best is not None:
                measure = study.record.measure(best)
                line = f"{line}, best so far {measure.title} {measure.text(best)}"
            if progress["left"] is not None:
                line = f"{line}, about {seconds_text(progress['left'])} left"
            yield line


def last_written(file: Path) -> float:
    """Return the time of the last write to the study, in seconds since 1970, by its file system's
    clock."""
    resolved = file.resolve()
    # SQLite's write-ahead log holds the latest writes.
    log = resolved.with_name(f"{resolved.name}-wal")
    written = resolved.stat().st_mtime
    if log.exists() and log.stat().st_size > 0:  # a reader makes an empty log
        written = max(written, log.stat().st_mtime)
    return written


def _best(study: Study, *, trains_on: bool) -> str:
    """Return a text with the best score so far and the parameters of its trial."""
    best = best_trial(study)
    if best is None:
        return "none yet"
    measure = study.record.measure(best.score)
    text = f"{measure.title} {measure.text(best.score)} in trial {best.number}: {params_text(best)}"
    # Trials that have passed a rung have no result before they end. So far all trials with a result
    # are worse.
    if trains_on and best.state == "pruned":
        text = f"{text} (pruned; trials that still train have no score yet)"
    return text


def report(arguments: Namespace) -> str:
    """Write the HTML report to ``--out``, which may exist, and return a text with its path."""
    with without_collector():
        from gputune.report.page import page
        from gputune.study.code import class_from_flag
        from gputune.tuning.refit import Access
        from gputune.tuning.validation import check_fold_report, fold_report

    file = study_file(arguments.study)
    out = report_page(file) if arguments.out is None else Path(arguments.out)
    check_place(f"--out {str(out)!r}", out, file)
    study = open_study(arguments)
    parts = {"confusion": bool(arguments.confusion), "importance": bool(arguments.importance)}
    if arguments.live and any(parts.values()):  # checked before a report is written
        check_fold_report(study, confusion=parts["confusion"])

    def write(folds: FoldReport | None = None, reload_seconds: int = 0) -> None:
        model = read_model_info(study, model_folder(file))
        write_text(out, page(study, model=model, folds=folds, reload_seconds=reload_seconds))

    if arguments.live:
        try:
            while any(trial.state in ("waiting", "stopped") for trial in study.trials):
                write(reload_seconds=_LIVE_SECONDS)
                time.sleep(_LIVE_SECONDS)
                study = open_study(arguments)
        finally:  # the last report does not reload itself
            write()
    if any(parts.values()):
        module = class_from_flag(arguments.module)
        access = Access(study, trust_code=arguments.trust_code, called="report", module=module)
        write(fold_report(access, **parts))
    elif not arguments.live:
        write()
    return f"Report   {out}"


def repair(arguments: Namespace) -> str:
    """Save the undamaged part of a damaged study into a new file, and return the summary."""
    from gputune.study.repair import repair

    saved = repair(study_file(arguments.study), arguments.out)
    if not saved.is_whole_search:
        return str(saved)
    way = how_to_continue(Study.open(arguments.out).record)
    if way == RESUME:
        return f"{saved}\n\nResume: {shlex.join(['gputune', 'resume', arguments.out])}"
    return f"{saved}\n\n{way.capitalize()} with study={arguments.out!r} continues the search."
