"""The function ``tune``, which searches the hyperparameters of a model on rows."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import cleandoc
from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import Dataset

from gputune.api.interactive import passed_arguments, public
from gputune.api.study import Study
from gputune.data.columns import Columns
from gputune.data.containers import read_dataset
from gputune.data.kinds import Kind
from gputune.data.target import MissingTarget, TaskWord, check_row_options, select_values
from gputune.data.target_transform import TargetTransform
from gputune.data.weights import ClassWeight
from gputune.executors.cluster import Cluster
from gputune.ground.types import (
    BackendWord,
    MethodWord,
    Numbers,
    Precision,
    ScheduleWord,
    defaults_in_words,
)
from gputune.scoring.metrics import Scorings
from gputune.tuning.callbacks import Callback
from gputune.tuning.interrupt import script_signals
from gputune.tuning.method import Method
from gputune.tuning.options import make_options
from gputune.tuning.pipeline import search as search_rows
from gputune.tuning.presets import choose_before_preset, with_preset
from gputune.tuning.progress import reading_bar
from gputune.tuning.record import SearchCall, read_rows


@public
def tune(
    model: object,
    X: object,
    y: object = None,
    *,
    preset: str | None = None,
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
    category_copies: Sequence[str] = (),
    columns: Columns | Literal["auto"] = "auto",
    numbers: Numbers | Literal["auto"] = "auto",
    optimizer: str | type[torch.optim.Optimizer] | None = None,
    schedule: ScheduleWord = "constant",
    max_epochs: int | Literal["auto"] = "auto",
    n_ens: int = 1,
    patience: int | Literal["auto"] | None = "auto",
    epoch: Literal["best", "last"] = "best",
    timeout: float | str | None = None,
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
    workers: int | Literal["auto", "ray"] | Cluster = "auto",
    keep_predictions: bool = True,
    random_state: object = 0,
    callbacks: Sequence[Callback] = (),
    verbose: int = 1,
) -> Study:
    """Tune hyperparameters by training every configuration x fold at once, and return the Study.

    Guides: ``docs/tune-a-table.md``, ``docs/tune-my-module.md``, ``docs/choose-space.md``,
    ``docs/choose-method.md`` and ``docs/stopping.md``.

    Args:
        model: the model to tune.

            - a name: "mlp", "logistic", "realmlp" (RealMLP, for tables), "cnn" (for images and
              sequences) or "gru" (for sequences);
            - a ``torch.nn.Module`` class, or a function or ``functools.partial`` that returns a
              module;
            - "FILE.py:NAME", such a class or function in a Python file;
            - "auto": the model that ``preset`` chooses.

            A class or function is called with the trial's ``module__*`` values, and with
            ``n_features``, ``n_outputs``, ``input_shape`` and ``feature_groups`` if its signature
            has them.
        X: an array, tensor, pandas or polars DataFrame, or the path of a file. A module also takes:

            - arrays and tensors (n, ...) of any shape;
            - integer tensors (n, T) of token ids;
            - a tuple of several inputs, or a dict of keyword inputs;
            - a map-style ``torch.utils.data.Dataset``;
            - a .npz, .pt or .npy file.

        y: the targets, or the name of the target column of a file or DataFrame. If X is a .npy
            file, y is another .npy file.
        preset: a named choice of model, portfolio, trials, folds, epochs, patience, number of
            networks, calibration and ``category_copies`` for a table. It depends on the table and
            on ``timeout``, and not on the speed of the machine. Arguments that you pass win over
            the preset. gputune prints the choices.

            - "best": RealMLP, meant for ``study.ensemble()``.
            - "medium": an MLP, meant for ``study.ensemble()``.
            - "fast": an MLP, within a minute.

            Pass "auto" as the model to let the preset choose it. Presets exist only for "mlp" and
            "realmlp".
        space: the hyperparameters to search. None: the default space of the model.

            - A dict from a hyperparameter to its values: a list, a scipy.stats distribution,
              ``gputune.log_int(a, b)``, an Optuna distribution or one fixed value.
            - A list of such dicts.
            - The name of a space: "mlp", "realmlp", "realmlp-large" or "realmlp-tabarena". "mlp" is
              the default space plus a portfolio of seven good configurations that run first.
              "realmlp" has a portfolio too.

        n_trials: number of configurations. It counts the default configuration and the
            configurations that are sampled at random or proposed by an Optuna sampler.
        include: dicts, each a configuration that runs in addition to ``n_trials``. A missing key
            takes its default, moved into the space in the same way as for ``include_default``.
        include_default: whether trial 0 is the default configuration. A default outside the space
            is replaced by the nearest numeric value of the space, or by the first entry of a list
            of strings.
        warm_start: earlier studies, or the paths of their files. The best five finished trials of
            each study that lie in the space run in addition to ``n_trials``. An Optuna sampler also
            receives all earlier trials that have the same score.
        method: the search method.

            - "random" trains every trial to the end.
            - "halving" or ``gputune.Halving(...)`` trains all trials together. At each rung only
              the trials with the best mean validation scores continue.
            - "median" or ``gputune.Median(...)`` stops trials that are below the median of the mean
              validation scores.
            - "pbt" or ``gputune.PopulationBased(...)`` trains all trials together. Every few epochs
              the worst trials copy the best trials and change their hyperparameters.
            - "hypergradient" or ``gputune.Hypergradient(...)`` takes each sampled configuration as
              a starting point and moves it by gradient descent on the mean validation loss after
              ``max_epochs``. Each point on the way is a trial, scored after its last epoch.
            - "tpe" or ``gputune.OptunaSampler(...)`` lets an Optuna sampler propose the
              configurations in batches. With halving, new configurations take the places of pruned
              trials.

        cv: the folds.

            - A number of folds, at least 2. Rows are shuffled with ``random_state``, and stratified
              for classes.
            - A scikit-learn splitter. It receives X as you passed it.
            - "time:5", for five folds whose validation rows come after the training rows in time.
              If X is a table with one date column, the rows are in the order of its values.
              Otherwise they are in their given order.
            - An iterable of (train, valid) pairs of row positions, masks or slices.
            - One tuple (train, valid), for a fixed validation split.

        groups: one label per row, or the name of a column. A number of folds keeps whole groups
            together. Other folds that split a group are refused.
        scoring: the metric, greater is better.

            - The name of a scikit-learn scorer.
            - ``callable(estimator, X, y)``. X holds rows in the form you passed: a DataFrame stays
              a DataFrame, a tensor becomes an array. ``estimator`` predicts any rows.
            - ``callable(outputs, y)``, on the outputs (m, ...) of a module on validation rows.
            - A list, tuple or dict (name -> scorer) of several metrics. The first one ranks and
              prunes trials, chooses epochs and ends the search. The study keeps all of them for
              every epoch and fold (``Study.curves_of``).
            - None: accuracy or R2. For several labels, accuracy is the share of rows with all
              labels right. For hypergradients, custom targets and soft labels, None is the loss.
              For "mae", "huber" and "quantile" see ``loss``.

        positive: the positive class of f1, precision, recall, jaccard, average_precision and
            likelihood ratios. You can omit it for the classes {0, 1}, {-1, 1} and {False, True}:
            the larger one is positive.
        task: the kind of target, "classification" or "regression". None: gputune guesses.

            - Text, booleans and at most 20 distinct whole numbers that repeat are classes. Other
              targets are numbers.
            - More than 20 distinct whole numbers are also classes if the loss only classifies, or
              if a module has as many outputs as there are distinct numbers.
            - A module also takes "regression" on several numbers per row (n, K), "multilabel" on
              (n, K) of 0 and 1, and "custom" on numbers (n, ...) for a custom loss.

        missing_target: "error" refuses rows whose target is missing, "drop" leaves them out.
        target_transform: "log" (of numbers above 0), "log1p" (of numbers above -1), or a
            scikit-learn transformer with an inverse, as in ``TransformedTargetRegressor``. It is
            fitted on the training rows of each fold, and inverted in scores and predictions. A
            custom loss receives the transformed y.
        loss: training loss.

            - For numbers "mse", "mae", "huber" or "quantile", on the standardized target.
              "quantile:0.9" sets the level (0.5 by default), "huber:2" the delta (1 by default, in
              standard deviations of the target). scikit-learn's names "squared_error" and
              "absolute_error" work too. Without ``scoring``, "mae" and "huber" rank trials by
              neg_mean_absolute_error, and "quantile" by neg_mean_pinball_loss at its level.
            - For a module also "cross_entropy", "bce" (for labels, and for two classes with one
              logit per row), a loss of torch.nn, or ``callable(outputs, y)`` that receives y as you
              passed it and returns the losses of the rows or their mean.
            - Numeric arguments of the loss can be searched: ``loss__label_smoothing``,
              ``loss__delta``, ``loss__q``.

        training_step: ``callable(module, (x, y))`` in place of ``loss``, for a loss that needs the
            module. It returns the losses of the rows or their mean.
        augment: ``callable(x, generator)``, applied to training minibatches. It returns inputs of
            the same shape.
        class_weight: weights of the classes in the training loss, as in scikit-learn. Scores are
            unweighted.
        sample_weight: weights of the rows in the training loss, as in scikit-learn. Scores are
            unweighted.
        drop: columns of a table to leave out, such as an id.
        kinds: the kind of a column ("category", "number" or "date") that replaces gputune's guess,
            for example {"zip": "category"}.
        max_levels: number of levels of a category (the most frequent ones) that get a feature each,
            at least 1. The other levels share one feature.
        category_copies: columns of numbers that are also categories, in addition to their number.
            Use it for numbers that are like names, such as codes. Values with at least 10 rows (or
            1% of the rows, if that is less) get a feature each, up to 128 values (``max_levels`` if
            that is more). The other values share one feature. A preset finds such columns.
        columns: "keep" makes each numeric or boolean column one feature, whatever it holds.
            "drop-constant" leaves out constant columns and adds features that mark missing values.
            "auto" is "keep" for your own class, otherwise "drop-constant".
        numbers: scaling of numeric columns, fitted on the training rows of each fold.

            - "standard": mean 0 and variance 1. Other rows are clipped at 20, or at the farthest
              training row if that is farther.
            - "robust", "quantile" or "none".
            - "piecewise": 16 bins between quantiles, one feature per bin (arXiv:2203.05556).
            - "piecewise-tree": bins between the thresholds of a decision tree on the target.
            - "auto": "standard" for tables, "robust" for RealMLP, and "none" for a pretrained
              base, which expects the scaling of its own training. Images, sequences and other
              inputs of a module are not scaled. For them "standard" gives each channel mean 0 and
              variance 1.

        optimizer: name of an optimizer. None is "adamw", and "exact" for "logistic", which is
            solved to convergence.

            - "sgd", "nesterov", "adam", "adamw", "rmsprop", "lion".
            - "muon": Muon for hidden matrices, AdamW for the rest.
            - "schedulefree": AdamW, scored and saved as its average.
            - "sgdhd", "nesterovhd", "adamhd", "adamwhd": they adapt the learning rate during
              training (``gputune.optim``).
            - For a module also a class of torch.optim or its name, such as "RAdam". Its members
              train one by one. Its arguments can be searched: ``optimizer__betas``,
              ``optimizer__eps``.

        schedule: factor on the learning rate, which changes at every optimizer step and spans
            ``max_epochs``. It can be searched too.

            - "constant": always 1.
            - "cosine": half a cosine from 1 to 0.
            - "linear": a straight line from 1 to 0.
            - "warmup+cosine": a straight line up to 1 in the first tenth of the steps, then half a
              cosine to 0.
            - "one_cycle": up from 1/25 to 1 at three tenths of the steps, then down to 1/250000,
              like ``torch.optim.lr_scheduler.OneCycleLR``.
            - "coslog4": four waves from 0 to 1 and back, each twice as long as the one before
              (arXiv:2407.04491).
            - "flat_cos": 1 in the first half of the steps, then half a cosine to 0.

        max_epochs: number of epochs that a trial trains at most, at least 1. Schedules always span
            this number. "auto": 50. For a built-in model and n > 50,000 rows, "auto" means
            50 x 50,000 / n, and at least 10.
        n_ens: number of networks (at least 1) that each trial trains per fold, for the models "mlp"
            and "realmlp". They have different initial weights and orders of the rows, and their
            predictions are averaged: probabilities of classes, or numbers. Each score is the score
            of this average. The tuned model contains all networks.
        patience: number of epochs (at least 1) without a better mean validation score after which a
            trial ends. Its members then leave their population. The trial is scored at its best
            epoch. None: all trials train for ``max_epochs``. "auto": None up to 50,000 rows, for
            your own module, and with a learning rate schedule. Otherwise a quarter of
            ``max_epochs``, and at least 3.
        epoch: "best" takes the mean validation score at the best epoch, "last" the one after the
            last epoch.
        timeout: time (above 0) after which training stops at the end of the running epoch: a number
            of seconds, text such as "60s", "5m" or "1h30m", or "auto" for the time until the SLURM
            job ends. Trials that were cut short are scored at the epochs they have. A later call
            with the same ``study`` trains them further. None: no limit.
        target_score: the search ends when a trial reaches this score. Greater is better: use -0.3 for a
            neg_log_loss of -0.3. Trials are compared in order of number, after all trials with
            lower numbers have ended.
        patience_trials: the search ends when this number of trials in a row (at least 1) are no
            better than the best trial before them.
        study: path of an SQLite file that keeps the study. The same call resumes a search that is
            in this file.
        checkpoint_seconds: seconds (above 0) between two checkpoints of trials in training, in a
            folder next to the study. The interval is longer if writing is slow: at least 20 times
            the time of one checkpoint. A killed search repeats at most this time and one epoch.
        device: "auto", "cpu", "cuda" or "cuda:1". "auto" takes a GPU if there is one and X is a
            tensor on it, a module trains, or the training is long. Otherwise it takes the CPU,
            whose compiled code trains a small MLP before a GPU has started.
        backend: how members train. "auto" chooses. All backends give the same results up to
            rounding. A member is one trial on one fold.

            - "kernel": each member of an MLP or linear model trains whole epochs in a thread block
              of a GPU.
            - "compiled": the same in compiled code on a CPU.
            - "recorded": one step of all members is recorded once and replayed. Earlier versions
              called it "graph", which still works.
            - "eager": one step at a time, as operations on stacked tensors.
            - "merged": your module runs once on the rows of all members, if they cannot be stacked.
            - "loop": the members of your module train one by one.
            - "stacked": the members of your module are stacked, in recorded or eager steps. It is an
              error if they cannot be stacked.

        dtype: "float32" or "float64".
        tf32: whether a GPU may round the factors of matrix products to TF32 (10 bits of mantissa)
            in training. This is faster, and changes scores by more than rounding. ``tf32=True`` is
            refused on a CPU.
        precision: "full", or "bf16" for a module: matrix products and convolutions in bfloat16 by
            ``torch.autocast``, while parameters, updates and scores stay in single precision.
        memory: memory of the device that trials training together may take, in bytes or as text
            such as "8GB". None: gputune decides.
        workers: number of processes on a CPU. "auto" uses several cores if the work repays the
            start of the processes. "ray" or ``gputune.Ray(address, cpus)`` trains in tasks of a Ray
            cluster, each with one GPU or some CPUs.
        keep_predictions: whether the study keeps the predictions of each finished trial, at its
            best epoch, on the validation rows of its folds. ``ensemble``, ``oof_predictions``,
            intervals and calibration then train no fold again. The limit is 128 MiB; the
            predictions of the worst trials are left out beyond it. Predictions are not kept for
            hypergradient searches, custom targets or ``epoch="last"``.
        random_state: an integer in [0, 2**32), a numpy RandomState or Generator, or None. It seeds
            configurations, folds, row orders, initial weights, dropout and other random numbers of
            a module.
        callbacks: objects of ``gputune.callbacks``. They are called at the start, after epochs,
            with finished trials and at the end.
        verbose: 0 is silent. 1 prints a progress bar, the plan and notes on standard error.

    Returns:
        The study with all trials.

    Raises:
        InputError: the input is bad. It is a ValueError.
        SearchFailedError: no trial has a finite score.
        SearchInterrupted: Ctrl-C, SIGTERM or SIGUSR1 ended the search. It is a KeyboardInterrupt,
            and its ``study`` holds the results so far. If a script does not catch it, the exit
            code after SIGTERM is 143 and after SIGUSR1 138 (128 + number of the signal). In a
            notebook or at a prompt, Ctrl-C returns that study instead.

    Example:
        >>> import gputune
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> space = {"lr": [0.0001, 0.01], "width": 32}
        >>> study = gputune.tune("mlp", X, y, space=space, n_trials=2, max_epochs=10, verbose=0)
        >>> study.best_params["lr"]
        0.01
        >>> model = study.best_model()
        >>> model.predict(X[:3])
        array([0, 0, 0])
    """
    options = make_options(
        space=space,
        n_trials=n_trials,
        include=include,
        include_default=include_default,
        warm_start=warm_start,
        method=method,
        cv=cv,
        scoring=scoring,
        positive=positive,
        task=task,
        missing_target=missing_target,
        target_transform=target_transform,
        loss=loss,
        training_step=training_step,
        augment=augment,
        class_weight=class_weight,
        sample_weight=sample_weight,
        drop=drop,
        kinds=kinds,
        max_levels=max_levels,
        category_copies=category_copies,
        columns=columns,
        numbers=numbers,
        schedule=schedule,
        max_epochs=max_epochs,
        n_ens=n_ens,
        patience=patience,
        epoch=epoch,
        timeout=timeout,
        target_score=target_score,
        patience_trials=patience_trials,
        study=study,
        checkpoint_seconds=checkpoint_seconds,
        device=device,
        backend=backend,
        dtype=dtype,
        tf32=tf32,
        precision=precision,
        memory=memory,
        workers=workers,
        keep_predictions=keep_predictions,
        random_state=random_state,
        callbacks=callbacks,
        verbose=verbose,
    )
    choice = choose_before_preset(preset, model, optimizer)
    # Read the Dataset here, behind a progress bar. ``read_source`` would read it silently.
    if choice.takes_arrays and isinstance(X, Dataset):
        X, y = read_dataset(X, y, partial(reading_bar, verbose=options.machine.verbose))
    source = read_rows(choice, options.rows, X, y, groups)
    if source.positions is not None:
        check_row_options(source.n_given, options.rows.cv, options.training.sample_weight)
        options = options.changed(
            sample_weight=select_values(options.training.sample_weight, source.positions)
        )
    call = SearchCall(choice, source, options, given=passed_arguments())
    if preset is not None:
        call = with_preset(call, preset, model, optimizer)
    return search_rows(call, script_signals(), study_type=Study)


tune.__doc__ = f"{cleandoc(tune.__doc__ or '')}\n\n{defaults_in_words()}"
