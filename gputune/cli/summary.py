"""What is printed when a search has ended: what was understood, the best trials, the honest score, what to do next."""

import math
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gputune.api.study import Study
from gputune.cli.evaluation import HeldOut
from gputune.cli.study import SCORE_AND_ERROR, mean_words, pareto_text, study_measure, trial_rows
from gputune.data.arrays import ArrayLayout, Arrays
from gputune.data.source import Source
from gputune.data.table import Table
from gputune.methods.distributions import edge_remarks
from gputune.report.facts import seconds_text, states_of, states_text
from gputune.study.model import TunedModel
from gputune.study.study import Trial
from gputune.text import blocks, clean, count, paragraph, short
from gputune.views.scores import other_measures

BEST = 5
"""Trials in the table."""

_LABEL = 9


@dataclass(frozen=True)
class Ending:
    """A finished search: its input, its study, the rows it searched on, where the study and the model lie.

    ``held_out`` is the score on rows apart (None: all were used), ``model_folder`` None where no model was saved,
    ``seconds`` is the time of the whole run, ``ensemble`` what is said of one. ``trial`` is that of ``gputune train``,
    None after a search. ``ended`` is why a search was good enough before its last trial, ``typed`` are the words behind
    ``gputune``.
    """

    file: str
    study: Study
    rest: Source
    study_file: Path
    held_out: HeldOut | None = None
    model_folder: Path | None = None
    seconds: float = 0.0
    ensemble: str = ""
    trial: Trial | None = None
    ended: str = ""
    typed: Sequence[str] = ()


def ensemble_words(
    study: Study, model: TunedModel, held_out: HeldOut | None, best: HeldOut | None, *, is_saved: bool
) -> str:
    """Say what an ensemble is of, its score beside that of the best trial, and which of both is saved."""
    measure, members = study_measure(study), count(len(model.info["ensemble"]), "trial")
    text = f"An ensemble of {members} has a cross-validated {measure.name} of {measure.text(model.info['score'])}"
    if held_out is None or best is None or held_out.why or best.why:
        return f"{text} and is the model that is saved."
    scores = f"{measure.text(held_out.score)} on the held-out rows, the best trial alone {measure.text(best.score)}"
    saved = "ensemble" if is_saved else "best trial"
    text = f"{text}, and {scores}; the {saved} is saved, by these rows: its score there is a little optimistic."
    pairs = (held_out.interval, best.score), (best.interval, held_out.score)
    within = any(interval is not None and interval[0] <= score <= interval[1] for interval, score in pairs)
    if held_out.score != best.score and within:
        text += " One lies within 95 % of the other's bootstrap samples: the difference may be chance."
    return text


def summary_text(ending: Ending, *, width: int) -> str:
    """Return the lines that end ``gputune tune`` and ``train``."""
    trials = _best_trials(ending, width) if ending.trial is None else _one_trial(ending.study, ending.trial, width)
    parts = [_understood(ending, width), trials, _scores(ending, width)]
    return "\n\n".join([*parts, _whereabouts(ending, width)])


def stopped_text(ending: Ending, *, width: int) -> str:
    """Return what is there when Ctrl-C has ended ``gputune``: the table, and how to go on."""
    parts, places = [_understood(ending, width)], [*_trial_counts(ending, width)]
    if any(math.isfinite(trial.score) for trial in ending.study.trials):
        parts.append(_best_trials(ending, width))
    if ending.model_folder is not None:
        parts.append(_scores(ending, width))
        places += _model_and_next(ending.model_folder)
    return "\n\n".join([*parts, "\n".join([*places, _go_on(ending)])])


def _go_on(ending: Ending) -> str:
    return f"{'Go on':{_LABEL}}{clean(shlex.join(['gputune', *ending.typed]))}"


_ENDING = re.compile(r" --(?:timeout|target-score|patience-trials)[ =]\S+")
"""Flags that end a search before its last trial."""


def _understood(ending: Ending, width: int) -> str:
    record = ending.study.record
    held_out = (record.source or {}).get("held_out")
    apart = "" if held_out is None else f" and {held_out['rows']} held out"
    lines = [
        ("Data", f"{ending.file}: {record.fingerprint['rows']} rows to search on{apart}"),
        _inputs(ending),
        ("Task", _task(ending.study)),
        ("Search", _search(ending.study)),
        *_method(ending.study),
    ]
    return _label_lines([*lines, *(("Note", note) for note in record.notes)], width)


def _inputs(ending: Ending) -> tuple[str, str]:
    X = ending.rest.X
    if isinstance(X, Arrays):
        return "Inputs", str(ArrayLayout.of(X))
    kinds = Counter(X.kinds) if isinstance(X, Table) else {}
    named = ", ".join(count(number, kind) for kind, number in kinds.items())
    record = ending.study.record
    many = any(trial.params.get("numbers", record.numbers) != record.numbers for trial in ending.study.trials)
    rest = f" with numbers {record.numbers!r}" if many else ""
    return "Columns", f"{named}, made into {count(record.features, 'feature')}{rest}"


def _task(study: Study) -> str:
    classes, target = study.record.classes, clean(study.record.target)
    if study.record.task in ("multilabel", "custom"):
        kind = "several labels" if study.record.task == "multilabel" else "a target as it is"
        of_rows = study.record.task == "multilabel" and study.record.scoring == "accuracy"
        rule = "; accuracy is the share of rows of which all labels are right" if of_rows else ""
        return f"{kind}: predict {target!r}{rule}"
    if classes is None:
        return f"regression: predict the number {target!r}"
    shown = ", ".join(clean(name) for name in classes[:10])
    more = f" and {len(classes) - 10} more" if len(classes) > 10 else ""
    override = "" if isinstance(classes[0], str | bool) else " (--task regression takes them for numbers)"
    return f"{len(classes)} classes of {target!r}: {shown}{more}{override}"


def _search(study: Study) -> str:
    record = study.record
    size = f"{count(len(study.trials), 'trial')} x {count(record.folds, 'fold')}"
    if record.optimizer == "exact":
        return f"{record.model}, solved to convergence; {size}"
    rule = record.optimizer if record.schedule == "constant" else f"{record.optimizer}, {record.schedule}"
    return f"{clean(record.model)} trained with {rule}; {size} x {count(record.max_epochs, 'epoch')}"


def _method(study: Study) -> list[tuple[str, str]]:
    """What a search other than the random one did."""
    method = study.record.method
    if isinstance(method, str):
        return []
    if method["name"] == "hypergradient":
        return [("Descent", _descent(study, method["outer_steps"]))]
    if method["name"] == "optuna":
        halving = [("Halving", _pruning_text(study))] if method["halving"] else []
        return [("Sampler", _proposal_text(study, method["sampler"])), *halving]
    return [(method["name"].capitalize(), _pruning_text(study))]


def _proposal_text(study: Study, sampler: str) -> str:
    """How many trials Optuna's sampler proposed, in how many batches."""
    origins = [trial.origin for trial in study.trials if str(trial.origin).startswith("batch ")]
    number = len(set(origins))
    batches = f"{number} batch{'' if number == 1 else 'es'}"
    return f"Optuna's {clean(sampler)} proposed {count(len(origins), 'trial')} in {batches}"


def _pruning_text(study: Study) -> str:
    """The rungs at which trials left, and how much training that saved."""
    left = Counter(trial.detail["rung"] for trial in study.trials if trial.state == "pruned")
    if not left:
        return "no trial was pruned: there was no rung before the last epoch, or one trial alone"
    rungs = ", ".join(f"{number} after epoch {rung}" for rung, number in sorted(left.items()))
    spent, full = study.spent
    return (
        f"of {count(len(study.trials), 'trial')} these were pruned: {rungs}; {spent} of {full} trial-epochs were "
        f"trained ({spent / max(1, full):.0%})"
    )


def _descent(study: Study, outer_steps: int) -> str:
    """The starts and points of a search by hypergradients, and where the guard acted."""
    starts = sum(trial.origin[1] == 0 for trial in study.trials)
    steps = count(outer_steps, "outer step")
    text = f"on {', '.join(study.record.descended)} from {count(starts, 'start')}, at most {steps} each"
    guarded = study.guarded
    if guarded["chaotic"]:
        text += f"; the slope was noise at {count(guarded['chaotic'], 'point')}"
    if guarded["differences"]:
        text += f"; taken by wide finite differences at {count(guarded['differences'], 'point')}"
    return text


def _best_trials(ending: Ending, width: int) -> str:
    study = ending.study
    scored = _first_looks([trial for trial in study.ranking() if math.isfinite(trial.score)])
    finished = [trial for trial in scored if trial.state != "pruned"]
    shown = (finished or scored)[:BEST]  # a score that a pruned trial had early is no match for them
    begun = sum(trial.state != "waiting" for trial in study.trials)
    best = f"The best {len(shown)} of {begun} trials" if len(shown) > 1 else "The best trial"
    best += "" if finished else ", pruned as all with a score are,"
    title = f"{best} by {study_measure(study).title}, {mean_words(study, errors=study.record.folds > 1)}:"
    layout = ("trial", SCORE_AND_ERROR, "epoch") if study.record.max_epochs > 1 else ("trial", SCORE_AND_ERROR)
    others = other_measures(study)
    rows = trial_rows(shown, study_measure(study), [layout], width=width, indent="  ", others=others)
    pareto = pareto_text(study, width=width, most=BEST)
    return "\n\n".join(part for part in (paragraph(title, width), rows, pareto) if part)


def _one_trial(study: Study, trial: Trial, width: int) -> str:
    """Return the parameters of a trial, its score in every fold, and its curve."""
    measure, record = study_measure(study), study.record
    params = ", ".join(f"{clean(key)}={short(value)}" for key, value in trial.params.items())
    score = f"{measure.title} {measure.with_error(trial.score, trial.std_error)}"
    lines = [
        (f"Trial {trial.number}", params),
        ("Score", f"{score}, {mean_words(study, errors=math.isfinite(trial.std_error))}"),
        ("Folds", ", ".join(map(measure.text, trial.fold_scores))),
    ]
    if others := other_measures(study):
        scores = [f"{one.title} {one.text(trial.scores[name])}" for name, one in others.items()]
        lines.insert(2, ("Others", ", ".join(scores)))
    curve = study.curves[study.trials.index(trial)].mean(1)
    if record.max_epochs > 1:
        best = f"best {measure.text(trial.score)} after epoch {trial.best_epoch} of {record.max_epochs}"
        first, last = (measure.text(float(curve[epoch])) for epoch in (0, -1))
        lines.append(("Curve", f"{blocks(curve, width=40)} first {first}, last {last}, {best}"))
    return _label_lines(lines, width)


def _first_looks(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials without second looks: a start whose slope is noise is measured again where it stands."""
    seen: dict[str, Trial] = {}
    for trial in trials:
        place = trial.origin[0] if isinstance(trial.origin, tuple) else trial.number
        seen.setdefault(repr((place, sorted(trial.params.items()))), trial)
    return list(seen.values())


def _scores(ending: Ending, width: int) -> str:
    measure, score = study_measure(ending.study), ending.held_out
    bounds = score.bounds(measure) if score is not None else ""
    if score is None:
        text = "All rows were used, so no honest score is left; gputune tune --test-size keeps rows apart for one."
    elif score.why:
        text = f"There is no held-out {measure.name}: {clean(score.why)}."
    else:
        text = (
            f"Held-out {measure.title}: {measure.text(score.score)}, the saved model's own score on "
            f"{count(score.rows, 'row')} that nothing was fitted on"
            f"{f' (95 % of bootstrap samples: {bounds})' * bool(bounds)}."
        )
    if score is not None and score.unseen:
        verb = "counts" if score.unseen == 1 else "count"
        text += f" {count(score.unseen, 'row')} of a class that no row of the search has {verb} as wrong."
    about_best = (_unfinished_text(ending.study), *edge_remarks(ending.study)) if ending.trial is None else ()
    sentences = (text, _optimistic(ending), _without_model(ending.study), *map(clean, about_best))
    words = " ".join(sentence for sentence in sentences if sentence)
    return "\n\n".join(paragraph(part, width) for part in (words, clean(ending.ensemble)) if part)


def _without_model(study: Study) -> str:
    baseline = study.record.baseline
    if baseline is None:
        return ""
    score = study_measure(study).text(baseline["score"])
    return f"On the same folds {clean(baseline['answer'])} scores {score} without a model."


def _unfinished_text(study: Study) -> str:
    epochs = study.record.max_epochs
    if not study.record.descends and study.best_trial.best_epoch == epochs > 1:
        return f"It was best after the last of {epochs} epochs: more of them may be better."
    return ""


def _optimistic(ending: Ending) -> str:
    study, measure = ending.study, study_measure(ending.study)
    if ending.trial is not None:
        score = measure.text(ending.trial.score)
        by_epoch = f"The cross-validated {measure.name}, {score}, is that of the epoch that scored best on these folds."
        return by_epoch if study.record.max_epochs > 1 else ""
    best = f"The best cross-validated {measure.name}, {measure.text(study.best_score)}, is optimistic:"
    scored = sum(math.isfinite(trial.score) for trial in study.trials)
    if scored > 1:
        return f"{best} it is the best of {scored} trials on the folds that chose it."
    chosen = study.record.max_epochs > 1
    return f"{best} its epoch was chosen on the folds that scored it." if chosen else ""


def _whereabouts(ending: Ending, width: int) -> str:
    if ending.model_folder is None:
        study = clean(ending.study_file)
        places = [f"{'Next':{_LABEL}}gputune.Study.open({study!r}).best_model()"]
    else:
        places = _model_and_next(ending.model_folder)
    if any(trial.state == "waiting" for trial in ending.study.trials):
        places.append(_ENDING.sub("", _go_on(ending)))
    return "\n".join([*_trial_counts(ending, width), *places])


def _model_and_next(folder: Path) -> list[str]:
    model = clean(folder)
    return [f"{'Model':{_LABEL}}{model}", f"{'Next':{_LABEL}}gputune predict {shlex.quote(model)} FILE"]


def _trial_counts(ending: Ending, width: int) -> list[str]:
    """How many trials there are of each state, and their file."""
    states = states_text(states_of(ending.study))
    trials = _label_lines([("Trials", f"{states}; {seconds_text(ending.seconds)} in all")], width)
    # Not filled: a path must stay in one piece.
    ended = [_label_lines([("Ended", ending.ended)], width)] if ending.ended else []
    return [*ended, trials, f"{'Study':{_LABEL}}{clean(ending.study_file)}"]


def _label_lines(lines: list[tuple[str, str]], width: int) -> str:
    then = " " * _LABEL
    return "\n".join(paragraph(clean(text), width, first=f"{name:{_LABEL}}", then=then) for name, text in lines)
