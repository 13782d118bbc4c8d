"""The pipeline of a search on rows, from the rows to a study."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial

import torch

from gputune.callbacks import Callbacks
from gputune.data.dataset import Dataset, Rows, ScorerRows
from gputune.engine.backend import matrix_products, other_gpus
from gputune.engine.choice import DeviceChoice
from gputune.engine.plan import parse_memory
from gputune.engine.stop import Stop, entry
from gputune.errors import InputError, StudyCorruptError, StudyVersionError
from gputune.executors.ray_cluster import Ray, RayCluster, ray_cluster
from gputune.garbage import without_collector
from gputune.methods.descent import Hypergradient
from gputune.methods.distributions import CheckedSpace
from gputune.methods.edges import edge_remarks
from gputune.methods.optuna import OptunaSampler
from gputune.methods.random import draw, notes
from gputune.methods.stopping import StoppingRule
from gputune.optimizers.classes import check_optimizer
from gputune.scoring.baseline import baseline, remark_on_accuracy
from gputune.scoring.metrics import check_folds, has_function
from gputune.scoring.objective import make_objective
from gputune.scoring.scoring import Scoring
from gputune.study.code import remember
from gputune.study.ledger import Ledger, open_ledger
from gputune.study.module_source import remember_code
from gputune.study.record import SearchRecord
from gputune.study.store import Candidate, Store
from gputune.text import size_words
from gputune.tuning.choices import ModelChoice, check_patience
from gputune.tuning.context import Context
from gputune.tuning.descent import check_descent, descend
from gputune.tuning.interrupt import CTRL_C
from gputune.tuning.options import Options
from gputune.tuning.problem import Problem, make_problem
from gputune.tuning.progress import PREPARING, Profile, Progress
from gputune.tuning.random import check_sampling, sample, train_batches, train_fully
from gputune.tuning.record import RecordedSearch, checkpoint_folder, search_record
from gputune.tuning.rungs import check_rungs, train_in_rungs
from gputune.tuning.session import (
    AnyStudy,
    check_ending,
    checked_space,
    default_params,
    first_trials,
    with_earlier,
)
from gputune.tuning.task_choice import chosen_task
from gputune.tuning.trainer import Trainer
from gputune.types import KEPT_BYTES, Config
from gputune.wording import PYTHON


@dataclass(frozen=True, eq=False)
class _Setup:
    """The prepared search before anything trains: model, space, rows, trials and score."""

    problem: Problem
    space: CheckedSpace
    folds: Sequence[Rows]
    trials: Sequence[Candidate]
    configs: Sequence[Config]
    data: Dataset
    scoring: Scoring
    first: Config
    """The parameters of the first trial, or a random draw if a sampler proposes the trials
    later."""


@entry
def search(
    recorded: RecordedSearch,
    signals: Sequence[int] = (CTRL_C,),
    *,
    say_notes: bool = True,
    profile: Profile | None = None,
    words: Callable[[str], str] = PYTHON.render,
    study_type: type[AnyStudy],
) -> AnyStudy:
    """Run a search: space, rows, folds, data on the device, trials, training, study.

    Args:
        recorded: The search to run.
        signals: The signals that interrupt the training.
        say_notes: If True, the notes of the record on the columns and the trials are shown. A
            caller that shows them itself passes False.
        profile: Receives the time that each part takes.
        words: See ``Progress``.
        study_type: The class of the study to return.

    Raises:
        SearchInterrupted: One of the ``signals`` ended the search early.
    """
    options = recorded.options
    stop = Stop(None if options.timeout is None else time.monotonic() + options.timeout)
    callbacks = Callbacks(options.callbacks, stop)
    # Callbacks get a copy of the curves, because the search continues to use its own.
    progress = Progress(
        options.verbose, lambda curves: callbacks.tell("on_epoch", curves.copy()), words
    )
    profile = Profile() if profile is None else profile
    with _open_store(options) as store:
        with profile.clock(PREPARING):
            setup = _prepare(recorded, progress, store)
        problem = setup.problem
        options = setup.problem.options
        profile.device = setup.data.device
        progress.scoring = setup.scoring.name
        with _cluster(problem) as cluster:
            trainer = _trainer(setup, stop, cluster, progress)
            # An empty ledger for now: the study file is opened only after all checks have passed.
            context = Context(Ledger(None), options, progress, stop, trainer, problem, profile)
            context.check_module(setup.first, first=True)
            remember_what_runs(problem.choice, options)
            training = _training(setup, context)
            record = _record(setup, context)
            arguments = replace(record.arguments, final_model=dict(recorded.final_model))
            record = replace(record, arguments=arguments)
            progress.say(problem.in_words())
            for note in (*problem.remarks(), *(record.notes if say_notes else ())):
                progress.say(f"note: {note}")
            make_study = partial(study_type.from_rows, record.to_json())
            with open_ledger(options.study, record, store) as ledger:
                context = replace(
                    context, ledger=ledger, checkpoints=checkpoint_folder(options.study, record)
                )
                context.add(setup.trials, setup.space)
                with profile.clock("training"), matrix_products(tf32=options.tf32):
                    numbers = context.run(
                        partial(training, context), callbacks, make_study, signals
                    )
                profile.ended = stop.reason
                context.tidy()
                if context.faults:
                    ledger.note(list(context.faults))
                    record = replace(record, notes=[*record.notes, *context.faults])
    refitted = replace(options, callbacks=(), warm_start=())  # a refit has no callbacks
    source = replace(recorded.source, original=None)
    data = RecordedSearch(problem.choice, source, refitted, outputs=ledger.outputs)
    study = study_type.from_rows(record.to_json(), ledger.rows(), data=data, file=options.study)
    for remark in edge_remarks(study) if say_notes else ():
        progress.say(f"note: {remark}")
    return check_ending(study, numbers)


def _open_store(options: Options) -> AbstractContextManager[Store | None]:
    """Open the study of a search that is resumed.

    Returns None for a new study. Also returns None for a faulty file, which is reported later.
    """
    if options.study is not None:
        with suppress(OSError, StudyCorruptError, StudyVersionError):
            return Store.open(options.study)
    return nullcontext()


def _prepare(recorded: RecordedSearch, progress: Progress, store: Store | None) -> _Setup:
    """Check a call, and prepare its rows and trials. Raises InputError."""
    choice = recorded.choice
    options = recorded.options
    checked_space(choice, options)  # an invalid space is refused before the rows are encoded
    if options.patience is not None:
        check_patience(options.method, options.epoch, solved=choice.solved)
    task = chosen_task(recorded.source, choice, options)
    problem = make_problem(recorded.source, task, choice, options)
    choice = problem.choice
    space = checked_space(choice, options)  # again: the target decides some defaults
    problem = problem.with_space(space, with_earlier(options, space))
    options = problem.options
    folds = problem.folds()
    with without_collector():
        trials = first_trials(space, choice, options, store, problem.portfolio)
        configs = [choice.complete(trial.params, options.schedule) for trial in trials]
    # Data for a cluster stays in main memory.
    place = DeviceChoice(torch.device("cpu"))
    if not options.is_on_cluster:
        # A sampler draws more configurations of this kind later.
        repeats = max(1.0, options.n_trials / max(1, len(configs)))
        place = problem.device_choice(folds, configs, repeats=repeats)
    if place.why:
        progress.say(
            "note: trials train on the CPU and not on the GPU, which device='cuda' takes: "
            f"{place.why}"
        )
    data = problem.dataset(folds, place.device)
    if has_function(options.scoring):  # a custom function receives the original rows
        data = replace(data, scorer_rows=ScorerRows(problem.source.original_rows(), problem.layout))
    first = trials[0].params if trials else draw(space, 1, options.random_state)[0]
    # The default loss depends on the module's outputs, so the module is tried on the data first.
    if loss := problem.default_loss(data, first):
        objective = make_objective(loss, None, options.augment, data.task)
        data = data.with_one_logit()
        problem = replace(problem, options=replace(options, loss=loss), objective=objective)
    if problem.objective is not None:
        problem = replace(problem, objective=problem.objective.of_space(space))
    # A hypergradient search has no best epoch, and outputs for a custom target have no mean.
    has_best = (
        options.epoch == "best"
        and not isinstance(options.method, Hypergradient)
        and data.task != "custom"
    )
    kept_bytes = KEPT_BYTES if options.keep_predictions and has_best else 0
    is_resumed = store is not None and "scoring" in store.meta
    scoring = problem.scoring(_earlier_scoring(store), is_resumed=is_resumed)
    scoring = replace(scoring, kept_bytes=kept_bytes)
    check_folds(scoring, data)
    for trial, config in zip(trials, configs):
        if problem.objective is not None:
            problem.objective.check(trial.params)
        check_optimizer(config, choice.searched, stacked=options.backend == "stacked")
    return _Setup(problem, space, folds, trials, configs, data, scoring, first)


def _earlier_scoring(store: Store | None) -> str | None:
    """Return "r2" if "r2" ranks the study that is resumed, else None.

    Earlier versions ranked every regression by R2 by default.
    """
    return "r2" if store is not None and store.meta.get("scoring") == "r2" else None


def _record(setup: _Setup, context: Context) -> SearchRecord:
    """Return the record of the search for the study file, with its notes, one sentence each."""
    problem = setup.problem
    data = setup.data
    options = setup.problem.options
    limit = setup.scoring.kept_bytes
    without_model = baseline(data, setup.scoring, problem.target.classes)
    defaults = default_params(problem.choice, options)
    remarks = [
        *problem.remarks_on_target(),
        *notes(
            setup.trials, setup.space, include_default=options.include_default, defaults=defaults
        ),
        *context.remarks_on(setup.configs),
        *problem.remarks_on_loss(setup.scoring),
        *remark_on_accuracy(without_model, setup.scoring),
    ]
    # Outputs are stored as float32, 4 bytes for each output of each validation row.
    most = limit // (4 * data.n_outputs * sum(len(fold.valid) for fold in data.folds))
    if limit and most < max(options.n_trials, len(setup.trials)):
        kept = f"predictions of validation rows are kept of about {most} trials, the best"
        more = f"since those of all take more than {size_words(limit)}"
        remarks.append(f"{kept}, {more}: an ensemble of others trains them again")
    remarks += problem.remarks_on_limits(data)
    return search_record(context, setup.space, setup.folds, remarks, without_model)


def remember_what_runs(choice: ModelChoice, options: Options) -> None:
    """Remember the class and the cluster, so that later processes of this user trust them."""
    if choice.module_class is not None:
        remember_code(choice.module_class)
    if isinstance(options.workers, Ray) and options.workers.is_elsewhere:
        remember(options.workers.address)


def _cluster(problem: Problem) -> AbstractContextManager[RayCluster | None]:
    """Connect to the Ray cluster of a search during a ``with`` block, if it uses one."""
    workers = problem.options.workers
    if not isinstance(workers, Ray):
        return nullcontext()
    if problem.choice.solved:
        why = (
            "the logistic regression solved with optimizer='exact' is a batched solve of seconds "
            "on this machine"
        )
        raise InputError(
            f"workers='ray': {why}; leave workers out, or train it with optimizer='adamw'."
        )
    return ray_cluster(workers, device=problem.options.device)


def _trainer(setup: _Setup, stop: Stop, cluster: RayCluster | None, progress: Progress) -> Trainer:
    """Return the trainer with the chosen backend. Slow backends are reported."""
    choice = setup.problem.choice
    options = setup.problem.options
    data = setup.data
    workers = None if isinstance(options.workers, str | Ray) else int(options.workers)
    trainer = Trainer(
        data=data,
        kind=choice.kind,
        module_class=choice.module_class,
        objective=setup.problem.objective,
        seed=options.random_state,
        horizon=1 if choice.solved else options.max_epochs,
        scoring=setup.scoring,
        memory=parse_memory(options.memory),
        precision=options.precision,
        each_epoch=bool(options.callbacks),
        stop=stop,
        cluster=cluster,
        workers=workers if cluster is None else cluster.tasks,
        # TF32 can be set only in this process.
        others=()
        if options.tf32 or cluster is not None
        else other_gpus(options.device, data.device),
    )
    return (
        trainer
        if choice.solved
        else trainer.with_backend(options.backend, setup.configs, progress.say)
    )


def _training(setup: _Setup, context: Context) -> Callable[[Context], object]:
    """Return the function that trains the trials by the chosen method.

    Raises InputError if the method does not fit the search.
    """
    space = setup.space
    match context.options.method:
        case Hypergradient() as descent:
            check_descent(descent, setup.trials, context)
            return lambda context: descend(context, space, descent)
        case StoppingRule() as rule:
            check_rungs(rule, context)
            return lambda context: train_in_rungs(context, rule, context.ledger.candidates)
        case OptunaSampler() as sampler:
            check_sampling(sampler, space, context)
            return lambda context: sample(
                context, space, partial(train_batches, context, sampler), epochs=context.epochs
            )
    return train_fully
