"""Optuna studies in memory. Their samplers propose the trials of a search."""

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from gputune.ground.entry_points import import_extra
from gputune.ground.errors import InputError, Verbatim, option
from gputune.ground.types import Config, first_metric
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
from gputune.spaces.random import n_counted
from gputune.study.store import Candidate, Result
from gputune.tuning.session import BATCH, Session, batch_of

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
        score = None if result.state == "failed" else result.score
        state = state_of(self.optuna, result.state)
        trial = self.frozen(params, state, score, fold_means(result.curve))
        if trial is not None:
            self.study.add_trial(trial)
        return trial is not None

    def frozen(
        self,
        params: Config,
        state: object,
        value: float | None,
        means: Mapping[int, float],
        attributes: Mapping[str, object] = MappingProxyType({}),
    ) -> "optuna.trial.FrozenTrial | None":
        """Return a trial for an Optuna study, or None if the space does not contain the trial.

        ``means`` are the mean scores by epoch, and ``attributes`` the notes of the sampler.
        """
        if params.keys() != self.distributions.keys():
            return None
        try:
            trial: optuna.trial.FrozenTrial = self.optuna.trial.create_trial(
                state=state,
                value=value,
                params=self.label_choices(params),
                distributions=self.distributions,
                system_attrs=dict(attributes),
                intermediate_values=dict(means),
            )
        except ValueError:  # Optuna checks each value against its distribution
            return None
        return trial

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
            if seen is None:
                means = trial.rung_means
                survived = trial.state == "running" and bool(means)
                state = states.COMPLETE if survived else states.RUNNING
                value = means[max(means)] if survived else None
                attributes = self.attributes.get(number, {})
                seen = self.frozen(trial.params, state, value, means, attributes)
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


NOT_REPEATED = (
    "note: the sampler does not propose the finished trials again, because it has no seed or is a "
    "different sampler; a reseeded copy of the sampler receives their results"
)


def outside_text(trial: Candidate) -> str:
    """Return the note about a trial that Optuna's sampler cannot see."""
    return (
        f"note: trial {trial.number} ({trial.origin}) is outside the space, so the sampler does "
        "not receive its result"
    )


def sample(
    session: Session,
    train: Callable[[], bool],
    make: Callable[..., OptunaStudy],
    *,
    batch: int,
    epochs: int,
) -> None:
    """Train the trials that an Optuna sampler proposes, batch by batch.

    First the waiting trials train, and the sampler receives all results in order. Then the sampler
    proposes one batch after another, and receives the results of each batch. Only this process does
    so, because a batch depends on every result of the batch before.

    Args:
        session: The running search.
        train: Trains the waiting trials, and returns whether the search continues.
        make: Makes an Optuna study with a fresh copy of the sampler.
        batch: The number of proposals that train together.
        epochs: The number of epochs of a trial, for the progress bar.
    """
    ledger = session.ledger
    if not train() or not n_missing(session):
        return
    study = _study_so_far(session, make)
    with session.progress.bar_over(n_missing(session), epochs):
        while missing := min(batch, n_missing(session)):
            proposals = [study.ask() for _ in range(missing)]
            candidates = next_batch(session, [params for _, params in proposals])
            if not train():
                return
            for candidate, (trial, _) in zip(candidates, proposals):
                study.tell(trial, ledger.results[candidate.number])


def next_batch(session: Session, configs: Sequence[Config]) -> list[Candidate]:
    """Store configurations as the next batch of the study, and return its trials."""
    ledger = session.ledger
    first = 1 + max((candidate.number for candidate in ledger.candidates), default=-1)
    origin = f"{BATCH}{1 + max(map(batch_of, ledger.candidates), default=0)}"
    trials = [Candidate(number, params, origin) for number, params in enumerate(configs, first)]
    if trials:
        ledger.add(trials)
    return trials


def n_missing(session: Session) -> int:
    """Return the number of trials that the Optuna sampler still has to propose.

    The default trial counts as proposed. Included trials do not count.
    """
    candidates = session.ledger.candidates
    proposed = sum(batch_of(candidate) > 0 for candidate in candidates)
    return max(0, session.options.search.n_trials - proposed - n_counted(candidates))


def _study_so_far(session: Session, make: Callable[..., OptunaStudy]) -> OptunaStudy:
    """Return an Optuna study that has received all results so far, in order.

    The Optuna study has a fresh copy of the sampler, and asks the copy again for all earlier
    proposals. A seeded sampler makes the same proposals and then continues as if it had never
    stopped. If the proposals differ, the study uses a reseeded copy, which receives the trained
    configurations in place of its own proposals.
    """
    for reseed in (False, True):
        study = make(reseed=reseed)
        add_earlier(study, session)
        if _repeat(study, session, enqueue=reseed):
            break
        session.progress.say(NOT_REPEATED, once=True)
    return study


def add_earlier(study: OptunaStudy, session: Session) -> None:
    """Report the results of the earlier studies in ``warm_start`` to an Optuna study."""
    progress = session.progress
    for earlier in session.options.search.warm_start:
        scoring = earlier.record.scoring
        if scoring != progress.scoring:
            progress.say(
                f"note: {option('warm_start')}: the sampler does not use a study that was "
                f"ranked by {scoring}, because this search is ranked by {progress.scoring}",
                once=True,
            )
            continue
        for t in earlier.trials:
            if t.state == "complete":
                curve = np.array([t.fold_scores])
                result = Result(t.number, t.state, t.score, t.fold_scores, 1, t.seconds, curve)
                study.add(t.params, result)


def _repeat(study: OptunaStudy, session: Session, *, enqueue: bool) -> bool:
    """Report all results so far to an Optuna study.

    With ``enqueue=True``, the stored configurations replace the sampler's proposals. Returns False
    if a proposal differs from the stored configuration.
    """
    results = session.ledger.results
    for batch, group in groupby(session.ledger.candidates, batch_of):
        candidates = list(group)
        if batch == 0:
            for candidate in candidates:
                if not study.add(candidate.params, results[candidate.number]):
                    session.progress.say(outside_text(candidate))
            continue
        proposals = []
        for candidate in candidates:
            proposals.append(study.ask(candidate.params if enqueue else None))
        if any(params != c.params for (_, params), c in zip(proposals, candidates)):
            return False
        for (trial, _), candidate in zip(proposals, candidates):
            study.tell(trial, results[candidate.number])
    return True
