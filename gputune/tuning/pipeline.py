"""The steps of a search on rows of data, from reading the rows to the finished study."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic

import torch

from gputune.data.arrays import ArrayLayout
from gputune.data.columns import Layout
from gputune.data.dataset import Dataset, Rows
from gputune.engine.backend import matrix_products, other_gpus
from gputune.engine.choice import DeviceChoice
from gputune.engine.plan import Plan, parse_memory
from gputune.engine.stop import Stop, entry, stop_after
from gputune.executors.cluster import Cluster, Connection
from gputune.ground.errors import PYTHON, InputError, Interface, option
from gputune.ground.memory import without_collector
from gputune.ground.text import count, size_words
from gputune.ground.types import KEPT_BYTES, LARGE_TABLE, Config
from gputune.models import RealMLP
from gputune.modules.pretrained import pretrained_of
from gputune.optimizers.classes import check_optimizer
from gputune.scoring.baseline import baseline, remark_on_accuracy
from gputune.scoring.metrics import check_folds, has_function
from gputune.scoring.objective import make_objective
from gputune.scoring.scoring import Scoring
from gputune.spaces.distributions import CheckedSpace
from gputune.spaces.edges import edge_remarks
from gputune.spaces.random import draw, notes
from gputune.spaces.space import choices_of
from gputune.study.file_system import check_one_process
from gputune.study.ledger import Ledger, open_ledger
from gputune.study.record import SearchRecord
from gputune.study.store import Candidate
from gputune.tuning.callbacks import Callbacks
from gputune.tuning.choices import ModelChoice
from gputune.tuning.context import Context
from gputune.tuning.interrupt import CTRL_C
from gputune.tuning.method import check_patience, why_no_patience
from gputune.tuning.options import DEFAULT_EPOCHS, Options
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
from gputune.tuning.task_choice import chosen_task
from gputune.tuning.trainer import Trainer


@dataclass(frozen=True, eq=False)
class Setup:
    """A search that is ready to train: model, space, rows, trials and scoring."""

    problem: Problem
    space: CheckedSpace
    folds: Sequence[Rows]
    trials: Sequence[Candidate]
    configs: Sequence[Config]
    data: Dataset
    scoring: Scoring
    first: Config
    """The hyperparameters of the first trial.

    If an Optuna sampler proposes the trials later, they are a random sample.
    """


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
    with profile.clock(PREPARING):
        setup = _prepare(call, progress)
    problem = setup.problem
    # The problem's options from here on. ``machine`` still has the call's.
    options = problem.options
    profile.device = setup.data.device
    progress.scoring = setup.scoring.name
    with _cluster(problem) as cluster:
        context = context_of(setup, progress, stop, cluster, profile)
        # The search method is checked before a study file is created.
        context.method.check(context, setup.space, setup.trials)
        record = _record(call, setup, context)
        progress.say(problem.summary())
        if call.preset:
            progress.say(call.preset)
        for note in (*problem.remarks(), *(record.notes if say_notes else ())):
            progress.say(f"note: {note}")
        with open_ledger(machine.study, record) as ledger:
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
        context.method.check(context, setup.space, setup.trials)
        record = _record(call, setup, context)
        candidates = list(setup.trials)
        search = context.options.search
        if not search.samples_first:
            n_missing = max(0, search.n_trials - len(candidates))
            for params in draw(setup.space, n_missing, search.random_state):
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
    setup = _prepare(call, progress)
    with _cluster(setup.problem) as cluster:
        yield setup, context_of(setup, progress, cluster=cluster)


def context_of(
    setup: Setup,
    progress: Progress,
    stop: Stop | None = None,
    cluster: Connection | None = None,
    profile: Profile | None = None,
) -> Context:
    """Return the context in which a prepared problem is planned or trained, without a study yet.

    gputune runs the user's module on a few rows, and keeps features of its frozen layers if
    possible. Raises InputError if the module cannot be trained.
    """
    stop = stop or Stop()
    options = setup.problem.options
    trainer = _trainer(setup, stop, cluster, progress)
    # An empty ledger for now: a new study file is created only after all checks have passed.
    context = Context(
        Ledger(None), options, progress, stop, trainer, setup.problem, profile or Profile()
    )
    # Complete, because the arguments of a LoRA's builder depend on keys with default values. With
    # other arguments the module would be tried again before the training.
    first = context.complete(setup.first)
    context.check_module(first, first=True)
    trainer = trainer.with_features([context.complete(params) for params in _with_choices(setup)])
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


def _prepare(call: SearchCall, progress: Progress) -> Setup:
    """Check the arguments of a search, and prepare its rows, folds and trials.

    Raises InputError.
    """
    # An invalid space is refused before the rows are encoded.
    early_space = checked_space(call.choice, call.options)
    check_networks(call.choice, call.options)
    options, remarks = with_length(call.options, call.choice, early_space, len(call.source.X))
    training = options.training
    if training.patience is not None:
        check_patience(options.search.method, training.epoch, solved=call.choice.solved)
    task = chosen_task(call.source, call.choice, options)
    problem = make_problem(call.source, task, call.choice, options)
    choice = problem.choice
    # The space is checked again, because the target decides some defaults of the choice.
    space = checked_space(choice, options)
    chosen = call.chosen_by_user()
    check_schedule(space, choice, chosen)
    problem = problem.with_space(space, with_earlier(options.search, space))
    problem = replace(problem, remarks_on_length=remarks)
    folds = problem.folds()
    check_rows_of_networks(training.n_ens, folds)
    with without_collector():
        trials = first_trials(space, choice, problem.options, problem.portfolio(chosen))
        return set_up(problem, space, folds, trials, progress)


def _record(call: SearchCall, setup: Setup, context: Context) -> SearchRecord:
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
    record = search_record(context, setup.space, setup.folds, remarks, without_model)
    arguments = replace(
        record.arguments, final_model=dict(call.final_model), preset=call.preset_choices
    )
    return replace(record, arguments=arguments)


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
    problem = setup.problem
    machine = problem.options.machine
    workers = None if isinstance(machine.workers, str | Cluster) else int(machine.workers)
    # TF32 can be set only in this process. On a cluster each worker has its own GPU.
    uses_one_gpu = machine.tf32 or cluster is not None
    trainer = problem.trainer(
        setup.data,
        scoring=setup.scoring,
        memory=parse_memory(machine.memory),
        each_epoch=bool(machine.callbacks),
        stop=stop,
        cluster=cluster,
        workers=workers if cluster is None else cluster.tasks,
        others=() if uses_one_gpu else other_gpus(machine.device, setup.data.device),
    )
    if problem.choice.solved:
        return trainer
    return trainer.with_backend(machine.backend, setup.configs, progress.say)


# Above 50,000 rows, a trial reads about as many rows in its whole training as with 50 epochs of 50,000
# rows. AutoGluon scales the patience of its boosted trees in the same way, from 10,000 rows on
# (``get_early_stopping_rounds``). pytabkit and skorch train for the same number of epochs at every
# number of rows, until a time limit ends the training.
_FEWEST_EPOCHS = 10
_PATIENCE_SHARE = 1 / 4  # of the epochs
_LEAST_PATIENCE = 3  # epochs


def check_networks(choice: ModelChoice, options: Options) -> None:
    """Raise InputError if the trials of a search cannot train several networks (``n_ens``)."""
    n_ens = options.training.n_ens
    if n_ens == 1:
        return
    remedy = f"Leave {option('n_ens')} out."
    if choice.solved:
        rule = (
            f"has no effect for {option('model', choice.name)}, because every solved logistic "
            "regression is the same"
        )
    elif choice.searched != "mlp" and choice.module_class is not RealMLP:
        rule = (
            "supports only the models mlp and realmlp, because the mean prediction of other "
            f"modules may have no meaning, but the model is {choice.name}"
        )
        remedy = f"{remedy} Several trials can be averaged with study.ensemble()."
    elif options.rows.task == "custom":
        rule = f"needs predictions with a mean, but {option('task', 'custom')} may have any outputs"
    elif options.search.differentiates:
        rule = (
            "is the number of networks whose predictions are averaged, but "
            f"{option('method', 'hypergradient')} differentiates the loss of each network"
        )
    else:
        return
    raise InputError(option("n_ens", n_ens), rule, remedy=remedy)


def check_rows_of_networks(n_ens: int, folds: Sequence[Rows]) -> None:
    """Raise InputError if a fold has fewer training rows than a trial has networks."""
    fewest = min(len(train) for train, _ in folds)
    if fewest < n_ens:
        raise InputError(
            option("n_ens", n_ens),
            "must be at most the number of training rows of a fold, so that each network can train "
            f"in its own order of the rows, but a fold has only {count(fewest, 'training row')}",
            remedy=f"Pass {option('n_ens', fewest)} or less.",
        )


def set_up(
    problem: Problem,
    space: CheckedSpace,
    folds: Sequence[Rows],
    trials: Sequence[Candidate],
    progress: Progress,
) -> Setup:
    """Prepare the data, the training loss and the scoring for the first trials of a problem.

    Raises InputError.
    """
    schedule = problem.options.training.schedule
    configs = [problem.choice.complete(trial.params, schedule) for trial in trials]
    data = _dataset(problem, folds, configs, progress)
    first = trials[0].params if trials else draw(space, 1, problem.options.search.random_state)[0]
    # The default loss depends on the module's outputs, so gputune runs the module on the data once.
    loss = problem.default_loss(data, first)
    objective = problem.objective
    if loss:
        objective = make_objective(loss, None, problem.options.training.augment, data.task)
        problem = replace(problem, options=problem.options.changed(loss=loss))
        data = data.with_one_logit()
    if objective is not None:
        objective = objective.of_space(space)
    problem = replace(problem, objective=objective)
    is_stacked = problem.options.machine.backend == "stacked"
    for trial, config in zip(trials, configs):
        if objective is not None:
            objective.check(trial.params)
        check_optimizer(config, problem.choice.searched, stacked=is_stacked)
    scoring = _scoring(problem, data)
    return Setup(problem, space, folds, trials, configs, data, scoring, first)


def _dataset(
    problem: Problem, folds: Sequence[Rows], configs: Sequence[Config], progress: Progress
) -> Dataset:
    """Return the data of all folds on the chosen device.

    A note tells the user if the device is unexpected.
    """
    options = problem.options
    # Data for a cluster stays in main memory.
    place = DeviceChoice(torch.device("cpu"))
    if options.machine.cluster is None:
        # A sampler draws more configurations of this kind later.
        repeats = max(1.0, options.search.n_trials / max(1, len(configs)))
        place = problem.device_choice(folds, configs, repeats=repeats)
    if place.why:
        gpu = option("device", "cuda")
        progress.say(f"note: trials train on the CPU ({gpu} takes the GPU): {place.why}")
    return problem.with_scorer_rows(problem.dataset(folds, place.device))


def _scoring(problem: Problem, data: Dataset) -> Scoring:
    """Return the scoring of the search, with a limit on the bytes of stored predictions."""
    options = problem.options
    # A hypergradient search has no best epoch, and outputs for a custom target have no mean.
    has_best = (
        options.training.epoch == "best"
        and not options.search.differentiates
        and data.task != "custom"
    )
    kept_bytes = KEPT_BYTES if options.machine.keep_predictions and has_best else 0
    scoring = replace(problem.scoring(), kept_bytes=kept_bytes)
    check_folds(scoring, data)
    return scoring


def with_length(
    options: Options, choice: ModelChoice, space: CheckedSpace, n_rows: int
) -> tuple[Options, tuple[str, ...]]:
    """Return the options with numbers in place of "auto" for ``max_epochs`` and ``patience``.

    The second result has remarks for the user on defaults that depend on the number of rows. They
    are for tables, so "auto" means 50 epochs without patience for a user's module.
    """
    training = options.training
    is_large = n_rows > LARGE_TABLE and not choice.takes_arrays and not choice.solved
    remarks = []
    max_epochs = training.epochs
    if is_large and training.max_epochs == "auto":
        max_epochs = max(_FEWEST_EPOCHS, round(DEFAULT_EPOCHS * LARGE_TABLE / n_rows))
        remarks.append(
            f"{n_rows:,} rows: trials train for at most {max_epochs} epochs, because an epoch has "
            f"more steps than one of {LARGE_TABLE:,} rows, for which the default is "
            f"{DEFAULT_EPOCHS} epochs"
        )
    patience = training.patience_epochs
    if is_large and training.patience == "auto" and _may_end_early(options, choice, space):
        patience = max(_LEAST_PATIENCE, math.ceil(_PATIENCE_SHARE * max_epochs))
        remarks.append(
            f"{n_rows:,} rows: a trial ends after {patience} epochs without a better mean score, "
            "the default patience of a large table"
        )
    return options.changed(max_epochs=max_epochs, patience=patience), tuple(remarks)


def _may_end_early(options: Options, choice: ModelChoice, space: CheckedSpace) -> bool:
    """Return whether trials without a better score for some epochs are unlikely to become better.

    A schedule lowers the learning rate at its end, where scores become better again.
    """
    training = options.training
    default = choice.complete({}, training.schedule)["schedule"]
    if set(choices_of(space, "schedule", default=default)) != {"constant"}:
        return False
    return not why_no_patience(options.search.method, training.epoch, solved=choice.solved)
