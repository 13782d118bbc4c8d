"""An Optuna study in memory that proposes configurations."""

import copy
import math
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from gputune.errors import InputError, import_extra
from gputune.spaces.config import ConfigCheck, check_config
from gputune.spaces.distributions import (
    CheckedSpace,
    Choices,
    as_optuna,
    choice_of_label,
    describe,
    distribution_text,
    label,
)
from gputune.study.store import Result
from gputune.types import Config, first_metric
from gputune.wording import Verbatim, option

if TYPE_CHECKING:
    import optuna


class OptunaStudy:
    """An Optuna study in memory for one gputune search space, with a copy of the user's sampler.

    The sampler proposes configurations and receives their scores.
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
        self.sampler = copy.deepcopy(sampler)
        if reseed:
            self.sampler.reseed_rng()
        self.study = self.empty_study()

    def empty_study(self) -> "optuna.Study":
        """Return an empty Optuna study in memory, which asks the copy of the user's sampler."""
        logging = self.optuna.logging
        verbosity = logging.get_verbosity()
        # Optuna logs a message about each new study, which is not wanted here.
        logging.set_verbosity(max(verbosity, logging.WARNING))
        try:
            study: optuna.Study = self.optuna.create_study(
                sampler=self.sampler, direction="maximize"
            )
        finally:
            logging.set_verbosity(verbosity)
        return study

    def ask(self, params: Config | None = None) -> tuple["optuna.Trial", Config]:
        """Return a new Optuna trial and its configuration, which the sampler proposes.

        If ``params`` is not None, the configuration is ``params`` instead.
        """
        if params is not None:
            self.study.enqueue_trial(self.label_choices(params))
        trial = self.study.ask(self.distributions)
        proposed = {}
        for key, value in trial.params.items():
            choices = self.choices[key]
            proposed[key] = choice_of_label(value, choices) if isinstance(choices, list) else value
        try:
            return trial, self.check(proposed, name="space")
        except InputError as error:
            raise InputError(None, f"A proposal of the sampler for {error.message}") from error

    def tell(self, trial: "optuna.Trial", result: Result) -> None:
        """Report the result of a proposed trial to Optuna's sampler, including pruned and diverged
        trials."""
        if result.state == "pruned":
            for epoch, mean in fold_means(result.curve).items():
                trial.report(mean, epoch)
        if result.state == "complete":
            self.study.tell(trial, result.score)
        else:
            self.study.tell(trial, state=state_of(self.optuna, result.state))

    def add(self, params: Config, result: Result) -> bool:
        """Report the result of a trial that Optuna's sampler did not propose, such as the default
        trial.

        Returns False if the trial's configuration is not in the space.
        """
        if params.keys() != self.distributions.keys():
            return False
        try:
            trial = self.optuna.trial.create_trial(
                state=state_of(self.optuna, result.state),
                value=None if result.state == "failed" else result.score,
                params=self.label_choices(params),
                distributions=self.distributions,
                intermediate_values=fold_means(result.curve),
            )
        except ValueError:  # Optuna checks each value against its distribution
            return False
        self.study.add_trial(trial)
        return True

    def label_choices(self, params: Config) -> Config:
        """Return a configuration in which Optuna's labels replace the choices of lists."""
        labeled = {}
        for key in self.distributions:
            is_list = isinstance(self.choices[key], list)
            labeled[key] = label(params[key]) if is_list else params[key]
        return labeled


def fold_means(curve: np.ndarray) -> dict[int, float]:
    """Return the mean validation score of each epoch, keyed by epoch from 1.

    The result includes only epochs with a score in every fold.
    """
    means = first_metric(curve, axes=2).mean(1).tolist()
    return {epoch: mean for epoch, mean in enumerate(means, 1) if not math.isnan(mean)}


def state_of(optuna: ModuleType, state: str) -> Any:
    """Convert the state of a gputune trial to Optuna's state. A trial that the deadline has stopped
    counts as pruned."""
    states = optuna.trial.TrialState
    return {"complete": states.COMPLETE, "failed": states.FAIL}.get(state, states.PRUNED)


def check_askable(space: CheckedSpace) -> tuple[Mapping[str, Choices], dict[str, Any]]:
    """Check that Optuna supports a space. Returns the space's only dict and its
    ``optuna.distributions`` by key.

    Raises InputError if the space has several dicts, or a distribution that Optuna lacks.
    """
    if len(space) > 1:
        raise InputError(
            "space",
            "must be one dict for an Optuna sampler",
            got=Verbatim(f"a list of {len(space)}"),
            remedy=f"Search each dict separately, or use {option('method', 'random')}.",
        )
    distributions = {}
    for key, value in space[0].items():
        if (description := describe(value)) is None:
            raise InputError(
                f"space[{key!r}]",
                "must be a list, scipy's uniform, loguniform or randint, gputune.log_int or an "
                "Optuna distribution for an Optuna sampler",
                got=Verbatim(distribution_text(value)),
                remedy=f"Use one of these, or {option('method', 'random')}.",
            )
        distributions[key] = as_optuna(description)
    return space[0], distributions
