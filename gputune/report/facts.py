"""The texts of the HTML report: the facts at its top, the search options, and the trials'
states."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from gputune.ground.errors import TOO_BIG, InputError
from gputune.ground.files import no_folder
from gputune.ground.text import Measure, clean, count, short, with_short_numbers
from gputune.ground.types import Json
from gputune.study.record import has_form
from gputune.study.rows import TrialState
from gputune.study.study import Study, Trial, best_trial
from gputune.views.default_trial import (
    NO_IMPROVEMENT,
    default_trial,
    improvement_text,
    shorter_training,
)
from gputune.views.scores import Scores, limited, score_view

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
"""The names and types of the entries in a saved model's ``info`` that the report reads."""


class PageMeasure(Measure):
    """The name of a score and its number format in the HTML report.

    Scores have at most four significant digits. The code in the report has all digits, so that
    running the code repeats the scores.
    """

    def size(self, value: float) -> str:
        """Return a score, or a difference of scores, as text."""
        if not math.isfinite(value) or abs(value) >= 1e7:
            return super().size(value)
        return limited(value, self.decimals)


def page_scores(study: Study) -> Scores:
    """Return the scores of a study's trials, with the number format of the HTML report."""
    view = score_view(study)
    return replace(view, measure=PageMeasure(**vars(view.measure)))


Fact = tuple[str, str, str]
"""A fact at the top of the report: its name, its value as text and a note."""


def score_facts(study: Study, model: Json | None) -> list[Fact]:
    """Return the report's facts on the best trial: its score, held-out score and improvement.

    ``model`` is the ``info`` of the study's tuned model, or None.
    """
    record = study.record
    best = best_trial(study)
    if best is None:
        return []
    measure = page_scores(study).measure
    if record.face == "loop":
        return [(f"best {measure.title}", measure.text(best.score), f"trial {best.number}")]
    mean = "mean ± standard error" if math.isfinite(best.std_error) else "mean"
    note = f"trial {best.number}, {mean} over {count(len(best.fold_scores), 'fold')}"
    score = measure.with_error(best.score, best.std_error)
    return [
        (f"best cross-validated {measure.title}", score, note),
        _held_out_fact(study, model, measure),
        *_improvement_facts(study, measure),
    ]


def search_facts(study: Study) -> list[Fact]:
    """Return the report's facts on the search: baseline score, trials, training time and device."""
    record = study.record
    facts = []
    baseline = record.baseline
    if baseline is not None and best_trial(study) is not None:
        score = page_scores(study).measure.text(baseline["score"])
        facts.append(("without a model", score, clean(baseline["answer"])))
    facts.append(("trials", str(len(study.trials)), states_text(study)))
    facts.append(_time_fact(study))
    if record.device:
        facts.append(("device", clean(record.device), clean(record.dtype)))
    return facts


def _time_fact(study: Study) -> Fact:
    """Return the report's fact on the total training time of all trials."""
    seconds = sum(trial.seconds for trial in study.trials if math.isfinite(trial.seconds))
    trained, full = study.spent
    note = "added up over all trials"
    if study.record.face != "sklearn" and 0 < trained < full:
        note += f", which trained for {trained} of {full} epochs"
    return "training time", seconds_text(seconds), note


def eligible_text(study: Study) -> str:
    """Return a note that says whether pruned trials can be the best trial, or "" without pruned
    trials."""
    pruned = sum(trial.state == "pruned" for trial in study.trials)
    if not pruned:
        return ""
    if page_scores(study).eligible[np.isfinite(study.scores)].all():
        return "Every trial with a score was pruned, so each of them can be the best trial."
    trials = "1 trial was" if pruned == 1 else f"{pruned} trials were"
    return (
        f"{trials} pruned and cannot be the best trial, even with a higher score: that score is "
        "from the epochs before the pruning. The column “eligible” says which trials can be the "
        "best trial."
    )


def _improvement_facts(study: Study, measure: Measure) -> list[tuple[str, str, str]]:
    """Return the report's fact on the improvement over the default, or [] without a default
    trial."""
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
    remark = shorter_training(default)
    if remark:
        note = f"{note}. {remark}"
    return [(name, improvement, note)]


def _held_out_fact(study: Study, model: Json | None, measure: Measure) -> tuple[str, str, str]:
    """Return the report's fact on the tuned model's score on held-out rows."""
    tried = int(np.isfinite(study.scores).sum())
    name = f"held-out {measure.name}"
    optimistic = "the best score is optimistic, because the folds that give it chose the epoch"
    if tried > 1:
        optimistic = f"the best score is optimistic, because it is the best of {tried}"
    score = None if model is None else model.get("held_out_score")
    if model is None or score is None or not math.isfinite(score):
        return name, "–", f"not known here; {optimistic}"
    rows = count(model["held_out_rows"], "row")
    members = model.get("ensemble")
    noun = "the model"
    if members is not None:
        noun = f"an ensemble of {count(len(members), 'trial')}, which is the model,"
    note = f"{noun} on {rows} that nothing was fitted on"
    # Models of earlier versions do not record whether the rows chose them. An ensemble with a
    # held-out score was always chosen by them.
    if model.get("held_out_chose", members is not None):
        other = "an ensemble" if members is None else "the best trial"
        note += f", but these rows chose it over {other}, so its score is a little optimistic"
    baseline = model.get("held_out_baseline")
    if baseline is not None:
        note += f"; without a model {measure.text(baseline['score'])} ({clean(baseline['answer'])})"
    return name, measure.text(score), f"{note}; {optimistic}"


def is_its_model(study: Study, model: Json) -> bool:
    """Return True if a saved model's ``info`` matches the study's best trial and data rows."""
    best = best_trial(study)
    rows = study.record.fingerprint
    scoring = study.record.scoring
    if best is None or model.get("scoring", scoring) != scoring:
        return False
    is_best = model.get("params") == best.params and model.get("score") == best.score
    # Models of earlier versions do not record the rows that they were trained on.
    same_rows = bool(model.get("fingerprint", rows) == rows)
    return same_rows and ("ensemble" in model or is_best)


def read_model_info(study: Study, folder: Path) -> Json | None:
    """Return the ``info`` of the model saved in a study's folder, for the report.

    The result is None without a model, or if the model does not belong to the best trial.
    """
    from gputune.study.model_files import DESCRIPTION, file_errors, read_description

    if not (folder / DESCRIPTION).is_file():
        return None
    with file_errors(folder / DESCRIPTION):
        info: Json = read_description(folder / DESCRIPTION)["info"]
        if not has_form(info, MODEL_INFO):
            raise ValueError("its info is of another type")
    return info if is_its_model(study, info) else None


def seconds_text(seconds: float) -> str:
    """Return a duration in seconds as text, such as "12.3 s" or "2 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


_EXACT = ("data", "target", "classes", "positive class", "versions")
"""Options whose text the report does not shorten, because the text holds names or versions."""


def setting(study: Study) -> list[tuple[str, str]]:
    """Return the names and values of the search's options, for a table in the report."""
    record = study.record
    classes = study.record.classes or ()
    labels = [*map(str, classes[:12]), *["…"] * (len(classes) > 12)]
    method = study.record.method
    if not isinstance(method, str):
        method = f"{method.get('name')}: {_options(method)}"
    rows = [
        ("data", (record.source or {}).get("path")),
        ("rows", record.fingerprint.get("rows")),
        ("features", record.features or None),
        ("target", record.target),
        ("task", record.task),
        ("target_transform", _transform(record.target_transform)),
        ("classes", f"{len(classes)}: {', '.join(labels)}" if classes else None),
        ("loss", record.objective),
        ("positive class", record.positive),
        ("model", record.model),
        ("optimizer", record.optimizer),
        ("schedule", record.schedule),
        ("method", method),
        ("space", record.space),
        ("folds", record.folds or None),
        ("networks per trial and fold", record.n_ens if record.n_ens > 1 else None),
        ("epochs", record.max_epochs or None),
        ("seed", record.seed),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
    ]
    texts = []
    for name, value in rows:
        if value is not None and value != "":
            text = clean(value)
            texts.append((name, text if name in _EXACT else with_short_numbers(text)))
    return texts


def _transform(recorded: str | Json | None) -> object:
    """Return a study's target transformation as text, such as
    "PowerTransformer(method='box-cox')"."""
    if not isinstance(recorded, Mapping) or "params" not in recorded:
        return recorded if recorded is None or isinstance(recorded, str) else recorded.get("object")
    params = ", ".join(f"{key}={value!r}" for key, value in recorded["params"].items())
    return f"{recorded['class']}({params})"


def _options(options: Json) -> str:
    """Return the options of a search method as text, such as "factor=3, min_epochs=2".

    If a sampler uses halving, the options of halving are in parentheses.
    """
    texts = []
    for key, value in options.items():
        if key != "name" and value is not None:
            text = f"({_options(value)})" if isinstance(value, dict) else short(value)
            texts.append(f"{key}={text}")
    return ", ".join(texts)


def states_text(study: Study) -> str:
    """Return the number of trials in each state as text, such as "8 complete, 2 pruned".

    Failed trials are counted by their reason.
    """
    counts: Counter[str] = Counter(dict.fromkeys([*STATES.values(), _RAISED, _TOO_BIG, _LOST], 0))
    for trial in study.trials:
        if "error" in trial.detail:
            state = _RAISED
        elif "reason" in trial.detail:
            state = _TOO_BIG if str(trial.detail["reason"]).startswith(TOO_BIG) else _LOST
        else:
            state = STATES.get(trial.state, trial.state)
        counts[state] += 1
    return ", ".join(f"{number} {state}" for state, number in counts.items() if number) or "none"


def params_text(trial: Trial, between: str = ", ", equals: str = "=") -> str:
    """Return the hyperparameters of a trial as one text, such as "lr=0.01, batch_size=64"."""
    return between.join(
        f"{clean(name)}{equals}{short(value)}" for name, value in trial.params.items()
    )


def failure_reason(study: Study, trial: Trial) -> str:
    """Return the reason why a trial failed as text, such as "diverged in epoch 3"."""
    reason = trial.detail.get("error", trial.detail.get("reason"))
    if reason is None and study.record.face == "loop":
        reason = "a NaN or infinite score was returned or reported"
    return clean(f"diverged in epoch {trial.best_epoch + 1}" if reason is None else reason)


def endings(study: Study) -> Json:
    """Return the numbers and texts for the report's section on complete, pruned and failed
    trials."""
    counts: Counter[TrialState] = Counter()
    pruned: Counter[int] = Counter()
    failures: list[tuple[int, str, str]] = []
    for trial in study.trials:
        counts[trial.state] += 1
        if trial.state == "pruned" and "rung" in trial.detail:
            pruned[trial.detail["rung"]] += 1
        if trial.state == "failed" and len(failures) < FAILED:
            params = params_text(trial, equals=" = ")
            failures.append((trial.number, failure_reason(study, trial), params))
    states = []
    for state, text in STATES.items():
        if counts[state]:
            share = 100 * counts[state] / len(study.trials)
            states.append((state, text, counts[state], share))
    # (C,) number of trained epochs
    trained = np.zeros(0, dtype=int)
    if study.curves.size:
        trained = (~np.isnan(study.curves)).any(2).sum(1)
    return {
        # Each row: state, its text, number of trials, share in percent.
        "states": states,
        # Each row: epoch, trials pruned there, trials that trained further.
        "rungs": [
            (epoch, number, (trained > epoch).sum()) for epoch, number in sorted(pruned.items())
        ],
        "failures": failures,
        "failed": counts["failed"],
        "spent": study.spent,
    }


def check_place(argument: str, path: Path, read: Path | None, noun: str = "") -> None:
    """Raise InputError if a report or another text cannot be written to a path.

    Args:
        argument: the beginning of the message.
        path: the path to write to.
        read: the file that is read, which must not be overwritten.
        noun: description of ``read``. "" for a report, which must end in .html or .htm.
    """
    if path.is_dir():
        example = "" if noun else ", such as report.html"
        rule = f"must be a file, but {str(path)!r} is a folder"
        raise InputError(argument, rule, remedy=f"Give the name of a file{example}.")
    if read is not None and path.exists() and read.exists() and path.samefile(read):
        rule = f"must not be {noun or 'the file of the study'}"
        raise InputError(argument, rule, remedy="Give another name.")
    if not noun and path.suffix.lower() not in (".html", ".htm"):
        raise InputError(argument, "must end in .html, because the report is HTML")
    if not path.resolve().parent.is_dir():
        raise no_folder(argument, path)
