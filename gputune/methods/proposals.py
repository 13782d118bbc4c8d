"""Searches in which an Optuna sampler proposes the trials, batch by batch."""

from collections.abc import Callable
from itertools import groupby

import numpy as np

from gputune.methods.optuna_study import OptunaStudy
from gputune.spaces.random import n_counted
from gputune.study.store import Candidate, Result
from gputune.tuning.good_enough import BATCH, batch_of
from gputune.tuning.session import Session
from gputune.wording import option

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
            first = 1 + max((candidate.number for candidate in ledger.candidates), default=-1)
            origin = f"{BATCH}{1 + max(map(batch_of, ledger.candidates), default=0)}"
            candidates = []
            for number, (_, params) in enumerate(proposals, start=first):
                candidates.append(Candidate(number, params, origin))
            ledger.add(candidates)
            if not train():
                return
            for number, (trial, _) in enumerate(proposals, start=first):
                study.tell(trial, ledger.results[number])


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
