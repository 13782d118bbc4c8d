"""Which trials train once more beside those that wait, when a search that stops at rungs goes on.

All trials train together from stop to stop, where a rule sends some of them away; the others train on.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch

from gputune.engine.checkpoint import Checkpoint, pause_after
from gputune.engine.job import BegunChunk
from gputune.engine.memory import GivenUp
from gputune.engine.population import Population
from gputune.engine.rung import Parking, RungJob, RungOutcome
from gputune.engine.train import State
from gputune.errors import InputError
from gputune.hypergradients.memory import free_bytes
from gputune.study.ledger import Ledger
from gputune.study.score import score_curve
from gputune.study.store import Candidate, Result
from gputune.tuning.checkpoints import latest
from gputune.tuning.context import Context, FrozenPlan, frozen_plans, given_up
from gputune.types import Config


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


SendAway = Callable[[int, Mapping[int, np.ndarray]], set[int]]
"""An epoch and the curves (epochs, F) of trials by number, ended ones too -> the numbers of those that leave."""


@dataclass(eq=False)
class _Runner:
    """One trial on its way: its curve so far (epochs, F) and the seconds it took."""

    trial: Candidate
    config: Config
    curve: np.ndarray
    seconds: float = 0.0

    @property
    def number(self) -> int:
        return self.trial.number

    def has_diverged(self, epoch: int) -> bool:
        """Whether it has no score up to an epoch."""
        return bool(np.isnan(self.curve[:epoch]).any())


def check_trains(method: str, context: Context) -> None:
    """Raise InputError for a model that a ``method`` cannot judge on its way."""
    if context.choice.solved:
        raise InputError(
            f"method={method!r} judges trials while they train, and the solved logistic regression does not train: "
            "choose optimizer='adamw', or method='random'."
        )


def train_in_rungs(ledger: Ledger, stops: Sequence[int], send_away: SendAway, context: Context) -> None:
    """Train the trials of the ledger to each of ``stops`` (epochs) and to the end; each is finished when it leaves.

    Trials that a study file has finished already keep their results, and are judged by their curves.
    """
    search = _Search(ledger, stops, send_away, context)
    try:
        search.run()
    finally:
        search.parking.close()


class _Search:
    """The trials on their way, and where they wait."""

    def __init__(self, ledger: Ledger, stops: Sequence[int], send_away: SendAway, context: Context) -> None:
        self.ledger, self.stops, self.send_away, self.context = ledger, stops, send_away, context
        self.ends = sorted({*stops, context.epochs})
        configs = {trial.number: context.complete(trial.params) for trial in ledger.candidates}
        begun = latest(context.checkpoints_of(list(configs), list(configs.values())))
        done = {number: checkpoint.state.epoch for number, (checkpoint, _) in begun.items()}
        self.company = company_of(ledger, self.ends, done)
        wanted = self.company.get(0, set()) | {trial.number for trial in ledger.waiting()}
        nothing = np.empty((0, context.data.n_folds))
        trials = [trial for trial in ledger.candidates if trial.number in wanted]
        self.running = [_Runner(trial, configs[trial.number], nothing) for trial in trials]
        free = free_bytes(torch.device("cpu")) // 4  # states wait in main memory, wherever they train
        self.parking = Parking(min(free, context.trainer.memory or free))
        self.unsaved: list[tuple[int, ...]] = []  # chunks whose states no file has
        self.saved_at, self.earliest = time.monotonic(), 0.0
        self._resume(begun)

    def _resume(self, begun: Mapping[int, tuple[Checkpoint, int]]) -> None:
        """Put the trials where their checkpoints have them."""
        for runner in self.running:
            if runner.number not in begun:
                continue
            checkpoint, position = begun[runner.number]
            runner.curve = checkpoint.curves[position]
            runner.seconds = checkpoint.seconds / len(checkpoint.trials)
            if position in checkpoint.alive:
                row = checkpoint.alive.index(position)
                self.parking.park(runner.number, checkpoint.state.select([row]))

    def run(self) -> None:
        """Train to every epoch at which the rule decides, and to the end."""
        progress, begin = self.context.progress, 0
        with progress.bar_over(len(self.running), self.context.epochs):
            for stop in self.ends:
                if not self.context.is_over():
                    self._part_company(begin)
                if self.running and not self.context.is_over():
                    self._train(begin, stop)
                    if self.context.is_over():
                        self._save()
                    self._leave(stop)
                begin = stop
            self._finish([runner for runner in self.running if len(runner.curve)])

    def _part_company(self, epoch: int) -> None:
        """Let go the trials that are finished, and are no company for others from this epoch on."""
        stay, over = self.company.get(epoch, set()), self.ledger.results
        for runner in self.running:
            if runner.number in over and runner.number not in stay:
                self.parking.drop(runner.number)
        self.running = [r for r in self.running if r.number not in over or r.number in stay]

    def _train(self, begin: int, stop: int) -> None:
        """Train the running trials from one stop to the next."""
        context = self.context
        plans = frozen_plans(
            self.ledger,
            [runner.trial for runner in self.running],
            stage=begin,
            kind=context.choice.kind,
            complete=context.complete,
            make=lambda configs: context.plan(configs, epochs=stop - begin),
            alone=True,
        )
        for frozen in plans:
            plan = replace(frozen.plan, parking_bytes=self.parking.limit)
            context.progress.plan(plan, aloud=begin == 0)
            self._run(frozen, stop)

    def _run(self, frozen: FrozenPlan, stop: int) -> None:
        """Train the chunks of a plan to a stop."""
        context, by_number = self.context, {runner.number: runner for runner in self.running}
        runners = [by_number[trial.number] for trial in frozen.trials]
        chunks = tuple(part for chunk in frozen.plan.chunks for part in self._begun(chunk, runners, stop))
        checkpointing = context.checkpointing([runner.number for runner in runners])
        job = context.trainer.job(RungJob, epochs=stop, checkpointing=checkpointing, keep_stopped=False)
        trained: set[int] = set()
        if chunks:
            plan = replace(frozen.plan, chunks=chunks, workers=min(frozen.plan.workers, len(chunks)))
            for outcome in context.train(job, plan):
                trained.update(outcome.index)
                if isinstance(outcome, GivenUp):
                    self._give_up(runners[outcome.index[0]], outcome.reason)
                else:
                    assert isinstance(outcome, RungOutcome)
                    self._keep(runners, outcome)
        for chunk in chunks:
            if chunk.state is not None and chunk.alive is not None:
                for row, position in enumerate(chunk.alive):
                    if chunk.index[position] not in trained:  # time was over before it went on
                        self.parking.park(runners[chunk.index[position]].number, chunk.state.select([row]))

    def _keep(self, runners: Sequence[_Runner], outcome: RungOutcome) -> None:
        self.context.profile.trained(outcome.spent)
        for i, curve in zip(outcome.index, outcome.curves):
            runners[i].curve = np.concatenate([runners[i].curve, curve])
            runners[i].seconds += outcome.seconds / len(outcome.index)
        for row, position in enumerate(outcome.alive):
            self.parking.park(runners[outcome.index[position]].number, outcome.state.select([row]))
        self.unsaved.append(tuple(runners[i].number for i in outcome.index))
        # The next chunk takes at most about as long as this one: they are sorted.
        due = self.saved_at + self.context.options.checkpoint_seconds - outcome.seconds
        if time.monotonic() > max(due, self.earliest):
            self._save()

    def _give_up(self, runner: _Runner, reason: str) -> None:
        """Finish a trial that cannot be trained."""
        self.running = [other for other in self.running if other is not runner]
        self.context.store(self.ledger, [given_up(runner.number, runner.curve, reason)])
        self._tell([runner])

    def _begun(self, chunk: Population, runners: Sequence[_Runner], stop: int) -> Iterator[BegunChunk]:
        """Yield the trials of a planned chunk that have not come to the stop yet, those of one length together.

        Those that have diverged stay in their place, without a state, so that what trains on a checkpoint is what
        trained before it.
        """
        places = sorted(range(len(chunk.index)), key=lambda c: len(runners[chunk.index[c]].curve))
        for epoch, group in groupby(places, key=lambda c: len(runners[chunk.index[c]].curve)):
            own = sorted(group)
            those = [runners[chunk.index[c]] for c in own]
            index, configs = tuple(chunk.index[c] for c in own), tuple(chunk.configs[c] for c in own)
            alive = tuple(i for i, r in enumerate(those) if not r.has_diverged(epoch))
            if epoch == 0:
                yield BegunChunk(chunk.kind, index, configs)
            elif epoch < stop and alive:
                state: State = self.parking.take([those[i].number for i in alive])
                before = np.stack([runner.curve for runner in those])
                seconds = sum(runner.seconds for runner in those)
                yield BegunChunk(chunk.kind, index, configs, state, alive, before, seconds)

    def _save(self) -> None:
        """Keep the states of the chunks that no file has, where there is a study file."""
        begin, of = time.monotonic(), {runner.number: runner for runner in self.running}
        checkpointing = self.context.checkpointing(list(of))
        if checkpointing is not None:
            seen: set[int] = set()
            for numbers in reversed(
                self.unsaved
            ):  # the last company that a trial trained in is of one length
                runners = [of[number] for number in numbers if number in of and number not in seen]
                seen |= set(numbers)
                alive = tuple(i for i, r in enumerate(runners) if r.number in self.parking.states)
                if alive:
                    state = State.stack([self.parking.look(runners[i].number) for i in alive])
                    curves = np.stack([runner.curve for runner in runners])
                    seconds = sum(runner.seconds for runner in runners)
                    trials = tuple(runner.number for runner in runners)
                    checkpoint = Checkpoint(trials, alive, curves, state, seconds)
                    checkpointing.keep(checkpoint, [runner.config for runner in runners])
        self.unsaved.clear()
        self.saved_at = time.monotonic()
        self.earliest = self.saved_at + pause_after(self.saved_at - begin)

    def _leave(self, epoch: int) -> None:
        """Finish the trials that have diverged, that were cut short, or that the rule sends away."""
        done = [r for r in self.running if len(r.curve) < epoch or r.has_diverged(epoch)]
        if epoch == self.context.epochs:
            done = self.running
        self._finish([r for r in done if len(r.curve)])
        gone = {r.number for r in done}
        self.running = [r for r in self.running if r.number not in gone]
        if epoch in self.stops and not self.context.is_over():
            curves = {r.number: r.curve for r in self.running}
            curves |= {number: result.curve for number, result in self.ledger.results.items()}
            away = self.send_away(epoch, curves)
            self._finish([r for r in self.running if r.number in away], rung=epoch)
            self.running = [r for r in self.running if r.number not in away]

    def _finish(self, runners: Sequence[_Runner], *, rung: int | None = None) -> None:
        """Keep the results of trials that train no more; ``rung`` is the epoch of the one that sent them away."""
        for runner in runners:
            self.parking.drop(runner.number)
        if runners:
            results = [self._result(runner, rung) for runner in runners]
            self.context.store(self.ledger, results)
            self.context.ended(results)
            self._tell(runners, pruned=sum(result.state == "pruned" for result in results))

    def _tell(self, runners: Sequence[_Runner], *, pruned: int = 0) -> None:
        """Count trials that have ended, and what is not trained of them."""
        self.context.progress.finished(len(runners), pruned=pruned)
        self.context.progress.spare(sum(self.context.epochs - len(runner.curve) for runner in runners))

    def _result(self, runner: _Runner, rung: int | None) -> Result:
        curve = runner.curve[: self.context.epochs if rung is None else rung]
        done = len(curve)
        state, score, folds, best = score_curve(curve, epochs=done, rule=self.context.options.epoch)
        if state == "complete" and rung is not None:
            state = "pruned"
        elif state == "complete" and done < self.context.epochs:
            state = "stopped"
        detail = {} if rung is None else {"rung": rung}
        return Result(runner.number, state, score, folds, best, runner.seconds, curve, detail)
