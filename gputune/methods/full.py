"""Every trial trained to the end (or solved), in the order that suits the machine: what random search does."""

from collections.abc import Callable, Sequence

import numpy as np

from gputune.engine.chunk import Job, Outcome
from gputune.engine.solved import solve_chunk
from gputune.engine.workers import run_chunks
from gputune.methods.context import Context
from gputune.options import Options
from gputune.study.ledger import Ledger
from gputune.study.score import score_curve
from gputune.study.store import Candidate, Result
from gputune.types import Config

_SOLVED_TOGETHER = 16  # trials of the solved logistic regression between two looks at the clock


def train_fully(ledger: Ledger, context: Context) -> None:
    """Train what waits in the ledger, chunk by chunk; what is finished is kept at once."""
    waiting, options, progress = ledger.waiting(), context.options, context.progress
    configs = [context.complete(trial.params) for trial in waiting]

    def keep(outcome: Outcome) -> None:
        ledger.finish(
            [_result(waiting[i], curve, outcome, options) for i, curve in zip(outcome.index, outcome.curves)]
        )
        progress.finished(len(outcome.index))

    if context.choice.solved:
        with progress.bar_over(len(waiting), 1):
            _solve(configs, context, keep)
    elif configs:
        plan = context.plan(configs, epochs=context.epochs)
        if not progress.trials_done:  # the first of many where trials come in batches
            progress.say(f"plan: {plan}")
        job = Job(
            options.random_state,
            context.epochs,
            context.epochs,
            context.scoring,
            context.choice.module_class,
            context.deadline,
        )
        with progress.bar_over(len(waiting), context.epochs):
            run_chunks(job, context.data, plan, progress=progress.advance, on_outcome=keep)


def _solve(configs: Sequence[Config], context: Context, keep: Callable[[Outcome], None]) -> None:
    for begin in range(0, len(configs), _SOLVED_TOGETHER):
        if begin and context.is_over():
            return
        part = range(begin, min(begin + _SOLVED_TOGETHER, len(configs)))
        outcome = solve_chunk(context.data, configs, part, context.scoring)
        context.progress.advance(len(part), outcome.curves)
        keep(outcome)


def _result(trial: Candidate, curve: np.ndarray, outcome: Outcome, options: Options) -> Result:
    state, score, fold_scores, best_epoch = score_curve(curve, epochs=outcome.epochs, rule=options.epoch)
    share = outcome.seconds / len(outcome.index)
    return Result(trial.number, state, score, fold_scores, best_epoch, share, curve)
