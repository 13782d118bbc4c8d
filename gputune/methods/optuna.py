"""Optuna samplers propose configurations, and a study can be exported to Optuna.

A copy of the user's sampler works in an Optuna study in memory. It is asked for configurations and
receives their scores.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from datetime import datetime, timedelta
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from gputune.errors import InputError, check_count, import_extra
from gputune.methods.config import ConfigCheck, check_config
from gputune.methods.distributions import (
    CheckedSpace,
    Choices,
    as_optuna,
    describe,
    distribution_text,
    label,
    labels,
    of_label,
)
from gputune.methods.stopping import Halving
from gputune.study.store import Result
from gputune.study.study import Study, Trial
from gputune.types import Config, Json, first_metric

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class OptunaSampler:
    """Options of a search with an Optuna sampler, for ``tune(method=...)``.

    The sampler proposes batches of configurations. The configurations of a batch train together.

    Args:
        sampler: An Optuna sampler such as ``optuna.samplers.TPESampler(seed=0)``. It is copied for
            each search and never changed. A TPESampler should have ``constant_liar=True``, which is
            Optuna's default since version 5. Otherwise the proposals of one batch are very similar.
        batch: The number of proposals that train together. The sampler receives none of their
            scores before it has proposed the whole batch.
        halving: None trains every trial to its end. ``gputune.Halving(...)`` applies successive
            halving within each batch. Trials that stop at a rung are reported to the sampler as
            pruned.

    Raises:
        InputError: An option is invalid.
        MissingExtraError: Optuna is not installed.
    """

    sampler: "optuna.samplers.BaseSampler"
    _: KW_ONLY
    batch: int = 16
    halving: Halving | None = None

    def __post_init__(self) -> None:
        samplers = import_extra("optuna.samplers", extra="optuna", used_by="OptunaSampler")
        if not isinstance(self.sampler, samplers.BaseSampler):
            raise InputError(
                "OptunaSampler(sampler=...) must be a sampler of Optuna's, for example "
                f"optuna.samplers.TPESampler(seed=0), got {self.sampler!r}."
            )
        if isinstance(self.sampler, samplers.GridSampler | samplers.BruteForceSampler):
            raise InputError(
                f"OptunaSampler(sampler=...) cannot be a {type(self.sampler).__name__}, which "
                "ends an optimization of Optuna's own; a space of lists with method='random' "
                "runs every point."
            )
        check_count(self.batch, "OptunaSampler(batch=...)")
        if self.halving is not None and not isinstance(self.halving, Halving):
            raise InputError(
                "OptunaSampler(halving=...) must be gputune.Halving(...) or None, got "
                f"{self.halving!r}."
            )


class OptunaStudy:
    """An Optuna study over one space.

    Its sampler proposes configurations and receives their scores.
    """

    def __init__(
        self,
        sampler: "optuna.samplers.BaseSampler",
        space: CheckedSpace,
        *,
        reseed: bool = False,
        check: ConfigCheck = check_config,
    ) -> None:
        self.check = check
        self.optuna = import_extra("optuna", extra="optuna", used_by="OptunaSampler")
        self.choices, self.distributions = check_askable(space)
        sampler = copy.deepcopy(sampler)
        if reseed:
            sampler.reseed_rng()
        logging = self.optuna.logging
        verbosity = self.optuna.logging.get_verbosity()
        # Optuna logs a message about each new study, which is not wanted here.
        logging.set_verbosity(max(verbosity, logging.WARNING))
        try:
            self.study = self.optuna.create_study(sampler=sampler, direction="maximize")
        finally:
            logging.set_verbosity(verbosity)

    def ask(self, params: Config | None = None) -> tuple["optuna.Trial", Config]:
        """Return an Optuna trial and its configuration.

        The configuration is proposed by the sampler, or it is ``params`` if given.
        """
        if params is not None:
            self.study.enqueue_trial(self._label_choices(params))
        trial = self.study.ask(self.distributions)
        proposed = {
            key: of_label(value, choices)
            if isinstance(choices := self.choices[key], list)
            else value
            for key, value in trial.params.items()
        }
        return trial, self.check(proposed, name="a proposal of the sampler")

    def tell(self, trial: "optuna.Trial", result: Result) -> None:
        """Report the result of a proposed trial to Optuna. Pruned and diverged trials are marked as
        such."""
        if result.state == "pruned":
            for epoch, mean in fold_means(result.curve).items():
                trial.report(mean, epoch)
        if result.state == "complete":
            self.study.tell(trial, result.score)
        else:
            self.study.tell(trial, state=state_of(self.optuna, result.state))

    def add(self, params: Config, result: Result) -> bool:
        """Report a result that was not proposed by the sampler.

        Returns False if its configuration is not in the space.
        """
        if params.keys() != self.distributions.keys():
            return False
        try:
            trial = self.optuna.trial.create_trial(
                state=state_of(self.optuna, result.state),
                value=None if result.state == "failed" else result.score,
                params=self._label_choices(params),
                distributions=self.distributions,
                intermediate_values=fold_means(result.curve),
            )
        except ValueError:  # Optuna checks each value against its distribution
            return False
        self.study.add_trial(trial)
        return True

    def _label_choices(self, params: Config) -> Config:
        """Return a configuration with labels in place of the choices of lists."""
        return {
            key: label(params[key]) if isinstance(self.choices[key], list) else params[key]
            for key in self.distributions
        }


def fold_means(curve: np.ndarray) -> dict[int, float]:
    """Return the mean validation score of each epoch, keyed by epoch from 1.

    Only epochs that were scored in every fold are included.
    """
    return {
        epoch: mean
        for epoch, mean in enumerate(first_metric(curve, axes=2).mean(1).tolist(), 1)
        if mean == mean
    }


def state_of(optuna: ModuleType, state: str) -> object:
    """Return Optuna's state of a trial. A trial that was stopped by a deadline counts as pruned."""
    states = optuna.trial.TrialState
    return {"complete": states.COMPLETE, "failed": states.FAIL}.get(state, states.PRUNED)


def check_askable(space: CheckedSpace) -> tuple[Mapping[str, Choices], dict[str, object]]:
    """Return the only dict of a space and its ``optuna.distributions`` by key.

    Raises InputError if the space has several dicts, or a distribution that Optuna lacks.
    """
    if len(space) > 1:
        raise InputError(
            f"space must be one dict for an Optuna sampler, got a list of {len(space)}; search "
            "each by itself, or use method='random'."
        )
    distributions = {}
    for key, value in space[0].items():
        if (description := describe(value)) is None:
            raise InputError(
                f"space[{key!r}] must be a list, scipy's uniform, loguniform or randint, "
                "gputune.log_int or one of Optuna's distributions for an Optuna sampler, got "
                f"{distribution_text(value)}; choose one of them, or method='random'."
            )
        distributions[key] = as_optuna(description)
    return space[0], distributions


def export_to_optuna(study: Study, storage: object, name: str | None) -> "optuna.Study":
    """Return an ``optuna.Study`` with every trial of ``study``, written to ``storage``.

    See ``Study.to_optuna``.
    """
    optuna = import_extra("optuna", extra="optuna", used_by="to_optuna()")
    laws = {
        key: widened_law(study, key)
        for key in dict.fromkeys(key for t in study.trials for key in t.params)
    }
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
    """Make an Optuna study that maximizes. It is deleted again if writing it fails."""
    try:
        place = optuna.storages.get_storage(storage)
        if not isinstance(place, optuna.storages.BaseStorage):
            raise TypeError(f"{type(place).__name__} is no storage")
    except Exception as error:
        # Errors of SQLAlchemy, of a missing driver and of other storages have no common class.
        raise InputError(
            f"to_optuna(storage={str(storage)!r}) cannot be opened: {str(error).splitlines()[0]}. "
            "It is a URL such as 'sqlite:///optuna.db' in a folder that exists, a storage of "
            "Optuna's, or None for one in memory."
        ) from error
    try:
        study = optuna.create_study(storage=place, study_name=name, direction="maximize")
    except optuna.exceptions.DuplicatedStudyError as error:
        raise InputError(
            f"to_optuna(name={name!r}): the storage has a study of that name; give another name, "
            "or delete it there with optuna.delete_study."
        ) from error
    try:
        yield study
    except BaseException:
        optuna.delete_study(study_name=study.study_name, storage=place)
        raise


def _attributes(trial: Trial, inside: Mapping[str, object]) -> dict[str, object]:
    """Return the facts about a trial that have no field in Optuna.

    None stands for NaN, which JSON lacks.
    """
    attributes: dict[str, object] = {"number": trial.number, "origin": trial.origin_text}
    attributes |= {
        "fold_scores": list(map(_plain, trial.fold_scores)),
        "std_error": _plain(trial.std_error),
    }
    attributes |= {
        "best_epoch": trial.best_epoch,
        "seconds": _plain(trial.seconds),
        "state": trial.state,
    }
    if trial.metrics:
        attributes["metrics"] = {
            name: list(map(_plain, folds)) for name, folds in trial.metrics.items()
        }
    left_out = {key: repr(value) for key, value in trial.params.items() if key not in inside}
    return {**attributes, "other_params": left_out} if left_out else attributes


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def widened_law(study: Study, key: str) -> Json:
    """Return the distribution of a key, widened to include the default and the included trials.

    If the study does not have the distribution, because Optuna lacks it, it is uniform over the
    values of the trials.
    """
    values = [label(trial.params[key]) for trial in study.trials if key in trial.params]
    law = study.record.distributions.get(key) or _guess_law(values)
    if law["kind"] == "choices":
        return {"kind": "choices", "choices": labels([*law["choices"], *values])}
    inside = [value for value in values if _holds(law, value)]
    low = min([law["low"], *inside])
    high = max([law["high"], *inside])
    plain = {"kind": law["kind"], "low": low, "high": high, "log": law.get("log", False)}
    if (step := law.get("step")) is None:
        return plain
    # The step stays only if every value is still a whole number of steps from the new low end.
    multiples = [(value - low) / step for value in (law["low"], high, *inside)]
    return plain | (
        {"step": step} if all(math.isclose(round(n), n, abs_tol=1e-9) for n in multiples) else {}
    )


def _guess_law(values: Sequence[object]) -> Json:
    """Return a distribution over the values of the trials, in Optuna's notation."""
    numbers = [
        value for value in values if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    if len(numbers) < len(values) or not all(map(math.isfinite, numbers)):
        return {"kind": "choices", "choices": labels(list(values))}
    kind = "int" if all(isinstance(value, int) for value in numbers) else "float"
    return {"kind": kind, "low": min(numbers), "high": max(numbers)}


def _holds(law: Json, value: object) -> bool:
    """Return True if a distribution can be widened to include a value.

    A word among numbers cannot be included, nor 0 on a log scale.
    """
    if law["kind"] == "choices":
        return True
    if isinstance(value, bool) or not isinstance(
        value, int if law["kind"] == "int" else int | float
    ):
        return False
    return math.isfinite(value) and (value > 0 or not law.get("log", False))
