"""Which trials train once more beside those that wait, when a search that stops at rungs goes on."""

from collections.abc import Mapping, Sequence

from gputune.study.ledger import Ledger


def company_of(ledger: Ledger, stops: Sequence[int], done: Mapping[int, int]) -> dict[int, set[int]]:
    """Return, for each epoch at which frozen chunks begin, the trials that the waiting ones need there.

    A search that goes on trains its waiting trials from where they are ``done`` (epochs), and their bits depend on
    those that trained with them: the others of their chunks, which in turn depend on the others of their earlier ones.
    """
    needed = {trial.number for trial in ledger.waiting()}
    company = {}
    for stage in sorted({chunk.stage for chunk in ledger.plan}, reverse=True):
        end = min(stop for stop in stops if stop > stage)
        for chunk in ledger.plan:
            if chunk.stage == stage and any(n in needed and done.get(n, 0) < end for n in chunk.trials):
                needed = needed | set(chunk.trials)
        company[stage] = needed
    return company
