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
from gputune.cli.flags import in_flags
from gputune.cli.held_out import HeldOut
from gputune.cli.saved_model import is_default_best, may_be_chance
from gputune.cli.study import SCORE_AND_ERROR, mean_words, pareto_text, trial_rows
from gputune.data.arrays import ArrayLayout, Arrays
from gputune.data.columns import Layout
from gputune.data.source import Source
from gputune.methods.edges import edge_remarks
from gputune.report.facts import params_text, seconds_text, states_of, states_text
from gputune.study.model import TunedModel
from gputune.study.study import Trial
from gputune.text import Measure, blocks, clean, count, paragraph
from gputune.views.default_trial import improvement_text
from gputune.views.scores import other_measures, score_view

# Number of trials in the table, and width of a label in letters.
_BEST = 5
_LABEL = 9


@dataclass(frozen=True)
class Ending:
    """A finished search and its results."""

    file: str  # the input, as it was typed
    study: Study
    rest: Source  # the rows of the search
    study_file: Path
    held_out: HeldOut | None = None  # score on held-out rows; None if no rows are held out
    model_folder: Path | None = None  # None if no model was saved
    seconds: float = 0.0  # of the whole run
    ensemble: str = ""  # the sentences about an ensemble
    model: TunedModel | None = None  # the model that was saved
    model_sentences: Sequence[str] = ()  # on its calibration and intervals
    comparison: str = ""  # with the default's model, on the held-out rows
    trial: Trial | None = None  # the trial of ``gputune train``; None after a search
    ended: str = ""  # why the search ended before its last trial
    typed: Sequence[str] = ()  # the arguments after ``gputune``


def ensemble_words(
    study: Study,
    model: TunedModel,
    held_out: HeldOut | None,
    best: HeldOut | None,
    *,
    is_saved: bool,
) -> str:
    """Return sentences on an ensemble: its members, its score compared with the best trial, its
    saving."""
    measure = score_view(study).measure
    members = count(len(model.info["ensemble"]), "trial")
    text = (
        f"An ensemble of {members} has a cross-validated {measure.name} of "
        f"{measure.text(model.info['score'])}"
    )
    if held_out is None or best is None or held_out.why or best.why:
        return f"{text} and is the model that is saved."
    of_default = " (the default configuration)" if is_default_best(study) else ""
    scores = (
        f"{measure.text(held_out.score)} on the held-out rows, the best trial alone{of_default} "
        f"{measure.text(best.score)}"
    )
    saved = "ensemble" if is_saved else "best trial"
    text = (
        f"{text}, and {scores}; the {saved} is saved, by these rows: its score there is a little "
        "optimistic."
    )
    if may_be_chance(held_out, best):
        text += " One lies within the other's 95% interval, so the difference may be chance."
    return text


def summary_text(ending: Ending, *, width: int) -> str:
    """Return the closing text of ``gputune tune`` and ``train``."""
    trials = (
        _best_trials(ending, width)
        if ending.trial is None
        else _one_trial(ending.study, ending.trial, width)
    )
    places = _places(ending, width)
    if ending.model_folder is None:
        places.append(
            _line("Next", f"gputune.Study.open({clean(ending.study_file)!r}).best_model()")
        )
    if any(trial.state == "waiting" for trial in ending.study.trials):
        places.append(_ENDING.sub("", _go_on(ending)))
    return "\n\n".join(
        [_understood(ending, width), trials, _scores(ending, width), "\n".join(places)]
    )


def stopped_text(ending: Ending, *, width: int) -> str:
    """Return the closing text after Ctrl-C: the table so far, and how to resume."""
    parts = [_understood(ending, width)]
    if any(math.isfinite(trial.score) for trial in ending.study.trials):
        parts.append(_best_trials(ending, width))
    if ending.model_folder is not None:
        parts.append(_scores(ending, width))
    return "\n\n".join([*parts, "\n".join([*_places(ending, width), _go_on(ending)])])


def _go_on(ending: Ending) -> str:
    """Return the line with the command that resumes the search."""
    return _line("Go on", shlex.join(["gputune", *ending.typed]))


def _line(name: str, text: object) -> str:
    """Return one line that is not wrapped, so that a path stays in one piece."""
    return f"{name:{_LABEL}}{clean(text)}"


def _places(ending: Ending, width: int) -> list[str]:
    """Return the number of trials by state, the files of the study and the model, and the next
    command."""
    states = states_text(states_of(ending.study))
    ended = [("Ended", ending.ended)] if ending.ended else []
    trials = _label_lines(
        [*ended, ("Trials", f"{states}; {seconds_text(ending.seconds)} in all")], width
    )
    lines = [trials, _line("Study", ending.study_file)]
    folder = ending.model_folder
    if folder is not None:
        lines += [
            _line("Model", folder),
            _line("Next", f"gputune predict {shlex.quote(clean(folder))} FILE"),
        ]
    return lines


def _label_lines(lines: list[tuple[str, str]], width: int) -> str:
    """Return lines with labels, wrapped to the width."""
    then = " " * _LABEL
    return "\n".join(
        paragraph(clean(text), width, first=f"{name:{_LABEL}}", then=then) for name, text in lines
    )


_ENDING = re.compile(r" --(?:timeout|target-score|patience-trials)[ =]\S+")
"""A regular expression for flags that end a search before its last trial."""


def _understood(ending: Ending, width: int) -> str:
    """Return the lines on data, inputs, task and search."""
    study = ending.study
    record = ending.study.record
    held_out = (record.source or {}).get("held_out")
    apart = "" if held_out is None else f" and {held_out['rows']} held out"
    size = f"{count(len(study.trials), 'trial')} x {count(record.folds, 'fold')}"
    rule = (
        record.optimizer
        if record.schedule == "constant"
        else f"{record.optimizer}, {record.schedule}"
    )
    trained = (
        f"{clean(record.model)} trained with {rule}; {size} x {count(record.max_epochs, 'epoch')}"
    )
    solved = f"{record.model}, solved to convergence; {size}"
    lines = [
        ("Data", f"{ending.file}: {record.fingerprint['rows']} rows to search on{apart}"),
        _inputs(ending),
        ("Task", _task(study)),
        ("Search", solved if record.optimizer == "exact" else trained),
        *_method(study),
        *(("Note", in_flags(note, kept={record.target})) for note in record.notes),
    ]
    return _label_lines(lines, width)


def _inputs(ending: Ending) -> tuple[str, str]:
    """Return the label and text about the inputs or columns."""
    X = ending.rest.X
    if isinstance(X, Arrays):
        return "Inputs", str(ArrayLayout.of(X))
    record = ending.study.record
    many = any(
        trial.params.get("numbers", record.numbers) != record.numbers
        for trial in ending.study.trials
    )
    rest = f" with numbers {record.numbers!r}" if many else ""
    features = f"made into {count(record.features, 'feature')}{rest}"
    layout = None if ending.model is None else ending.model.layout
    if not isinstance(layout, Layout):
        return "Columns", features
    # Only columns that the model reads. Constant columns and identifiers are left out.
    kinds = Counter(column.kind for column in layout.columns)
    named = ", ".join(count(number, kind) for kind, number in kinds.items())
    return "Columns", f"{named}, {features}"


def _task(study: Study) -> str:
    """Return the text about the task and the target."""
    record = study.record
    classes = study.record.classes
    target = clean(study.record.target)
    if record.task == "multilabel":
        rule = "; accuracy is the share of rows of which all labels are right" * (
            record.scoring == "accuracy"
        )
        return f"several labels: predict {target!r}{rule}"
    if record.task == "custom":
        return f"a target as it is: predict {target!r}"
    if classes is None:
        return f"regression: predict the number {target!r}"
    shown = ", ".join(clean(name) for name in classes[:10])
    more = f" and {len(classes) - 10} more" if len(classes) > 10 else ""
    override = (
        ""
        if isinstance(classes[0], str | bool)
        else " (if they are numbers, add --task regression)"
    )
    return f"{len(classes)} classes of {target!r}: {shown}{more}{override}"


def _method(study: Study) -> list[tuple[str, str]]:
    """Return the lines about the search method."""
    method = study.record.method
    if isinstance(method, str):
        return []
    if method["name"] == "hypergradient":
        return [("Method", _descent(study, method["outer_steps"]))]
    if method["name"] != "optuna":
        return [(method["name"].capitalize(), _pruning_text(study))]
    origins = [trial.origin for trial in study.trials if str(trial.origin).startswith("batch ")]
    batches = f"{len(set(origins))} batch{'' if len(set(origins)) == 1 else 'es'}"
    proposed = (
        f"Optuna's {clean(method['sampler'])} proposed {count(len(origins), 'trial')} in {batches}"
    )
    return [
        ("Sampler", proposed),
        *([("Halving", _pruning_text(study))] if method["halving"] else []),
    ]


def _pruning_text(study: Study) -> str:
    """Return the rungs at which trials were pruned, and the saved share of training."""
    left = Counter(trial.detail["rung"] for trial in study.trials if trial.state == "pruned")
    if not left:
        return "no trial was pruned: there was no rung before the last epoch, or one trial alone"
    rungs = ", ".join(f"{number} after epoch {rung}" for rung, number in sorted(left.items()))
    trials, (spent, full) = count(len(study.trials), "trial"), study.spent
    share = f"{spent} of {full} trial-epochs were trained ({spent / max(1, full):.0%})"
    return f"of {trials} these were pruned: {rungs}; {share}"


def _descent(study: Study, outer_steps: int) -> str:
    """Return the text about a hypergradient search."""
    n_starts = sum(trial.origin[1] == 0 for trial in study.trials)
    guarded = study.guarded
    on = ", ".join(study.record.changed_hyperparameters)
    steps = count(outer_steps, "outer step")
    text = (
        f"hypergradient search on {on} from {count(n_starts, 'starting point')}, at most {steps} "
        "each"
    )
    for acted, words in (
        ("chaotic", "the slope was noise"),
        ("differences", "taken by wide finite differences"),
    ):
        text += f"; {words} at {count(guarded[acted], 'point')}" * (guarded[acted] > 0)
    return text


def _best_trials(ending: Ending, width: int) -> str:
    """Return the table of the best trials."""
    study = ending.study
    measure = score_view(ending.study).measure
    record = ending.study.record
    # Repeated points are left out. A start whose slope is noise is measured again at the same
    # point.
    looks: dict[str, Trial] = {}
    for trial in study.ranking():
        if math.isfinite(trial.score):
            place = trial.origin[0] if isinstance(trial.origin, tuple) else trial.number
            looks.setdefault(repr((place, sorted(trial.params.items()))), trial)
    finished = [trial for trial in looks.values() if trial.state != "pruned"]
    # The early score of a pruned trial cannot be compared with the scores of the others.
    shown = (finished or list(looks.values()))[:_BEST]
    begun = sum(trial.state != "waiting" for trial in study.trials)
    best = f"The best {len(shown)} of {begun} trials" if len(shown) > 1 else "The best trial"
    best += "" if finished else ", pruned as all with a score are,"
    title = f"{best} by {measure.title}, {mean_words(study, errors=record.folds > 1)}:"
    layout = ("trial", SCORE_AND_ERROR, *["epoch"] * (record.max_epochs > 1))
    rows = trial_rows(study, shown, [layout], width=width, indent="  ")
    pareto = pareto_text(study, width=width, most=_BEST)
    return "\n\n".join(part for part in (paragraph(title, width), rows, pareto) if part)


def _one_trial(study: Study, trial: Trial, width: int) -> str:
    """Return the parameters of a trial, its score in every fold, and its curve."""
    measure = score_view(study).measure
    record = study.record
    score = f"{measure.title} {measure.with_error(trial.score, trial.std_error)}"
    lines = [
        (f"Trial {trial.number}", params_text(trial)),
        ("Score", f"{score}, {mean_words(study, errors=math.isfinite(trial.std_error))}"),
    ]
    if others := [
        f"{one.title} {one.text(trial.scores[name])}" for name, one in other_measures(study).items()
    ]:
        lines.append(("Others", ", ".join(others)))
    lines.append(("Folds", ", ".join(map(measure.text, trial.fold_scores))))
    if record.max_epochs > 1:
        curve = study.curves[study.trials.index(trial)].mean(1)
        best = (
            f"best {measure.text(trial.score)} after epoch {trial.best_epoch} of "
            f"{record.max_epochs}"
        )
        first, last = (measure.text(float(curve[epoch])) for epoch in (0, -1))
        lines.append(("Curve", f"{blocks(curve, width=40)} first {first}, last {last}, {best}"))
    return _label_lines(lines, width)


def _scores(ending: Ending, width: int) -> str:
    """Return the sentences about the scores of the search and the saved model."""
    study = ending.study
    measure = score_view(ending.study).measure
    score = ending.held_out
    if score is None:
        text = (
            "All rows were used, so no honest score is left; gputune tune --test-size keeps rows "
            "apart for one."
        )
    elif score.why:
        text = f"There is no held-out {measure.name}: {clean(score.why)}."
    else:
        text = (
            f"Held-out {measure.title}: {measure.text(score.score)}, the saved model's own score "
            "on "
        )
        text += f"{count(score.rows, 'row')} {_use_of(score)}{score.interval_text(measure)}."
    sentences = [text]
    if score is not None and score.unseen:
        verb = "counts" if score.unseen == 1 else "count"
        sentences.append(
            f"{count(score.unseen, 'row')} of a class that no row of the search has {verb} as "
            "wrong."
        )
    if score is not None and score.baseline is not None:
        answer, baseline_score = score.baseline
        sentences.append(
            f"On these rows {clean(answer)} scores {measure.text(baseline_score)} without a model."
        )
    sentences.append(_optimistic(study, measure, ending.trial))
    if (baseline := study.record.baseline) is not None:
        without = measure.text(baseline["score"])
        sentences.append(
            f"On the same folds {clean(baseline['answer'])} scores {without} without a model."
        )
    if ending.trial is None:
        sentences.append(improvement_text(study))
        epochs = study.record.max_epochs
        if not study.record.is_hypergradient and study.best_trial.best_epoch == epochs > 1:
            sentences.append(
                f"It was best after the last of {epochs} epochs: more of them may be better."
            )
        sentences += map(clean, edge_remarks(study))
    words = " ".join(sentence for sentence in sentences if sentence)
    model_text = " ".join(sentence for sentence in ending.model_sentences if sentence)
    parts = (words, clean(ending.comparison), clean(ending.ensemble), model_text)
    return "\n\n".join(paragraph(part, width) for part in parts if part)


def _use_of(score: HeldOut) -> str:
    """Return words on the use of the held-out rows, to follow their number."""
    if score.chose:
        return "that nothing was fitted on, but that chose between the ensemble and the best trial"
    return "that nothing was fitted on"


def _optimistic(study: Study, measure: Measure, trial: Trial | None) -> str:
    """Return a sentence that explains why the cross-validated score is optimistic, or "" if it is
    not."""
    chosen = study.record.max_epochs > 1
    if trial is not None:
        score = f"The cross-validated {measure.name}, {measure.text(trial.score)}"
        return f"{score}, is that of the epoch that scored best on these folds." * chosen
    best = (
        f"The best cross-validated {measure.name}, {measure.text(study.best_score)}, is optimistic:"
    )
    scored = sum(math.isfinite(trial.score) for trial in study.trials)
    if scored > 1:
        return f"{best} it is the best of {scored} trials on the folds that chose it."
    return f"{best} its epoch was chosen on the folds that scored it." * chosen
