"""Every trial trained to the end (or solved), in the order that suits the machine: what random search does."""

from collections.abc import Callable, Sequence

import numpy as np

from gputune.engine.chunk import Job, Outcome
from gputune.engine.solved import solve_chunk
from gputune.engine.workers import run_chunks
from gputune.methods.context import Context, does_not_fit
from gputune.methods.resuming import with_begun
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
        results = [
            _result(waiting[i], curve, outcome, options) for i, curve in zip(outcome.index, outcome.curves)
        ]
        ledger.finish(results)
        context.ended(results)
        progress.finished(len(outcome.index))

    def give_up(place: int, reason: str) -> None:
        ledger.finish([does_not_fit(waiting[place].number, np.empty((0, context.data.n_folds)), reason)])
        progress.finished(1)

    if context.choice.solved:
        with progress.bar_over(len(waiting), 1):
            _solve(configs, context, keep)
    elif configs:
        numbers = [trial.number for trial in waiting]
        plan = context.plan(configs, epochs=context.epochs)
        plan = with_begun(plan, context.checkpoints_of(numbers, configs), numbers, configs)
        progress.say(f"plan: {plan}")
        job = Job(
            options.random_state,
            context.epochs,
            context.epochs,
            context.scoring,
            context.choice.module_class,
            context.stop,
            context.checkpointing(numbers),
        )
        with progress.bar_over(len(waiting), context.epochs):
            run_chunks(
                job, context.data, plan, progress=progress.advance, on_outcome=keep, on_failure=give_up
            )


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
