"""The text at the end of a search: the data, the best trials, the held-out score and the next
steps."""

import math
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gputune.api.study import Study
from gputune.cli.flags import CommandLine
from gputune.cli.held_out import HeldOut, is_default_best, may_be_chance
from gputune.cli.study import SCORE_AND_ERROR, mean_words, pareto_text, trial_rows
from gputune.data.arrays import ArrayLayout, Arrays
from gputune.data.columns import Layout
from gputune.data.kinds import may_be_numbers
from gputune.data.source import Source
from gputune.ground.text import Measure, blocks, clean, count, paragraph
from gputune.report.facts import params_text, seconds_text, states_text
from gputune.spaces.edges import edge_remarks
from gputune.study.model import TunedModel
from gputune.study.study import Trial
from gputune.tuning.method import method_class
from gputune.views.default_trial import (
    NO_IMPROVEMENT,
    DefaultTrial,
    default_trial,
    shorter_training,
)
from gputune.views.scores import other_measures, score_view


@dataclass(frozen=True)
class Ending:
    """A finished search and its results, for the text that a command prints at its end."""

    file: str  # the input, as it was typed
    study: Study
    rest: Source | None  # the rows of the search; None for a custom training loop
    study_file: Path
    layout: Layout | ArrayLayout | None = None  # what the model reads; None without a model
    held_out: HeldOut | None = None  # score on held-out rows; None if no rows are held out
    default_held_out: HeldOut | None = None  # of the default's model, if it was trained too
    model_folder: Path | None = None  # None if no model was saved
    seconds: float = 0.0  # of the whole run
    ensemble: str = ""  # the sentences about an ensemble
    model: TunedModel | None = None  # the model that was saved
    model_sentences: Sequence[str] = ()  # on its calibration and intervals
    comparison: str = ""  # a remark on the comparison with the default's model
    trial: Trial | None = None  # the trial of ``gputune train``; None after a search
    ended: str = ""  # why the search ended before its last trial
    typed: Sequence[str] = ()  # the arguments after ``gputune``


# Number of trials in the table, and width of a label in letters.
_BEST = 5
_LABEL = 9


def ensemble_text(
    study: Study,
    model: TunedModel,
    held_out: HeldOut | None,
    best: HeldOut | None,
    *,
    is_saved: bool,
) -> str:
    """Return sentences on an ensemble: its members, its score next to the best trial's, and its
    file."""
    measure = score_view(study).measure
    members = count(len(model.info["ensemble"]), "trial")
    text = (
        f"An ensemble of {members} has a cross-validated {measure.name} of "
        f"{measure.text(model.info['score'])}"
    )
    if held_out is None or best is None or held_out.reason or best.reason:
        return f"{text} and is saved as the model."
    trial = (
        "the best trial (the default configuration)" if is_default_best(study) else "the best trial"
    )
    saved = "ensemble" if is_saved else "best trial"
    text = (
        f"{text}. On the held-out rows it scores {measure.text(held_out.score)}, and {trial} "
        f"scores {measure.text(best.score)}. The {saved} is saved. These rows chose the saved "
        "model, so its score on them is a little optimistic."
    )
    if may_be_chance(held_out, best):
        text += " One score lies within the other's 95% interval, so the difference may be chance."
    return text


def summary_text(ending: Ending, *, width: int) -> str:
    """Return the text that ``gputune tune`` and ``train`` print at the end."""
    if ending.trial is None:
        trials = _best_trials(ending, width)
    else:
        trials = _one_trial(ending.study, ending.trial, width)
    places = _places(ending, width)
    if ending.model_folder is None:
        call = f"gputune.Study.open({clean(ending.study_file)!r}).best_model()"
        places.append(_line("Next", call))
    if any(trial.state == "waiting" for trial in ending.study.trials):
        places.append(_ENDING.sub("", _go_on(ending)))
    parts = [_understood(ending, width), trials, _scores(ending, width), "\n".join(places)]
    return "\n\n".join(parts)


def stopped_text(ending: Ending, *, width: int) -> str:
    """Return the text after Ctrl-C: the best trials so far, and the command that resumes the
    search."""
    parts = [_understood(ending, width)]
    if any(math.isfinite(trial.score) for trial in ending.study.trials):
        parts.append(_best_trials(ending, width))
    if ending.model_folder is not None:
        parts.append(_scores(ending, width))
    return "\n\n".join([*parts, "\n".join([*_places(ending, width), _go_on(ending)])])


def _go_on(ending: Ending) -> str:
    """Return the line with the command that resumes the search."""
    return _line("Resume", shlex.join(["gputune", *ending.typed]))


def _line(name: str, text: object) -> str:
    """Return a label and its text as one line without wrapping, so that a path stays in one
    piece."""
    return f"{name:{_LABEL}}{clean(text)}"


def _places(ending: Ending, width: int) -> list[str]:
    """Return the lines with the count of trials by state, the paths of study and model, and the
    next command."""
    states = states_text(ending.study)
    facts = [("Ended", ending.ended)] if ending.ended else []
    facts.append(("Trials", f"{states}; this command took {seconds_text(ending.seconds)}"))
    lines = [label_lines(facts, width), _line("Study", ending.study_file)]
    folder = ending.model_folder
    if folder is not None:
        lines.append(_line("Model", folder))
        command = f"gputune predict {shlex.quote(clean(folder))} FILE"
        if "path" in ending.study.record.spec:
            command = f"{command} --module FILE.py:NAME"
        lines.append(_line("Next", command))
    return lines


def label_lines(lines: list[tuple[str, str]], width: int) -> str:
    """Return the text of lines with labels, wrapped to the width."""
    then = " " * _LABEL
    return "\n".join(
        paragraph(clean(text), width, first=f"{name:{_LABEL}}", then=then) for name, text in lines
    )


_ENDING = re.compile(r" --(?:timeout|target-score|patience-trials)[ =]\S+")
"""A regular expression for flags that end a search before its last trial."""


def _understood(ending: Ending, width: int) -> str:
    """Return the first lines of the text at the end: data, inputs, task, search, method and
    notes."""
    method = ending.study.record.method
    lines = facts(ending)
    if not isinstance(method, str):
        lines += method_class(method["name"]).summary(ending.study)
    lines += notes_on(ending.study)
    return label_lines(lines, width)


def facts(ending: Ending) -> list[tuple[str, str]]:
    """Return (label, text) pairs about the data, the inputs, the task and the search."""
    study = ending.study
    record = ending.study.record
    data = f"{ending.file}: {record.fingerprint['rows']} rows to search on"
    held_out = (record.source or {}).get("held_out")
    if held_out is not None:
        data = f"{data} and {held_out['rows']} held out"
    size = f"{count(len(study.trials), 'trial')} x {count(record.folds, 'fold')}"
    if record.n_ens > 1:
        size = f"{size} x {record.n_ens} networks"
    if record.optimizer == "exact":
        training = f"{record.model}, solved to convergence; {size}"
    else:
        rule = record.optimizer
        if record.schedule != "constant":
            rule = f"{rule}, {record.schedule}"
        epochs = count(record.max_epochs, "epoch")
        training = f"{clean(record.model)} trained with {rule}; {size} x {epochs}"
    return [
        ("Data", data),
        _inputs(ending),
        ("Task", _task(study)),
        ("Search", training),
    ]


def notes_on(study: Study) -> list[tuple[str, str]]:
    """Return the labeled notes of a study on its columns and trials."""
    return [("Note", CommandLine().render(note)) for note in study.record.notes]


def _inputs(ending: Ending) -> tuple[str, str]:
    """Return the (label, text) pair about the inputs of the model."""
    assert ending.rest is not None  # only ``gputune search`` has no rows
    X = ending.rest.X
    if isinstance(X, Arrays):
        return "Inputs", str(ArrayLayout.of(X))
    record = ending.study.record
    scaling = ""
    scalings = {trial.params.get("numbers", record.numbers) for trial in ending.study.trials}
    if scalings - {record.numbers}:  # other scalings give other numbers of features
        scaling = f" with numbers {record.numbers!r}"
    if not isinstance(ending.layout, Layout):
        return "Features", f"{record.features:,}{scaling}"
    # Only columns that the model reads. Constant columns and identifiers are left out.
    kinds = Counter(column.kind for column in ending.layout.columns)
    columns = ", ".join(count(number, kind) for kind, number in kinds.items())
    return "Columns", f"{columns}, made into {count(record.features, 'feature')}{scaling}"


def _task(study: Study) -> str:
    """Return the text about the task, the target and its classes."""
    record = study.record
    classes = study.record.classes
    target = clean(study.record.target)
    if record.task == "multilabel":
        text = f"several labels: predict {target!r}"
        if record.scoring == "accuracy":
            text = f"{text}; accuracy is the share of rows with only correct labels"
        return text
    if record.task == "custom":
        return f"an unchanged target: predict {target!r}"
    if classes is None:
        return f"regression: predict the number {target!r}"
    text = f"{len(classes)} classes of {target!r}: {', '.join(map(clean, classes[:10]))}"
    if len(classes) > 10:
        text = f"{text} and {len(classes) - 10} more"
    if may_be_numbers(classes, record.fingerprint["rows"]):
        text = f"{text} (if they are numbers, add --task regression)"
    return text


def _best_trials(ending: Ending, width: int) -> str:
    """Return a table of the best trials for the text at the end."""
    study = ending.study
    measure = score_view(ending.study).measure
    record = ending.study.record
    # Repeated points are left out. A start whose slope is noise is measured again at the same
    # point.
    points: dict[str, Trial] = {}
    for trial in study.ranking():
        if math.isfinite(trial.score):
            start = trial.origin[0] if isinstance(trial.origin, tuple) else trial.number
            points.setdefault(repr((start, sorted(trial.params.items()))), trial)
    finished = [trial for trial in points.values() if trial.state != "pruned"]
    # The early score of a pruned trial cannot be compared with the scores of the others.
    best = (finished or list(points.values()))[:_BEST]
    n_begun = sum(trial.state != "waiting" for trial in study.trials)
    title = f"The best {len(best)} of {n_begun} trials" if len(best) > 1 else "The best trial"
    if not finished:
        title = f"{title}, pruned like all trials with a score,"
    title = f"{title} by {measure.title}, {mean_words(study, errors=record.folds > 1)}:"
    layout = ["trial", SCORE_AND_ERROR]
    if record.max_epochs > 1:
        layout.append("epoch")
    rows = trial_rows(study, best, [layout], width=width, indent="  ")
    pareto = pareto_text(study, width=width, most=_BEST)
    return "\n\n".join(filter(None, (paragraph(title, width), rows, pareto)))


def _one_trial(study: Study, trial: Trial, width: int) -> str:
    """Return the parameters of a trial, its score in every fold, and its curve."""
    measure = score_view(study).measure
    record = study.record
    score = f"{measure.title} {measure.with_error(trial.score, trial.std_error)}"
    lines = [
        (f"Trial {trial.number}", params_text(trial)),
        ("Score", f"{score}, {mean_words(study, errors=math.isfinite(trial.std_error))}"),
    ]
    others = []
    for name, other in other_measures(study).items():
        others.append(f"{other.title} {other.text(trial.scores[name])}")
    if others:
        lines.append(("Others", ", ".join(others)))
    lines.append(("Folds", ", ".join(map(measure.text, trial.fold_scores))))
    if record.max_epochs > 1:
        curve = study.curves[study.trials.index(trial)].mean(1)
        text = (
            f"{blocks(curve, width=40)} first {measure.text(float(curve[0]))}, last "
            f"{measure.text(float(curve[-1]))}, best {measure.text(trial.score)} after epoch "
            f"{trial.best_epoch} of {record.max_epochs}"
        )
        lines.append(("Curve", text))
    return label_lines(lines, width)


def _scores(ending: Ending, width: int) -> str:
    """Return the scores, the warnings about these scores, and notes on the saved model."""
    remarks = [("Warning", warning) for warning in score_warnings(ending)]
    notes = (ending.comparison, ending.ensemble, *ending.model_sentences)
    remarks += [("Note", note) for note in notes if note]
    parts = [scores_block(ending, width)]
    if remarks:
        parts.append(label_lines(remarks, width))
    return "\n\n".join(parts)


@dataclass(frozen=True)
class _Line:
    """A line with one score: its name, its value, and a remark."""

    name: str
    value: str
    remark: str


def scores_block(ending: Ending, width: int) -> str:
    """Return the scores for the closing text, one aligned line for each score."""
    measure = score_view(ending.study).measure
    lines = [*_held_out(ending, measure), *_cross_validated(ending, measure)]
    longest = max(len(line.name) for line in lines)
    widest = max(len(line.value) for line in lines)
    texts = [f"Scores   {measure.title}"]
    for line in lines:
        first = f"  {line.name:{longest}}  {line.value:>{widest}}  "
        texts.append(paragraph(line.remark, width, first=first, then=" " * len(first)))
    return "\n".join(texts)


def score_warnings(ending: Ending) -> list[str]:
    """Return the warnings about the scores, one or two sentences each."""
    study = ending.study
    warnings = []
    score = ending.held_out
    if score is not None and score.unseen:
        verb = "counts" if score.unseen == 1 else "count"
        warnings.append(
            f"{count(score.unseen, 'row')} of a class that no row of the search has {verb} as "
            "wrong."
        )
    if ending.trial is not None:
        return warnings
    default = _compared_default(ending)
    if default is not None:
        warnings.append(NO_IMPROVEMENT if default.improvement <= 0 else shorter_training(default))
    epochs = study.record.max_epochs
    if not study.record.is_hypergradient and study.best_trial.best_epoch == epochs > 1:
        warnings.append(
            f"The best trial was best after the last of {epochs} epochs, so more epochs may be "
            "better."
        )
    warnings += map(clean, edge_remarks(study))
    return [warning for warning in warnings if warning]


def _held_out(ending: Ending, measure: Measure) -> list[_Line]:
    """Return the lines with the scores on held-out rows."""
    score = ending.held_out
    if score is None:
        remark = (
            "All rows were used, so there is no unbiased score. To get an unbiased score, hold "
            "rows out with gputune tune --test-size."
        )
        return [_Line("held-out", "-", remark)]
    if score.reason:
        remark = f"There is no held-out {measure.name}: {clean(score.reason)}."
        lines = [_Line("held-out", "-", remark)]
    else:
        rows = f"the saved model on {count(score.rows, 'row')} that nothing was fitted on"
        if score.chose:
            rows = f"{rows}, but these rows chose between the ensemble and the best trial"
        lines = [_with_interval("held-out", score, measure, rows)]
    default = ending.default_held_out
    if default is not None and not default.reason:
        remark = "the default configuration, also trained on all rows"
        lines.append(_with_interval("  default", default, measure, remark))
    if score.baseline is not None:
        answer, baseline = score.baseline
        remark = f"{clean(answer)} on these rows, without a model"
        lines.append(_Line("  baseline", measure.text(baseline), remark))
    return lines


def _with_interval(name: str, score: HeldOut, measure: Measure, remark: str) -> _Line:
    """Return a line of a held-out score with its interval."""
    return _Line(name, measure.text(score.score), f"{remark}{score.interval_text(measure)}")


def _cross_validated(ending: Ending, measure: Measure) -> list[_Line]:
    """Return the lines with the cross-validated scores of the search."""
    study = ending.study
    best = study.best_score if ending.trial is None else ending.trial.score
    lines = [_Line("cross-validated", measure.text(best), _optimistic(ending))]
    default = _compared_default(ending)
    if default is not None:
        n_folds = len(default.fold_scores)
        where = "on the same folds" if n_folds > 1 else "on the same rows"
        remark = f"the default configuration (trial {default.number}) {where}"
        lines.append(_Line("  default", measure.text(default.score), remark))
        if default.improvement > 0:
            remark = "over the default"
            if math.isfinite(default.improvement_std_error):
                error = measure.size(default.improvement_std_error)
                folds = count(n_folds, "fold")
                remark = f"± {error} {remark} (paired standard error over {folds})"
            value = measure.size(default.improvement)
            lines.append(_Line("  improvement", value, remark))
    baseline = study.record.baseline
    if baseline is not None:
        remark = f"{clean(baseline['answer'])} on the same folds, without a model"
        lines.append(_Line("  baseline", measure.text(baseline["score"]), remark))
    return lines


def _compared_default(ending: Ending) -> DefaultTrial | None:
    """Return the trial with the default configuration, or None if it has no other trial to
    compare."""
    default = default_trial(ending.study) if ending.trial is None else None
    return default if default is not None and default.text else None


def _optimistic(ending: Ending) -> str:
    """Return the remark on the cross-validated score, which is often optimistic."""
    study = ending.study
    chose_epoch = study.record.max_epochs > 1
    n_scored = sum(math.isfinite(trial.score) for trial in study.trials)
    if ending.trial is not None and chose_epoch:
        return "at the epoch that scored best on these folds, so optimistic"
    if ending.trial is None and n_scored > 1:
        return f"the best of {n_scored} trials on the folds that chose it, so optimistic"
    if ending.trial is None and chose_epoch:
        return "its epoch was chosen on the folds that scored it, so optimistic"
    folds = study.record.folds or study.curves.shape[2]
    return f"mean over {count(folds, 'fold')}"
