"""The function ``search``, which searches the hyperparameters of a custom training loop."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from gputune.api.interactive import public
from gputune.api.study import Study
from gputune.executors.worker import LoopObjective
from gputune.tuning.callbacks import Callback
from gputune.tuning.interrupt import script_signals
from gputune.tuning.loops import search_loop
from gputune.tuning.method import Method
from gputune.tuning.options import make_options


@public
def search(
    objective: LoopObjective,
    space: object,
    *,
    direction: Literal["maximize", "minimize"],
    n_trials: int = 64,
    include: Sequence[Mapping[str, object]] = (),
    warm_start: str | Path | Study | Sequence[str | Path | Study] = (),
    method: Method | Literal["random", "halving", "median", "tpe"] = "random",
    max_epochs: int | None = None,
    timeout: float | str | None = None,
    target_score: float | None = None,
    patience_trials: int | None = None,
    study: str | Path | None = None,
    workers: int | Literal["auto"] = "auto",
    random_state: object = 0,
    callbacks: Sequence[Callback] = (),
    verbose: int = 1,
) -> Study:
    """Search the hyperparameters of a custom training loop, one trial at a time per core or GPU.

    Guide: ``docs/own-loop.md``.

    Args:
        objective: ``objective(params, report)`` trains one configuration (a dict) and returns its
            score. ``report`` is a ``gputune.Report``. Call ``report(value)`` after each epoch. The
            call records the learning curve, and raises an exception if the search prunes the trial
            or its time is over. ``report.number`` is the number of the trial. If the objective
            raises another error, the trial is "failed", ``trial.detail["error"]`` holds the error,
            and the search continues.
        space: a dict from any key to its values, or a list of such dicts. The values are a list, a
            scipy.stats distribution, ``gputune.log_int(a, b)``, an Optuna distribution or one fixed
            value.
        direction: "maximize" or "minimize" the value of the objective. In the study greater scores
            are always better, as in scikit-learn. With "minimize" they have the opposite sign.
        n_trials: number of configurations, at least 1, that are sampled at random or proposed by an
            Optuna sampler.
        include: dicts with all keys of the space, each a configuration. They run first, in addition
            to ``n_trials``.
        warm_start: earlier studies or the paths of their files, with the same ``direction``. The
            best five finished trials of each study that lie in the space run in addition to
            ``n_trials``. An Optuna sampler also receives all earlier trials.
        method: the search method.

            - "random" trains every trial to the end.
            - "halving", "median", ``gputune.Halving(...)`` and ``gputune.Median(...)`` can prune a
              trial at a report. The trial is compared with the trials that have lower numbers. It
              waits until these trials have made as many reports, so that any number of workers
              prunes the same trials.
            - "tpe" or ``gputune.OptunaSampler(...)`` lets an Optuna sampler propose the
              configurations in batches.

        max_epochs: number of times that a full training run calls ``report``. Halving and the
            median rule need it.
        timeout: time (above 0) after which no trial starts: seconds, text such as "5m", or "auto",
            as in ``gputune.tune``. Running trials end at their next report. A later call with the
            same ``study`` trains these trials again from the beginning.
        target_score: no trial starts after the objective has returned this value or a better one.
            Trials are compared in order of number. Trials that are running in other workers train
            to their end.
        patience_trials: no trial starts after this number of trials in a row were no better than
            the best trial before them. The order is as for ``target_score``.
        study: path of an SQLite file that keeps the study. The same call resumes a search that is
            in this file.
        workers: number of processes, each of which trains one trial at a time. "auto": one per GPU,
            or one per core if there is no GPU. 1: this process. Each process sees its own GPU as
            "cuda" (by CUDA_VISIBLE_DEVICES), and torch uses its share of the cores.
        random_state: an integer in [0, 2**32), a numpy RandomState or Generator, or None. It seeds
            the configurations. ``random``, ``numpy.random`` and ``torch`` start each trial from
            this seed.
        callbacks: objects of ``gputune.callbacks``. They are called at the start, with finished
            trials and at the end.
        verbose: 0 is silent. 1 prints a progress bar and notes on standard error.

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
        >>> def objective(params, report):
        ...     weight = 1.0
        ...     for _ in range(10):
        ...         weight -= params["lr"] * 2 * weight  # a step down the slope of weight**2
        ...         report(weight**2)
        ...     return weight**2
        >>> options = {"direction": "minimize", "n_trials": 3, "workers": 1, "verbose": 0}
        >>> study = gputune.search(objective, {"lr": [0.01, 0.1, 0.4]}, **options)
        >>> study.best_params
        {'lr': 0.4}
    """
    options = make_options(
        space=space,
        n_trials=n_trials,
        include=include,
        warm_start=warm_start,
        method=method,
        # ``Options`` needs a number. ``search_loop`` receives the original value.
        max_epochs=1 if max_epochs is None else max_epochs,
        timeout=timeout,
        target_score=target_score,
        patience_trials=patience_trials,
        study=study,
        workers=workers,
        random_state=random_state,
        callbacks=callbacks,
        verbose=verbose,
    )
    return search_loop(
        objective,
        options,
        direction=direction,
        max_epochs=max_epochs,
        signals=script_signals(),
        study_type=Study,
    )
