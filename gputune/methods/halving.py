"""Successive halving at work: all trials train together from rung to rung, and those that leave cost nothing more."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gputune.engine.chunk import Outcome
from gputune.engine.population import Population
from gputune.engine.rung import BegunChunk, Parking, RungJob, RungOutcome
from gputune.engine.train import State
from gputune.engine.workers import run_chunks
from gputune.errors import InputError
from gputune.hypergradients.memory import free_bytes
from gputune.methods.context import Context
from gputune.search.halving import Halving, survivors
from gputune.study.ledger import Ledger
from gputune.study.score import score_curve
from gputune.study.store import Candidate, Result
from gputune.types import Config


@dataclass
class _Runner:
    """One trial on its way: its curve so far (epochs, F) and the seconds it took."""

    trial: Candidate
    config: Config
    curve: np.ndarray
    seconds: float = 0.0


def check_halving(method: Halving, context: Context) -> None:
    """Raise InputError where this search cannot be halved, before anything is kept or trained."""
    if context.choice.solved:
        raise InputError(
            "method='halving' judges trials while they train, and the solved logistic regression does not train: "
            "choose optimizer='adamw', or method='random'."
        )
    method.rungs(context.epochs)


def halve(ledger: Ledger, method: Halving, context: Context) -> None:
    """Train all trials of the ledger from rung to rung; each is finished when it leaves, or at the end.

    Trials that a study file has finished already keep their results, and are judged by their curves.
    """
    search = _Search(ledger, method, context)
    try:
        search.run()
    finally:
        search.parking.close()


class _Search:
    """The trials on their way, and where they wait."""

    def __init__(self, ledger: Ledger, method: Halving, context: Context) -> None:
        self.ledger, self.method, self.context = ledger, method, context
        self.rungs = method.rungs(context.epochs)
        brackets = method.brackets_of(len(ledger.candidates), context.epochs)
        self.bracket = {c.number: b for c, b in zip(ledger.candidates, brackets)}
        folds = context.data.n_folds
        self.running = [
            _Runner(trial, context.complete(trial.params), np.empty((0, folds))) for trial in ledger.waiting()
        ]
        self.parking = Parking(context.memory or free_bytes(context.data.device) // 4)

    def run(self) -> None:
        """Train to every epoch at which some bracket decides, and to the end."""
        stops = sorted({rung for rungs in self.rungs for rung in rungs} | {self.context.epochs})
        progress, begin = self.context.progress, 0
        with progress.bar_over(len(self.running), self.context.epochs):
            for stop in stops:
                if self.running and not self.context.is_over():
                    self._train(begin, stop)
                    self._leave(stop)
                begin = stop
            self._finish([runner for runner in self.running if len(runner.curve)])

    def _train(self, begin: int, stop: int) -> None:
        """Train the running trials from one stop to the next."""
        context, runners = self.context, self.running
        plan = context.plan([runner.config for runner in runners], epochs=stop - begin)
        if begin == 0:
            context.progress.say(f"plan: {plan}")
        chunks = tuple(self._begun(chunk, begin) for chunk in plan.chunks)
        options = context.options
        job = RungJob(
            options.random_state,
            stop,
            context.epochs,
            context.scoring,
            context.choice.module_class,
            context.deadline,
        )

        def keep(outcome: Outcome) -> None:
            assert isinstance(outcome, RungOutcome)
            for i, curve in zip(outcome.index, outcome.curves):
                runners[i].curve = np.concatenate([runners[i].curve, curve])
                runners[i].seconds += outcome.seconds / len(outcome.index)
            for row, position in enumerate(outcome.alive):
                self.parking.park(runners[outcome.index[position]].trial.number, outcome.state.select([row]))

        run_chunks(
            job,
            context.data,
            replace(plan, chunks=chunks),
            progress=context.progress.advance,
            on_outcome=keep,
            cluster=context.cluster,
        )

    def _begun(self, chunk: Population, epoch: int) -> BegunChunk:
        state: State | None = None
        if epoch:
            state = self.parking.take([self.running[i].trial.number for i in chunk.index], epoch)
        return BegunChunk(chunk.kind, chunk.index, chunk.configs, state)

    def _leave(self, epoch: int) -> None:
        """Finish the trials that have diverged, that the deadline has cut short, or that a rung sends away."""
        done = [r for r in self.running if len(r.curve) < epoch or np.isnan(r.curve).any()]
        if epoch == self.context.epochs:
            done = self.running
        self._finish([r for r in done if len(r.curve)])
        gone = {r.trial.number for r in done}
        self.running = [r for r in self.running if r.trial.number not in gone]
        for bracket, rungs in enumerate(self.rungs):
            if epoch in rungs and not self.context.is_over():
                away = self._sent_away(bracket, epoch)
                self._finish([r for r in self.running if r.trial.number in away], rung=epoch)
                self.running = [r for r in self.running if r.trial.number not in away]

    def _sent_away(self, bracket: int, epoch: int) -> set[int]:
        """Return the numbers of the bracket's trials that a rung sends away."""
        reached: dict[int, float] = {}
        curves = {r.trial.number: r.curve for r in self.running}
        curves |= {number: result.curve for number, result in self.ledger.results.items()}
        for number in sorted(curves):
            if self.bracket[number] == bracket and len(curves[number]) >= epoch:
                reached[number] = float(curves[number][epoch - 1].mean())
        stays = survivors(np.array(list(reached.values())), self.method.factor)
        return {number for number, stay in zip(reached, stays) if not stay}

    def _finish(self, runners: Sequence[_Runner], *, rung: int | None = None) -> None:
        """Keep the results of trials that train no more; ``rung`` is the epoch of the one that sent them away."""
        for runner in runners:
            self.parking.drop(runner.trial.number)
        if runners:
            self.ledger.finish([self._result(runner, rung) for runner in runners])
            self.context.progress.finished(len(runners))

    def _result(self, runner: _Runner, rung: int | None) -> Result:
        done = len(runner.curve)
        state, score, folds, best = score_curve(runner.curve, epochs=done, rule=self.context.options.epoch)
        if state == "complete" and rung is not None:
            state = "pruned"
        elif state == "complete" and done < self.context.epochs:
            state = "stopped"
        detail = {} if rung is None else {"rung": rung}
        return Result(runner.trial.number, state, score, folds, best, runner.seconds, runner.curve, detail)
