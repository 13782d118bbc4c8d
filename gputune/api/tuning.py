"""tune() and search(): the searches of a model on rows, and of those who have a training loop of
their own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial, wraps
from inspect import cleandoc, signature
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, cast

import torch
from torch.utils.data import Dataset

from gputune.api.study import Study
from gputune.callbacks import Callback
from gputune.data.columns import Columns
from gputune.data.kinds import Kind
from gputune.data.missing_target import MissingTarget, check_row_options, select_weights
from gputune.data.source import read_source
from gputune.data.target import TaskWord
from gputune.data.target_transform import TargetTransform
from gputune.data.torch_dataset import read_dataset
from gputune.data.weights import ClassWeight
from gputune.errors import SearchInterrupted
from gputune.executors.ray_cluster import Ray
from gputune.executors.worker import Objective
from gputune.methods.config import key_of
from gputune.scoring.metrics import Scorings
from gputune.text import did_you_mean
from gputune.tuning.choices import Method, choose_model
from gputune.tuning.interrupt import is_interactive
from gputune.tuning.loops import search_loop
from gputune.tuning.options import RULES, Options
from gputune.tuning.pipeline import search as search_rows
from gputune.tuning.progress import Progress, reading_bar
from gputune.tuning.record import RecordedSearch
from gputune.types import (
    BackendWord,
    MethodWord,
    Numbers,
    Precision,
    ScheduleWord,
    defaults_in_words,
)

Given = ParamSpec("Given")
Value = TypeVar("Value")

_OTHER_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("epochs", "n_epochs", "num_epochs", "max_iter"), "max_epochs"),
    **dict.fromkeys(("trials", "n_iter", "num_trials"), "n_trials"),
    **dict.fromkeys(("param_distributions", "param_grid", "search_space"), "space"),
    **dict.fromkeys(("metric", "score", "scorer"), "scoring"),
    "folds": "cv",
    "seed": "random_state",
    "criterion": "loss",
    "n_jobs": "workers",
    "scheduler": "schedule",
}
"""What other libraries call our arguments: too far for a spell checker."""


def public(function: Callable[Given, Value]) -> Callable[Given, Value]:
    """Let the TypeError of an argument that a function has not name the one that was meant, as
    Python 3.13 does.

    Where a person types the calls, a search that is interrupted returns its study so far.
    """
    known = signature(function).parameters

    @wraps(function)
    def called(*args: Given.args, **more: Given.kwargs) -> Value:
        for name in more:
            if name not in known:
                key = key_of(name) if "space" in known else None
                meant = f' Hyperparameters belong in the space: space={{"{key}": [...]}}.'
                hint = meant if key else did_you_mean(name, known, others=_OTHER_WORDS)
                raise TypeError(
                    f"{function.__name__}() got an unexpected keyword argument {name!r}.{hint}"
                )
        try:
            return function(*args, **more)
        except SearchInterrupted as stopped:
            if not is_interactive():
                raise
            Progress(cast(int, more.get("verbose", 1))).say(str(stopped))
            so_far: Value = stopped.study
            return so_far

    return called


@public
def tune(
    model: object,
    X: object,
    y: object = None,
    *,
    space: object = None,
    n_trials: int = 64,
    include: Sequence[Mapping[str, object]] = (),
    include_default: bool = True,
    warm_start: str | Path | Study | Sequence[str | Path | Study] = (),
    method: Method | MethodWord = "random",
    cv: object = 5,
    groups: object = None,
    scoring: Scorings | None = None,
    positive: object = None,
    task: TaskWord | None = None,
    missing_target: MissingTarget = "error",
    target_transform: TargetTransform | None = None,
    loss: str | Callable[..., object] | None = None,
    training_step: Callable[..., object] | None = None,
    augment: Callable[..., object] | None = None,
    class_weight: ClassWeight = None,
    sample_weight: object = None,
    drop: Sequence[str] = (),
    kinds: Mapping[str, Kind] | None = None,
    max_levels: int = 32,
    columns: Columns | Literal["auto"] = "auto",
    numbers: Numbers | Literal["auto"] = "auto",
    optimizer: str | type[torch.optim.Optimizer] | None = None,
    schedule: ScheduleWord = "constant",
    max_epochs: int = 50,
    patience: int | None = None,
    epoch: Literal["best", "last"] = "best",
    timeout: float | None = None,
    target_score: float | None = None,
    patience_trials: int | None = None,
    study: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    device: str = "auto",
    backend: BackendWord = "auto",
    dtype: Literal["float32", "float64"] = "float32",
    tf32: bool = False,
    precision: Precision = "full",
    memory: int | str | None = None,
    workers: int | Literal["auto", "ray"] | Ray = "auto",
    keep_predictions: bool = True,
    random_state: object = 0,
    callbacks: Sequence[Callback] = (),
    verbose: int = 1,
) -> Study:
    """Search hyperparameters by training every configuration x fold as one tensor program; return
    the Study.

    model        "mlp", "logistic", "realmlp" (RealMLP, for tables), "cnn" for images, "gru" for
                 sequences, a ``torch.nn.Module`` class, a function or a partial that makes one,
                 called with the trial's ``module__*`` values and what it has of ``n_features``,
                 ``n_outputs``, ``input_shape`` and ``feature_groups``; or "FILE.py:NAME"
    X, y         arrays, tensors, pandas or polars frames; or a file and the name of its target
                 column. For a module also arrays and tensors (n, ...) of any shape, integer tensors
                 (n, T) of token ids, a tuple of several or a dict of keyword inputs, a map-style
                 Dataset of torch's, a .npz or .pt file, or .npy files of X and of y
    space        a dict, or a list of dicts, of hyperparameter -> list, scipy.stats distribution,
                 ``gputune.log_int(a, b)``, a distribution of Optuna's or one fixed value; or a
                 space by its name, "mlp" (the default one, behind a portfolio: seven good
                 configurations that are tried first), "realmlp" or "realmlp-tabarena"; None: a
                 default for the model
    n_trials     configurations in all: with ``include_default`` the default one, held to the space
                 wherever that names a key, and the others drawn, or asked of Optuna's sampler;
                 ``include`` (dicts; a missing key takes the default, held to the space too) comes
                 on top
    warm_start   earlier studies, or their files: the best five finished trials of each that lie in
                 the space are included, on top of ``n_trials``, and Optuna's sampler hears of all
                 that have the same score
    method       "random": every trial is trained to the end; "halving" or ``gputune.Halving(...)``:
                 all train together, and at each rung those with the best fold means go on; "median"
                 or ``gputune.Median(...)``: those below the median of the fold means leave;
                 "hypergradient" or ``gputune.Hypergradient(...)``: each drawn configuration is a
                 start that descends on the fold mean of its validation loss after ``max_epochs``;
                 each point of it is a trial, scored after the last epoch;
                 ``gputune.OptunaSampler(...)``: a sampler of Optuna's proposes the configurations,
                 batch by batch
    cv           number of shuffled, stratified folds, a scikit-learn splitter, which sees X as you
                 gave it, or (train, valid) index arrays
    groups       one label a row, or the name of a column: folds that split a group are refused
    scoring      a scikit-learn scorer name or ``callable(estimator, X, y)``, where X are rows as
                 you gave them (a frame stays one, a tensor is an array) and ``estimator`` predicts
                 whatever rows it is given; or ``callable(outputs, y)`` of a module's outputs (m,
                 ...) on validation rows; None: accuracy (of labels the share of rows of which all
                 are right) or R2, for hypergradients, custom targets and soft labels the loss; for
                 "mae", "huber" and "quantile" see ``loss``. A list, tuple or dict (name -> scorer)
                 of several: the first ranks the trials, prunes, chooses epochs and ends the search,
                 all are kept for every epoch and fold (``Study.curves_of``)
    positive     the class that f1, precision, recall, jaccard, average_precision or a likelihood
                 ratio is of; may be left out for classes {0, 1}, {-1, 1} and {False, True}, of
                 which the larger one is positive
    task         overrides what the target looks like: text, booleans and at most 20 distinct whole
                 numbers that repeat are classes, everything else is a number. More than 20 distinct
                 whole numbers are classes too if the loss only classifies, or if a module has as
                 many outputs as there are distinct numbers. For a module also several numbers a row
                 ("regression" of (n, K)), "multilabel" (n, K) of 0 and 1, and "custom": numbers (n,
                 ...) for a loss of your own
    missing_target  "drop" leaves out the rows whose target is missing; "error" refuses them
    target_transform  "log" (of numbers above 0), "log1p" (above -1) or a transformer of
                      scikit-learn's that has an
                 inverse, as in its TransformedTargetRegressor: fitted on each fold's training rows,
                 and inverted in scores and predictions; a loss of your own sees y transformed
    loss         "mse", "mae", "huber" or "quantile" of numbers, on the standardized target.
                 "quantile:0.9" gives the level (0.5 by default), "huber:2" the delta (1, in
                 standard deviations of the target). scikit-learn's names "squared_error" and
                 "absolute_error" mean the same. "mae" and "huber" rank trials by
                 neg_mean_absolute_error if you give no scoring, "quantile" by neg_mean_pinball_loss
                 of its level. Of a module also "cross_entropy", "bce" (of labels, and of two
                 classes with one logit a row); a loss of torch.nn or ``callable(outputs, y)``, of y
                 as you gave it, that returns row losses or their mean. Numbers that it takes can be
                 searched: ``loss__label_smoothing``, ``loss__delta``, ``loss__q``
    training_step  ``callable(module, (x, y))`` in its place, for what needs the module; returns row
                   losses or a mean
    augment      ``callable(x, generator)`` on minibatches of training: returns inputs of the same
                 shape
    class_weight, sample_weight  weights of the rows in the training loss, as in scikit-learn;
                                 scores are unweighted
    drop         columns of a table to leave out, such as an id
    kinds        what columns are read as, in the place of what they look like: {"zip": "category"};
                 or "number", "date"
    max_levels   levels of a category, the most frequent ones, that have a feature each; the others
                 share one
    columns      "keep": each column of numbers or booleans is one feature, whatever it holds;
                 "drop-constant": constant ones are left out, and features say where values are
                 missing; "auto": "keep" for a class of your own, else "drop-constant"
    numbers      how numeric columns are scaled, fitted on each fold's training rows: "standard"
                 (mean 0, variance 1; other rows are clipped at 20 or the farthest of these),
                 "robust", "quantile", "none", or cut into 16 bins between quantiles ("piecewise"),
                 or between the thresholds of a decision tree on the target ("piecewise-tree"), a
                 feature each (arXiv:2203.05556); images, sequences and other inputs of a module are
                 taken as they are ("auto"), or "standard": each channel with mean 0, variance 1
    optimizer    "sgd", "nesterov", "adam", "adamw", "rmsprop", "lion", "muon" (hidden matrices, the
                 rest by adamw), "schedulefree" (AdamW, scored and saved as its average), or one
                 that adapts its rate as it trains (``gputune.optim``): "sgdhd", "nesterovhd",
                 "adamhd", "adamwhd"; "logistic" is solved to convergence ("exact") by default. Of a
                 module also a class of torch.optim or its name, "RAdam": its members train one by
                 one, and its arguments can be searched: ``optimizer__betas``, ``optimizer__eps``
    schedule     of the learning rate over ``max_epochs``, per step: "constant", "cosine", "linear",
                 "warmup+cosine" or "one_cycle"
    patience     epochs without a better fold mean after which a trial ends, and its members leave
                 their chunk; it is scored at its best epoch. None: all train for ``max_epochs``,
                 over which schedules run in any case
    epoch        "best" scores the fold mean at its best epoch, "last" after the last one
    timeout      seconds after which training stops at the end of the running epoch; what it cut
                 short is scored on what it had, and trained on by a later call with the same
                 ``study``
    target_score, patience_trials  the search ends when a trial has that score (greater is better,
                                   so -0.3 of a
                 neg_log_loss), or so many in a row are no better than the best before them. Trials
                 are looked at in order of number, when all trials with lower numbers have ended
    study        path of an SQLite file to keep the study in; the same call goes on where the file
                 ends
    checkpoint_seconds  a chunk that trains longer than this keeps its state in a folder beside the
                        study, again and
                 again (or at 20 times what writing takes), so that a killed search repeats that and
                 an epoch at most
    device       "auto" takes the GPU where there is one and X is a tensor on it, or a module
                 trains, or the training is long; else the CPU, whose compiled code has a small MLP
                 trained before a GPU has begun
    dtype        "float32" or "float64"
    backend      "compiled" trains each member of an MLP or a linear model through whole epochs in
                 compiled code, on a CPU; "kernel" does so in a thread block of a GPU; "graph"
                 records a step of all members once and replays it; "eager" takes it as operations
                 on stacked tensors. Members of a user's module are "stacked", which is an error
                 where they cannot be, or train one by one ("loop"). "auto" chooses; numbers are the
                 same to rounding
    tf32         whether a GPU may round the factors of its matrix products to TF32 (10 bits of
                 mantissa) while it trains, which is faster and moves scores by more than rounding;
                 on a CPU it is refused
    precision    of what a module computes while it trains: "full", or "bf16": matrix products and
                 convolutions in bfloat16 by torch.autocast, with parameters, updates and scores in
                 single precision
    memory       bytes, or text such as "8GB", that a chunk of trials may take on the device
    workers      processes on a CPU; "auto" uses the cores where the work repays their start; "ray"
                 or ``gputune.Ray(address, cpus)``: tasks of a Ray cluster, each with one GPU or
                 some CPUs
    keep_predictions  whether the study keeps what each finished trial predicts, at its best epoch,
                      of the rows that
                 its folds validate on (at most 128 MiB; beyond that the worst trials go without):
                 ``ensemble``,
                 ``oof_predictions``, intervals and calibration then train no fold again. Not of
                 descents, nor of a custom target, nor with ``epoch="last"``
    random_state seed of candidates, folds, row order, starts, dropout and other draws of a module
    callbacks    ``gputune.callbacks``: called at the start, after epochs, with finished trials, and
                 at the end
    verbose      0 silent, 1 a bar, the plan and remarks on standard error

    Raises InputError (a ValueError) for bad input, SearchFailedError where every trial failed,
    SearchInterrupted (a KeyboardInterrupt with the ``study`` so far) on Ctrl-C; in a notebook or at
    a prompt Ctrl-C returns that study.
    """
    return _search(locals())


def _search(arguments: Mapping[str, Any]) -> Study:
    options = Options(**{name: arguments[name] for name in RULES})
    choice = choose_model(arguments["model"], arguments["optimizer"])
    X = arguments["X"]
    y = arguments["y"]
    groups = arguments["groups"]
    # behind a bar; read_source reads one too, in silence
    if choice.takes_arrays and isinstance(X, Dataset):
        X, y = read_dataset(X, y, partial(reading_bar, verbose=options.verbose))
    read = partial(read_source, module=choice.takes_arrays, drop=options.drop, kinds=options.kinds)
    source = read(X, y, groups, missing_target=options.missing_target)
    if source.kept is not None:
        check_row_options(source.n_given, options.cv, options.sample_weight)
        options = replace(options, sample_weight=select_weights(options.sample_weight, source.kept))
    return search_rows(RecordedSearch(choice, source, options), study_type=Study)


tune.__doc__ = f"{cleandoc(tune.__doc__ or '')}\n\n{defaults_in_words()}"


@public
def search(
    objective: Objective,
    space: object,
    *,
    direction: Literal["maximize", "minimize"],
    n_trials: int = 64,
    include: Sequence[Mapping[str, object]] = (),
    warm_start: str | Path | Study | Sequence[str | Path | Study] = (),
    method: Method | Literal["halving", "median"] = "random",
    max_epochs: int | None = None,
    timeout: float | None = None,
    target_score: float | None = None,
    patience_trials: int | None = None,
    study: str | Path | None = None,
    workers: int | Literal["auto"] = "auto",
    random_state: object = 0,
    callbacks: Sequence[Callback] = (),
    verbose: int = 1,
) -> Study:
    """Search hyperparameters of a training loop of your own, a trial at a time on each core or GPU;
    return the Study.

    objective    ``objective(params, report)`` trains one configuration, a dict, and returns its
                 score. ``report(value)`` after each epoch keeps the learning curve, and raises
                 where the search prunes the trial or its time is over; ``report.number`` is the
                 trial's. Another error makes the trial "failed", with ``trial.detail["error"]``,
                 and the search goes on
    space        as in ``tune``, with any keys and values
    direction    whether the objective is to be large ("maximize") or small. As in scikit-learn
                 greater scores of a study are better: those of "minimize" have the other sign
    n_trials     configurations that are drawn, or asked of Optuna's sampler; ``include`` (dicts
                 with all keys of the space) comes on top, and first
    method       "random"; "halving", "median", ``gputune.Halving(...)``, ``gputune.Median(...)``: a
                 trial is pruned at a report, compared with the trials that have lower numbers. It
                 waits until these have come as far, so that any number of workers prunes the same
                 trials; ``gputune.OptunaSampler(...)``, by its batch
    max_epochs   how often a whole training calls ``report``; halving and the median rule need it
    timeout      seconds after which no trial begins, and those that train end at their next report;
                 a later call with the same ``study`` trains these anew
    target_score, patience_trials  no trial begins any more when the objective has returned that or
                                   better, or so many
                 trials in a row were no better than the best before them. Trials are looked at in
                 order of number; those that train meanwhile in other workers train to their end
    study        path of an SQLite file to keep the study in; the same call goes on where the file
                 ends
    workers      processes that train, a trial each; "auto": one for each GPU, else for each core;
                 1: this process. Each has a GPU of its own as "cuda" (by CUDA_VISIBLE_DEVICES) and
                 its part of the cores for torch
    random_state seed of the draws. ``random``, ``numpy.random`` and ``torch`` begin each trial at
    this seed
    ``warm_start``, ``callbacks``, ``verbose`` and what is raised are as in ``tune``.
    """
    arguments = locals() | {"max_epochs": 1 if max_epochs is None else max_epochs}
    options = Options(**{name: arguments[name] for name in RULES.keys() & arguments.keys()})
    if options.target_score is not None and direction == "minimize":
        options = replace(options, target_score=-options.target_score)
    return search_loop(
        objective, options, direction=direction, max_epochs=max_epochs, study_type=Study
    )
