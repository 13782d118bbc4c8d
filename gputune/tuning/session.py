"""The ledger of a search while this process works on it: trials are added, trained till a signal comes, and checked."""

import errno
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from gputune.callbacks import Callbacks
from gputune.engine.stop import Stop
from gputune.errors import SearchFailedError, SearchInterrupted
from gputune.methods.config import ConfigCheck, check_config
from gputune.methods.random import remarks
from gputune.methods.space import Space
from gputune.study.ledger import Ledger
from gputune.study.store import Candidate, Result
from gputune.study.study import Study
from gputune.text import count
from gputune.tuning.candidates import add_missing, draws_at_once
from gputune.tuning.choices import method_name
from gputune.tuning.interrupt import interrupted_words, run_until_signal
from gputune.tuning.options import Options
from gputune.tuning.progress import Progress

Rows = Sequence[tuple[Candidate, Result | None]]
AnyStudy = TypeVar("AnyStudy", bound=Study)


@dataclass(frozen=True)
class Session:
    """The ledger of a search while this process works on it."""

    ledger: Ledger
    options: Options
    progress: Progress
    stop: Stop

    def add(self, trials: Sequence[Candidate], space: Space, check: ConfigCheck = check_config) -> None:
        """Add the trials that the ledger lacks, and say what is known of it."""
        self.ledger.on_wait, self.progress.on_look = self._wait, self.ledger.show
        if not isinstance(self.options.method, str):
            self.ledger.claim_search(method_name(self.options.method))
        add_missing(self.ledger, trials, space, self.options, check)
        if finished := len(self.ledger.results):
            trials_there = count(len(self.ledger.candidates), "trial")
            self.progress.say(f"going on: {finished} of {trials_there} are finished")
        options, known = self.options, self.ledger.candidates
        if draws_at_once(options):
            for sentence in remarks(known, space, n_trials=options.n_trials, include_default=options.include_default):
                self.progress.say(f"note: {sentence}")

    def _wait(self, words: str) -> None:
        """Say why this process waits before it has a plan; end that where training would end."""
        self.progress.say(words, once=True)
        if self.stop.asked:
            raise KeyboardInterrupt
        if self.stop.is_over():
            raise TimeoutError(errno.ETIMEDOUT, f"the time is over; {words}")

    def run(
        self,
        train: Callable[[], object],
        callbacks: Callbacks,
        make_study: Callable[..., Study],
        signals: Sequence[int],
    ) -> list[int]:
        """Train what waits, and tell the callbacks; return the numbers of the signals that ended it early."""
        ledger, file = self.ledger, self.options.study

        def finished(rows: Rows) -> None:
            callbacks.tell("on_trials_end", make_study(rows))
            self._stop_where_enough()

        ledger.on_finish = finished
        if callbacks.active:  # a study of many trials takes its time
            callbacks.tell("on_study_start", make_study(ledger.rows(), file=file))
        self._stop_where_enough()
        try:
            return [] if self.stop.asked else run_until_signal(train, self.stop, signals, self.progress.say)
        finally:
            if callbacks.active:
                callbacks.tell("on_study_end", make_study(ledger.rows(), file=file))

    def _stop_where_enough(self) -> None:
        """Let training end where a trial is good enough, or none has been better for long."""
        target, patience = self.options.target_score, self.options.patience_trials
        if target is None and patience is None:
            return
        best, since, number = -math.inf, 0, None
        for result in self.ledger.results.values():
            since += 1
            if result.state == "complete" and result.score > best:
                best, since, number = result.score, 0, result.number
        why = ""
        if target is not None and best >= target:
            why = f"trial {number} has reached the target score (target_score={target:g})"
        elif patience is not None and since >= patience:
            why = f"{count(since, 'trial')} in a row were no better than the best before (patience_trials={patience})"
        if why and not self.stop.asked:
            self.stop.ask()
            self.stop.reason = why
            self.progress.say(f"note: the search ends: {why}")


def check_ending(study: AnyStudy, numbers: Sequence[int]) -> AnyStudy:
    """Return the study of a search that has ended by itself; raise what a caller has to hear of another one."""
    if numbers:
        words, at_once = interrupted_words(study, study.file), len(numbers) > 1
        raise SearchInterrupted(words, study=study, signal=numbers[0], at_once=at_once)
    if all(result is not None and result.state == "failed" for _, result in study.rows):
        raise SearchFailedError(study.why_none_is_best())
    return study
