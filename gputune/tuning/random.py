"""Search methods that train every trial to its end, or solve it without training steps.

All trials are sampled at the start, or an Optuna sampler proposes trials batch by batch. A chunk is
a group of trials that train together.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

import numpy as np
import torch

from gputune.engine.backend import on_threads
from gputune.engine.checkpoint import Checkpoint
from gputune.engine.job import Failure, Job, Outcome, stalled_epochs
from gputune.engine.plan import Plan
from gputune.engine.train import BegunChunk
from gputune.errors import InputError
from gputune.methods.optuna import OptunaSampler, OptunaStudy, check_askable
from gputune.methods.stopping import StoppingRule
from gputune.population.population import Population, by_numbers
from gputune.solver.solve import solve_chunk
from gputune.spaces.config import ConfigCheck, check_config
from gputune.spaces.distributions import CheckedSpace
from gputune.spaces.random import n_counted
from gputune.study.store import Candidate, PlannedChunk, Result
from gputune.text import count
from gputune.tuning.context import Context, RecordedPlan, failed_result
from gputune.tuning.good_enough import BATCH, batch_of
from gputune.tuning.rungs import check_rungs, train_in_rungs
from gputune.tuning.session import Session
from gputune.types import Config, first_metric
from gputune.wording import option

_SOLVED_TOGETHER = 16  # solved logistic regressions between two checks of the time


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


def _train(context: Context, waiting: Sequence[Candidate]) -> list[PlannedChunk]:
    """Train the waiting trials that no other process has claimed.

    If this process can claim no trial, return the chunks that other processes train.
    """
    ledger = context.ledger
    epochs = context.epochs

    def make(configs: Sequence[Config]) -> Plan:
        return context.plan(configs, epochs=epochs).answering_early(context.data.n_folds)

    plans = context.recorded_plans(waiting, 0, make)
    chunks = [chunk for recorded in plans for chunk in recorded.chunks.values()]
    allowed = list(filter(context.good_enough.allows, chunks))
    if not any(map(ledger.claim, allowed)):  # any() stops at the first claimed chunk
        return allowed
    for recorded in plans:

        def claim(part: Population, recorded: RecordedPlan = recorded) -> bool:
            return ledger.claim(recorded.chunk_of(part))

        numbers = [trial.number for trial in recorded.trials]
        plan = _with_checkpoints(recorded, context.checkpoints_of(numbers, recorded.configs))
        context.progress.plan(plan)
        job = context.trainer.job(
            Job,
            epochs=epochs,
            checkpointing=context.checkpointing(numbers),
            patience=context.options.training.patience,
        )
        outcomes = context.trainer.train(
            job,
            plan,
            progress=context.progress.advance,
            claim=claim,
            may_begin=context.may_begin(recorded),
        )
        for outcome in outcomes:
            if isinstance(outcome, Failure):
                number = numbers[outcome.index[0]]
                context.finish([failed_result(number, context.no_curve, outcome.reason)])
            else:
                _finish_chunk(context, recorded.trials, outcome)
    return []


def _solve(context: Context, waiting: Sequence[Candidate]) -> list[PlannedChunk]:
    """Solve the waiting logistic regressions that no other process has claimed.

    If this process can claim no trial, return the chunks that other processes solve.
    """

    def split(new: Sequence[Candidate]) -> list[tuple[Sequence[int], int, int]]:
        threads = torch.get_num_threads()
        parts = list[tuple[Sequence[int], int, int]]()
        for group in by_numbers([trial.params for trial in new]):
            for begin in range(0, len(group), _SOLVED_TOGETHER):
                parts.append((group[begin : begin + _SOLVED_TOGETHER], threads, 1))
        return parts

    chunks = context.ledger.chunks(waiting, 0, split)
    trial_of = {trial.number: trial for trial in context.ledger.candidates}
    is_solved = False
    allowed = list(filter(context.good_enough.allows, chunks))
    for chunk in chunks:
        if is_solved and context.is_over():
            break
        if context.good_enough.allows(chunk) and context.ledger.claim(chunk):
            trials = [trial_of[number] for number in chunk.trials]
            configs = [context.complete(trial.params) for trial in trials]
            with on_threads(chunk.threads):
                outcome = solve_chunk(context.data, configs, range(len(configs)), context.scoring)
            context.progress.advance(len(trials), outcome.curves)
            _finish_chunk(context, trials, outcome)
            is_solved = True
    return [] if is_solved else allowed


def _finish_chunk(context: Context, trials: Sequence[Candidate], outcome: Outcome) -> None:
    """Store the results of trials that have trained together.

    With the option ``patience``, cut each learning curve at the epoch where its trial ended.
    """
    patience = context.options.training.patience
    results = []
    context.note_fault(outcome.fault)
    context.profile.spent += outcome.spent
    if not context.is_over():
        context.progress.skip(len(outcome.index) * (context.epochs - outcome.epochs))
    for i, curve in zip(outcome.index, outcome.curves):
        epochs = outcome.epochs
        if patience is not None:
            stalled = stalled_epochs(first_metric(curve, axes=2)[None, :epochs].mean(2))[0]
            # The curve decides, because a trial resumed from a checkpoint may have trained one
            # epoch more.
            ends = np.flatnonzero(stalled >= patience)
            if ends.size:
                epochs = int(ends[0]) + 1
                curve = curve[:epochs]
        number = trials[i].number
        rule = context.options.training.epoch
        # The trials of a chunk train together, so each gets an equal share of the time.
        share = outcome.seconds / len(outcome.index)
        results.append(Result.of_curve(number, curve, epochs=epochs, rule=rule, seconds=share))
    outputs = {trials[i].number: values for i, values in outcome.outputs.items()}
    context.finish(results, outputs)


def wait_for_others(session: Session, chunks: Sequence[PlannedChunk]) -> None:
    """Wait until other processes have trained their trials, and tell the user once."""
    owners, remedy = session.ledger.owners_of(chunks)
    trials = count(sum(len(chunk.trials) for chunk in chunks), "trial")
    session.progress.say(f"waiting for {trials} of {owners}. {remedy}".rstrip(), once=True)
    session.ledger.wait(chunks, session.is_over)


def _with_checkpoints(recorded: RecordedPlan, checkpoints: Sequence[Checkpoint]) -> Plan:
    """Return a plan in which trials with checkpoints continue from their checkpoints.

    Their chunks come first. Each chunk has the same trials as before, so that the results are
    bit-identical.
    """
    place = {trial.number: i for i, trial in enumerate(recorded.trials)}
    plan = recorded.plan
    chunks: list[Population] = []
    taken: set[int] = set()
    for checkpoint in checkpoints:
        index = tuple(place.get(number, -1) for number in checkpoint.trials)
        # Skip a checkpoint with a trial that is not in this plan or that another checkpoint has.
        if min(index) < 0 or taken & set(index):
            continue
        taken |= set(index)
        begun = BegunChunk(
            plan.chunks[0].kind,
            index,
            tuple(recorded.configs[i] for i in index),
            checkpoint.state,
            checkpoint.alive,
            checkpoint.curves,
            checkpoint.seconds,
        )
        chunks.append(begun)
    for chunk in plan.chunks:
        rest = [c for c, i in enumerate(chunk.index) if i not in taken]
        if rest:
            chunks.append(chunk.select(rest))
    return replace(plan, chunks=tuple(chunks))


def check_sampling(method: OptunaSampler, space: CheckedSpace, context: Context) -> None:
    """Raise InputError if the Optuna sampler cannot propose configurations of this space.

    A search calls this function before anything trains or is stored.
    """
    check_askable(space)
    if "penalty" in space[0]:
        raise InputError(
            "space",
            "must have 'l1_ratio' instead of the older key 'penalty' for an Optuna sampler",
            remedy="l1_ratio=0 is l2, l1_ratio=1 is l1, and C=inf is no penalty.",
        )
    if method.halving is not None:
        check_rungs(method.halving, context)


def sample(
    session: Session,
    space: CheckedSpace,
    train: Callable[[], bool],
    *,
    epochs: int,
    check: ConfigCheck = check_config,
) -> None:
    """Train the trials that an Optuna sampler proposes, batch by batch.

    First the waiting trials train, and the sampler receives all results in order. Then the sampler
    proposes one batch after another, and receives the results of each batch. Only this process does
    so, because a batch depends on every result of the batch before. ``train`` returns whether the
    search continues.
    """
    ledger = session.ledger
    method = session.options.search.method
    assert isinstance(method, OptunaSampler)
    if not train() or not _n_missing(session):
        return
    study = _study_so_far(session, partial(OptunaStudy, method.sampler, space, check=check))
    with session.progress.bar_over(_n_missing(session), epochs):
        while missing := min(method.batch, _n_missing(session)):
            proposals = [study.ask() for _ in range(missing)]
            first = 1 + max((candidate.number for candidate in ledger.candidates), default=-1)
            batch = f"{BATCH}{1 + max(map(batch_of, ledger.candidates), default=0)}"
            candidates = []
            for number, (_, params) in enumerate(proposals, start=first):
                candidates.append(Candidate(number, params, batch))
            ledger.add(candidates)
            if not train():
                return
            for number, (trial, _) in enumerate(proposals, start=first):
                study.tell(trial, ledger.results[number])


def _n_missing(session: Session) -> int:
    """Return the number of trials that the Optuna sampler still has to propose.

    The default trial counts as proposed. Included trials do not count.
    """
    candidates = session.ledger.candidates
    proposed = sum(batch_of(candidate) > 0 for candidate in candidates)
    return max(0, session.options.search.n_trials - proposed - n_counted(candidates))


def train_batches(context: Context, halving: StoppingRule | None = None) -> bool:
    """Train or solve the waiting trials of a study.

    Return False if the search is over. Without halving, all waiting trials train together. With
    halving, each batch trains separately.
    """
    ledger = context.ledger
    if halving is None:
        train = partial(_solve if context.choice.solved else _train, context)
        return train_waiting(context, train, epochs=context.epochs)
    for batch in sorted(set(map(batch_of, ledger.waiting()))):
        trials = [candidate for candidate in ledger.candidates if batch_of(candidate) == batch]
        train_in_rungs(context, halving, trials)
    return not context.is_over()


def _study_so_far(session: Session, make: Callable[..., OptunaStudy]) -> OptunaStudy:
    """Return an Optuna study that has received all results so far, in order.

    The Optuna study has a fresh copy of the sampler, and asks the copy again for all earlier
    proposals. A seeded sampler makes the same proposals and then continues as if it had never
    stopped. If the proposals differ, the study uses a reseeded copy, which receives the trained
    configurations in place of its own proposals.
    """
    progress = session.progress
    for reseed in (False, True):
        study = make(reseed=reseed)
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
        if _repeat(study, session, enqueue=reseed):
            break
        progress.say(
            "note: the sampler does not propose the finished trials again, because it has no seed "
            "or is a different sampler; a reseeded copy of the sampler receives their results",
            once=True,
        )
    return study


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
                    session.progress.say(
                        f"note: trial {candidate.number} ({candidate.origin}) is outside the "
                        "space, so the sampler does not receive its result"
                    )
            continue
        proposals = []
        for candidate in candidates:
            proposals.append(study.ask(candidate.params if enqueue else None))
        if any(params != c.params for (_, params), c in zip(proposals, candidates)):
            return False
        for (trial, _), candidate in zip(proposals, candidates):
            study.tell(trial, results[candidate.number])
    return True
