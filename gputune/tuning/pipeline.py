"""search(): from rows to a study, top to bottom."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from gputune.callbacks.callback import Callbacks
from gputune.data.dataset import Dataset, Rows, ScorerRows
from gputune.data.folds import Splitter, make_folds
from gputune.data.source import Source
from gputune.engine.backend import choose_backend, matrix_products, other_gpus, trains_as
from gputune.engine.entry import entry
from gputune.engine.plan import parse_memory
from gputune.engine.stop import Stop
from gputune.errors import InputError
from gputune.executors.ray_cluster import RayCluster
from gputune.executors.ray_connection import Ray, ray_cluster
from gputune.methods.config import legal_keys
from gputune.methods.descent import Hypergradient
from gputune.methods.optuna_sampler import OptunaSampler
from gputune.methods.random import default_space, draw
from gputune.methods.recipes import named_space
from gputune.methods.space import Space, check_include, check_space, translated
from gputune.methods.stopping import Halving, Median
from gputune.optimizers.classes import check_optimizer
from gputune.scoring.objective import make_objective
from gputune.scoring.scoring import Scoring, check_folds, loss_scoring, make_scoring
from gputune.scoring.validation import baseline, remark_on_accuracy
from gputune.study.ledger import Ledger, open_ledger
from gputune.study.module_source import remember_code
from gputune.study.store import Candidate
from gputune.study.study import Study
from gputune.study.trusted import remember
from gputune.tuning.candidates import first_trials, notes_on
from gputune.tuning.context import Context
from gputune.tuning.descent import check_descent, descend
from gputune.tuning.interrupt import CTRL_C
from gputune.tuning.options import Options
from gputune.tuning.problem import ModelChoice, Problem, default_loss, make_problem, remarks_on_loss
from gputune.tuning.progress import PREPARING, Profile, Progress
from gputune.tuning.random import check_sampling, sample, train_batches, train_fully
from gputune.tuning.record import checkpoint_folder, search_record
from gputune.tuning.rungs import check_rungs, halve, stop_below_median
from gputune.tuning.session import Session, checked
from gputune.tuning.trainer import Trainer
from gputune.types import Backend, Config

AnyStudy = TypeVar("AnyStudy", bound=Study)

Training = Callable[[Ledger, Context], None]
"""Trains the trials of a ledger as a method has it."""


@entry
def search(
    choice: ModelChoice,
    source: Source,
    options: Options,
    signals: Sequence[int] = (CTRL_C,),
    *,
    say_notes: bool = True,
    profile: Profile | None = None,
    words: Callable[[str], str] = str,
    study_type: type[AnyStudy],
) -> AnyStudy:
    """The pipeline: space, rows, folds, data on the device, trials, training, study.

    ``say_notes=False`` is for a caller that shows the notes of the record, on the columns and the trials, itself;
    ``profile`` is told where the time goes, and ``words`` is as in ``Progress``.
    Raises SearchInterrupted where one of ``signals`` ended the training early.
    """
    stop = Stop(None if options.timeout is None else time.monotonic() + options.timeout)
    space = checked_space(choice, options)
    callbacks = Callbacks(options.callbacks)
    # A copy of the curves, since the search goes on with its own.
    progress = Progress(options.verbose, lambda curves: callbacks.tell("on_epoch", curves.copy()), words)
    profile = Profile() if profile is None else profile
    with profile.clock(PREPARING):
        problem = make_problem(source, options.task, choice, options)
    choice = choice.of(problem)
    space = checked_space(choice, options)  # again: what is predicted decides some
    folds, trials = _folds(problem, options), first_trials(space, choice, options)
    configs = [choice.complete(t.params, options.schedule) for t in trials]
    with profile.clock(PREPARING):
        data = _dataset(problem, folds, options, choice, configs, progress)
    profile.device = data.device
    first = trials[0].params if trials else draw(space, 1, options.random_state)[0]
    if loss := default_loss(data, choice, options, first):
        options, data = replace(options, loss=loss), data.with_one_logit()
        problem = replace(problem, objective=make_objective(loss, None, options.augment, data.task))
    scoring = _scoring(options, problem)
    progress.scoring = scoring.name
    check_folds(scoring, data)
    without_model = baseline(data, scoring, problem.target.classes)
    _check_objective(problem, trials)
    for config in configs:
        check_optimizer(config, choice.searched, stacked=options.backend == "stacked")
    with _cluster(options, choice) as cluster:
        trainer = _trainer(data, scoring, choice, options, stop, cluster)
        backend = _backend(trainer, options, choice, configs, progress)
        trainer = replace(trainer, backend=backend, objective=problem.objective)
        context = Context(trainer, choice, options, progress, None, profile, problem.columns_in_words())
        context.check_module(first, first=True)
        _remember_what_runs(choice, options)
        check, training = _procedure(trials, space, context, problem.target.classes)
        check()  # before a study file is made
        notes = (
            *notes_on(trials, space, choice, options),
            *context.remarks,
            *context.remarks_on(configs),
            *remarks_on_loss(problem, choice),
            *remark_on_accuracy(without_model, scoring),
        )
        record = search_record(context, problem, space, folds, notes, without_model)
        _say_what_was_understood(problem, choice, progress, record.notes if say_notes else ())
        context = replace(context, checkpoints=checkpoint_folder(options.study, record))
        make_study = partial(study_type.from_rows, record.to_json())
        with open_ledger(options.study, record) as ledger:
            session = Session(ledger, options, progress, stop)
            session.add(trials, space)
            with profile.clock("training"), matrix_products(tf32=options.tf32):
                run = partial(training, ledger, context)
                signal_number = session.run(run, callbacks, make_study, signals)
            context.tidy(ledger)
            if context.faults:
                record = replace(record, notes=[*record.notes, *context.faults])
                ledger.note(list(context.faults))
                make_study = partial(study_type.from_rows, record.to_json())
    refitted = replace(options, callbacks=())  # a refit calls none
    data_of_refit = choice, replace(source, original=None), refitted
    return checked(make_study(ledger.rows(), data=data_of_refit, file=options.study), signal_number)


def _folds(problem: Problem, options: Options) -> list[Rows]:
    """Return the folds; a splitter sees the rows as the user gave them."""
    source = problem.source
    X = source.original_rows() if isinstance(options.cv, Splitter) else None
    n_rows, seed = len(source.X), options.random_state
    return make_folds(options.cv, problem.target, n_rows=n_rows, X=X, groups=source.groups, seed=seed)


def _dataset(
    problem: Problem,
    folds: Sequence[Rows],
    options: Options,
    choice: ModelChoice,
    configs: Sequence[Config],
    progress: Progress,
) -> Dataset:
    """Return the data, with the rows as the user gave them where a scorer of the user's own sees them."""
    if isinstance(options.workers, Ray):  # on its way to a cluster the data lies in main memory
        options = replace(options, workers=1, device="cpu")
    repeats = max(1.0, options.n_trials / max(1, len(configs)))  # of what a sampler draws later
    chosen = problem.device_choice(folds, options, choice, configs, repeats=repeats)
    if chosen.why:
        progress.say(
            f"note: trials train on the CPU and not on the GPU, which device='cuda' takes: {chosen.why}"
        )
    data, statistics = problem.dataset(folds, options, choice, chosen.device)
    if not callable(options.scoring):
        return data
    return replace(data, scorer_rows=ScorerRows(problem.source.original_rows(), problem.layout, statistics))


def _remember_what_runs(choice: ModelChoice, options: Options) -> None:
    """Let later processes of this user find the class again, and the cluster, without being told to trust them."""
    if choice.module_class is not None:
        remember_code(choice.module_class)
    if isinstance(options.workers, Ray) and options.workers.is_elsewhere:
        remember(options.workers.address)


def _cluster(options: Options, choice: ModelChoice) -> AbstractContextManager[RayCluster | None]:
    """Connect to the cluster that was asked for, if one was."""
    if not isinstance(options.workers, Ray):
        return nullcontext()
    if choice.solved:
        raise InputError(
            "workers='ray': the logistic regression solved with optimizer='exact' is a batched solve of seconds on "
            "this machine; leave workers out, or train it with optimizer='adamw'."
        )
    return ray_cluster(options.workers, device=options.device)


def _backend(
    trainer: Trainer, options: Options, choice: ModelChoice, configs: Sequence[Config], progress: Progress
) -> Backend:
    """Return how chunks train, and say where it is slower than it could be, or not what was asked for."""
    if options.backend == "loop" and choice.kind != "module":
        raise InputError(
            f"backend='loop' trains the members of a user's module one by one, and the model is {choice.name!r}; "
            "choose backend='auto', or 'eager'."
        )
    if choice.solved:
        return "eager"
    device = trainer.data.device if trainer.cluster is None else torch.device(trainer.cluster.device)
    backend, why = choose_backend(options.backend, device, trainer.data.dtype, choice.kind)
    module, word = choice.kind == "module", options.backend
    fast: Backend = "graph" if word == "graph" or (module and word == "auto") else "compiled"
    ways = {trains_as(fast, choice.kind, config) for config in configs}
    some_fast = not ways or fast in ways
    if why and some_fast:
        how = "eagerly, slower than" if backend == "eager" else "in recorded steps, slower than"
        than = "in recorded steps" if backend == "eager" else "compiled ones"
        progress.say(f"note: trials train {how} {than}: {why}")
    if word in ("compiled", "graph") and not some_fast and ways != {"loop"}:
        how = "in recorded steps" if module and word == "compiled" else "eagerly"
        models = "MLPs and linear models with " if word == "compiled" else ""
        progress.say(
            f"note: all trials train {how}: backend={word!r} knows {models}sgd, nesterov, adam or adamw alone"
        )
    return backend


def _trainer(
    data: Dataset,
    scoring: Scoring,
    choice: ModelChoice,
    options: Options,
    stop: Stop,
    cluster: RayCluster | None,
) -> Trainer:
    workers = None if isinstance(options.workers, str | Ray) else int(options.workers)
    return Trainer(
        data=data,
        kind=choice.kind,
        module_class=choice.module_class,
        seed=options.random_state,
        horizon=1 if choice.solved else options.max_epochs,
        scoring=scoring,
        memory=parse_memory(options.memory),
        precision=options.precision,
        workers=workers if cluster is None else cluster.tasks,
        # TF32 is set in this process alone.
        others=() if options.tf32 or cluster is not None else other_gpus(options.device, data.device),
        cluster=cluster,
        stop=stop,
    )


def _procedure(
    trials: Sequence[Candidate], space: Space, context: Context, labels: np.ndarray | None
) -> tuple[Callable[[], None], Training]:
    """Return what refuses a search that its method cannot make, and what trains trials by the method."""
    match context.options.method:
        case Hypergradient() as descent:
            check = partial(check_descent, descent, trials, context, labels)
            return check, lambda ledger, context: descend(ledger, space, descent, context)
        case Halving() as halving:
            check = partial(check_rungs, halving, context)
            return check, lambda ledger, context: halve(ledger, ledger.candidates, halving, context)
        case Median() as median:
            check = partial(check_rungs, median, context)
            return check, lambda ledger, context: stop_below_median(ledger, median, context)
        case OptunaSampler() as sampler:
            check = partial(check_sampling, sampler, space, context)

            def ask(ledger: Ledger, context: Context) -> None:
                train = partial(train_batches, ledger, sampler, context)
                options, progress = context.options, context.progress
                sample(ledger, space, sampler, options, progress, train=train, epochs=context.epochs)

            return check, ask
    return lambda: None, train_fully


def _scoring(options: Options, problem: Problem) -> Scoring:
    """Return the scoring of this search: by default that of scikit-learn, for a descent the loss it descends.

    Raises InputError for a scorer that a study could not tell from another one later.
    """
    target = problem.target
    if options.scoring is None and isinstance(options.method, Hypergradient) and target.task != "custom":
        return loss_scoring(target.task, target.classes, options.positive)
    scoring = make_scoring(
        options.scoring,
        target.task,
        target.classes,
        options.positive,
        problem.objective,
        n_labels=target.n_outputs,
    )
    if options.study is not None and ("<lambda>" in scoring.name or "<locals>" in scoring.name):
        raise InputError(
            f"scoring={scoring.name!r} has no name by which study={str(options.study)!r} could know it again; define "
            "it with def at the top of a module, or leave study out."
        )
    return scoring


def _check_objective(problem: Problem, trials: Sequence[Candidate]) -> None:
    """Raise InputError where a trial has ``loss__*`` values that the loss does not take."""
    if problem.objective is not None:
        for trial in trials:
            problem.objective.check(trial.params)


def checked_space(choice: ModelChoice, options: Options) -> Space:
    """Return the space that a search draws from, its own or the default one, checked. Raises InputError."""
    keys, module = legal_keys(choice.searched, choice.optimizer), choice.searched == "module"
    check_include(options.include, keys=keys, module=module)
    space = options.space
    if isinstance(space, str):
        space = named_space(space, choice.goal)
    elif space is None and choice.recipe:
        space = named_space("realmlp", choice.goal)
    elif space is None:
        space = default_space(choice.searched, choice.optimizer, choice.module_class)
    return check_space(translated(space), keys=keys, module=module)


def _say_what_was_understood(
    problem: Problem, choice: ModelChoice, progress: Progress, notes: Sequence[str]
) -> None:
    target = problem.target
    override = f"; {target.override}" if target.override else ""
    progress.say(
        f"{choice.name} on {problem.in_words()}; target {target.name!r}: {target.in_words}{override}"
    )
    objective = problem.objective
    if objective is not None and not objective.is_named and target.task == "regression":
        progress.say(
            f"note: {objective.name} sees {target.name} as it is (mean {target.values.mean():.4g}, standard deviation "
            f"{target.values.std():.4g}); a loss that has a name sees it standardised"
        )
    for note in (*problem.remarks_on_scaling(), *notes):
        progress.say(f"note: {note}")
