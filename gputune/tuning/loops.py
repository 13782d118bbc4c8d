"""The search over a custom training loop: sample trials, call the user's objective, store the
study."""

import functools
import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from gputune.engine.stop import entry, stop_after
from gputune.executors.executor import Executor, Queue
from gputune.executors.processes import trial_processes
from gputune.executors.worker import (
    LoopObjective,
    LoopTask,
    LoopTrial,
    Reports,
    SetupError,
    TrialEnding,
)
from gputune.ground.errors import PYTHON, InputError, Interface, Verbatim, check_count, option
from gputune.ground.files import scratch_folder
from gputune.spaces.config import plain_config
from gputune.spaces.distributions import CheckedSpace, space_text, space_to_json, to_scipy
from gputune.spaces.random import numbered
from gputune.spaces.space import check_own_include, check_own_space
from gputune.study.claims import Claims
from gputune.study.code import source_text
from gputune.study.file_system import check_one_process
from gputune.study.ledger import open_ledger
from gputune.study.record import DIRECTIONS, Arguments, SearchRecord
from gputune.study.store import Candidate, PlannedChunk, Result, Store
from gputune.study.values import sha256
from gputune.tuning.callbacks import Callback, Callbacks
from gputune.tuning.interrupt import CTRL_C
from gputune.tuning.options import Options, SearchOptions
from gputune.tuning.progress import Profile, Progress
from gputune.tuning.record import distributions, versions
from gputune.tuning.session import (
    AnyStudy,
    Session,
    check_ending,
    draw_trials,
    train_waiting,
    with_earlier,
)
from gputune.tuning.trainer import unseen

Direction = Literal["maximize", "minimize"]

_EXAMPLE = f"For example {option('n_trials', 64)}."


@entry
def search_loop(
    objective: LoopObjective,
    options: Options,
    *,
    direction: Direction,
    max_epochs: int | None,
    signals: Sequence[int] = (CTRL_C,),
    interface: Interface = PYTHON,
    profile: Profile | None = None,
    study_type: type[AnyStudy],
) -> AnyStudy:
    """Train the trials of a custom training loop.

    See ``gputune.search``.

    Args:
        objective: The training loop, ``objective(params, report)``.
        options: The options of the search.
        direction: Whether greater or smaller values of the objective are better.
        max_epochs: The number of reports of a full training. None: the user did not set it.
        signals: The signals that interrupt the training.
        interface: The names of arguments in messages.
        profile: Receives the reason for an early end of the search.
        study_type: The class of the study to return.
    """
    if options.search.target_score is not None and direction == "minimize":
        # The study stores the scores of "minimize" with the opposite sign, so that greater is
        # better.
        options = options.changed(target_score=-options.search.target_score)
    search = options.search
    machine = options.machine
    check_one_process(machine.study)
    stop = stop_after(search.timeout)
    _check_objective(objective, direction)
    if machine.cluster is not None:
        raise InputError(
            f"workers={machine.cluster.name!r}",
            "is only for gputune.tune, because search() trains on this machine",
            remedy="Pass a number of processes, or 'auto'.",
        )
    space = check_own_space(to_scipy(search.space))
    for study in search.warm_start:
        other = DIRECTIONS.get(study.record.scoring, direction)
        if other != direction:
            raise InputError(
                "warm_start",
                f"must have only studies with direction={direction!r}",
                got=Verbatim(f"a study with direction={other!r}"),
                remedy="Its best trials would be the worst trials here. Leave this study out.",
            )
    search = with_earlier(search, space)
    first = _first_trials(search, space)
    rule = search.method.pruning_rule(max_epochs)
    record = _record(objective, search, space, direction, max_epochs, machine.callbacks)
    callbacks = Callbacks(machine.callbacks, stop)
    progress = Progress(
        machine.verbose, lambda curves: callbacks.tell("on_epoch", curves), interface
    )
    progress.scoring = record.scoring
    make_study = partial(study_type.from_rows, record.to_json())
    with (
        _ended_by_setup_error(machine.study),
        open_ledger(machine.study, record) as ledger,
        scratch_folder() as folder,
    ):
        session = Session(ledger, replace(options, search=search), progress, stop)
        session.add(first, space, plain_config)
        sign = 1.0 if direction == "maximize" else -1.0
        task = LoopTask(
            objective, sign, search.random_state, Reports(folder / "reports"), rule, stop
        )
        # A rule compares new trials also with the finished trials of a resumed search.
        for result in ledger.results.values():
            task.reports.write(result.number, result.curve[:, 0], ended=True)
        n_workers = machine.workers if isinstance(machine.workers, int) else None
        n_calls = max(1, search.n_trials + len(search.include))
        with trial_processes(task, n_workers, n_calls, folder) as workers:
            train = partial(
                train_waiting,
                session,
                partial(_train, session, task, workers, max_epochs),
                epochs=1,
            )
            run = partial(session.method.run_loop, session, space, train, plain_config)
            numbers = session.run(run, callbacks, make_study, signals)
            if profile is not None:
                profile.ended = stop.reason
    return check_ending(make_study(ledger.rows(), file=machine.study), numbers)


@contextmanager
def _ended_by_setup_error(study: Path | None) -> Iterator[None]:
    """Raise InputError in place of a SetupError, and remove a new study file without results.

    The corrected objective is another search, which could not use the file.
    """
    is_new = study is not None and not study.exists()
    try:
        yield
    except SetupError as error:
        if study is not None and is_new:
            with Store.open(study) as store, Claims(study) as claims:
                is_used = store.n_finished() > 0 or bool(claims.owners())
            if not is_used:
                study.unlink()
        raise InputError(*error.args) from error


def _first_trials(search: SearchOptions, space: CheckedSpace) -> tuple[Candidate, ...]:
    """Return the trials that are known at the start: included configurations and random samples.

    Without random samples if an Optuna sampler proposes the trials later.
    """
    check_count(search.n_trials, "n_trials", least=0, remedy=_EXAMPLE)
    first = numbered([(config, "include") for config in check_own_include(search.include, space)])
    if not first and not search.n_trials:
        rule = "must be at least 1 if include is empty"
        raise InputError("n_trials", rule, got=0, remedy=_EXAMPLE)
    search.method.check_space(space)
    if search.samples_first:
        first += draw_trials(first, space, search, plain_config)
    return first


def _check_objective(objective: object, direction: object) -> None:
    """Raise InputError for an objective that is not a function of two arguments, or an unknown
    direction."""
    if not callable(objective):
        raise InputError(
            "objective",
            "must be a function of (params, report) that returns a score",
            got=objective,
        )
    try:
        inspect.signature(objective).bind({}, None)
    except TypeError as error:
        _, name = _function(objective)
        raise InputError(
            "objective",
            f"must take two arguments, (params, report), but {name} does not: {error}",
            remedy="Write def objective(params, report): ..., and call report(value) after each "
            "epoch.",
        ) from None
    except ValueError:  # a function in C may have no signature
        pass
    if direction not in ("maximize", "minimize"):
        raise InputError("direction", "must be 'maximize' or 'minimize'", got=direction)


def _function(objective: object) -> tuple[object, str]:
    """Return the function inside a ``functools.partial``, or the objective itself, and the
    function's name."""
    while isinstance(objective, functools.partial):
        objective = objective.func
    return objective, str(getattr(objective, "__qualname__", type(objective).__name__))


_ABSENT = """
target optimizer schedule task classes source fingerprint features columns numbers max_levels
category_copies class_weight sample_weight n_ens cv splits objective code positive baseline dtype device
""".split()
"""The fields of a search record about rows and models. Searches with a custom training loop lack
them."""


def _record(
    objective: object,
    search: SearchOptions,
    space: CheckedSpace,
    direction: Direction,
    max_epochs: int | None,
    callbacks: Sequence[Callback],
) -> SearchRecord:
    """Return the description of a search over a custom training loop, for the study file."""
    function, name = _function(objective)
    text = source_text(function if inspect.isroutine(function) else type(function))
    arguments = Arguments(
        kept={"n_trials": search.n_trials},
        space=space_to_json(space),
        lacking=["objective, a function"],
        callbacks=[type(callback).__name__ for callback in callbacks],
    )
    return SearchRecord(
        face="loop",
        model=name,
        spec={"kind": "objective", "name": name, "sha256": sha256(text) if text else ""},
        space=space_text(space),
        distributions=distributions(space),
        method=search.method.to_json(),
        folds=0,
        scoring="objective" if direction == "maximize" else "neg_objective",
        epoch="last",
        max_epochs=max_epochs or 0,
        seed=search.random_state,
        versions=versions(),
        arguments=arguments,
        absent=frozenset(_ABSENT),
    )


def _train(
    session: Session,
    task: LoopTask,
    workers: Executor[LoopTrial, TrialEnding],
    max_epochs: int | None,
    waiting: Sequence[Candidate],
) -> Sequence[PlannedChunk]:
    """Train the waiting trials that no other process has claimed.

    If this process can claim no trial, return the trials that other processes train.
    """
    ledger = session.ledger
    progress = session.progress
    has_begun = False
    n_parallel = max(1, workers.capacity)

    def split(new: Sequence[Candidate]) -> list[tuple[tuple[int], int, int]]:
        return [((place,), 1, n_parallel) for place in range(len(new))]

    chunks = ledger.chunks(waiting, 0, split)
    chunk_of = {chunk.trials[0]: chunk for chunk in chunks}
    trials = [LoopTrial(trial.number, trial.params) for trial in waiting]
    good_enough = session.good_enough

    def claim(trial: LoopTrial) -> bool:
        if not ledger.claim(chunk_of[trial.number]):
            return False
        # Trials with higher numbers wait for the reports of this trial.
        task.reports.write(trial.number, (), ended=False)
        return True

    def may_begin(trial: LoopTrial) -> bool:
        return good_enough.allows(chunk_of[trial.number])

    queue = Queue(trials, workers, task.stop, claim, may_begin if good_enough.is_possible else None)
    # Without workers, this process calls the objective.
    for ending in queue.run(None if workers.capacity else task, unseen):
        has_begun = True
        if ending.setup_error is not None and not _has_succeeded(ledger.results.values()):
            task.stop.ask()
            raise ending.setup_error
        detail = {}
        if ending.error:
            detail["error"] = ending.error
            progress.say(f"note: trial {ending.number} failed: {ending.error}")
            # Marked as ended here, because its worker may have been lost.
            task.reports.write(ending.number, ending.values, ended=True)
        if max_epochs is not None and len(ending.values) > max_epochs:
            progress.say(
                "note: a trial called report more often than "
                f"{option('max_epochs', max_epochs)}. No trial is pruned after report {max_epochs}. "
                "Pass the number of reports of a full training.",
                once=True,
            )
        curve = np.array(ending.values or [ending.score], dtype=np.float64)[:, None]
        progress.advance(1, curve[None])
        progress.finished(1, pruned=int(ending.state == "pruned"))
        result = Result(
            ending.number,
            ending.state,
            ending.score,
            (ending.score,),
            len(ending.values),
            ending.seconds,
            curve,
            detail,
        )
        ledger.finish([result])
    return [] if has_begun else list(filter(good_enough.allows, chunks))


def _has_succeeded(results: Iterable[Result]) -> bool:
    """Return whether a trial has ended without an error."""
    return any(result.state != "failed" for result in results)
