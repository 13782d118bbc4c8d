"""tune(): from rows to a study, top to bottom."""

import errno
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from gputune.callbacks.callback import Callback, Callbacks
from gputune.data.dataset import Dataset, Given, Rows
from gputune.data.folds import Splitter, make_folds
from gputune.data.source import Source, read_source
from gputune.engine.backend import choose_backend, matrix_products, trains_as
from gputune.engine.entry import entry
from gputune.engine.population import complete
from gputune.engine.scoring import Scorer, Scoring, check_folds, loss_scoring, make_scoring
from gputune.engine.stop import Stop
from gputune.errors import InputError, SearchFailedError, SearchInterrupted
from gputune.executors.ray_cluster import RayCluster
from gputune.executors.ray_connection import Ray, ray_cluster
from gputune.search.config import legal_keys
from gputune.search.descent import Hypergradient
from gputune.search.halving import Halving
from gputune.search.median import Median
from gputune.search.optuna_sampler import OptunaSampler
from gputune.search.optuna_space import translated
from gputune.search.random import default_space, draw
from gputune.search.space import Space, check_include, check_space
from gputune.study.ledger import Ledger, open_ledger
from gputune.study.module_source import remember_code
from gputune.study.store import Candidate
from gputune.study.study import Study
from gputune.study.trusted import remember
from gputune.text import count
from gputune.tuning.candidates import add_trials, notes_on, remarks_on, wanted_trials
from gputune.tuning.checkpoints import checkpoint_folder
from gputune.tuning.context import Context
from gputune.tuning.descent import check_descent, descend
from gputune.tuning.halving import check_halving, halve
from gputune.tuning.interrupt import CTRL_C, interrupted_words, is_interactive, run_until_told
from gputune.tuning.median import check_median, stop_below_median
from gputune.tuning.options import Options, method_name
from gputune.tuning.problem import ModelChoice, Problem, choose_model, make_problem
from gputune.tuning.profile import PREPARING, Profile
from gputune.tuning.progress import Progress
from gputune.tuning.random import train_fully
from gputune.tuning.record import study_meta
from gputune.tuning.sampler import check_sampling, sample
from gputune.types import Backend


def tune(
    model: Any,
    X: Any,
    y: Any = None,
    *,
    space: Any = None,
    n_trials: int = 64,
    include: Sequence[Mapping[str, Any]] = (),
    include_default: bool = True,
    method: Literal["random", "halving", "median", "hypergradient"]
    | Halving
    | Median
    | Hypergradient
    | OptunaSampler = "random",
    cv: Any = 5,
    groups: Any = None,
    scoring: str | Scorer | None = None,
    positive: Any = None,
    task: Literal["classification", "binary", "multiclass", "regression"] | None = None,
    class_weight: Literal["balanced"] | Mapping[Any, float] | None = None,
    sample_weight: Any = None,
    columns: Literal["auto", "keep", "drop-constant"] = "auto",
    numbers: Literal["standard", "quantile", "none"] = "standard",
    optimizer: str | None = None,
    schedule: Literal["constant", "cosine"] = "constant",
    max_epochs: int = 50,
    epoch: Literal["best", "last"] = "best",
    timeout: float | None = None,
    study: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    device: str = "auto",
    backend: Literal["auto", "eager", "compiled", "graph"] = "auto",
    dtype: Literal["float32", "float64"] = "float32",
    tf32: bool = False,
    memory: int | str | None = None,
    workers: int | Literal["auto", "ray"] | Ray = "auto",
    random_state: Any = 0,
    callbacks: Sequence[Callback] = (),
    verbose: int = 1,
) -> Study:
    """Search hyperparameters by training every configuration x fold as one tensor program; return the Study.

    model        "mlp", "logistic", a ``torch.nn.Module`` class called with ``n_features``, ``n_outputs`` and the
                 trial's ``module__*`` values, or "FILE.py:CLASS"
    X, y         arrays, tensors, pandas or polars frames; or a file and the name of its target column
    space        a dict, or a list of dicts, of hyperparameter -> list, scipy.stats distribution,
                 ``gputune.log_int(a, b)``, a distribution of Optuna's or one fixed value; None: a default for the model
    n_trials     configurations in all: with ``include_default`` the default one, held to the space wherever that names
                 a key, and the others drawn, or asked of Optuna's sampler; ``include`` (dicts; a missing key takes the
                 default, held to the space too) comes on top
    method       "random": every trial is trained to the end; "halving" or ``gputune.Halving(...)``: all train
                 together, and at each rung those with the best fold means go on; "median" or
                 ``gputune.Median(...)``: those below the median of the fold means leave; "hypergradient" or
                 ``gputune.Hypergradient(...)``: each drawn configuration is a start that descends on the fold mean of
                 its validation loss after ``max_epochs``; each point of it is a trial, scored after the last epoch;
                 ``gputune.OptunaSampler(...)``: a sampler of Optuna's proposes the configurations, batch by batch
    cv           number of shuffled, stratified folds, a scikit-learn splitter, which sees X as you gave it, or
                 (train, valid) index arrays
    groups       one label a row, or the name of a column: folds that split a group are refused
    scoring      a scikit-learn scorer name or ``callable(estimator, X, y)``, where X are rows as you gave them (a frame
                 stays one, a tensor is an array) and ``estimator`` predicts whatever rows it is given; None: accuracy
                 or R2, for hypergradients the loss that is descended
    positive     the class that f1, precision, recall, jaccard, average_precision or a likelihood ratio is of; may be
                 left out for classes {0, 1}, {-1, 1} and {False, True}, of which the larger one is positive
    task         overrides what the target looks like: text, booleans and at most 20 distinct whole numbers that
                 repeat are classes, everything else is a number
    class_weight, sample_weight  weights of the rows in the training loss, as in scikit-learn; scores are unweighted
    columns      "keep": each column of numbers or booleans is one feature, whatever it holds; "drop-constant": constant
                 ones are left out, and features say where values are missing; "auto": "keep" for a class of your own,
                 else "drop-constant"
    numbers      how numeric columns are scaled, fitted on each fold's training rows
    optimizer    "sgd", "nesterov", "adam", "adamw", or one that adapts its rate as it trains (``gputune.optim``):
                 "sgdhd", "nesterovhd", "adamhd", "adamwhd"; "logistic" is solved to convergence ("exact") by default
    schedule     of the learning rate over ``max_epochs``, per step
    epoch        "best" scores the fold mean at its best epoch, "last" after the last one
    timeout      seconds after which training stops at the end of the running epoch; what it cut short is scored on
                 what it had, and trained on by a later call with the same ``study``
    study        path of an SQLite file to keep the study in; the same call goes on where the file ends
    checkpoint_seconds  a chunk that trains longer than this keeps its state in a folder beside the study, again and
                 again (or at 20 times what writing takes), so that a killed search repeats that and an epoch at most
    device, dtype  "auto" takes a GPU where there is one; "float32" or "float64"
    backend      "compiled" trains each member of an MLP or a linear model through whole epochs in compiled code, on a
                 CPU with a C compiler; "graph" records a step of all members once and replays it, on a GPU (on a CPU
                 it is a slow check of that); "eager" takes it as operations on stacked tensors, as user's modules
                 always do; "auto" chooses; the numbers are the same to rounding
    tf32         whether a GPU may round the factors of its matrix products to TF32 (10 bits of mantissa) while it
                 trains, which is faster and moves scores by more than rounding; on a CPU it is refused
    memory       bytes, or text such as "8GB", that a chunk of trials may take on the device
    workers      processes on a CPU; "auto" uses the cores where the work repays their start; "ray" or
                 ``gputune.Ray(address, cpus)``: tasks of a Ray cluster, each with one GPU or some CPUs
    random_state seed of candidates, folds, row order, starts and dropout
    callbacks    ``gputune.callbacks``: called at the start, after epochs, with finished trials, and at the end
    verbose      0 silent, 1 a bar, the plan and remarks on standard error

    Raises InputError (a ValueError) for bad input, SearchFailedError where every trial failed, SearchInterrupted (a
    KeyboardInterrupt with the ``study`` so far) on Ctrl-C; in a notebook or at a prompt Ctrl-C returns that study.
    """
    options = Options(
        space=space, n_trials=n_trials, include=include, include_default=include_default, method=method,
        cv=cv, scoring=scoring, positive=positive, task=task, class_weight=class_weight, sample_weight=sample_weight,
        columns=columns, numbers=numbers, schedule=schedule, max_epochs=max_epochs, epoch=epoch, timeout=timeout,
        study=study, checkpoint_seconds=checkpoint_seconds,
        device=device, backend=backend, dtype=dtype, tf32=tf32, memory=memory, workers=workers,
        random_state=random_state, callbacks=callbacks, verbose=verbose,
    )  # fmt: skip
    choice = choose_model(model, optimizer)
    try:
        return search(choice, read_source(X, y, groups), options)
    except SearchInterrupted as stopped:
        if not is_interactive():
            raise
        Progress(verbose).say(str(stopped))
        so_far: Study = stopped.study
        return so_far


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
) -> Study:
    """The pipeline: space, rows, folds, data on the device, trials, training, study.

    ``say_notes=False`` is for a caller that shows ``meta["notes"]``, on the columns and the trials, itself; ``profile``
    is told where the time goes, and ``words`` is as in ``Progress``.
    Raises SearchInterrupted where one of ``signals`` ended the training early.
    """
    stop = Stop(None if options.timeout is None else time.monotonic() + options.timeout)
    space = _checked_space(choice, options)
    callbacks = Callbacks(options.callbacks)
    progress = Progress(options.verbose, callbacks.epoch, words)
    profile = Profile() if profile is None else profile
    with profile.clock(PREPARING):
        problem = make_problem(source, options.task, choice, options.columns)
    scoring = _scoring(options, problem)
    progress.scoring = scoring.name
    _check_scoring_has_a_name(scoring, options)
    folds = _folds(problem, options)
    with profile.clock(PREPARING):
        data = _dataset(problem, folds, options, choice)
    check_folds(scoring, data)
    wanted = wanted_trials(space, choice, options)
    with _cluster(options, choice) as cluster:
        with profile.clock("compiling"):
            backend = _backend(options, choice, data, cluster, wanted, progress)
        context = Context(
            data, scoring, choice, options, stop, progress, cluster=cluster, backend=backend, profile=profile,
            columns=problem.columns_in_words(),
        )  # fmt: skip
        context.check_module(wanted[0].params if wanted else draw(space, 1, options.random_state)[0])
        _remember_what_runs(choice, options)
        _check_method(wanted, space, context, problem.target.classes)
        notes = notes_on(wanted, space, choice, options)
        meta = study_meta(choice, problem, options, scoring, data, space, folds, notes)
        _say_what_was_understood(problem, choice, progress, meta["notes"] if say_notes else ())
        if cluster is not None:
            meta["device"] = cluster.device
        context = replace(context, checkpoints=checkpoint_folder(options.study, meta))
        file: Path | None = options.study
        with open_ledger(options.study, meta) as ledger:
            ledger.on_wait = partial(_wait_on, stop, progress)
            if not isinstance(options.method, str):
                ledger.decide_alone(method_name(options.method))
            add_trials(ledger, wanted, space, options)
            if known := len(ledger.results):
                progress.say(f"going on: {known} of {count(len(ledger.candidates), 'trial')} are finished")
            for sentence in remarks_on(ledger, space, options):
                progress.say(f"note: {sentence}")
            products = matrix_products(tf32=options.tf32)
            with _heard(callbacks, ledger, meta, file), profile.clock("training"), products:
                told = run_until_told(lambda: _run(ledger, space, context), stop, signals, progress.say)
            context.tidy(ledger)
    refitted = replace(options, callbacks=())  # a refit calls none
    study = Study.from_rows(
        meta, ledger.rows(), data=(choice, replace(source, given=None), refitted), file=file
    )
    if told is not None:
        raise SearchInterrupted(interrupted_words(study, options.study), study=study, signal=told)
    if all(trial.state == "failed" for trial in study.trials):
        raise SearchFailedError(study.why_none_is_best())
    return study


def _wait_on(stop: Stop, progress: Progress, words: str) -> None:
    """Say why this process waits before it has a plan; end that where training would end."""
    progress.say(words, once=True)
    if stop.asked:
        raise KeyboardInterrupt
    if stop.is_over():
        raise TimeoutError(errno.ETIMEDOUT, f"the time is over; {words}")


@contextmanager
def _heard(callbacks: Callbacks, ledger: Ledger, meta: dict[str, Any], file: Path | None) -> Iterator[None]:
    """Tell callbacks of the start, of what is finished inside, and of the end, however it comes."""
    ledger.on_finish = lambda rows: callbacks.trials_end(Study.from_rows(meta, rows))
    callbacks.study_start(Study.from_rows(meta, ledger.rows(), file=file))
    try:
        yield
    finally:
        callbacks.study_end(Study.from_rows(meta, ledger.rows(), file=file))


def _folds(problem: Problem, options: Options) -> list[Rows]:
    """Return the folds; a splitter sees the rows as the user gave them."""
    source = problem.source
    X = source.as_given() if isinstance(options.cv, Splitter) else None
    n_rows, seed = len(source.X), options.random_state
    return make_folds(options.cv, problem.target, n_rows=n_rows, X=X, groups=source.groups, seed=seed)


def _dataset(problem: Problem, folds: Sequence[Rows], options: Options, choice: ModelChoice) -> Dataset:
    """Return the data, with the rows as the user gave them where a scorer of the user's own sees them."""
    data, statistics = problem.dataset(folds, _data_options(options), choice)
    if not callable(options.scoring):
        return data
    return replace(data, given=Given(problem.source.as_given(), problem.layout, statistics))


def _remember_what_runs(choice: ModelChoice, options: Options) -> None:
    """Let later processes of this user find the class again, and the cluster, without being told to trust them."""
    if choice.module_class is not None:
        remember_code(choice.module_class)
    if isinstance(options.workers, Ray) and options.workers.is_elsewhere:
        remember(options.workers.address)


def _data_options(options: Options) -> Options:
    """Return the options for the data: on its way to a cluster it lies in main memory."""
    return replace(options, workers=1, device="cpu") if isinstance(options.workers, Ray) else options


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
    options: Options,
    choice: ModelChoice,
    data: Dataset,
    cluster: RayCluster | None,
    wanted: Sequence[Candidate],
    progress: Progress,
) -> Backend:
    """Return how chunks train, and say where it is slower than it could be, or not what was asked for."""
    word = options.backend
    if choice.solved or (choice.kind == "module" and word == "auto"):
        return "eager"
    device = data.device if cluster is None else torch.device(cluster.device)
    backend, why = choose_backend(word, device, data.dtype)
    asked: Backend = "graph" if word == "graph" else "compiled"
    configs = (complete(t.params, optimizer=choice.optimizer, schedule=options.schedule) for t in wanted)
    known = not wanted or any(trains_as(asked, choice.kind, config) == asked for config in configs)
    if why and known:
        progress.say(f"note: trials train eagerly, slower than compiled ones: {why}")
    if word in ("compiled", "graph") and not known:
        progress.say(
            f"note: all trials train eagerly: backend={word!r} knows MLPs and linear models with sgd, nesterov, "
            "adam or adamw"
        )
    return "eager" if choice.kind == "module" else backend


def _check_method(
    wanted: Sequence[Candidate], space: Space, context: Context, labels: np.ndarray | None
) -> None:
    """Refuse what the method cannot do before a study file is made."""
    match context.options.method:
        case Hypergradient() as method:
            check_descent(method, wanted, context, labels)
        case Halving() as method:
            check_halving(method, context)
        case Median() as method:
            check_median(method, context)
        case OptunaSampler() as method:
            check_sampling(method, space, context)


def _run(ledger: Ledger, space: Space, context: Context) -> None:
    """Train the trials of the ledger as the method has it."""
    match context.options.method:
        case Hypergradient() as method:
            descend(ledger, space, method, context)
        case Halving() as method:
            halve(ledger, method, context)
        case Median() as method:
            stop_below_median(ledger, method, context)
        case OptunaSampler() as method:
            sample(ledger, space, method, context)
        case _:
            train_fully(ledger, context)


def _scoring(options: Options, problem: Problem) -> Scoring:
    """Return the scoring of this search: by default that of scikit-learn, for a descent the loss it descends."""
    target = problem.target
    if options.scoring is None and isinstance(options.method, Hypergradient):
        return loss_scoring(target.task, target.classes, options.positive)
    return make_scoring(options.scoring, target.task, target.classes, options.positive)


def _check_scoring_has_a_name(scoring: Scoring, options: Options) -> None:
    """Refuse to keep a study whose scorer could not be told from another one later."""
    if options.study is not None and ("<lambda>" in scoring.name or "<locals>" in scoring.name):
        raise InputError(
            f"scoring={scoring.name!r} has no name by which study={str(options.study)!r} could know it again; define "
            "it with def at the top of a module, or leave study out."
        )


def _checked_space(choice: ModelChoice, options: Options) -> Space:
    keys, module = legal_keys(choice.searched, choice.optimizer), choice.searched == "module"
    check_include(options.include, keys=keys, module=module)
    space = default_space(choice.searched, choice.optimizer) if options.space is None else options.space
    return check_space(translated(space), keys=keys, module=module)


def _say_what_was_understood(
    problem: Problem, choice: ModelChoice, progress: Progress, notes: Sequence[str]
) -> None:
    target, rows = problem.target, len(problem.source.X)
    kind = "numbers (regression)" if target.classes is None else f"{len(target.classes)} classes"
    override = f"; {target.override}" if target.override else ""
    progress.say(
        f"{choice.name} on {rows} rows, {len(problem.layout.feature_names)} features; target {target.name!r}: "
        f"{kind}{override}"
    )
    for note in notes:
        progress.say(f"note: {note}")
