"""The options of a search whose configurations one of Optuna's samplers proposes.

An Optuna study in memory, in which a copy of the user's sampler is asked for configurations and told scores.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from gputune.errors import InputError, import_extra
from gputune.methods.config import ConfigCheck, check_config, check_count
from gputune.methods.distributions import Choices, as_optuna, described, distribution_text, label, of_label
from gputune.methods.space import Space
from gputune.methods.stopping import Halving
from gputune.study.store import Result
from gputune.types import Config, first_metric

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class OptunaSampler:
    """Options of ``tune(method=...)``: a sampler of Optuna's proposes, a batch of its proposals trains together.

    sampler   a sampler such as ``optuna.samplers.TPESampler(seed=0)``. It is copied for each search and never
              changed, and taken as it is: a TPESampler should have ``constant_liar=True``, which is Optuna's own
              default since version 5, or else the proposals of one batch are much alike
    batch     proposals that train together, before the sampler hears of any of their scores
    halving   None trains every trial to its end; ``gputune.Halving(...)`` halves every batch by itself, and trials that
              a rung sends away are told as pruned

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
                f"OptunaSampler(sampler=...) cannot be a {type(self.sampler).__name__}, which ends an optimization of "
                "Optuna's own; a space of lists with method='random' runs every point."
            )
        check_count(self.batch, "OptunaSampler(batch=...)")
        if self.halving is not None and not isinstance(self.halving, Halving):
            raise InputError(
                f"OptunaSampler(halving=...) must be gputune.Halving(...) or None, got {self.halving!r}."
            )


class OptunaStudy:
    """A study of Optuna's over one space, whose sampler proposes configurations and is told their scores."""

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
        with _quiet(self.optuna):
            self.study = self.optuna.create_study(sampler=sampler, direction="maximize")

    def ask(self, params: Config | None = None) -> tuple["optuna.Trial", Config]:
        """Return Optuna's trial and its configuration: what the sampler proposes, or ``params`` in its place."""
        if params is not None:
            self.study.enqueue_trial(self._labelled(params))
        trial = self.study.ask(self.distributions)
        proposed = {
            key: of_label(value, choices) if isinstance(choices := self.choices[key], list) else value
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
        """Tell a result that was not asked for; False where its configuration is not one of the space."""
        if params.keys() != self.distributions.keys():
            return False
        try:
            trial = self.optuna.trial.create_trial(
                state=state_of(self.optuna, result.state),
                value=None if result.state == "failed" else result.score,
                params=self._labelled(params),
                distributions=self.distributions,
                intermediate_values=fold_means(result.curve),
            )
        except ValueError:  # Optuna's own check of each value
            return False
        self.study.add_trial(trial)
        return True

    def _labelled(self, params: Config) -> Config:
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
    """Return the one dict of a space that a sampler can be asked for, and its distributions; InputError for others."""
    if len(space) > 1:
        raise InputError(
            f"space must be one dict for an Optuna sampler, got a list of {len(space)}; search each by itself, or use "
            "method='random'."
        )
    return space[0], optuna_distributions(space[0])


def optuna_distributions(choices: Mapping[str, Choices]) -> dict[str, object]:
    """Return ``optuna.distributions`` objects, by key. Raises InputError for a law that Optuna does not have."""
    distributions = {}
    for key, value in choices.items():
        if (description := described(value)) is None:
            raise InputError(
                f"space[{key!r}] must be a list, scipy's uniform, loguniform or randint, gputune.log_int or one of "
                f"Optuna's distributions for an Optuna sampler, got {distribution_text(value)}; choose one of "
                "them, or method='random'."
            )
        distributions[key] = as_optuna(description)
    return distributions


@contextmanager
def _quiet(optuna: ModuleType) -> Iterator[None]:
    """Leave out what Optuna says about a new study."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
