"""The trials of a call, and the session in which they train.

The trials are the default trial, the trials of a portfolio (good configurations of a named space),
included trials and randomly sampled trials. A resumed study adds the trials that its ledger (the
list of trials and results) lacks.
"""

import errno
import math
import threading
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import TypeVar

from gputune.engine.stop import Stop
from gputune.ground.errors import (
    InputError,
    SearchFailedError,
    SearchInterrupted,
    SearchTerminated,
    Verbatim,
    option,
)
from gputune.ground.memory import without_collector
from gputune.ground.text import count
from gputune.ground.types import DEFAULTS, Config
from gputune.modules.construction import parameters_of
from gputune.modules.pretrained import ADAPTER_DEFAULTS, adapters_of
from gputune.optimizers.classes import argument_defaults
from gputune.scoring.objective import loss_defaults
from gputune.spaces.config import ConfigCheck, check_config, legal_keys
from gputune.spaces.distributions import CheckedSpace, is_inside, to_scipy
from gputune.spaces.named import MODELS_OF_SPACES, SPACES, named_space
from gputune.spaces.portfolios import PORTFOLIOS
from gputune.spaces.random import first_candidates, n_counted, remarks, top_up
from gputune.spaces.space import check_include, check_space, choices_of, default_space
from gputune.study.ledger import Ledger
from gputune.study.store import Candidate, PlannedChunk, Result
from gputune.study.study import Study
from gputune.tuning.callbacks import Callbacks
from gputune.tuning.choices import ModelChoice
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
    portfolio: Sequence[Config] = (),
) -> tuple[Candidate, ...]:
    """Return the first trials of a search: default, portfolio, included and random
    configurations."""
    search = options.search
    first = first_candidates(
        space,
        n_trials=search.n_trials,
        include=search.include,
        include_default=search.include_default,
        defaults=default_params(choice, options),
        portfolio=portfolio,
    )
    if not search.samples_first:
        return first
    return first + draw_trials(first, space, search, check_config)


def draw_trials(
    known: Sequence[Candidate],
    space: CheckedSpace,
    search: SearchOptions,
    check: ConfigCheck,
) -> tuple[Candidate, ...]:
    """Sample random configurations until the search has ``n_trials`` trials.

    Configurations of earlier studies are not sampled again.
    """
    earlier = [
        t.params for study in search.warm_start for t in study.trials if t.state != "waiting"
    ]
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


BATCH = "batch "
"""The first part of a trial's ``origin`` if an Optuna sampler proposed the trial.

The batch number follows.
"""

_BLOCK = 16
"""The smallest number of consecutive trials that are planned together.

With fewer trials, the stacked backends would have too little work.
"""


def batch_of(candidate: Candidate) -> int:
    """Return the batch number of a trial that an Optuna sampler proposed.

    The batch number of any other trial is 0.
    """
    origin = candidate.origin
    if not isinstance(origin, str) or not origin.startswith(BATCH):
        return 0
    return int(origin.removeprefix(BATCH))


def block_size(target_score: float | None, patience_trials: int | None) -> int | None:
    """Return the number of consecutive trials that gputune plans together.

    Returns None if the search cannot end early, because then gputune plans all trials at once. A
    search that can end early judges its trials in order. Small groups of consecutive trials let it
    decide sooner.
    """
    if target_score is None and patience_trials is None:
        return None
    return max(_BLOCK, patience_trials or 0)


# Trials are judged in order of their trial numbers, never in the order in which they end. A trial
# counts when all trials of its chunk, of all earlier chunks, and all trials with lower numbers have
# ended. The first trial that ends the search is therefore the same with any number of workers, after
# a kill, and in a repeated call.
#
# A chunk begins only if the chunks before it, except the last few, do not end the search. "The last
# few" is the number of chunks that may train at once, which the study stores. These chunks train to
# their end, also after the decision. So the set of trained trials is the same each time.
@dataclass(eq=False)
class GoodEnough:
    """The decision to end a search early because a score is good enough or no longer improves.

    Attributes:
        in_rungs: If True, trials train together from rung to rung, and all trials together count as
            one chunk. With an Optuna sampler, each batch counts as one chunk.
        reason: The reason why the search ends, as text. "" while the search continues.
    """

    ledger: Ledger
    target_score: float | None
    patience_trials: int | None
    in_rungs: bool
    reason: str = ""
    _ended: int = 0  # number of chunks, counted from the first one, that are known to have ended
    _trials: set[int] = field(default_factory=set)  # in these chunks
    _counted: int = 0  # number of candidates, counted from the first one, that count
    _best: float = -math.inf
    _since_best: int = 0
    # Threads of an executor call the methods too.
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def is_possible(self) -> bool:
        """True if the user set ``target_score`` or ``patience_trials``, so that the search can end
        early."""
        return self.target_score is not None or self.patience_trials is not None

    def allows(self, chunk: PlannedChunk) -> bool:
        """Return True if a chunk (a group of trials that train together) may begin to train now."""
        if not self.is_possible:
            return True
        with self._lock:
            chunks = self._chunks()
            self._look(chunks)
            place = bisect_left(chunks, chunk.number, key=lambda other: other.number)
            return self._allows(place, chunk)

    def is_reached(self) -> bool:
        """Return True if ``target_score`` or ``patience_trials`` ends the search now.

        The result is False while trials that were allowed to begin have not ended.
        """
        if not self.is_possible:
            return False
        with self._lock:
            chunks = self._chunks()
            self._look(chunks)
            if not self.reason:
                return False
            for place, chunk in enumerate(chunks[self._ended :], start=self._ended):
                if self._allows(place, chunk) and not self._has_ended(chunk):
                    return False
            return True

    def _allows(self, place: int, chunk: PlannedChunk) -> bool:
        """Return True if the chunk at position ``place`` of the plan may begin to train."""
        if self.reason:
            # After the decision, only chunks that were allowed to begin just before it may train.
            return place < self._ended - 1 + chunk.at_once
        return place - chunk.at_once < self._ended

    def _chunks(self) -> Sequence[PlannedChunk]:
        """Return the groups of trials that train together, in the order of the plan.

        With halving or the median rule, each batch of trials is one group.
        """
        if not self.in_rungs:
            return self.ledger.plan
        batches = groupby(self.ledger.candidates, batch_of)
        return [
            PlannedChunk(number, 0, tuple(c.number for c in batch), 1) for number, batch in batches
        ]

    def _has_ended(self, chunk: PlannedChunk) -> bool:
        return all(number in self.ledger.results for number in chunk.trials)

    def _look(self, chunks: Sequence[PlannedChunk]) -> None:
        """Judge the trials that have ended since the last call, until one trial ends the search."""
        while (
            not self.reason and self._ended < len(chunks) and self._has_ended(chunks[self._ended])
        ):
            self._trials.update(chunks[self._ended].trials)
            self._ended += 1
            self._count_trials()

    def _count_trials(self) -> None:
        """Judge trials in the order of their trial numbers, and stop at the first unfinished
        trial."""
        candidates = self.ledger.candidates
        while not self.reason and self._counted < len(candidates):
            number = candidates[self._counted].number
            if number not in self._trials:
                return
            self._counted += 1
            self._count(number)

    def _count(self, number: int) -> None:
        """Compare a trial with the best trial so far, and set ``reason`` if the trial ends the
        search."""
        result = self.ledger.results[number]
        if result.state == "complete" and result.score > self._best:
            self._best = result.score
            self._since_best = 0
        elif result.state != "pruned" or math.isfinite(self._best):
            # A pruned trial is no worse than a best trial that does not exist yet.
            self._since_best += 1
        if self.target_score is not None and self._best >= self.target_score:
            target = option("target_score", Verbatim(f"{self.target_score:g}"))
            self.reason = f"trial {number} has reached the target score ({target})"
        elif self.patience_trials is not None and self._since_best >= self.patience_trials:
            trials = count(self._since_best, "trial")
            patience = option("patience_trials", self.patience_trials)
            self.reason = f"{trials} in a row were no better than the best before ({patience})"


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
        # ``n_trials`` limits the portfolio, but not the included trials.
        n_portfolio = max(0, search.n_trials - n_counted(candidates))
        number = 1 + max(candidate.number for candidate in candidates)
        added = list[Candidate]()
        for trial in trials:
            if trial.origin == "random" or trial.params in params:
                continue
            if trial.origin == "portfolio":
                n_portfolio -= 1
                if n_portfolio < 0:
                    continue
            added.append(replace(trial, number=number + len(added)))
        if not search.samples_first:
            return added
        return [*added, *draw_trials([*candidates, *added], space, search, check)]

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


def train_waiting(
    session: Session, train: Callable[[Sequence[Candidate]], Sequence[PlannedChunk]], *, epochs: int
) -> bool:
    """Train the trials of a study that have no result yet, and return True if time is left.

    The function ``train`` returns the groups of trials that other processes are training.
    """
    ledger = session.ledger
    if not ledger.waiting():
        return not session.is_over()
    with session.progress.bar_over(len(ledger.waiting()), epochs):
        while waiting := ledger.waiting():
            foreign = train(waiting)
            ledger.refresh()
            session.stop_where_enough()  # results of other processes count too
            if session.is_over():
                break
            if foreign:  # trained here if the other processes end without results
                wait_for_others(session, foreign)
    return not session.is_over()


def wait_for_others(session: Session, chunks: Sequence[PlannedChunk]) -> None:
    """Wait until other processes have trained their trials, and tell the user once."""
    owners, remedy = session.ledger.owners_of(chunks)
    trials = count(sum(len(chunk.trials) for chunk in chunks), "trial")
    session.progress.say(f"waiting for {trials} of {owners}. {remedy}".rstrip(), once=True)
    session.ledger.wait(chunks, session.is_over)


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
