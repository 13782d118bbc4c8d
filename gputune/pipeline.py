"""tune(): from rows to a study, top to bottom."""

import inspect
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sklearn
import torch

from gputune.again import stored_arguments
from gputune.data.dataset import Dataset
from gputune.data.fingerprint import digest_of, fingerprint
from gputune.data.folds import make_folds
from gputune.data.source import Source, read_source
from gputune.engine.ray_connection import Ray, ray_cluster
from gputune.engine.ray_workers import RayCluster
from gputune.engine.scoring import Scorer, Scoring, check_folds, loss_scoring, make_scoring
from gputune.errors import InputError, SearchFailedError
from gputune.methods.context import Context
from gputune.methods.descent import check_descent, descend
from gputune.methods.full import train_fully
from gputune.methods.halving import check_halving, halve
from gputune.model_choice import ModelChoice, choose_model
from gputune.options import Options, method_meta, method_name
from gputune.problem import Problem, make_problem
from gputune.progress import Progress
from gputune.search.config import legal_keys
from gputune.search.halving import Halving
from gputune.search.hypergradient import Hypergradient
from gputune.search.random import candidates, default_space, remarks, top_up
from gputune.search.space import Space, check_include, check_space, space_text
from gputune.study.ledger import Ledger, open_ledger
from gputune.study.store import Candidate
from gputune.study.study import Study
from gputune.types import DEFAULTS, Config
from gputune.version import __version__


def tune(
    model: Any,
    X: Any,
    y: Any = None,
    *,
    space: Any = None,
    n_trials: int = 64,
    include: Sequence[Mapping[str, Any]] = (),
    include_default: bool = True,
    method: Literal["random", "halving", "hypergradient"] | Halving | Hypergradient = "random",
    cv: Any = 5,
    groups: Any = None,
    scoring: str | Scorer | None = None,
    task: Literal["classification", "binary", "multiclass", "regression"] | None = None,
    class_weight: Literal["balanced"] | Mapping[Any, float] | None = None,
    sample_weight: Any = None,
    numbers: Literal["standard", "quantile", "none"] = "standard",
    optimizer: str | None = None,
    schedule: Literal["constant", "cosine"] = "constant",
    max_epochs: int = 50,
    epoch: Literal["best", "last"] = "best",
    timeout: float | None = None,
    study: str | Path | None = None,
    device: str = "auto",
    dtype: Literal["float32", "float64"] = "float32",
    memory: int | str | None = None,
    workers: int | Literal["auto", "ray"] | Ray = "auto",
    random_state: Any = 0,
    verbose: int = 1,
) -> Study:
    """Search hyperparameters by training every configuration x fold as one tensor program; return the Study.

    model        "mlp", "logistic", a ``torch.nn.Module`` class called with ``n_features``, ``n_outputs`` and the
                 trial's ``module__*`` values, or "FILE.py:CLASS"
    X, y         arrays, tensors, pandas or polars frames; or a file and the name of its target column
    space        a dict, or a list of dicts, of hyperparameter -> list, scipy.stats distribution,
                 ``gputune.log_int(a, b)`` or one fixed value; None: a default for the model
    n_trials     drawn configurations, on top of ``include`` (dicts) and, with ``include_default``, of the default one
    method       "random": every trial is trained to the end; "halving" or ``gputune.Halving(...)``: all train
                 together, and at each rung those with the best fold means go on; "hypergradient" or
                 ``gputune.Hypergradient(...)``: each drawn configuration is a start that descends on the fold mean of
                 its validation loss after ``max_epochs``; each point of it is a trial, scored after the last epoch
    cv           number of shuffled, stratified folds, a scikit-learn splitter, or (train, valid) index arrays
    groups       one label a row, or the name of a column: a group is never split between folds
    scoring      a scikit-learn scorer name or ``callable(estimator, X, y)``; None: accuracy or R2, for hypergradients
                 the loss that is descended
    task         overrides what the target looks like
    class_weight, sample_weight  weights of the rows in the training loss, as in scikit-learn; scores are unweighted
    numbers      how numeric columns are scaled, fitted on each fold's training rows
    optimizer    "sgd", "nesterov", "adam", "adamw", or one that adapts its rate as it trains (``gputune.optim``):
                 "sgdhd", "nesterovhd", "adamhd", "adamwhd"; "logistic" is solved to convergence ("exact") by default
    schedule     of the learning rate over ``max_epochs``, per step
    epoch        "best" scores the fold mean at its best epoch, "last" after the last one
    timeout      seconds after which training stops at the end of the running epoch; what it cut short is scored on
                 what it had, and trained again by a later call with the same ``study``
    study        path of an SQLite file to keep the study in; the same call goes on where the file ends
    device, dtype  "auto" takes a GPU where there is one; "float32" or "float64"
    memory       bytes, or text such as "8GB", that a chunk of trials may take on the device
    workers      processes on a CPU; "auto" uses the cores where the work repays their start; "ray" or
                 ``gputune.Ray(address, cpus)``: tasks of a Ray cluster, each with one GPU or some CPUs
    random_state seed of candidates, folds, row order, starts and dropout
    verbose      0 silent, 1 a bar, the plan and remarks on standard error

    Raises InputError (a ValueError) for bad input, SearchFailedError where every trial failed.
    """
    choice = choose_model(model, optimizer)
    options = Options(
        space=space, n_trials=n_trials, include=include, include_default=include_default, method=method,
        cv=cv, scoring=scoring, task=task, class_weight=class_weight, sample_weight=sample_weight,
        numbers=numbers, schedule=schedule, max_epochs=max_epochs, epoch=epoch, timeout=timeout, study=study,
        device=device, dtype=dtype, memory=memory, workers=workers, random_state=random_state,
        verbose=verbose,
    )  # fmt: skip
    return search(choice, read_source(X, y, groups), options)


@torch.inference_mode(False)
def search(choice: ModelChoice, source: Source, options: Options) -> Study:
    """The pipeline: space, rows, folds, data on the device, trials, training, study."""
    deadline = None if options.timeout is None else time.monotonic() + options.timeout
    space = _checked_space(choice, options)
    progress = Progress(options.verbose)
    problem = make_problem(source, options.task, choice)
    scoring = _scoring(options, problem)
    _check_scoring_has_a_name(scoring, options)
    folds = make_folds(
        options.cv, problem.target, n_rows=len(source.X), groups=source.groups, seed=options.random_state
    )
    data, _ = problem.dataset(folds, _data_options(options), choice)
    check_folds(scoring, data)
    wanted = _wanted(space, choice, options)
    with _cluster(options, choice) as cluster:
        context = Context(data, scoring, choice, options, deadline, progress, cluster)
        context.check_module(wanted[0].params)
        _check_method(wanted, context)
        _say_what_was_understood(problem, choice, progress)
        meta = _meta(choice, problem, options, scoring, data, space)
        meta["device"] = str(data.device) if cluster is None else cluster.device
        meta["arguments"] = stored_arguments(options, source, space, folds)
        with open_ledger(options.study, meta) as ledger:
            if not isinstance(options.method, str):
                ledger.decide_alone(method_name(options.method))
            _add_trials(ledger, wanted, space, options)
            _say_remarks(ledger, space, choice, options, progress)
            _run(ledger, space, context)
    path = None if options.study is None else Path(options.study)
    study = Study.from_rows(meta, ledger.rows(), data=(choice, source, options), path=path)
    if all(trial.state == "failed" for trial in study.trials):
        raise SearchFailedError(study.why_none_is_best())
    return study


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
            "this machine; leave workers (--ray) out, or train it with optimizer='adamw'."
        )
    return ray_cluster(options.workers, device=options.device)


def _check_method(wanted: Sequence[Candidate], context: Context) -> None:
    """Refuse what the method cannot do before a study file is made."""
    match context.options.method:
        case Hypergradient() as method:
            check_descent(method, wanted, context)
        case Halving() as method:
            check_halving(method, context)


def _run(ledger: Ledger, space: Space, context: Context) -> None:
    """Train the trials of the ledger as the method has it."""
    match context.options.method:
        case Hypergradient() as method:
            descend(ledger, space, method, context)
        case Halving() as method:
            halve(ledger, method, context)
        case _:
            train_fully(ledger, context)


def _scoring(options: Options, problem: Problem) -> Scoring:
    """Return the scoring of this search: by default that of scikit-learn, for a descent the loss it descends."""
    target = problem.target
    if options.scoring is None and isinstance(options.method, Hypergradient):
        return loss_scoring(target.task, target.classes)
    return make_scoring(options.scoring, target.task, target.classes)


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
    return check_space(space, keys=keys, module=module)


def _defaults(choice: ModelChoice, options: Options) -> Config:
    defaults = {**DEFAULTS, "optimizer": choice.optimizer, "schedule": options.schedule}
    if choice.module_class is not None:  # what its own signature says
        for name, parameter in inspect.signature(choice.module_class).parameters.items():
            if parameter.default is not parameter.empty:
                defaults[f"module__{name}"] = parameter.default
    return defaults


def _wanted(space: Space, choice: ModelChoice, options: Options) -> tuple[Candidate, ...]:
    """Draw the trials of this call: the default one, the included ones, the random ones."""
    return candidates(
        space,
        n_trials=options.n_trials,
        include=options.include,
        include_default=options.include_default,
        random_state=options.random_state,
        defaults=_defaults(choice, options),
    )


def _add_trials(ledger: Ledger, wanted: Sequence[Candidate], space: Space, options: Options) -> None:
    """Add the trials that the ledger lacks: all of a new study, or what this call adds to an old one."""
    if _lacking(ledger, wanted, space, options):
        with ledger.alone():  # another process may have added them meanwhile
            ledger.add(_lacking(ledger, wanted, space, options))


def _lacking(
    ledger: Ledger, wanted: Sequence[Candidate], space: Space, options: Options
) -> Sequence[Candidate]:
    if not ledger.candidates:
        return wanted
    known = [candidate.params for candidate in ledger.candidates]
    given = [c for c in wanted if c.origin != "random" and c.params not in known]
    number = 1 + max(candidate.number for candidate in ledger.candidates)
    added = [replace(c, number=number + i) for i, c in enumerate(given)]
    return [*added, *top_up([*ledger.candidates, *added], space, options.n_trials, options.random_state)]


def _say_remarks(
    ledger: Ledger, space: Space, choice: ModelChoice, options: Options, progress: Progress
) -> None:
    said = remarks(
        ledger.candidates,
        space,
        n_trials=options.n_trials,
        include_default=options.include_default,
        defaults=_defaults(choice, options),
    )
    for sentence in said:
        progress.say(f"note: {sentence}")


def _say_what_was_understood(problem: Problem, choice: ModelChoice, progress: Progress) -> None:
    target, rows = problem.target, len(problem.source.X)
    kind = "numbers (regression)" if target.classes is None else f"{len(target.classes)} classes"
    progress.say(
        f"{choice.name} on {rows} rows, {len(problem.layout.feature_names)} features; target {target.name!r}: {kind}"
    )
    for note in problem.layout.notes:
        progress.say(f"note: {note}")


def _meta(
    choice: ModelChoice, problem: Problem, options: Options, scoring: Scoring, data: Dataset, space: Space
) -> dict[str, Any]:
    """What a study file holds beside its trials: all that resumes the search and refits its best trial."""
    classes = problem.target.classes
    return {
        "model": choice.name,
        "spec": choice.spec,
        "optimizer": choice.optimizer,
        "schedule": options.schedule,
        "space": space_text(space),
        "method": options.method if isinstance(options.method, str) else method_meta(options.method),
        "task": problem.target.task,
        "target": problem.target.name,
        "classes": None if classes is None else classes.tolist(),
        "source": problem.source.origin,
        "fingerprint": fingerprint(problem.source.X, problem.target),
        "features": len(problem.layout.feature_names),
        "notes": list(problem.layout.notes),
        "numbers": options.numbers,
        "class_weight": None if options.class_weight is None else repr(options.class_weight),
        "sample_weight": None
        if options.sample_weight is None
        else digest_of(np.asarray(options.sample_weight)),
        "cv": repr(options.cv) if isinstance(options.cv, int | np.integer) else type(options.cv).__name__,
        "folds": data.n_folds,
        "splits": digest_of(
            *(rows.cpu().numpy() for fold in data.folds for rows in (fold.train, fold.valid))
        ),
        "scoring": scoring.name,
        "epoch": options.epoch,
        "max_epochs": 1 if choice.solved else options.max_epochs,
        "seed": options.random_state,
        "dtype": str(data.dtype).removeprefix("torch."),
        "versions": {
            "gputune": __version__,
            "torch": torch.__version__,
            "sklearn": sklearn.__version__,
            "numpy": np.__version__,
        },
    }
