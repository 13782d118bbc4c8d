"""Optuna beside a search: a sampler of its that proposes configurations, and a study written as one
of Optuna's.

An Optuna study in memory, in which a copy of the user's sampler is asked for configurations and
told scores.
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
    Choices,
    Space,
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
    """Options of ``tune(method=...)``: a sampler of Optuna's proposes, a batch of its proposals
    trains together.

    sampler   a sampler such as ``optuna.samplers.TPESampler(seed=0)``. It is copied for each search
              and never changed, and taken as it is: a TPESampler should have
              ``constant_liar=True``, which is Optuna's own default since version 5, or else the
              proposals of one batch are much alike
    batch     proposals that train together, before the sampler hears of any of their scores
    halving   None trains every trial to its end; ``gputune.Halving(...)`` halves every batch by
              itself, and trials that a rung sends away are told as pruned

    Raises InputError; MissingExtraError without Optuna.
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
    """A study of Optuna's over one space, whose sampler proposes configurations and is told their
    scores."""

    def __init__(
        self,
        sampler: "optuna.samplers.BaseSampler",
        space: Space,
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
        # without what it says about a new study
        logging.set_verbosity(max(verbosity, logging.WARNING))
        try:
            self.study = self.optuna.create_study(sampler=sampler, direction="maximize")
        finally:
            logging.set_verbosity(verbosity)

    def ask(self, params: Config | None = None) -> tuple["optuna.Trial", Config]:
        """Return Optuna's trial and its configuration: what the sampler proposes, or ``params`` in
        its place."""
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
        """Tell the result of a trial that was asked for; pruned and diverged ones as such."""
        if result.state == "pruned":
            for epoch, mean in fold_means(result.curve).items():
                trial.report(mean, epoch)
        if result.state == "complete":
            self.study.tell(trial, result.score)
        else:
            self.study.tell(trial, state=state_of(self.optuna, result.state))

    def add(self, params: Config, result: Result) -> bool:
        """Tell a result that was not asked for; False where its configuration is not one of the
        space."""
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
        except ValueError:  # Optuna's own check of each value
            return False
        self.study.add_trial(trial)
        return True

    def _label_choices(self, params: Config) -> Config:
        return {
            key: label(params[key]) if isinstance(self.choices[key], list) else params[key]
            for key in self.distributions
        }


def fold_means(curve: np.ndarray) -> dict[int, float]:
    """Return epoch -> fold mean, from 1, of the epochs that were scored in every fold."""
    return {
        epoch: mean
        for epoch, mean in enumerate(first_metric(curve, axes=2).mean(1).tolist(), 1)
        if mean == mean
    }


def state_of(optuna: ModuleType, state: str) -> object:
    """Return Optuna's state of a trial; what a deadline stopped is pruned there."""
    states = optuna.trial.TrialState
    return {"complete": states.COMPLETE, "failed": states.FAIL}.get(state, states.PRUNED)


def check_askable(space: Space) -> tuple[Mapping[str, Choices], dict[str, object]]:
    """Return the one dict of a space that a sampler can be asked for, and its
    ``optuna.distributions`` by key.

    Raises InputError for several dicts, and for a law that Optuna does not have.
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
    """Return an ``optuna.Study`` with every trial of ``study``, written to ``storage``; see
    ``Study.to_optuna``."""
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
                end = finished.datetime_complete or datetime.now()
                finished.datetime_start = end - timedelta(seconds=trial.seconds)
            written.add_trial(finished)
    return written


@contextmanager
def _new_study(optuna: ModuleType, storage: object, name: str | None) -> Iterator["optuna.Study"]:
    """Make a study that maximizes; one that cannot be written to its end goes again."""
    try:
        place = optuna.storages.get_storage(storage)
        if not isinstance(place, optuna.storages.BaseStorage):
            raise TypeError(f"{type(place).__name__} is no storage")
    except Exception as error:
        # SQLAlchemy's own, a driver's that is missing, those of other storages
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
    """Return what Optuna has no place of its own for; None stands for NaN, which JSON lacks."""
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
    """Return the law of a key, widened where the default or an included trial lies outside of it.

    Where the study does not know it (a law that Optuna lacks), it is uniform over what the trials
    hold.
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
    multiples = [(value - low) / step for value in (law["low"], high, *inside)]
    return plain | (
        {"step": step} if all(math.isclose(round(n), n, abs_tol=1e-9) for n in multiples) else {}
    )


def _guess_law(values: Sequence[object]) -> Json:
    numbers = [
        value for value in values if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    if len(numbers) < len(values) or not all(map(math.isfinite, numbers)):
        return {"kind": "choices", "choices": labels(list(values))}
    kind = "int" if all(isinstance(value, int) for value in numbers) else "float"
    return {"kind": kind, "low": min(numbers), "high": max(numbers)}


def _holds(law: Json, value: object) -> bool:
    """Whether a value can be one of a law whose ends may be widened: not a word among numbers, nor
    0 on a log axis."""
    if law["kind"] == "choices":
        return True
    if isinstance(value, bool) or not isinstance(
        value, int if law["kind"] == "int" else int | float
    ):
        return False
    return math.isfinite(value) and (value > 0 or not law.get("log", False))
