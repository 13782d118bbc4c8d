"""A search with one of Optuna's samplers: it is asked for a batch, the batch trains together, and it is told."""

from itertools import groupby

from gputune.search.optuna_sampler import OptunaSampler, OptunaStudy, check_askable
from gputune.search.random import n_counted
from gputune.search.space import Space
from gputune.study.ledger import Ledger
from gputune.study.store import Candidate
from gputune.tuning.context import Context
from gputune.tuning.random import train_fully
from gputune.tuning.rungs import check_rungs, halve

_BATCH = "batch "
"""Origin of a trial that was asked for, before the number of its batch."""


def check_sampling(method: OptunaSampler, space: Space, context: Context) -> None:
    """Raise InputError where the sampler cannot be asked for this space, before anything is kept or trained."""
    check_askable(space)
    if method.halving is not None:
        check_rungs(method.halving, context)


def sample(ledger: Ledger, space: Space, method: OptunaSampler, context: Context) -> None:
    """Train what waits, tell the sampler all results in order, then ask, train and tell batch by batch.

    This process alone asks and trains: the next batch depends on every result of the last one.
    """
    _train(ledger, method, context)
    if context.is_over() or not _missing(ledger, context):
        return
    study = _study_so_far(ledger, space, method, context)
    with context.progress.bar_over(_missing(ledger, context), context.epochs):
        while (count := min(method.batch, _missing(ledger, context))) and not context.is_over():
            proposals = [study.ask() for _ in range(count)]
            number = 1 + max((c.number for c in ledger.candidates), default=-1)
            batch = f"{_BATCH}{1 + max(map(_batch_of, ledger.candidates), default=0)}"
            ledger.add([Candidate(number + i, params, batch) for i, (_, params) in enumerate(proposals)])
            _train(ledger, method, context)
            if not context.is_over():
                for i, (trial, _) in enumerate(proposals):
                    study.tell(trial, ledger.results[number + i])


def _missing(ledger: Ledger, context: Context) -> int:
    """How many trials are still to be asked for: the default one counts, included ones do not."""
    proposed = sum(_batch_of(c) > 0 for c in ledger.candidates)
    return max(0, context.options.n_trials - proposed - n_counted(ledger.candidates))


def _batch_of(candidate: Candidate) -> int:
    """Return the number of the batch that a trial was asked for in, 0 for one that was given."""
    origin = candidate.origin
    return int(origin.removeprefix(_BATCH)) if isinstance(origin, str) and origin.startswith(_BATCH) else 0


def _train(ledger: Ledger, method: OptunaSampler, context: Context) -> None:
    """Train what waits in the ledger together; with halving each batch by itself."""
    if method.halving is None:
        if ledger.waiting():
            train_fully(ledger, context)
        return
    for batch in sorted({_batch_of(candidate) for candidate in ledger.waiting()}):
        trials = [candidate for candidate in ledger.candidates if _batch_of(candidate) == batch]
        halve(ledger, trials, method.halving, context)


def _study_so_far(ledger: Ledger, space: Space, method: OptunaSampler, context: Context) -> OptunaStudy:
    """Return a study of a fresh copy of the sampler in which all results so far have been told, in order.

    The copy is asked again for what it was asked before. A seeded sampler proposes the same again, and then goes on as
    if it had never stopped. Where it proposes something else, a reseeded copy is told what was tried in the place of
    its proposals.
    """
    study = OptunaStudy(method.sampler, space)
    if _repeat(study, ledger, context, enqueue=False):
        return study
    context.progress.say(
        "note: the sampler does not propose the finished trials again (it has no seed, or is another one); a reseeded "
        "copy of it is told their results."
    )
    study = OptunaStudy(method.sampler, space, reseed=True)
    _repeat(study, ledger, context, enqueue=True)
    return study


def _repeat(study: OptunaStudy, ledger: Ledger, context: Context, *, enqueue: bool) -> bool:
    """Tell the results of the ledger, batch by batch; False where a proposal is another than the first time.

    enqueue: put what was proposed in the place of what is proposed now.
    """
    for batch, group in groupby(ledger.candidates, _batch_of):
        candidates = list(group)
        if batch == 0:
            for c in candidates:
                if not study.add(c.params, ledger.results[c.number]):
                    context.progress.say(
                        f"note: trial {c.number} ({c.origin}) is not in the space, so the sampler is not told."
                    )
            continue
        proposals = [study.ask(c.params if enqueue else None) for c in candidates]
        if any(params != c.params for (_, params), c in zip(proposals, candidates)):
            return False
        for (trial, _), candidate in zip(proposals, candidates):
            study.tell(trial, ledger.results[candidate.number])
    return True
