"""The texts of the report: facts at its top, options of the search, and endings of the trials."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gputune.errors import TOO_BIG, InputError
from gputune.scratch import no_folder
from gputune.study.record import has_form
from gputune.study.rows import TrialState
from gputune.study.store import States
from gputune.study.study import Study, Trial, best_trial
from gputune.text import Measure, clean, count, short
from gputune.types import Json
from gputune.views.default_trial import (
    NO_IMPROVEMENT,
    default_trial,
    improvement_text,
    shorter_training,
)
from gputune.views.scores import score_view

STATES: dict[TrialState, str] = {
    "complete": "complete",
    "pruned": "pruned",
    "stopped": "cut short",
    "failed": "diverged",
    "waiting": "waiting",
}

_RAISED = "that raised an error"
_TOO_BIG = "too big for the memory"
_LOST = "that lost their workers"

FAILED = 20  # number of failed trials that are listed

MODEL_INFO = {
    "held_out_score?": (float, None),
    "held_out_rows?": int,
    "held_out_chose?": bool,
    "held_out_baseline?": {"answer": str, "score": float},
}
"""The form of the entries that the report reads from a saved model's ``info``."""


Fact = tuple[str, str, str]
"""The name of a fact, its number and a note."""


def score_facts(study: Study, model: Json | None) -> list[Fact]:
    """Return the facts on the best score. ``model`` is the ``info`` of the study's tuned model."""
    record = study.record
    best = best_trial(study)
    if best is None:
        return []
    measure = score_view(study).measure
    if record.face == "loop":
        return [(f"best {measure.title}", measure.text(best.score), f"trial {best.number}")]
    added = " ± standard error" * math.isfinite(best.std_error)
    note = f"trial {best.number}, mean{added} over {count(len(best.fold_scores), 'fold')}"
    score = measure.with_error(best.score, best.std_error)
    return [
        (f"best cross-validated {measure.title}", score, note),
        _held_out_fact(study, model, measure),
        *_improvement_facts(study, measure),
    ]


def search_facts(study: Study) -> list[Fact]:
    """Return the facts on the search: the score without a model, trials, time and device."""
    record = study.record
    facts = []
    if (baseline := record.baseline) is not None and best_trial(study) is not None:
        measure = score_view(study).measure
        facts.append(
            ("without a model", measure.text(baseline["score"]), clean(baseline["answer"]))
        )
    facts.append(("trials", str(len(study.trials)), states_text(states_of(study))))
    facts.append(_time_fact(study))
    if record.device:
        facts.append(("device", clean(record.device), clean(record.dtype)))
    return facts


def _time_fact(study: Study) -> Fact:
    """Return the fact on the training time."""
    seconds = sum(trial.seconds for trial in study.trials if math.isfinite(trial.seconds))
    trained, whole = study.spent
    note = "added up over all trials"
    if study.record.face != "sklearn" and 0 < trained < whole:
        note += f", which trained for {trained} of {whole} epochs"
    return "training time", seconds_text(seconds), note


def eligible_text(study: Study) -> str:
    """Return a text on the trials that can be the best one, or "" if all trials can be."""
    pruned = sum(trial.state == "pruned" for trial in study.trials)
    if not pruned:
        return ""
    if score_view(study).eligible[np.isfinite(study.scores)].all():
        return "Every trial with a score was pruned, so each of them can be the best trial."
    trials = "1 trial was" if pruned == 1 else f"{pruned} trials were"
    return (
        f"{trials} pruned and cannot be the best trial, even with a higher score: that score is "
        "from the epochs before the pruning. The column “eligible” says which trials can be the "
        "best one."
    )


def _improvement_facts(study: Study, measure: Measure) -> list[tuple[str, str, str]]:
    """Return the fact that says whether tuning helped, or [] without a default to compare with."""
    text = improvement_text(study)
    default = default_trial(study)
    if default is None or not text:
        return []
    name = "improvement over the default"
    if text == NO_IMPROVEMENT:
        return [(name, "none", text)]
    default_score = measure.text(default.score)
    best_score = measure.text(default.best_score)
    notes = [
        f"the default, trial {default.number}, scores {default_score}, the best trial {best_score}"
    ]
    improvement = measure.size(default.improvement)
    if math.isfinite(default.improvement_std_error):
        improvement += f" ± {measure.size(default.improvement_std_error)}"
        notes.append(f"± paired standard error over {count(len(default.fold_scores), 'fold')}")
    note = "; ".join(notes)
    if remark := shorter_training(default):
        note = f"{note}. {remark}"
    return [(name, improvement, note)]


def _held_out_fact(study: Study, model: Json | None, measure: Measure) -> tuple[str, str, str]:
    """Return the fact on the held-out score."""
    tried = int(np.isfinite(study.scores).sum())
    name = f"held-out {measure.name}"
    optimistic = f"the best of {tried} is optimistic" if tried > 1 else "the folds chose the epoch"
    score = None if model is None else model.get("held_out_score")
    if model is None or score is None or not math.isfinite(score):
        return name, "–", f"not known here; {optimistic}"
    rows = count(model["held_out_rows"], "row")
    members = model.get("ensemble")
    what = (
        "the model"
        if members is None
        else f"an ensemble of {count(len(members), 'trial')}, which is the model,"
    )
    note = f"{what} on {rows} nothing was fitted on"
    # Models of earlier versions do not record whether the rows chose them. An ensemble with a
    # held-out score was always chosen by them.
    if model.get("held_out_chose", members is not None):
        other = "an ensemble" if members is None else "the best trial"
        note += f", but they chose it over {other}, so its score is a little optimistic"
    if (baseline := model.get("held_out_baseline")) is not None:
        note += f"; without a model {measure.text(baseline['score'])} ({clean(baseline['answer'])})"
    return name, measure.text(score), f"{note}; {optimistic}"


def is_its_model(study: Study, model: Json) -> bool:
    """Return whether the ``info`` of a model belongs to this study's best trial and to its rows."""
    best = best_trial(study)
    rows = study.record.fingerprint
    scoring = study.record.scoring
    if best is None or model.get("scoring", scoring) != scoring:
        return False
    same = "ensemble" in model or (model.get("params"), model.get("score")) == (
        best.params,
        best.score,
    )
    # Models of earlier versions do not record the rows that they were trained on.
    return same and bool(model.get("fingerprint", rows) == rows)


def read_model_info(study: Study, folder: Path) -> Json | None:
    """Return the info of the model next to a study, or None if it does not belong to the best
    trial."""
    from gputune.study.model_files import DESCRIPTION, file_errors, read_description

    if not (folder / DESCRIPTION).is_file():
        return None
    with file_errors(folder / DESCRIPTION):
        info: Json = read_description(folder / DESCRIPTION)["info"]
        if not has_form(info, MODEL_INFO):
            raise ValueError("its info is of another type")
    return info if is_its_model(study, info) else None


def states_of(study: Study) -> States:
    """Return the state and detail of each trial, in the form of a study file's counts."""
    return [(trial.state, trial.detail, 1) for trial in study.trials]


def seconds_text(seconds: float) -> str:
    """Return a time in at most two units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def setting(study: Study) -> list[tuple[str, str]]:
    """Return the names and values of the search's options."""
    record = study.record
    classes = study.record.classes or ()
    method = study.record.method
    shown = f"{', '.join(map(str, classes[:12]))}{', …' if len(classes) > 12 else ''}"
    rows = [
        ("data", (record.source or {}).get("path")),
        ("rows", record.fingerprint.get("rows")),
        ("features", record.features or None),
        ("target", record.target),
        ("task", record.task),
        ("target_transform", _transform(record.target_transform)),
        ("classes", f"{len(classes)}: {shown}" if classes else None),
        ("loss", record.objective),
        ("positive class", record.positive),
        ("model", record.model),
        ("optimizer", record.optimizer),
        ("schedule", record.schedule),
        (
            "method",
            method if isinstance(method, str) else f"{method.get('name')}: {_options(method)}",
        ),
        ("space", record.space),
        ("folds", record.folds or None),
        ("epochs", record.max_epochs or None),
        ("seed", record.seed),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
    ]
    return [(name, clean(value)) for name, value in rows if value is not None and value != ""]


def _transform(recorded: str | Json | None) -> object:
    """Return the text of a recorded target transformation."""
    if not isinstance(recorded, Mapping) or "params" not in recorded:
        return recorded if recorded is None or isinstance(recorded, str) else recorded.get("object")
    return f"{recorded['class']}({', '.join(f'{key}={value!r}' for key, value in recorded['params'].items())})"


def _options(options: Json) -> str:
    """Return the options of a method as text, without its name.

    A sampler's halving has its own options in parentheses.
    """
    texts = {
        key: f"({_options(one)})" if isinstance(one, dict) else short(one)
        for key, one in options.items()
    }
    return ", ".join(
        f"{key}={text}" for key, text in texts.items() if key != "name" and options[key] is not None
    )


def states_text(states: States) -> str:
    """Return the number of trials of each state. Failed trials are counted by their reason."""
    counts: Counter[str] = Counter(dict.fromkeys([*STATES.values(), _RAISED, _TOO_BIG, _LOST], 0))
    for state, detail, number in states:
        if "error" in detail:
            counts[_RAISED] += number
        elif "reason" in detail:
            counts[_TOO_BIG if str(detail["reason"]).startswith(TOO_BIG) else _LOST] += number
        else:
            counts[STATES.get(state, state)] += number
    return ", ".join(f"{number} {words}" for words, number in counts.items() if number) or "none"


def params_text(trial: Trial, between: str = ", ", equals: str = "=") -> str:
    """Return the hyperparameters of a trial as one text."""
    return between.join(
        f"{clean(name)}{equals}{short(value)}" for name, value in trial.params.items()
    )


def why_failed(study: Study, trial: Trial) -> str:
    """Return the reason why a trial failed."""
    why = trial.detail.get("error", trial.detail.get("reason"))
    if why is None and study.record.face == "loop":
        why = "a NaN or infinite score was returned or reported"
    return clean(f"diverged in epoch {trial.best_epoch + 1}" if why is None else why)


def endings(study: Study) -> Json:
    """Return the data of the report's section on how trials ended."""
    trials = study.trials
    counts = Counter(trial.state for trial in study.trials)
    failed = [trial for trial in trials if trial.state == "failed"]
    pruned = Counter(t.detail["rung"] for t in trials if t.state == "pruned" and "rung" in t.detail)
    trained = (
        (~np.isnan(study.curves)).any(2).sum(1) if study.curves.size else np.zeros(0, dtype=int)
    )
    return {
        # Each row: state, its text, number of trials, share in percent.
        "states": [
            (s, words, counts[s], 100 * counts[s] / len(trials))
            for s, words in STATES.items()
            if counts[s]
        ],
        # Each row: epoch, trials pruned there, trials that trained further.
        "rungs": [
            (epoch, number, (trained > epoch).sum()) for epoch, number in sorted(pruned.items())
        ],
        "failures": [
            (t.number, why_failed(study, t), params_text(t, equals=" = ")) for t in failed[:FAILED]
        ],
        "failed": len(failed),
        "spent": study.spent,
    }


def check_place(argument: str, path: Path, read: Path | None, what: str = "") -> None:
    """Raise InputError for a place where a report or another text cannot be written.

    Args:
        argument: the beginning of the message.
        path: the place.
        read: the file that is read, which must not be overwritten.
        what: description of ``read``. "" for a report, which must end in .html or .htm.
    """
    if path.is_dir():
        example = "" if what else ", such as report.html"
        raise InputError(f"{argument} is a folder; give the name of a file{example}.")
    if read is not None and path.exists() and read.exists() and path.samefile(read):
        raise InputError(
            f"{argument} is {what or 'the file of the study itself'}; give another name."
        )
    if not what and path.suffix.lower() not in (".html", ".htm"):
        raise InputError(
            f"{argument} must end in .html, since a page of HTML is written; give such a name."
        )
    if not path.resolve().parent.is_dir():
        raise no_folder(argument, path)
