"""A study written as one of Optuna's, so that its dashboard, plots and importances work on it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from gputune.errors import InputError, import_extra
from gputune.methods.distributions import Described, as_optuna, label, labels
from gputune.methods.optuna_sampler import fold_means, state_of
from gputune.study.study import Study, Trial

if TYPE_CHECKING:
    import optuna


def export_to_optuna(study: Study, storage: object, name: str | None) -> "optuna.Study":
    """Return an ``optuna.Study`` with every trial of ``study``, written to ``storage``; see ``Study.to_optuna``."""
    optuna = import_extra("optuna", extra="optuna", used_by="to_optuna()")
    laws = {key: widened(study, key) for key in dict.fromkeys(key for t in study.trials for key in t.params)}
    distributions = {key: as_optuna(law) for key, law in laws.items()}
    with _new_study(optuna, storage, name) as written:
        for word in ("model", "scoring", "positive", "optimizer", "task"):
            if (value := getattr(study.record, word)) not in (None, ""):
                written.set_user_attr(word, value)
        for trial, curve in zip(study.trials, study.curves):
            texts = {key: label(value) for key, value in trial.params.items()}
            inside = {key: text for key, text in texts.items() if _holds(laws[key], text)}
            if trial.state == "waiting":
                written.enqueue_trial(inside, user_attrs=_attributes(trial, inside))
            else:
                written.add_trial(_finished(optuna, trial, curve, inside, distributions))
    return written


@contextmanager
def _new_study(optuna: ModuleType, storage: object, name: str | None) -> Iterator["optuna.Study"]:
    """Make a study that maximizes; one that cannot be written to its end goes again."""
    place = _storage(optuna, storage)
    try:
        study = optuna.create_study(storage=place, study_name=name, direction="maximize")
    except optuna.exceptions.DuplicatedStudyError as error:
        raise InputError(
            f"to_optuna(name={name!r}): the storage has a study of that name; give another name, or delete it there "
            "with optuna.delete_study."
        ) from error
    try:
        yield study
    except BaseException:
        optuna.delete_study(study_name=study.study_name, storage=place)
        raise


def _storage(optuna: ModuleType, storage: object) -> object:
    """Return Optuna's storage of a URL, or of what else Optuna takes."""
    try:
        place = optuna.storages.get_storage(storage)
        if not isinstance(place, optuna.storages.BaseStorage):
            raise TypeError(f"{type(place).__name__} is no storage")
        return place
    except Exception as error:  # SQLAlchemy's own, a driver's that is missing, those of other storages
        raise InputError(
            f"to_optuna(storage={str(storage)!r}) cannot be opened: {str(error).splitlines()[0]}. It is a URL such as "
            "'sqlite:///optuna.db' in a folder that exists, a storage of Optuna's, or None for one in memory."
        ) from error


def _finished(
    library: ModuleType,
    trial: Trial,
    curve: np.ndarray,
    inside: Mapping[str, object],
    distributions: Mapping[str, object],
) -> "optuna.trial.FrozenTrial":
    """Return a trial with a result as Optuna's."""
    finished: optuna.trial.FrozenTrial = library.trial.create_trial(
        state=state_of(library, trial.state),
        value=None if trial.state == "failed" else trial.score,
        params=inside,
        distributions={key: distributions[key] for key in inside},
        user_attrs=_attributes(trial, inside),
        intermediate_values=fold_means(curve),
    )
    if math.isfinite(trial.seconds):
        end = finished.datetime_complete or datetime.now()
        finished.datetime_start = end - timedelta(seconds=trial.seconds)
    return finished


def _attributes(trial: Trial, inside: Mapping[str, object]) -> dict[str, object]:
    """Return what Optuna has no place of its own for; None stands for NaN, which JSON lacks."""
    left_out = {key: repr(value) for key, value in trial.params.items() if key not in inside}
    attributes: dict[str, object] = {
        "number": trial.number,
        "origin": trial.origin_text,
        "fold_scores": [_plain(score) for score in trial.fold_scores],
        "std_error": _plain(trial.std_error),
        "best_epoch": trial.best_epoch,
        "seconds": _plain(trial.seconds),
        "state": trial.state,
    }
    if trial.metrics:
        attributes["metrics"] = {name: list(map(_plain, folds)) for name, folds in trial.metrics.items()}
    return {**attributes, "other_params": left_out} if left_out else attributes


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def widened(study: Study, key: str) -> Described:
    """Return the law of a key, widened where the default or an included trial lies outside of it.

    Where the study does not know it (a law that Optuna lacks), it is uniform over what the trials hold.
    """
    values = [label(trial.params[key]) for trial in study.trials if key in trial.params]
    law = study.record.distributions.get(key) or _guessed(values)
    if law["kind"] == "choices":
        return {"kind": "choices", "choices": labels([*law["choices"], *values])}
    inside = [value for value in values if _holds(law, value)]
    low, high = min([law["low"], *inside]), max([law["high"], *inside])
    plain = {"kind": law["kind"], "low": low, "high": high, "log": law.get("log", False)}
    step = law.get("step")
    on_grid = step is not None and all(
        _is_multiple(value - low, step) for value in (law["low"], high, *inside)
    )
    return plain | ({"step": step} if on_grid else {})


def _guessed(values: Sequence[object]) -> Described:
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(values) or not all(map(math.isfinite, numbers)):
        return {"kind": "choices", "choices": labels(list(values))}
    kind = "int" if all(isinstance(value, int) for value in numbers) else "float"
    return {"kind": kind, "low": min(numbers), "high": max(numbers)}


def _holds(law: Described, value: object) -> bool:
    """Whether a value can be one of a law whose ends may be widened: not a word among numbers, nor 0 on a log axis."""
    if law["kind"] == "choices":
        return True
    if isinstance(value, bool) or not isinstance(value, int if law["kind"] == "int" else int | float):
        return False
    return math.isfinite(value) and (value > 0 or not law.get("log", False))


def _is_multiple(distance: float, step: float) -> bool:
    return math.isclose(round(distance / step) * step, distance, abs_tol=1e-9 * step)
