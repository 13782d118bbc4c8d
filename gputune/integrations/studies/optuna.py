"""Export of a study to an Optuna storage, for ``Study.to_optuna``."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from types import ModuleType
from typing import TYPE_CHECKING

from gputune.ground.entry_points import import_extra
from gputune.ground.errors import InputError
from gputune.ground.types import Json
from gputune.methods.sampling import fold_means, state_of
from gputune.spaces.distributions import as_optuna, is_real, label, labels
from gputune.study.study import Study, Trial

if TYPE_CHECKING:
    import optuna


def export_study(study: Study, storage: object, name: str | None) -> "optuna.Study":
    """Write every trial of a gputune study to an Optuna storage, and return the ``optuna.Study``.

    See ``Study.to_optuna``.
    """
    optuna = import_extra("optuna", extra="optuna", used_by="to_optuna()")
    descriptions: dict[str, Json] = {}
    for trial in study.trials:
        for key in trial.params:
            if key not in descriptions:
                descriptions[key] = widened_description(study, key)
    distributions = {key: as_optuna(description) for key, description in descriptions.items()}
    with _new_study(optuna, storage, name) as written:
        for word in ("model", "scoring", "positive", "optimizer", "task"):
            if (value := getattr(study.record, word)) not in (None, ""):
                written.set_user_attr(word, value)
        for trial, curve in zip(study.trials, study.curves):
            inside: dict[str, object] = {}
            for key, value in trial.params.items():
                if _can_include(descriptions[key], label(value)):
                    inside[key] = label(value)
            if trial.state == "waiting":
                written.enqueue_trial(inside, user_attrs=_attributes(trial, inside))
                continue
            finished = optuna.trial.create_trial(
                state=state_of(optuna, trial.state),
                value=None if trial.state == "failed" else trial.score,
                params=inside,
                distributions={key: distributions[key] for key in inside},
                user_attrs=_attributes(trial, inside),
                intermediate_values=fold_means(curve),
            )
            if math.isfinite(trial.seconds):
                # Optuna has no field for a duration. It is the time between start and end.
                end = finished.datetime_complete or datetime.now()
                finished.datetime_start = end - timedelta(seconds=trial.seconds)
            written.add_trial(finished)
    return written


@contextmanager
def _new_study(optuna: ModuleType, storage: object, name: str | None) -> Iterator["optuna.Study"]:
    """Create an Optuna study that maximizes the score. Deletes the study again if writing to it
    fails."""
    try:
        place = optuna.storages.get_storage(storage)
        if not isinstance(place, optuna.storages.BaseStorage):
            raise TypeError(f"{type(place).__name__} is not a storage")
    except Exception as error:
        # Errors of SQLAlchemy, of a missing driver and of other storages have no common class.
        reason = str(error).splitlines()[0]
        raise InputError(
            f"to_optuna(storage={str(storage)!r})",
            f"cannot be opened: {reason}",
            remedy="Pass a URL such as 'sqlite:///optuna.db' in a folder that exists, an Optuna "
            "storage, or None for a storage in memory.",
        ) from error
    try:
        study = optuna.create_study(storage=place, study_name=name, direction="maximize")
    except optuna.exceptions.DuplicatedStudyError as error:
        raise InputError(
            f"to_optuna(name={name!r})",
            "is the name of a study that the storage already has",
            remedy="Use another name, or delete that study with optuna.delete_study.",
        ) from error
    try:
        yield study
    except BaseException:
        optuna.delete_study(study_name=study.study_name, storage=place)
        raise


def _attributes(trial: Trial, inside: Mapping[str, object]) -> dict[str, object]:
    """Return the user attributes of a trial in Optuna: all facts that have no Optuna field.

    NaN becomes None, because JSON lacks NaN.
    """
    attributes: dict[str, object] = {
        "number": trial.number,
        "origin": trial.origin_text,
        "fold_scores": list(map(_plain, trial.fold_scores)),
        "std_error": _plain(trial.std_error),
        "best_epoch": trial.best_epoch,
        "seconds": _plain(trial.seconds),
        "state": trial.state,
    }
    if trial.metrics:
        metrics = trial.metrics.items()
        attributes["metrics"] = {name: list(map(_plain, folds)) for name, folds in metrics}
    left_out = {key: repr(value) for key, value in trial.params.items() if key not in inside}
    if left_out:
        attributes["other_params"] = left_out
    return attributes


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def widened_description(study: Study, key: str) -> Json:
    """Return a hyperparameter's distribution in Optuna's notation, widened to include the values of
    all trials.

    The result then covers the default trial and the included trials too. If Optuna lacks the
    distribution, the result is uniform over the values of the trials.
    """
    values = [label(trial.params[key]) for trial in study.trials if key in trial.params]
    description = study.record.distributions.get(key) or _guess_description(values)
    if description["kind"] == "choices":
        return {"kind": "choices", "choices": labels([*description["choices"], *values])}
    inside = [value for value in values if _can_include(description, value)]
    low = min([description["low"], *inside])
    high = max([description["high"], *inside])
    widened = {
        "kind": description["kind"],
        "low": low,
        "high": high,
        "log": description.get("log", False),
    }
    if (step := description.get("step")) is not None:
        # The step stays only if every value is still a whole number of steps from the new low end.
        multiples = [(value - low) / step for value in (description["low"], high, *inside)]
        if all(math.isclose(round(n), n, abs_tol=1e-9) for n in multiples):
            widened["step"] = step
    return widened


def _guess_description(values: Sequence[object]) -> Json:
    """Return a uniform distribution over the trials' values of a hyperparameter, in Optuna's
    notation."""
    numbers = [value for value in values if is_real(value) and math.isfinite(value)]
    if len(numbers) < len(values):
        return {"kind": "choices", "choices": labels(values)}
    kind = "int" if all(isinstance(value, int) for value in numbers) else "float"
    return {"kind": kind, "low": min(numbers), "high": max(numbers)}


def _can_include(description: Json, value: object) -> bool:
    """Return True if widening an Optuna distribution can make it include a value.

    A numeric distribution cannot include a string, and a log scale cannot include 0.
    """
    if description["kind"] == "choices":
        return True
    if not is_real(value) or (description["kind"] == "int" and not isinstance(value, int)):
        return False
    return math.isfinite(value) and (value > 0 or not description.get("log", False))
