"""The steps of a search on rows of data, from reading the rows to the finished study."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Generic

import torch

from gputune.data.arrays import ArrayLayout
from gputune.data.columns import Layout
from gputune.data.replicas import with_replicas
from gputune.engine.backend import matrix_products, other_gpus
from gputune.engine.plan import Plan, parse_memory
from gputune.engine.stop import Stop, entry, stop_after
from gputune.executors.cluster import Cluster, Connection
from gputune.ground.errors import (
    PYTHON,
    InputError,
    Interface,
    StudyCorruptError,
    StudyVersionError,
    option,
)
from gputune.ground.memory import without_collector
from gputune.ground.text import size_words
from gputune.ground.types import Config
from gputune.modules.pretrained import pretrained_of
from gputune.scoring.baseline import baseline, remark_on_accuracy
from gputune.scoring.metrics import has_function
from gputune.spaces.distributions import CheckedSpace
from gputune.spaces.edges import edge_remarks
from gputune.spaces.random import draw, notes
from gputune.spaces.space import choices_of
from gputune.study.file_system import check_one_process
from gputune.study.ledger import Ledger, open_ledger
from gputune.study.record import SearchRecord
from gputune.study.store import Candidate, Store
from gputune.tuning.callbacks import Callbacks
from gputune.tuning.context import Context
from gputune.tuning.interrupt import CTRL_C
from gputune.tuning.length import with_length
from gputune.tuning.method import check_patience
from gputune.tuning.problem import Problem, make_problem
from gputune.tuning.progress import PREPARING, Profile, Progress
from gputune.tuning.record import SearchCall, checkpoint_folder, search_record
from gputune.tuning.session import (
    AnyStudy,
    check_ending,
    check_schedule,
    checked_space,
    default_params,
    first_trials,
    with_earlier,
)
from gputune.tuning.setup import Setup, check_networks, check_rows_of_networks, set_up
from gputune.tuning.task_choice import chosen_task
from gputune.tuning.trainer import Trainer


@entry
def search(
    call: SearchCall,
    signals: Sequence[int] = (CTRL_C,),
    *,
    say_notes: bool = True,
    profile: Profile | None = None,
    interface: Interface = PYTHON,
    study_type: type[AnyStudy],
) -> AnyStudy:
    """Run a search: check the options, prepare the rows and trials, train, and return the study.

    ``entry`` makes the function independent of the caller's inference mode and default device of
    torch. If the process ends during a search in a daemon thread, gputune requests the search to
    end, and the process waits for it.

    Args:
        call: The model, the rows and the options of the search.
        signals: The signals that interrupt the training.
        say_notes: If True, the search prints its notes on the columns and the trials. A caller that
            prints the notes itself passes False.
        profile: Receives the time that each part takes.
        interface: The names of arguments in messages.
        study_type: The class of the study to return.

    Raises:
        SearchInterrupted: One of the ``signals`` ended the search early.
    """
    options = call.options
    machine = options.machine
    check_one_process(machine.study)
    stop = stop_after(options.search.timeout)
    callbacks = Callbacks(machine.callbacks, stop)
    # Callbacks get a copy of the curves, because the search continues to use its own.
    progress = Progress(
        machine.verbose, lambda curves: callbacks.tell("on_epoch", curves.copy()), interface
    )
    profile = Profile() if profile is None else profile
    with _open_store(machine.study) as store:
        with profile.clock(PREPARING):
            setup = _prepare(call, progress, store)
        problem = setup.problem
        # The problem's options from here on. ``machine`` still has the call's.
        options = problem.options
        profile.device = setup.data.device
        progress.scoring = setup.scoring.name
        with _cluster(problem) as cluster:
            trainer = _trainer(setup, stop, cluster, progress)
            # An empty ledger for now: a new study file is created only after all checks have passed.
            context = Context(Ledger(None), options, progress, stop, trainer, problem, profile)
            context = _checked(context, setup)
            # The search method is checked before a study file is created.
            context.method.check(context, setup.space, setup.trials)
            record = _record(setup, context)
            arguments = replace(
                record.arguments, final_model=dict(call.final_model), preset=call.preset_choices
            )
            record = replace(record, arguments=arguments)
            progress.say(problem.summary())
            if call.preset:
                progress.say(call.preset)
            for note in (*problem.remarks(), *(record.notes if say_notes else ())):
                progress.say(f"note: {note}")
            with open_ledger(machine.study, record, store) as ledger:
                record = replace(record, arguments=ledger.arguments or record.arguments)
                make_study = partial(study_type.from_rows, record.to_json())
                context = replace(
                    context,
                    ledger=ledger,
                    checkpoints=checkpoint_folder(machine.study, record),
                )
                context.add(setup.trials, setup.space)
                train = partial(context.method.run, context, setup.space)
                with profile.clock("training"), matrix_products(tf32=machine.tf32):
                    # the numbers of the signals that ended the training early
                    numbers = context.run(train, callbacks, make_study, signals)
                profile.ended = stop.reason
                context.tidy()
                if context.faults:
                    ledger.note(list(context.faults))
                    record = replace(record, notes=[*record.notes, *context.faults])
    refitted = options.changed(callbacks=(), warm_start=())  # a refit has no callbacks
    source = call.source
    if not has_function(options.search.scoring):
        # Only a custom scorer needs the user's own data frame, array or list next to X.
        source = replace(source, original=None)
    data = SearchCall(problem.choice, source, refitted, outputs=ledger.outputs)
    study = study_type.from_rows(record.to_json(), ledger.rows(), data=data, file=machine.study)
    for remark in edge_remarks(study) if say_notes else ():
        progress.say(f"note: {remark}")
    return check_ending(study, numbers)


@dataclass(frozen=True, eq=False)
class Preview(Generic[AnyStudy]):
    """A search that is prepared and planned, but has trained and written nothing.

    Attributes:
        study: The planned trials, which have no results.
        plan: The plan of the training. None for logistic regressions that a solver fits.
        device: The device on which the trials would train.
        layout: The columns of the table and their features, or the shapes of the arrays.
        stand_ins: The number of randomly sampled trials that stand for later proposals of an Optuna
            sampler.
    """

    study: AnyStudy
    plan: Plan | None
    device: torch.device
    layout: Layout | ArrayLayout
    stand_ins: int = 0


@entry
def preview(
    call: SearchCall,
    *,
    verbose: int = 1,
    interface: Interface = PYTHON,
    study_type: type[AnyStudy],
) -> Preview[AnyStudy]:
    """Prepare and plan a search without training trials.

    gputune reads and writes no study. To choose how the members of your own module train, gputune
    times some of their steps, as in a search. Raises the errors of a search for invalid options.
    """
    progress = Progress(verbose, interface=interface)
    with prepared(call, progress) as (setup, context):
        options = setup.problem.options
        context.method.check(context, setup.space, setup.trials)
        record = _record(setup, context)
        candidates = list(setup.trials)
        if not context.options.search.samples_first:
            number = len(candidates)
            for params in draw(
                setup.space, max(0, options.search.n_trials - number), options.search.random_state
            ):
                candidates.append(Candidate(len(candidates), params, "random"))
        configs = [context.complete(candidate.params) for candidate in candidates]
        plan = None if context.choice.solved else context.method.plan(context, configs)
    study = study_type.from_rows(record.to_json(), [(candidate, None) for candidate in candidates])
    stand_ins = len(candidates) - len(setup.trials)
    return Preview(study, plan, setup.data.device, setup.problem.layout, stand_ins)


@contextmanager
def prepared(call: SearchCall, progress: Progress) -> Iterator[tuple[Setup, Context]]:
    """Prepare a search that trains and writes nothing, during a ``with`` block.

    The user's module has run on a few rows. Raises the errors of a search for invalid options.
    """
    setup = _prepare(call, progress, None)
    with _cluster(setup.problem) as cluster:
        yield setup, context_without_study(setup, progress, cluster)


def context_without_study(
    setup: Setup, progress: Progress, cluster: Connection | None = None
) -> Context:
    """Return the context in which a prepared problem is planned or trained without a study.

    The user's module has run on a few rows. Raises InputError if it cannot be trained.
    """
    stop = Stop()
    trainer = _trainer(setup, stop, cluster, progress)
    context = Context(
        Ledger(None), setup.problem.options, progress, stop, trainer, setup.problem, Profile()
    )
    return _checked(context, setup)


def _checked(context: Context, setup: Setup) -> Context:
    """Run the user's module on a few rows, and keep features of its frozen layers if possible.

    Raises InputError if the module cannot be trained.
    """
    # Complete, because the arguments of a LoRA's builder depend on keys with default values. With
    # other arguments the module would be tried again before the training.
    first = context.complete(setup.first)
    context.check_module(first, first=True)
    configs = [context.complete(params) for params in _with_choices(setup)]
    trainer = context.trainer.with_features(configs)
    if trainer.data is context.data:
        return replace(context, trainer=trainer)
    context = replace(context, trainer=trainer)
    context.check_module(first)
    return context


def _with_choices(setup: Setup) -> list[Config]:
    """Return the configurations of the first trials, and of each value of ``module__targets``."""
    configs = [setup.first, *(trial.params for trial in setup.trials)]
    for targets in choices_of(setup.space, "module__targets", default=None):
        if targets is not None:
            configs.append({**setup.first, "module__targets": targets})
    return configs


def _open_store(study: Path | None) -> AbstractContextManager[Store | None]:
    """Open the study file of a search that continues.

    Returns None for a new study. Also returns None for a faulty file, because a later step reports
    the fault.
    """
    if study is not None:
        with suppress(OSError, StudyCorruptError, StudyVersionError):
            return Store.open(study)
    return nullcontext()


def _prepare(call: SearchCall, progress: Progress, store: Store | None) -> Setup:
    """Check the arguments of a search, and prepare its rows, folds and trials.

    Raises InputError.
    """
    problem, space = _problem_and_space(call)
    options = problem.options
    folds = problem.folds()
    check_rows_of_networks(options.training.n_ens, folds)
    with without_collector():
        portfolio = problem.portfolio(call.chosen_by_user())
        trials = first_trials(space, problem.choice, options, store, portfolio)
        configs = [
            problem.choice.complete(trial.params, options.training.schedule) for trial in trials
        ]
    return set_up(problem, space, folds, trials, configs, progress, store)


def _problem_and_space(call: SearchCall) -> tuple[Problem, CheckedSpace]:
    """Check the arguments of a search, and return its problem, which has the encoded rows, and the
    search space."""
    # An invalid space is refused before the rows are encoded.
    early_space = checked_space(call.choice, call.options)
    check_networks(call.choice, call.options)
    options, remarks = with_length(call.options, call.choice, early_space, len(call.source.X))
    if options.training.patience is not None:
        check_patience(options.search.method, options.training.epoch, solved=call.choice.solved)
    task = chosen_task(call.source, call.choice, options)
    problem = make_problem(call.source, task, call.choice, options)
    problem = replace(problem, remarks_on_length=remarks)
    # The space is checked again, because the target decides some defaults of the choice.
    space = checked_space(problem.choice, options)
    check_schedule(space, problem.choice, call.chosen_by_user())
    return problem.with_space(space, with_earlier(options.search, space)), space


def _record(setup: Setup, context: Context) -> SearchRecord:
    """Return the description of the search for the study file, with notes for the user."""
    problem = setup.problem
    data = setup.data
    options = setup.problem.options
    limit = setup.scoring.kept_bytes
    without_model = baseline(data, setup.scoring, problem.target.classes)
    defaults = default_params(problem.choice, options)
    pretrained = pretrained_of(problem.choice.module_class)
    remarks = [
        *problem.remarks_on_target(),
        *problem.remarks_on_length,
        *(() if pretrained is None else pretrained.remarks()),
        *filter(None, [problem.choice.own_remark]),
        *notes(
            setup.trials,
            setup.space,
            include_default=options.search.include_default,
            defaults=defaults,
        ),
        *context.remarks_on(setup.configs),
        *problem.remarks_on_loss(setup.scoring),
        *remark_on_accuracy(without_model, setup.scoring),
    ]
    # Outputs are stored as float32, 4 bytes for each output of each validation row.
    n_rows = sum(len(fold.valid) for fold in data.folds)
    n_kept = limit // (4 * data.n_outputs * n_rows)
    if limit and n_kept < max(options.search.n_trials, len(setup.trials)):
        remarks.append(
            f"only the best trials, about {n_kept}, keep their predictions of validation rows, "
            f"because those of all trials take more than {size_words(limit)}; an ensemble of other "
            "trials trains them again"
        )
    remarks += problem.remarks_on_limits(data)
    return search_record(context, setup.space, setup.folds, remarks, without_model)


def _cluster(problem: Problem) -> AbstractContextManager[Connection | None]:
    """Connect to the search's cluster during a ``with`` block.

    Without a cluster, do nothing.
    """
    machine = problem.options.machine
    cluster = machine.cluster
    if cluster is None:
        return nullcontext()
    if problem.choice.solved:
        raise InputError(
            f"workers={cluster.name!r}",
            f"is not for the logistic regression solved with {option('optimizer', 'exact')}, which "
            "takes seconds on this machine",
            remedy=f"Leave {option('workers', cluster.name)} out, or train it with "
            f"{option('optimizer', 'adamw')}.",
        )
    return cluster.connect(machine.device)


def _trainer(setup: Setup, stop: Stop, cluster: Connection | None, progress: Progress) -> Trainer:
    """Return the trainer of the search, with the chosen backend.

    A message tells the user about a slow backend.
    """
    choice = setup.problem.choice
    options = setup.problem.options
    machine = options.machine
    data = with_replicas(setup.data, options.training.n_ens)
    workers = None if isinstance(machine.workers, str | Cluster) else int(machine.workers)
    # TF32 can be set only in this process. On a cluster each worker has its own GPU.
    uses_one_gpu = machine.tf32 or cluster is not None
    trainer = Trainer(
        data=data,
        kind=choice.kind,
        module_class=choice.module_class,
        objective=setup.problem.objective,
        seed=options.search.random_state,
        horizon=1 if choice.solved else options.training.epochs,
        scoring=setup.scoring,
        memory=parse_memory(machine.memory),
        precision=machine.precision,
        each_epoch=bool(machine.callbacks),
        stop=stop,
        cluster=cluster,
        workers=workers if cluster is None else cluster.tasks,
        others=() if uses_one_gpu else other_gpus(machine.device, data.device),
    )
    if choice.solved:
        return trainer
    return trainer.with_backend(machine.backend, setup.configs, progress.say)
