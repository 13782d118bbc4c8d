"""The trials of a call, and the session in which they train.

The trials are the default trial, the trials of a portfolio (good configurations of a named space),
included trials and randomly sampled trials. A resumed study adds the trials that its ledger (the
list of trials and results) lacks.
"""

import errno
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from gputune.engine.stop import Stop
from gputune.ground.errors import (
    InputError,
    SearchFailedError,
    SearchInterrupted,
    SearchTerminated,
    StudyCorruptError,
    Verbatim,
    option,
)
from gputune.ground.memory import without_collector
from gputune.ground.text import count
from gputune.ground.types import DEFAULTS, Config
from gputune.modules.adapters import ADAPTER_DEFAULTS, adapters_of
from gputune.modules.construction import parameters_of
from gputune.optimizers.classes import argument_defaults
from gputune.scoring.objective import loss_defaults
from gputune.spaces.config import ConfigCheck, check_config, legal_keys
from gputune.spaces.distributions import CheckedSpace, is_inside, space_text, to_scipy
from gputune.spaces.named import MODELS_OF_SPACES, SPACES, named_space
from gputune.spaces.portfolios import PORTFOLIOS
from gputune.spaces.random import NO_DEFAULT, first_candidates, n_counted, numbered, remarks, top_up
from gputune.spaces.space import check_include, check_space, choices_of, default_space
from gputune.study.ledger import Ledger
from gputune.study.store import Candidate, Result, Store
from gputune.study.study import Study
from gputune.tuning.callbacks import Callbacks
from gputune.tuning.choices import ModelChoice
from gputune.tuning.good_enough import GoodEnough
from gputune.tuning.interrupt import CTRL_C, ended_by_requests, ended_by_signals, interruption
from gputune.tuning.method import Method
from gputune.tuning.options import Options, SearchOptions
from gputune.tuning.progress import Progress

AnyStudy = TypeVar("AnyStudy", bound=Study)

_DRAWING_SHARE = 0.05
"""The largest share of the ``timeout`` that sampling the trials may take.

``n_trials`` may be far more than the time allows.
"""
_DRAWING_SECONDS = 0.5
"""The time in seconds that sampling the trials may take with any ``timeout``.

This time is enough for thousands of trials. A short timeout therefore shortens the training but not
the list of trials, which a resumed search trains.
"""

_BEST = 5  # this number of trials of each earlier study is tried first


def checked_space(choice: ModelChoice, options: Options) -> CheckedSpace:
    """Return the search space of a call after checking it.

    The default is the space of the model. Raises InputError for a space that does not fit the model
    or the options.
    """
    search = options.search
    numbers = options.rows.numbers
    keys = keys_of(choice)
    module = choice.searched == "module"
    check_include(search.include, keys=keys, module=module)
    space = "realmlp" if search.space is None and choice.recipe else search.space
    if isinstance(space, str):
        _check_named(space, choice, is_asked=search.space is not None)
        space = named_space(space, choice.goal)
    elif space is None:
        lr = choice.own_defaults.get("lr")
        space = default_space(choice.searched, choice.optimizer, choice.module_class, lr)
    checked = check_space(to_scipy(space), keys=keys, module=module)
    ways = choices_of(checked, "numbers", default=numbers)
    if numbers not in ("auto", *ways):
        raise InputError(
            f"numbers={numbers!r}",
            f"is not one of the values in the space ({', '.join(ways)}), so no trial would use it",
            remedy=f"Leave {option('numbers')} out, or add the value to the space.",
        )
    return checked


def keys_of(choice: ModelChoice) -> tuple[str, ...]:
    """Return the keys that a configuration of the model may have.

    Keys with a prefix, such as ``module__hidden``, are not included.
    """
    keys = legal_keys(choice.searched, choice.optimizer)
    return keys if adapters_of(choice.module_class) is None else (*keys, *ADAPTER_DEFAULTS)


def _check_named(space: str, choice: ModelChoice, *, is_asked: bool) -> None:
    """Raise InputError if a named space does not fit the model or the optimizer.

    A portfolio (tested configurations) was measured with AdamW only. Only a search that asks for
    the space by its name (``is_asked``) has a portfolio.
    """
    if space not in SPACES:
        return  # ``named_space`` raises the error
    model = MODELS_OF_SPACES[space]
    is_realmlp = bool(choice.recipe)
    if not (is_realmlp if model == "realmlp" else choice.searched == model):
        name = "realmlp" if is_realmlp else choice.name
        raise InputError(
            f"space={space!r}",
            f"needs {option('model', model)}",
            got=Verbatim(option("model", name)),
            remedy="Choose that model, or a space of your own.",
        )
    if is_asked and space in PORTFOLIOS and choice.optimizer != "adamw":
        raise InputError(
            f"space={space!r}",
            "begins with configurations that were measured with adamw",
            got=Verbatim(option("optimizer", choice.optimizer)),
            remedy="Leave one of them out.",
        )


def check_schedule(
    space: CheckedSpace, choice: ModelChoice, chosen_by_user: Mapping[str, object]
) -> None:
    """Raise InputError if the user chose a constant schedule that the model would replace.

    "constant" is the default of the option, so models such as RealMLP put their own schedule in its
    place.
    """
    schedule = choice.defaults("constant")["schedule"]
    is_asked = chosen_by_user.get("schedule") == "constant"
    if not is_asked or schedule == "constant" or all("schedule" in part for part in space):
        return
    raise InputError(
        option("schedule", "constant"),
        f"cannot replace the schedule {schedule!r} of {choice.name}, because 'constant' is the "
        "default of the option",
        remedy="Pass another schedule, or search a space of your own with schedule: ['constant'].",
    )


def first_trials(
    space: CheckedSpace,
    choice: ModelChoice,
    options: Options,
    store: Store | None = None,
    portfolio: Sequence[Config] = (),
) -> tuple[Candidate, ...]:
    """Return the first trials of a search: default, portfolio, included and random configurations.

    Random configurations that the study file has stored come before new ones.
    """
    search = options.search
    first = first_candidates(
        space,
        n_trials=search.n_trials,
        include=search.include,
        include_default=search.include_default and not _lacks_default(store),
        defaults=default_params(choice, options),
        portfolio=portfolio,
    )
    if not search.samples_first:
        return first
    stored: tuple[Candidate, ...] = ()  # drawing many trials again would take long
    with suppress(OSError, StudyCorruptError):  # reported when the study is opened
        if (
            store is not None
            and store.meta.get("seed") == search.random_state
            and store.meta.get("space") == space_text(space)
        ):
            stored = tuple(trial for trial in store.candidates() if trial.origin == "random")
    known = first + stored[: max(0, search.n_trials - n_counted(first))]
    return known + draw_trials(known, space, search, check_config)


def _lacks_default(store: Store | None) -> bool:
    """Return whether a study says in its notes that it runs no default configuration.

    Factors on learning rates had no default value in earlier versions.
    """
    if store is None:
        return False
    with suppress(OSError, StudyCorruptError):  # reported when the study is opened
        return any(str(note).startswith(NO_DEFAULT) for note in store.meta.get("notes") or ())
    return False


def draw_trials(
    known: Sequence[Candidate],
    space: CheckedSpace,
    search: SearchOptions,
    check: ConfigCheck,
    drawn: Sequence[Config] = (),
) -> tuple[Candidate, ...]:
    """Sample random configurations until the search has ``n_trials`` trials.

    Configurations of earlier studies are not sampled again. ``drawn`` are configurations that were
    sampled before, and are used if there are enough of them.
    """
    earlier = [
        t.params for study in search.warm_start for t in study.trials if t.state != "waiting"
    ]
    n_missing = search.n_trials - n_counted(known)
    if drawn and n_missing > 0:
        trials = numbered([(config, "random") for config in drawn], known, earlier)[:n_missing]
        if len(trials) == n_missing:
            return trials
    seconds = None
    if search.timeout is not None:
        seconds = max(_DRAWING_SECONDS, search.timeout * _DRAWING_SHARE)
    return top_up(known, space, search.n_trials, search.random_state, check, earlier, seconds)


def default_params(choice: ModelChoice, options: Options) -> Config:
    """Return the default values of all hyperparameters that a configuration may omit."""
    training = options.training
    defaults: Config = {**DEFAULTS, "numbers": options.rows.numbers}
    if choice.module_class is not None:  # the defaults in the signatures
        defaults |= argument_defaults(choice.optimizer) | loss_defaults(training.loss)
        for name, parameter in parameters_of(choice.module_class).items():
            if parameter.default is not parameter.empty:
                defaults[f"module__{name}"] = parameter.default
    return defaults | choice.defaults(training.schedule)


def with_earlier(search: SearchOptions, space: CheckedSpace) -> SearchOptions:
    """Add the best trials of the earlier studies in ``warm_start`` to the included configurations.

    Raises InputError if an earlier study has no usable trial.
    """
    configs: list[Mapping[str, object]] = []
    for study in search.warm_start:
        file = "a study in memory" if study.file is None else f"study {str(study.file)!r}"
        name = f"{option('warm_start')}: {file}"
        finished = [
            t.params for t in study.ranking() if t.state == "complete" and math.isfinite(t.score)
        ]
        if not finished:
            raise InputError(None, f"{name} has no finished trial", remedy="Leave it out.")
        usable = [params for params in finished if is_inside(params, space)]
        if not usable:
            example = finished[0]
            keys = sorted(example.keys() ^ set().union(*space))
            difference = f"the keys {', '.join(keys)}" if keys else f"values, such as {example!r}"
            raise InputError(
                None,
                f"{name} was searched in another space, which differs in {difference}",
                remedy=f"Leave {option('warm_start')} out, or search that space.",
            )
        configs += usable[:_BEST]
    return replace(search, include=[*search.include, *configs])


@dataclass(frozen=True)
class Session:
    """The state of a running search in this process: trials, options, progress and stop signal.

    Attributes:
        ledger: The trials and results of the study.
        options: The options of the search.
        progress: The progress bar and the messages.
        stop: The signal that ends the training.
    """

    ledger: Ledger
    options: Options
    progress: Progress
    stop: Stop

    @property
    def method(self) -> Method:
        """The search method."""
        return self.options.search.method

    def is_over(self) -> bool:
        """Return True if the training must end now, for example because the timeout is over."""
        return self.stop.is_over()

    def add(
        self, trials: Sequence[Candidate], space: CheckedSpace, check: ConfigCheck = check_config
    ) -> None:
        """Add new trials to the study.

        A new study receives all ``trials``. A resumed study receives only the trials that it does
        not have yet.
        """
        ledger = self.ledger
        search = self.options.search
        ledger.on_wait = self._wait
        self.progress.on_look = ledger.show
        ledger.check_sharing()
        if not self.method.shares_trials:
            # What the method does next depends on the results of all trials, so only one process
            # may run the search.
            ledger.claim_search(self.method.name)
        known = len(ledger.candidates)
        with without_collector():
            new = self._missing(trials, space, check)
        if new:
            with ledger.exclusive_setup():
                # another process has added trials in the meantime
                if len(ledger.candidates) > known:
                    new = self._missing(trials, space, check)
                ledger.add(new)
        if ledger.results:
            trials_in_all = count(len(ledger.candidates), "trial")
            self.progress.say(f"resuming: {len(ledger.results)} of {trials_in_all} are finished")
        if search.samples_first:
            sentences = remarks(
                ledger.candidates,
                space,
                n_trials=search.n_trials,
                include_default=search.include_default,
                timeout=search.timeout,
            )
            for sentence in sentences:
                self.progress.say(f"note: {sentence}")

    def _missing(
        self, trials: Sequence[Candidate], space: CheckedSpace, check: ConfigCheck
    ) -> Sequence[Candidate]:
        """Return the trials that the study does not have yet, with the next free trial numbers."""
        candidates = self.ledger.candidates
        search = self.options.search
        if not candidates:
            return trials
        params = [candidate.params for candidate in candidates]
        # In older studies the default configuration was not moved into the space. It still runs
        # only once.
        known_origins = {"random"}
        if any(candidate.origin == "default" for candidate in candidates):
            known_origins.add("default")
        # ``n_trials`` limits the portfolio, but not the included trials.
        n_portfolio = max(0, search.n_trials - n_counted(candidates))
        number = 1 + max(candidate.number for candidate in candidates)
        added = list[Candidate]()
        for trial in trials:
            if trial.origin in known_origins or trial.params in params:
                continue
            if trial.origin == "portfolio":
                n_portfolio -= 1
                if n_portfolio < 0:
                    continue
            added.append(replace(trial, number=number + len(added)))
        if not search.samples_first:
            return added
        stored = {candidate.number: candidate for candidate in candidates}
        drawn = [t.params for t in trials if t.origin == "random" and stored.get(t.number) != t]
        return [*added, *draw_trials([*candidates, *added], space, search, check, drawn)]

    def _wait(self, reason: str) -> None:
        """Tell the user why this process waits for another process, or end the wait.

        Raises KeyboardInterrupt or TimeoutError if the search must end.
        """
        self.progress.say(reason, once=True)
        if self.stop.requested:
            raise KeyboardInterrupt
        if self.stop.is_over():
            raise TimeoutError(errno.ETIMEDOUT, f"the time is over; {reason}")

    def run(
        self,
        train: Callable[[], object],
        callbacks: Callbacks,
        study: Callable[..., Study],
        signals: Sequence[int],
    ) -> list[int]:
        """Train the waiting trials of the study, and notify the callbacks.

        Returns the numbers of the signals that ended the training early.
        """
        ledger = self.ledger
        file = self.options.machine.study

        def finished(rows: Sequence[tuple[Candidate, Result | None]]) -> None:
            callbacks.tell("on_trials_end", study(rows))
            self.stop_where_enough()

        ledger.on_finish = finished
        if callbacks.active:  # only then, because making a study of many trials takes time
            callbacks.tell("on_study_start", study(ledger.rows(), file=file))
        self.stop_where_enough()
        try:
            if self.stop.requested:
                return []
            with (
                ended_by_requests(ledger.stop_requests, self.stop, self.progress.say),
                ended_by_signals(self.stop, signals, self.progress.say) as numbers,
            ):
                train()
            return numbers
        finally:
            if callbacks.active:
                callbacks.tell("on_study_end", study(ledger.rows(), file=file))

    @property
    def in_rungs(self) -> bool:
        """True if the method compares running trials (halving or median), so that all trials train
        together."""
        return False

    @cached_property
    def good_enough(self) -> GoodEnough:
        """The object that decides whether ``target_score`` or ``patience_trials`` ends the search
        early."""
        search = self.options.search
        return GoodEnough(self.ledger, search.target_score, search.patience_trials, self.in_rungs)

    def stop_where_enough(self) -> None:
        """Stop the training if ``target_score`` or ``patience_trials`` ends the search."""
        if not self.stop.requested and self.good_enough.is_reached():
            reason = self.good_enough.reason
            self.stop.ask()
            self.stop.reason = reason
            self.progress.say(f"note: the search ends: {reason}")


def check_ending(study: AnyStudy, numbers: Sequence[int]) -> AnyStudy:
    """Return the study of a search that ended normally, or raise an error.

    Raises SearchInterrupted after a signal, and SearchFailedError if all trials have failed.
    """
    if numbers:
        message = interruption(study, study.file)
        at_once = len(numbers) > 1
        kind = SearchInterrupted if numbers[0] == CTRL_C else SearchTerminated
        raise kind(message, study=study, signal=numbers[0], at_once=at_once)
    if all(result is not None and result.state == "failed" for _, result in study.rows):
        raise SearchFailedError(study.failure_message())
    return study
