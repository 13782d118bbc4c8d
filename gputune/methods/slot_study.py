"""Proposals of an Optuna sampler for the free slots of a running search."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gputune.errors import import_extra
from gputune.methods.optuna_study import OptunaStudy, state_of
from gputune.spaces.config import ConfigCheck, check_config
from gputune.spaces.distributions import CheckedSpace
from gputune.study.store import Result
from gputune.types import Config

if TYPE_CHECKING:
    import optuna


def tpe_sampler(seed: int | None) -> "optuna.samplers.TPESampler":
    """Return Optuna's TPE sampler with the settings of ``method="tpe"``.

    The settings were chosen on 20 runs of ``scripts/proposals.py``.

    Raises:
        MissingExtraError: Optuna is not installed.
    """
    samplers = import_extra("optuna.samplers", extra="optuna", used_by="method='tpe'")
    with warnings.catch_warnings():
        # Optuna 5 announces the end of ``gamma`` in version 6.
        warnings.simplefilter("ignore", FutureWarning)
        sampler: optuna.samplers.TPESampler = samplers.TPESampler(
            seed=seed,
            # One density for each hyperparameter instead of one joint density.
            multivariate=False,
            constant_liar=True,
            n_ei_candidates=64,  # instead of 24
            gamma=n_good_trials,
        )
    return sampler


def n_good_trials(n_trials: int) -> int:
    """Return the number of trials that TPE counts as good.

    Optuna's default is a tenth of the trials, at most 25. Here it is at most 5.
    """
    return min(5, math.ceil(n_trials / 10))


@dataclass(frozen=True)
class AskedTrial:
    """A trial as an Optuna sampler sees it, when free slots need new proposals.

    Attributes:
        params: The configuration.
        rung_means: The mean validation score at each rung that the trial has reached, keyed by
            epoch.
        state: "running", or the state of the trial's result.
        score: The score of a complete trial, else NaN.
    """

    params: Config
    rung_means: Mapping[int, float]
    state: str = "running"
    score: float = math.nan


class SlotStudy(OptunaStudy):
    """Proposals of an Optuna sampler for the free slots of a running search.

    Optuna's samplers count a running trial as a bad one, so that they do not propose similar
    trials. But a trial that survived a rung is better than most trials. Therefore the sampler gets
    a new Optuna study before each round of proposals. In this study, a trial that survived a rung
    is a complete trial with its score at that rung. Only trials that have not reached a rung are
    running.
    """

    def __init__(
        self,
        sampler: "optuna.samplers.BaseSampler",
        space: CheckedSpace,
        *,
        check: ConfigCheck = check_config,
    ) -> None:
        super().__init__(sampler, space, check=check)
        self.repeats = True  # whether the sampler has proposed every stored configuration again
        self.outside: set[int] = set()  # trials outside of the space, which the sampler never sees
        self.ended: dict[int, optuna.trial.FrozenTrial] = {}
        self.earlier: list[optuna.trial.FrozenTrial] = []  # trials of other studies
        # What a sampler notes about its proposals, for example the state of CMA-ES.
        self.attributes: dict[int, Mapping[str, object]] = {}

    def add(self, params: Config, result: Result) -> bool:
        """Report the result of a trial of an earlier study to Optuna's sampler.

        Returns False if the trial's configuration is not in the space.
        """
        is_added = super().add(params, result)
        if is_added:
            self.earlier.append(self.study.get_trials(deepcopy=False)[-1])
        return is_added

    def propose(
        self, trials: Mapping[int, AskedTrial], stored: Mapping[int, Config], new: Sequence[int]
    ) -> dict[int, Config]:
        """Return the configurations of new trials, which the sampler proposes.

        Args:
            trials: All trials that have begun, by trial number.
            stored: The trials of a resumed study that begin now. The sampler is asked for them too,
                so that its random state is that of an uninterrupted search. If a proposal
                differs, a reseeded copy of the sampler sees the stored trials instead.
            new: The trial numbers of the new trials.
        """
        self._see(trials)
        if self.repeats:
            proposed = {number: self._ask(number) for number in stored}
            if proposed != stored:
                self.repeats = False
                self.sampler.reseed_rng()
                self.attributes.clear()
        if not self.repeats:
            pending = {number: AskedTrial(params, {}) for number, params in stored.items()}
            self._see({**trials, **pending})
        return {number: self._ask(number) for number in new}

    def _ask(self, number: int) -> Config:
        trial, params = self.ask()
        frozen = self.study.get_trials(deepcopy=False)[trial.number]
        self.attributes[number] = frozen.system_attrs
        return params

    def _see(self, trials: Mapping[int, AskedTrial]) -> None:
        """Make a new Optuna study with these trials."""
        states = self.optuna.trial.TrialState
        self.study = self.empty_study()
        for earlier in self.earlier:
            self.study.add_trial(earlier)
        ended_now = {}
        for number, trial in sorted(trials.items()):
            if number in self.outside:
                continue
            seen = self.ended.get(number)
            if seen is None and trial.state == "running" and trial.rung_means:
                last_rung = max(trial.rung_means)
                seen = self._frozen(number, trial, states.COMPLETE, trial.rung_means[last_rung])
            elif seen is None:
                seen = self._frozen(number, trial, states.RUNNING)
            if seen is None:
                self.outside.add(number)
                continue
            if trial.state != "running" and number not in self.ended:
                ended_now[number] = len(self.study.get_trials(deepcopy=False))
            self.study.add_trial(seen)
        # After all trials are in the study: a sampler may look at all of them when a trial ends.
        for number, position in ended_now.items():
            trial = trials[number]
            if trial.state == "complete":
                self.study.tell(position, trial.score)
            else:
                self.study.tell(position, state=state_of(self.optuna, trial.state))
            self.ended[number] = self.study.get_trials(deepcopy=False)[position]

    def _frozen(
        self, number: int, trial: AskedTrial, state: object, value: float | None = None
    ) -> "optuna.trial.FrozenTrial | None":
        """Return a trial for an Optuna study, or None if the space does not contain the trial."""
        if trial.params.keys() != self.distributions.keys():
            return None
        try:
            frozen: optuna.trial.FrozenTrial = self.optuna.trial.create_trial(
                state=state,
                value=value,
                params=self.label_choices(trial.params),
                distributions=self.distributions,
                system_attrs=dict(self.attributes.get(number, {})),
                intermediate_values=dict(trial.rung_means),
            )
        except ValueError:  # Optuna checks each value against its distribution
            return None
        return frozen
