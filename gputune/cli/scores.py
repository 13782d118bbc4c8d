"""The scores that a command prints at its end: held-out and cross-validated.

Each score stands next to the default's score and the best score without a model. Warnings follow.
"""

import math
from dataclasses import dataclass

from gputune.cli.ending import Ending
from gputune.cli.held_out import HeldOut
from gputune.ground.text import Measure, clean, count, paragraph
from gputune.spaces.edges import edge_remarks
from gputune.views.default_trial import (
    NO_IMPROVEMENT,
    DefaultTrial,
    default_trial,
    shorter_training,
)
from gputune.views.scores import score_view


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
