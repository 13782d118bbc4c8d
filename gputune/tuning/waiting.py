"""Train the trials that wait, and wait for trials that other processes train."""

from collections.abc import Callable, Sequence

from gputune.ground.text import count
from gputune.study.store import Candidate, PlannedChunk
from gputune.tuning.session import Session


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
